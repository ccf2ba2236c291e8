"""The layout of a study::

    study/
      study.json     the settings that made it: the same ones go on with it, others are refused
      scan/          the recording (`llmbrain.load_scans`)
      networks/      networks, their maps and time courses; ica/ in it
      plan.json      what was cut
      pruned/        the smaller model
      lesions/       what each network's lesion does, where that was measured
      summary.json   the main figures, and what is needed to repeat them
      report.html

A scan store or a folder of networks by itself is a study of that one thing.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmbrain._files import plain, read_json, write_json
from llmbrain._validation import InputError
from llmbrain.checkpoints import load_model
from llmbrain.decomposition import GroupICA, read_ica
from llmbrain.intervention.table import LesionTable
from llmbrain.networks import FunctionalNetworks
from llmbrain.page.report import Report
from llmbrain.pruning import PruningPlan
from llmbrain.reporting import build_report, report
from llmbrain.scanning import Scan, load_scans

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

MARKS = {
    "scans": ("scan", "manifest.json"),
    "ica": ("networks", "ica/ica.json"),
    "networks": ("networks", "networks.json"),
    "plan": ("plan", "plan.json"),
    "pruned": ("pruned", "config.json"),
    "lesions": ("lesions", "lesion_table.tsv"),
    "summary": ("summary", "summary.json"),
}
"""Where each part of a study is: the folder of its name, or the study itself, where this file is."""


class Study:
    """What lies in a folder that `run` (or another step) wrote; each part is read when it is first asked for.

    Parameters
    ----------
    folder : path

    Raises
    ------
    InputError
        If there is no such folder; when a part is asked for that is not there.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise InputError(f"study {folder} does not exist")

    def __repr__(self) -> str:
        return f"Study({str(self.folder)!r})"

    def place(self, part: str) -> Path:
        """Folder that holds a part (a key of `MARKS`).

        Raises
        ------
        InputError
            If the study has no such part.
        """
        name, mark = MARKS[part]
        for folder in (self.folder / name, self.folder):
            if (folder / mark).is_file():
                return folder
        said = {"scans": "scan", "pruned": "pruned model", "lesions": "lesion table"}.get(part, part)
        raise InputError(f"study {self.folder} holds no {said} (no {mark} in it or in its {name}/)")

    def has(self, part: str) -> bool:
        """Whether the study has a part, read already or not."""
        name, mark = MARKS[part]
        return part in vars(self) or any((f / mark).is_file() for f in (self.folder / name, self.folder))

    @cached_property
    def scans(self) -> list[Scan]:
        """What was recorded, one a text."""
        return load_scans(self.place("scans"))

    @cached_property
    def ica(self) -> GroupICA:
        """The decomposition that the networks come from."""
        return read_ica(self.place("ica") / "ica")

    @cached_property
    def networks(self) -> FunctionalNetworks:
        """The functional networks."""
        return FunctionalNetworks.load(self.place("networks"))

    @cached_property
    def plan(self) -> PruningPlan:
        """What was cut."""
        return PruningPlan.load(self.place("plan") / "plan.json")

    @cached_property
    def pruned(self) -> tuple[nn.Module, PreTrainedTokenizerBase]:
        """The smaller model, in evaluation mode, and its tokenizer."""
        return load_model(self.place("pruned"))

    @property
    def model(self) -> nn.Module:
        """The smaller model."""
        return self.pruned[0]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer."""
        return self.pruned[1]

    @cached_property
    def lesions(self) -> LesionTable:
        """What the lesion of each network does."""
        return LesionTable.load(self.place("lesions"))

    @cached_property
    def summary(self) -> dict[str, Any]:
        """What ``summary.json`` holds: the dense and the pruned model side by side, held-out text, provenance."""
        return read_json(self.place("summary") / "summary.json", anew="run the job again")

    @property
    def report(self) -> Report:
        """The report of all that is there: it shows in a notebook, and ``.save(path)`` writes one HTML file."""
        return report(self)


@report.register
def _(obj: Study, *, title: str | None = None, **contents: Any) -> Report:
    own: dict[str, Any] = {
        part: getattr(obj, part) for part in ("scans", "ica", "networks", "plan", "lesions") if obj.has(part)
    }
    if obj.has("summary"):
        own |= {name: obj.summary[name] for name in ("dense", "pruned", "provenance")}
        title = title or f"llmbrain: {own['provenance']['model']}"
    return build_report(title=title or f"llmbrain: {obj.folder.name}", **{**own, **contents})


def claim(folder: str | Path, settings: dict[str, Any], *, overwrite: bool = False) -> None:
    """Take a folder for a study, or go on with the same one.

    Raises
    ------
    InputError
        If the folder holds a study with other settings, or files that are no study.
    """
    folder = Path(folder)
    mark = folder / "study.json"
    settings = json.loads(json.dumps(settings, default=plain))
    if mark.is_file() and not overwrite:
        before = read_json(mark)
        other = [k for k in settings.keys() | before.keys() if settings.get(k) != before.get(k)]
        if other:
            changed = ", ".join(f"{k}: {before.get(k)!r} there, {settings.get(k)!r} now" for k in sorted(other))
            raise InputError(
                f"out={str(folder)!r} already holds another study ({changed}): choose another, or --overwrite"
            )
    elif folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise InputError(
            f"out={str(folder)!r} already holds files that are no study of llmbrain: choose another folder"
        )
    write_json(mark, settings)


def provenance(model_id: str, texts: Sequence[str], **settings: Any) -> dict[str, Any]:
    """What is needed to repeat a result: inputs, settings, versions."""
    import platform
    from importlib.metadata import version

    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    packages = ("llmbrain", "torch", "transformers", "nilearn", "nibabel", "scikit-learn", "numpy")
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "model": model_id,
        "texts": {"n": len(texts), "sha256": digest},
        "settings": settings,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }

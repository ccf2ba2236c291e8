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
import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmbrain._validation import InputError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from llmbrain.decomposition import GroupICA
    from llmbrain.intervention.table import LesionTable
    from llmbrain.networks import FunctionalNetworks
    from llmbrain.page.report import Report
    from llmbrain.pruning import PruningPlan
    from llmbrain.scanning import Scan


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

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise InputError(f"study {folder} does not exist")

    def __repr__(self) -> str:
        return f"Study({str(self.folder)!r})"

    def find(self, what: str, mark: str) -> Path:
        """The folder in the study that holds `mark`: the study itself, or the part of the name `what` in it.

        Raises
        ------
        InputError
            If neither does.
        """
        for place in (self.folder / what, self.folder):
            if (place / mark).is_file():
                return place
        name = {"pruned": "pruned model", "lesions": "lesion table"}.get(what, what)
        raise InputError(f"study {self.folder} holds no {name} (no {mark} in it or in its {what}/)")

    def has(self, what: str, mark: str) -> bool:
        """Whether `find` finds it."""
        return any((place / mark).is_file() for place in (self.folder / what, self.folder))

    @cached_property
    def scans(self) -> list[Scan]:
        """What was recorded, one a text."""
        from llmbrain.scanning import load_scans

        return load_scans(self.find("scan", "manifest.json"))

    @cached_property
    def ica(self) -> GroupICA:
        """The decomposition that the networks come from."""
        from llmbrain.decomposition import read_ica

        return read_ica(self.find("networks", "ica/ica.json") / "ica")

    @cached_property
    def networks(self) -> FunctionalNetworks:
        """The functional networks."""
        from llmbrain.networks import FunctionalNetworks

        return FunctionalNetworks.load(self.find("networks", "networks.json"))

    @cached_property
    def plan(self) -> PruningPlan:
        """What was cut."""
        from llmbrain.pruning import PruningPlan

        return PruningPlan.load(self.find("plan", "plan.json") / "plan.json")

    @property
    def model(self) -> nn.Module:
        """The smaller model, in evaluation mode."""
        return self.pruned[0]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer."""
        return self.pruned[1]

    @cached_property
    def pruned(self) -> tuple[nn.Module, PreTrainedTokenizerBase]:
        """The smaller model and its tokenizer."""
        from llmbrain.checkpoints import load_model

        return load_model(self.find("pruned", "config.json"))

    @cached_property
    def lesions(self) -> LesionTable:
        """What the lesion of each network does."""
        from llmbrain.intervention.table import LesionTable

        return LesionTable.load(self.find("lesions", "lesion_table.tsv"))

    @cached_property
    def summary(self) -> dict[str, Any]:
        """What ``summary.json`` holds: the dense and the pruned model side by side, held-out text, provenance."""
        path = self.find("summary", "summary.json") / "summary.json"
        return json.loads(path.read_text(encoding="utf-8"))

    @property
    def report(self) -> Report:
        """The report of all that is there; shows in a notebook, ``.save(path)`` writes one HTML file."""
        from llmbrain.reporting import build_report

        marks = {"scans": ("scan", "manifest.json"), "ica": ("networks", "ica/ica.json"),
                 "networks": ("networks", "networks.json"), "plan": ("plan", "plan.json"),
                 "lesions": ("lesions", "lesion_table.tsv")}  # fmt: skip
        there: dict[str, Any] = {name: getattr(self, name) for name, mark in marks.items() if self.has(*mark)}
        summary = self.summary if self.has("summary", "summary.json") else {}
        record = summary.get("provenance")
        there |= {"dense": summary.get("dense"), "pruned": summary.get("pruned"), "provenance": record}
        return build_report(title=f"llmbrain: {record['model'] if record else self.folder.name}", **there)


def claim(folder: str | Path, settings: dict[str, Any], *, overwrite: bool = False) -> None:
    """Take a folder for a study, or go on with the same one.

    Raises
    ------
    InputError
        If the folder holds a study with other settings, or files that are no study.
    """
    folder = Path(folder)
    mark = folder / "study.json"
    settings = json.loads(json.dumps(settings, default=_plain))
    if mark.is_file() and not overwrite:
        before = json.loads(mark.read_text(encoding="utf-8"))
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


def write_json(path: Path, record: Any) -> None:
    """Write JSON whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(record, indent=2, default=_plain) + "\n", encoding="utf-8")
    temporary.replace(path)


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} does not go into JSON")

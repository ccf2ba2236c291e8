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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmbrain._files import (
    COMMIT,
    LOCK,
    SUMS,
    clear_errors,
    discard,
    owner,
    plain,
    read_json,
    read_listed,
    refuse_other,
    remove_folder,
    transaction,
    verify_listed,
    write_json,
)
from llmbrain._validation import InputError
from llmbrain._version import __version__
from llmbrain.checkpoints import load_model
from llmbrain.decomposition import GroupICA, read_ica
from llmbrain.intervention.table import LesionTable
from llmbrain.networks import FunctionalNetworks
from llmbrain.page.report import Report
from llmbrain.page.text import short_name
from llmbrain.pruning import PruningPlan
from llmbrain.pruning.experts import ExpertPlan, read_plan
from llmbrain.reporting import build_report, report
from llmbrain.scanning import Scan, load_scans
from llmbrain.scanning.store import origin_of, read_manifest
from llmbrain.study.again import GGUF as PRUNED_GGUF

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

    @classmethod
    def of(cls, study: Study | str | os.PathLike[str]) -> Study:
        """A study, or that of a folder."""
        return study if isinstance(study, Study) else cls(study)

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
        if part == "pruned" and (self.folder / PRUNED_GGUF).is_file():
            return True
        return part in vars(self) or any((f / mark).is_file() for f in (self.folder / name, self.folder))

    @cached_property
    def scans(self) -> list[Scan]:
        """What was recorded, one a text."""
        return load_scans(self.place("scans"))

    @cached_property
    def ica(self) -> GroupICA:
        """The decomposition that the networks come from."""
        folder = self.place("ica")
        found = read_ica(folder / "ica")
        self._check_origin(found.origin_, f"components in {folder}")
        return found

    @cached_property
    def networks(self) -> FunctionalNetworks:
        """The functional networks.

        Raises
        ------
        InputError
            If they were found in another scan than this study's.
        """
        folder = self.place("networks")
        found = FunctionalNetworks.load(folder)
        self._check_origin(found.provenance.get("origin"), f"networks in {folder}")
        if found.time_courses and self.has("scans"):
            there = [len(run) for run in found.time_courses]
            here = [run.n_tokens for run in self.scans[: len(there)]]
            if there != here:
                raise InputError(
                    f"networks in {folder} are of another study: time courses of {_few(there)} tokens, the scan has "
                    f"{_few(here)}. Find them again: llmbrain decompose {self.folder} --overwrite"
                )
        return found

    def _check_origin(self, origin: Any, what: str) -> None:
        """Whether what knows the scan that it was found in was found in this one."""
        there = origin if isinstance(origin, dict) else {}
        if not there.get("scan") or not self.has("scans"):
            return
        here = self.scans[0].origin if "scans" in vars(self) else origin_of(read_manifest(self.place("scans")))
        if here and here["scan"] != there["scan"]:
            raise InputError(
                f"{what} are of another study: found in a scan of {there.get('model')} ({there['scan'][:8]}), the scan "
                f"here is one of {here['model']} ({here['scan'][:8]}). Find them again: llmbrain decompose "
                f"{self.folder} --overwrite"
            )

    @cached_property
    def plan(self) -> PruningPlan | ExpertPlan:
        """What was cut."""
        path = self.place("plan") / "plan.json"
        verify_listed(path, anew="make the plan again (llmbrain plan)")  # or it is another study's
        return read_plan(path)

    @cached_property
    def pruned(self) -> tuple[nn.Module, PreTrainedTokenizerBase]:
        """The smaller model, in evaluation mode, and its tokenizer."""
        whole = self.folder / PRUNED_GGUF
        return load_model(whole if whole.is_file() else self.place("pruned"))

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
        return read_listed(self.place("summary") / "summary.json", anew="run the job again")

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
        own |= {name: obj.summary[name] for name in ("dense", "pruned", "provenance")} | {"summary": obj.summary}
        title = title or f"llmbrain: {short_name(str(own['provenance']['model']))}"
    return build_report(title=title or f"llmbrain: {obj.folder.name}", **{**own, **contents})


@contextmanager
def claim(folder: str | Path, settings: dict[str, Any], *, overwrite: bool = False) -> Iterator[None]:
    """Own a folder while a study is written into it: a new one, or the same one that goes on.

    With `overwrite`, what other settings had made there is removed before the new ones are noted: what is found later
    was made by the settings that stand in ``study.json``, whenever a run was stopped.

    Raises
    ------
    BusyError
        If another process writes into the folder now.
    InputError
        If the folder holds a study with other settings, or files that are no study; overwriting or not, if it holds a
        scan, a model or the like, which would be taken for a part of the study.
    """
    folder = Path(folder)
    mark = folder / "study.json"
    settings = json.loads(json.dumps(settings, default=plain))
    with owner(folder):
        with clear_errors(folder):  # looked at as its owner: another process may have just ended
            strange = any(not _is_passing(p.name) for p in folder.iterdir())
        if mark.is_file():
            try:
                before = read_json(mark, anew="give another folder, or --overwrite")
            except InputError:
                if not overwrite:
                    raise
                before = {}
            other = [k for k in settings.keys() | before.keys() if settings.get(k) != before.get(k)]
            if other and not overwrite:
                changed = ", ".join(f"{k}: {before.get(k)!r} there, {settings.get(k)!r} now" for k in sorted(other))
                raise InputError(
                    f"out={str(folder)!r} already holds another study ({changed}): choose another, or --overwrite"
                )
            if other:
                refuse_other(folder, "a study", *OWN)
                _remove_parts(folder)
        elif strange and not overwrite:
            raise InputError(
                f"out={str(folder)!r} already holds files that are no study of llmbrain: choose another folder"
            )
        elif strange:
            refuse_other(folder, "a study", *OWN)
            _remove_parts(folder)
        with transaction(folder) as new:  # what is written beside it later joins its checksums
            write_json(new / mark.name, settings, seal=True)
        yield


def _is_passing(name: str) -> bool:
    """Whether a file is a lock, or what a killed process left: the next writer removes or finishes it."""
    return name in (LOCK, COMMIT) or name.startswith(".tmp-")


PARTS = {"scan": "manifest.json", "networks": "networks.json", "ica": "ica.json", "pruned": "config.json",
         "lesions": "lesions.json", "dualreg": "dual_regression.json"}  # fmt: skip
MADE = (
    *("networks.safetensors", "networks.json", "desc-ICA_stat-z_components.nii.gz", "mixing.tsv", "key_neurons.tsv"),
    *("summary.json", "plan.json", "report.html", "comparison.json", "table-*.tsv", "figure-*.png", "melodic_*"),
    *("config.toml", "log.txt", PRUNED_GGUF),
)
"""What a study holds beside its settings: folders, with a file that shows that they are ours, and files."""
OWN = ("networks", "an ICA", "a comparison")  # what goes with them


def _few(values: list[int]) -> str:
    return ", ".join(map(str, values[:4])) + (", ..." if len(values) > 4 else "")


def _remove_parts(folder: Path) -> None:
    """Remove what a study made, before another one takes its place; nothing that is not ours."""
    for name, part_mark in PARTS.items():
        part = folder / name
        if part.is_dir() and any((part / m).exists() for m in (part_mark, "study.json", SUMS)):
            remove_folder(part)
    discard(folder, MADE)


def provenance(model_id: str, texts: Sequence[str], **settings: Any) -> dict[str, Any]:
    """What is needed to repeat a result: inputs, settings, versions."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    def version_of(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "not installed"

    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    packages = ("torch", "transformers", "nilearn", "nibabel", "scikit-learn", "numpy")
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "model": model_id,
        "texts": {"n": len(texts), "sha256": digest},
        "settings": settings,
        "versions": {
            "llmbrain": __version__,
            "python": platform.python_version(),
            **{name: version_of(name) for name in packages},
        },
    }

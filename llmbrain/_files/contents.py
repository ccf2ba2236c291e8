"""What a folder holds: one thing. A second one in it would be taken for a part of the first."""

from __future__ import annotations

import os
from pathlib import Path

from llmbrain._files.owner import owner
from llmbrain._validation import InputError

MARKS = {
    "study.json": "a study",
    "manifest.json": "a scan",
    "networks.json": "networks",
    "ica.json": "an ICA",
    "dual_regression.json": "a dual regression",
    "lesions.json": "lesions",
    "lesion_table.tsv": "lesions",
    "comparison.json": "a comparison",
    "model.onnx": "an ONNX graph",
    "model.safetensors": "a model",
    "model.safetensors.index.json": "a model",
    "config.json": "a model",
}
"""A file by which a folder is known, and what the folder then is; the config of its model lies beside a graph."""
NEXT = {"a scan": "scan", "a dual regression": "dualreg", "an ONNX graph": "onnx", "a model": "pruned"}


def other_content(folder: str | os.PathLike[str], *own: str) -> str:
    """The file that shows that a folder holds something else than `own`; empty where none does.

    Parameters
    ----------
    folder : path
    *own : str
        Values of `MARKS` that may be there.
    """
    for name, kind in MARKS.items():
        if kind in own or not (Path(folder) / name).is_file():
            continue
        if name == "config.json" and "an ONNX graph" in own:
            continue
        if name == "manifest.json" and b'"llmbrain-scan"' not in _head(Path(folder) / name):
            continue  # a name that others give too
        return name
    return ""


def refuse_other(folder: str | os.PathLike[str], what: str, *also: str) -> None:
    """Refuse to put something into a folder that holds something else, which it would be taken for a part of.

    Parameters
    ----------
    folder : path
    what : str
        A value of `MARKS`: what is to be put there; of the same kind the caller has its own word.
    *also : str
        Other values that it may stand beside.

    Raises
    ------
    InputError
        If the folder is another's, overwriting or not.
    """
    if found := other_content(folder, what, *also):
        raise InputError(
            f"out={str(folder)!r} holds {MARKS[found]} already ({found}), and a folder holds one thing: give another "
            f"one, such as {Path(folder) / NEXT.get(what, what)}"
        )


def still_free(folder: str | os.PathLike[str], what: str, *also: str, mark: str = "") -> None:
    """`refuse_other` once more, when a set is about to be put in place: others may have been faster.

    Parameters
    ----------
    mark : str
        A file that must not have come meanwhile: what is there would be mixed with what is put there.

    Raises
    ------
    BusyError
        If another process writes into the folder now.
    InputError
        If it holds something else meanwhile.
    """
    with owner(folder):
        refuse_other(folder, what, *also)
        if mark and (Path(folder) / mark).exists():
            raise InputError(f"{folder} holds {what} already: another process was faster. Give another folder")


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(1 << 16)
    except OSError:
        return b""

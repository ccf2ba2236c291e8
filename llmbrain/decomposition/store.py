"""A fit on disk: arrays as safetensors, the rest as JSON beside it. Knows no estimator."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmbrain._validation import InputError
from llmbrain._version import __version__

FORMAT = "llmbrain-ica"
Arrays = dict[str, NDArray[Any]]
Record = dict[str, Any]


def fit_files(path: str | Path) -> tuple[Path, Path]:
    """The array file and the text file of a fit in this folder, or of this name."""
    path = Path(path)
    array_file = path if path.suffix == ".safetensors" else path / "ica.safetensors"
    return array_file, array_file.with_suffix(".json")


def write_fit(path: str | Path, arrays: Mapping[str, NDArray[Any]], record: Record, *, overwrite: bool) -> Path:
    """Write arrays and a record of JSON values; each file is whole or absent. Returns the array file."""
    from safetensors.numpy import save_file

    array_file, text_file = fit_files(path)
    for file in (array_file, text_file):
        if file.exists() and not overwrite:
            raise FileExistsError(f"{file} exists: choose another place or pass overwrite=True")
    if text_file.exists() and _read_text(text_file).get("format") != FORMAT:
        raise FileExistsError(f"{text_file} is not an ICA of llmbrain: it is not overwritten")
    array_file.parent.mkdir(parents=True, exist_ok=True)
    head = {"format": FORMAT, "format_version": 1, "llmbrain": __version__}
    text = json.dumps(head | record, indent=1, default=_plain)
    # a killed process leaves no half-written fit under the final name
    temporary = array_file.with_name(array_file.name + ".partial")
    save_file({name: np.ascontiguousarray(a) for name, a in arrays.items()}, temporary, metadata={"format": FORMAT})
    os.replace(temporary, array_file)
    temporary = text_file.with_name(text_file.name + ".partial")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, text_file)
    return array_file


def read_fit(path: str | Path) -> tuple[Arrays, Record]:
    """Read what `write_fit` wrote.

    Raises
    ------
    FileNotFoundError
        When there is no fit at this place.
    InputError
        When the files are damaged or another program's.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    array_file, text_file = fit_files(path)
    for file in (array_file, text_file):
        if not file.is_file():
            raise FileNotFoundError(f"{file} not found: is {path} a saved ICA?")
    record = _read_text(text_file)
    if record.get("format") != FORMAT or record.get("format_version") != 1:
        raise InputError(
            f"{text_file} is not an ICA that this version of llmbrain reads: format {record.get('format')!r}"
        )
    try:
        return load_file(array_file), record
    except SafetensorError as error:
        raise InputError(f"{array_file} is damaged: {error}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, (np.integer, np.floating, np.bool_)):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _read_text(path: Path) -> Record:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    return record if isinstance(record, dict) else {}

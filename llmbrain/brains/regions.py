"""Regions of a brain: which ones are asked for, where they lie, and maps of some of them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from llmbrain._validation import InputError
from llmbrain.brains.plain import read_plain

if TYPE_CHECKING:
    from nibabel.nifti1 import Nifti1Image

    from llmbrain.plotting.what import Masker

Wanted: TypeAlias = "Sequence[str | int] | Mapping[str, Sequence[str | int]] | str | Path"
SHOWN = 8


@dataclass(frozen=True)
class PartMasker:
    """Values of some of the regions that a masker knows, or of all in another order, back into the brain.

    Attributes
    ----------
    whole : masker
    columns : int array ``(n_columns,)``
        Which of its regions each column is.
    n : int
        How many regions it knows.
    """

    whole: Masker
    columns: NDArray[np.int64]
    n: int

    def inverse_transform(self, values: NDArray[np.float32]) -> Nifti1Image:
        """An image of values ``(..., n_columns)``; 0 in the other regions."""
        given = np.asarray(values)
        full = np.zeros((*given.shape[:-1], self.n), dtype=given.dtype)
        full[..., self.columns] = given
        return self.whole.inverse_transform(full)


def read_rois(wanted: Wanted) -> list[str | int]:
    """Names or numbers of regions: a sequence, a mapping of sets to them (all are taken), or a file.

    Parameters
    ----------
    wanted : sequence, mapping or path
        A file is JSON (a list, or an object of lists), or text with a region a line (or commas). ``FILE.json:SET`` is
        one of the lists of an object.
    """
    if isinstance(wanted, (str, Path)):
        wanted = str(wanted)
        path, chosen = Path(wanted), ""
        if not path.is_file() and ":" in wanted:
            place, _, chosen = wanted.rpartition(":")
            path = Path(place)
        if not path.is_file():
            if path.suffix in (".json", ".txt", ".csv", ".tsv"):
                raise FileNotFoundError(f"rois: no file at {path}")
            return _clean(wanted.split(","))
        text = read_plain(path, "rois")
        if path.suffix.lower() != ".json":
            if chosen:
                raise InputError(f"rois={wanted!r}: only an object of JSON has sets to choose from")
            return _clean(re.split(r"[\n,\t]", text))
        try:
            wanted = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"rois: {path.name} is no JSON: {error}") from None
        if chosen:
            if not isinstance(wanted, dict) or chosen not in wanted:
                sets = ", ".join(wanted) if isinstance(wanted, dict) else "none"
                raise InputError(f"rois: {path.name} has no set {chosen!r}: allowed are {sets}")
            wanted = wanted[chosen]
    try:
        flat = _flat(wanted)
    except RecursionError:
        raise InputError("rois is nested too deeply") from None
    if not flat:
        raise InputError("rois is empty: name at least one region")
    return flat


def _clean(pieces: Sequence[str]) -> list[str | int]:
    found: list[str | int] = [piece.strip().strip("\"'") for piece in pieces if piece.strip()]
    if not found:
        raise InputError("rois is empty: name at least one region")
    return found


def _flat(wanted: object) -> list[str | int]:
    if isinstance(wanted, Mapping):
        return [item for part in wanted.values() for item in _flat(part)]
    if isinstance(wanted, (list, tuple, np.ndarray)):
        return [item for part in wanted for item in _flat(part)]
    if isinstance(wanted, (bool, np.bool_)) or not isinstance(wanted, (str, int, np.integer)):
        raise InputError(f"rois: {wanted!r} is neither the name nor the number of a region")
    return [wanted if isinstance(wanted, str) else int(wanted)]


def columns_of(wanted: Wanted, names: Sequence[str], *, numbered: bool) -> NDArray[np.int64]:
    """Columns of the regions that are wanted, rising.

    Parameters
    ----------
    wanted : see `read_rois`
    names : sequence of str
        Of the columns.
    numbered : bool
        Names were given by their place alone: numbers count columns from 0 then. Else a number is a name (the value of
        an atlas).

    Raises
    ------
    InputError
        If one is not there.
    """
    place = {name: i for i, name in enumerate(names)}
    found: set[int] = set()
    for item in read_rois(wanted):
        key = str(item)
        if key in place:
            found.add(place[key])
        elif numbered and key.isdigit() and int(key) < len(names):
            found.add(int(key))
        else:
            known = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
            how = " or their places from 0" if numbered else ""
            raise InputError(f"rois: {item!r} is none of the {len(names)} regions: allowed are {known}{how}")
    return np.array(sorted(found), dtype=np.int64)

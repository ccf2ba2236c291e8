"""A fit on disk: arrays as safetensors, the rest as JSON beside it. Knows no single estimator."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from sklearn.utils.validation import check_is_fitted

from llmbrain._files import reading, transaction, write_json, write_tensors
from llmbrain._validation import InputError
from llmbrain._version import __version__

FORMAT = "llmbrain-ica"
ANEW = "fit and save the ICA again"
Arrays = dict[str, NDArray[Any]]
Record = dict[str, Any]


def fit_files(path: str | Path) -> tuple[Path, Path]:
    """The array file and the text file of a fit in this folder, or of this name."""
    path = Path(path)
    array_file = path if path.suffix == ".safetensors" else path / "ica.safetensors"
    return array_file, array_file.with_suffix(".json")


def write_fit(path: str | Path, arrays: Mapping[str, NDArray[Any]], record: Record, *, overwrite: bool) -> Path:
    """Write arrays and a record of JSON values, both or neither. Returns the array file."""
    array_file, text_file = fit_files(path)
    for file in (array_file, text_file):
        if file.exists() and not overwrite:
            raise FileExistsError(f"{file} exists: choose another place or pass overwrite=True")
    if text_file.exists() and FORMAT not in text_file.read_text(encoding="utf-8", errors="replace"):
        raise FileExistsError(f"{text_file} is not an ICA of llmbrain: it is not overwritten")
    head = {"format": FORMAT, "format_version": 1, "llmbrain": __version__}
    with transaction(array_file.parent, needed=sum(array.nbytes for array in arrays.values())) as new:
        write_tensors(new / array_file.name, arrays, {"format": FORMAT})
        write_json(new / text_file.name, head | record)
    return array_file


class Saved:
    """A decomposition of runs, with ``get_params``, ``components_`` and ``mixing_``, whose fit can be saved."""

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the fit as safetensors with a JSON beside it; read it back with `read_ica`.

        Parameters
        ----------
        path : folder, or file ending in ``.safetensors``
        overwrite : bool
            Whether a fit that is already there may be replaced.

        Returns
        -------
        Path of the safetensors file.
        """
        check_is_fitted(self, "components_")
        arrays, record = self._as_plain()
        arrays |= {f"mixing_{index:05d}": part for index, part in enumerate(self.mixing_)}  # type: ignore[attr-defined]
        parameters = record["parameters"]
        if not isinstance(parameters["random_state"], (int, type(None))):
            parameters["random_state"] = None  # a generator has no lasting name
        return write_fit(path, arrays, record, overwrite=overwrite)

    def _as_plain(self) -> tuple[Arrays, Record]:
        """The fit without its time courses, as arrays and a record of JSON values."""
        raise NotImplementedError


def read_fit(path: str | Path) -> tuple[Arrays, Record]:
    """Read what `write_fit` wrote.

    Raises
    ------
    FileNotFoundError
        When there is no fit at this place.
    InputError
        When the files are damaged or another program's.
    """
    array_file, text_file = fit_files(path)
    if not array_file.parent.is_dir():
        raise FileNotFoundError(f"{array_file} not found: is {path} a saved ICA?")
    with reading(array_file.parent, anew=ANEW, required=True) as files:
        for file in (array_file, text_file):
            if file.name not in files and not file.is_file():
                raise FileNotFoundError(f"{file} not found: is {path} a saved ICA?")
        record = files.json(text_file.name)
        if record.get("format") != FORMAT or record.get("format_version") != 1:
            raise InputError(
                f"{text_file} is not an ICA that this version of llmbrain reads: format {record.get('format')!r}, "
                f"version {record.get('format_version')!r}"
            )
        return files.tensors(array_file.name), record

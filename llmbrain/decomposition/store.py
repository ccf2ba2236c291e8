"""A fitted `GroupICA` on disk: arrays as safetensors, the rest as JSON beside it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmbrain import __version__
from llmbrain._validation import InputError

if TYPE_CHECKING:
    from llmbrain.decomposition.group_ica import GroupICA

_FORMAT = "llmbrain-ica"
_SCALARS = ("n_components_", "n_iter_", "converged_", "joint_explained_variance_ratio_", "start_scores_",
            "order_estimates_", "preprocessing_report_")  # fmt: skip
_ARRAYS = ("components_", "explained_variance_ratio_", "constant_neurons_", "component_layers_")


def _files(path: Path) -> tuple[Path, Path]:
    array_file = path if path.suffix == ".safetensors" else path / "ica.safetensors"
    return array_file, array_file.with_suffix(".json")


def save_ica(ica: GroupICA, path: Path, *, overwrite: bool) -> Path:
    """Write a fit; see `GroupICA.save`."""
    from safetensors.numpy import save_file

    array_file, text_file = _files(path)
    for file in (array_file, text_file):
        if file.exists() and not overwrite:
            raise FileExistsError(f"{file} exists: choose another place or pass overwrite=True")
    if text_file.exists() and _read_text(text_file).get("format") != _FORMAT:
        raise FileExistsError(f"{text_file} is not an ICA of llmbrain: it is not overwritten")
    array_file.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.ascontiguousarray(getattr(ica, name)) for name in _ARRAYS if getattr(ica, name) is not None}
    arrays |= {f"mixing_{index:05d}": np.ascontiguousarray(part) for index, part in enumerate(ica.mixing_)}
    parameters = ica.get_params()
    if not isinstance(parameters["random_state"], (int, type(None))):
        parameters["random_state"] = None  # a generator has no lasting name
    mask = parameters.pop("mask")
    if ica.brain_mask_ is not None:
        arrays["mask_volume"] = ica.brain_mask_.volume
        arrays["mask_affine"] = np.asarray(ica.brain_mask_.image.affine, dtype=np.float64)
    elif mask is not None:
        arrays["mask"] = np.asarray(mask)
    record = {
        "format": _FORMAT,
        "format_version": 1,
        "llmbrain": __version__,
        "parameters": parameters,
        "space": None if ica.space_ is None else ica.space_.to_dict(),
        "windows": [[columns.start, columns.stop, count] for columns, count in zip(ica._columns, ica._counts)],
        **{name: getattr(ica, name) for name in _SCALARS},
    }
    text = json.dumps(record, indent=1, default=_plain)
    # whole or absent: a killed process leaves no half-written fit under the final name
    temporary = array_file.with_name(array_file.name + ".partial")
    save_file(arrays, temporary, metadata={"format": _FORMAT})
    os.replace(temporary, array_file)
    temporary = text_file.with_name(text_file.name + ".partial")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, text_file)
    return array_file


def _plain(value: Any) -> Any:
    if isinstance(value, (np.integer, np.floating, np.bool_)):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _read_text(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    return record if isinstance(record, dict) else {}


def read_ica(path: str | Path) -> GroupICA:
    """Read a fit that `GroupICA.save` wrote.

    Parameters
    ----------
    path : folder, or file ending in ``.safetensors``

    Returns
    -------
    GroupICA
        Fitted: `transform` and all attributes work. ``device`` is "auto" again.

    Raises
    ------
    FileNotFoundError
        When there is no fit at this place.
    InputError
        When the files are damaged or another program's.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    from llmbrain.anatomy.space import NeuronSpace
    from llmbrain.decomposition.group_ica import GroupICA
    from llmbrain.scanning.inputs import BrainMask

    array_file, text_file = _files(Path(path))
    for file in (array_file, text_file):
        if not file.is_file():
            raise FileNotFoundError(f"{file} not found: is {path} a saved ICA?")
    record = _read_text(text_file)
    if record.get("format") != _FORMAT or record.get("format_version") != 1:
        raise InputError(
            f"{text_file} is not an ICA that this version of llmbrain reads: format {record.get('format')!r}"
        )
    try:
        arrays = load_file(array_file)
    except SafetensorError as error:
        raise InputError(f"{array_file} is damaged: {error}") from error
    ica = GroupICA(**record["parameters"] | {"device": "auto"})
    for name in _SCALARS:
        setattr(ica, name, record[name])
    for name in _ARRAYS:
        setattr(ica, name, arrays.get(name))
    ica.mixing_ = [arrays[name] for name in sorted(arrays) if name.startswith("mixing_")]
    ica.space_ = None if record["space"] is None else NeuronSpace.from_dict(record["space"])
    ica._columns = [slice(start, stop) for start, stop, _ in record["windows"]]
    ica._counts = [count for _, _, count in record["windows"]]
    ica.brain_mask_ = None
    if "mask_volume" in arrays:
        ica.brain_mask_ = BrainMask.from_arrays(arrays["mask_volume"], arrays["mask_affine"])
        ica.mask = ica.brain_mask_.image
    elif "mask" in arrays:
        ica.mask = arrays["mask"]
    return ica

"""Networks on disk, as plain arrays and a record: one exact file, and the same in the forms people open.

``networks.safetensors``                 maps, cut-offs and time courses, to the bit
``networks.json``                        names, space, provenance
``desc-ICA_stat-z_components.nii.gz``    the z maps, one volume a network (with a space or a brain mask;
                                         ``.dscalar.nii`` or ``.func.gii`` for grayordinates)
``mixing.tsv``                           time courses: columns run, token, one a network
``key_neurons.tsv``                      network, layer, neuron, z
``mask.nii.gz``, ``coordinates.tsv``     of a brain: which voxels; where those of each network lie, in millimeters

They are one set: all of it is written or none, and what a former set held beside is gone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmbrain._files import DamagedError, reading, transaction, write_image, write_json, write_table, write_tensors
from llmbrain._validation import InputError
from llmbrain.anatomy.space import NeuronSpace
from llmbrain.imaging.brain_mask import BrainMask
from llmbrain.imaging.nifti import maps_to_nifti
from llmbrain.imaging.surface import Grayordinates, read_surface

if TYPE_CHECKING:
    import pandas as pd

TENSORS, RECORD = "networks.safetensors", "networks.json"
MAPS, MIXING, NEURONS = "desc-ICA_stat-z_components.nii.gz", "mixing.tsv", "key_neurons.tsv"
MASK, COORDINATES = "mask.nii.gz", "coordinates.tsv"
CIFTI, GIFTI = "desc-ICA_stat-z_components.dscalar.nii", "desc-ICA_stat-z_components.func.gii"
ANEW = "save the networks again"

Arrays = dict[str, NDArray[np.float32]]
Record = dict[str, Any]


def write_networks(
    folder: str | Path,
    arrays: Mapping[str, NDArray[np.float32]],
    record: Mapping[str, Any],
    key_neurons: pd.DataFrame,
    *,
    brain: BrainMask | Grayordinates | None = None,
    coordinates: pd.DataFrame | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the files named at the top of this module.

    Parameters
    ----------
    folder : path
    arrays : dict
        ``maps (n_networks, n_neurons)``, ``cutoffs (n_networks, 2)``, and ``time_course_0 (n_tokens, n_networks)``, ...
    record : dict
        ``names``, ``poles``, ``space`` (`NeuronSpace.to_dict` or None), ``n_runs``, ``provenance``; JSON values.
    key_neurons : DataFrame
        Of all networks.
    brain : BrainMask or Grayordinates, optional
        Where the columns of the maps lie.
    coordinates : DataFrame, optional
        Of the voxels of all networks.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    FileExistsError
        If the folder already holds networks and `overwrite` is False.
    """
    import pandas as pd

    folder = Path(folder)
    if not overwrite and (folder / RECORD).exists():
        raise FileExistsError(f"{folder} already holds networks: choose another folder, or pass overwrite=True")
    arrays, record = dict(arrays), dict(record)
    if isinstance(brain, BrainMask):
        affine = np.asarray(brain.image.affine, dtype=np.float64)
        arrays |= {"mask_volume": brain.volume, "mask_affine": affine}  # type: ignore[dict-item]
        record["mask_header"] = brain.header_facts()
    replaces = [TENSORS, RECORD, MAPS, MIXING, NEURONS, MASK, COORDINATES, CIFTI, GIFTI]
    with transaction(folder, replaces=replaces) as new:
        write_tensors(new / TENSORS, arrays)
        write_table(new / NEURONS, key_neurons)
        if record["n_runs"]:
            frames = [
                pd.DataFrame(arrays[f"time_course_{i}"], columns=record["names"]) for i in range(record["n_runs"])
            ]
            mixing = pd.concat(frames, keys=range(len(frames)), names=["run", "token"])
            write_table(new / MIXING, mixing, index=True)
        if record["space"] is not None:
            write_image(new / MAPS, maps_to_nifti(arrays["maps"], NeuronSpace.from_dict(record["space"])))
        if isinstance(brain, BrainMask):
            write_image(new / MAPS, brain.image_of(arrays["maps"]))
            write_image(new / MASK, brain.image)
        elif brain is not None:
            record["grayordinates"] = CIFTI if brain.axis is not None else GIFTI
            write_image(new / record["grayordinates"], brain.image_of(arrays["maps"]))
        if coordinates is not None:
            write_table(new / COORDINATES, coordinates)
        write_json(new / RECORD, record, indent=2)
    return folder


def read_networks(folder: str | Path) -> tuple[Arrays, Record, BrainMask | Grayordinates | None]:
    """Read what `write_networks` wrote: arrays, record, and where the columns of maps of a brain lie.

    Raises
    ------
    FileNotFoundError
        If the folder holds no networks.
    InputError
        If its files are damaged or do not belong together.
    """
    folder = Path(folder)
    with reading(folder, anew=ANEW, required=True) as files:
        for name in (RECORD, TENSORS):
            if name not in files and not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} holds no networks: {name} is missing")
        record, arrays = files.json(RECORD), files.tensors(TENSORS)
        surface = record.get("grayordinates")
        image = files.path(surface) if surface in (CIFTI, GIFTI) else None
    try:
        brain: BrainMask | Grayordinates | None = None
        volume, affine = arrays.pop("mask_volume", None), arrays.pop("mask_affine", None)
        if volume is not None and affine is not None:
            brain = BrainMask.from_arrays(volume > 0, affine, record.get("mask_header"))
        elif image is not None:
            brain = read_surface(image, image.name)[1]
        _check(arrays, record)
    except (InputError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedError(f"{folder} is damaged ({type(error).__name__}: {error}): {ANEW}") from error
    return arrays, record, brain


def _check(arrays: Arrays, record: Record) -> None:
    """Whether the two belong together; before anything is made of their numbers."""
    n_networks, n_neurons = arrays["maps"].shape
    names, poles, n_runs = record["names"], record["poles"], record["n_runs"]
    if len(names) != n_networks or len(poles) != n_networks or arrays["cutoffs"].shape != (n_networks, 2):
        raise InputError(f"{n_networks} maps, but {len(names)} names and {len(poles)} poles")
    if not all(isinstance(texts, list) and all(isinstance(t, str) for t in texts) for texts in (names, poles)):
        raise InputError("names and poles must be lists of texts")
    if record["space"] is not None:
        widths = record["space"]["widths"]
        if not all(type(width) is int and width >= 0 for width in widths) or sum(widths) != n_neurons:
            raise InputError(f"space of widths {str(widths)[:60]} is not that of maps over {n_neurons} neurons")
    if type(n_runs) is not int or n_runs != sum(name.startswith("time_course_") for name in arrays):
        raise InputError(f"n_runs={n_runs!r} is not the number of time courses")
    if not isinstance(record.get("provenance", {}), dict):
        raise InputError("provenance must be a mapping")
    for i in range(n_runs):
        arrays[f"time_course_{i}"]

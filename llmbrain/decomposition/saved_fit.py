"""A `GroupICA`, or another decomposition, made again from what its `save` wrote."""

from __future__ import annotations

from pathlib import Path

from llmbrain._files import clear_damage
from llmbrain.anatomy.space import NeuronSpace
from llmbrain.decomposition.group_ica import SAVED_ARRAYS, SAVED_VALUES, GroupICA
from llmbrain.decomposition.store import ANEW, Arrays, Record, fit_files, read_fit
from llmbrain.decomposition.ulcmod import ULCMOD
from llmbrain.imaging.brain_mask import BrainMask


def read_ica(path: str | Path) -> GroupICA | ULCMOD:
    """Read a fit that `GroupICA.save` (or `ULCMOD.save`) wrote.

    Parameters
    ----------
    path : folder, or file ending in ``.safetensors``

    Returns
    -------
    GroupICA or ULCMOD
        Fitted: `transform` and all attributes work. ``device`` is "auto" again.

    Raises
    ------
    FileNotFoundError
        When there is no fit at this place.
    InputError
        When the files are damaged or another program's.
    """
    arrays, record = read_fit(path)
    with clear_damage(fit_files(path)[1], "the record of an ICA", ANEW):
        if record.get("estimator") == "ULCMOD":
            return ULCMOD.from_plain(arrays, record)
        return _rebuilt(arrays, record)


def _rebuilt(arrays: Arrays, record: Record) -> GroupICA:
    ica = GroupICA(**record["parameters"] | {"device": "auto"})
    for name in SAVED_VALUES:
        setattr(ica, name, record.get(name, []))  # a fit of an older version has no convergence_
    for name in SAVED_ARRAYS:
        setattr(ica, name, arrays.get(name))
    ica.n_features_in_ = ica.components_.shape[1]
    ica.mixing_ = [arrays[name] for name in sorted(arrays) if name.startswith("mixing_")]
    ica.space_ = None if record["space"] is None else NeuronSpace.from_dict(record["space"])
    ica._columns = [slice(start, stop) for start, stop, _ in record["windows"]]
    ica._counts = [count for _, _, count in record["windows"]]
    ica.brain_mask_, ica.surface_ = None, None
    if "mask_volume" in arrays:
        ica.brain_mask_ = BrainMask.from_arrays(arrays["mask_volume"], arrays["mask_affine"], record.get("mask_header"))
        ica.mask = ica.brain_mask_.image
    elif "mask" in arrays:
        ica.mask = arrays["mask"]
    return ica

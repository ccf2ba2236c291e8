"""Networks on disk: one exact file, and the same in the forms people open.

``networks.safetensors``                 maps, cut-offs and time courses, to the bit
``networks.json``                        names, space, provenance, which of the files below are there
``desc-ICA_stat-z_components.nii.gz``    the z maps, one volume a network (only with a space)
``mixing.tsv``                           time courses: columns run, token, one a network
``key_neurons.tsv``                      network, layer, neuron, z
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmbrain._validation import InputError
from llmbrain.anatomy.space import NeuronSpace

if TYPE_CHECKING:
    from llmbrain.networks.functional import FunctionalNetworks

TENSORS, RECORD = "networks.safetensors", "networks.json"
MAPS, MIXING, NEURONS = "desc-ICA_stat-z_components.nii.gz", "mixing.tsv", "key_neurons.tsv"


def save_networks(networks: FunctionalNetworks, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Write the files named at the top of this module.

    Raises
    ------
    FileExistsError
        If the folder already holds networks and `overwrite` is False.
    """
    import pandas as pd
    from safetensors.numpy import save_file

    folder = Path(folder)
    if not overwrite and (folder / RECORD).exists():
        raise FileExistsError(f"{folder} already holds networks: choose another folder, or pass overwrite=True")
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"maps": networks.maps, "cutoffs": networks.cutoffs}
    tensors |= {f"time_course_{i}": np.ascontiguousarray(run) for i, run in enumerate(networks.time_courses)}
    save_file(tensors, folder / TENSORS)
    networks.to_frame().to_csv(folder / NEURONS, sep="\t", index=False)
    if networks.time_courses:
        frames = [pd.DataFrame(run, columns=networks.names) for run in networks.time_courses]
        mixing = pd.concat(frames, keys=range(len(frames)), names=["run", "token"])
        mixing.to_csv(folder / MIXING, sep="\t")
    if networks.space is not None:
        from llmbrain.imaging import maps_to_nifti

        maps_to_nifti(networks.maps, networks.space).to_filename(folder / MAPS)
    record: dict[str, Any] = {
        "names": networks.names,
        "poles": networks.poles,
        "space": None if networks.space is None else networks.space.to_dict(),
        "n_runs": len(networks.time_courses),
        "provenance": networks.provenance,
    }
    # Last, so that a folder with a record is whole.
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return folder


def load_networks(folder: str | Path) -> FunctionalNetworks:
    """Read what `save_networks` wrote.

    Raises
    ------
    FileNotFoundError
        If the folder holds no networks.
    InputError
        If its files are damaged or do not belong together.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    from llmbrain.networks.functional import FunctionalNetworks

    folder = Path(folder)
    for name in (RECORD, TENSORS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no networks: {name} is missing")
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        tensors = load_file(folder / TENSORS)
        space = None if record["space"] is None else NeuronSpace.from_dict(record["space"])
        runs = [tensors[f"time_course_{i}"] for i in range(record["n_runs"])]
        maps, cutoffs, names, poles = tensors["maps"], tensors["cutoffs"], record["names"], record["poles"]
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise InputError(f"{folder} is damaged ({type(error).__name__}: {error}): save the networks again") from error
    return FunctionalNetworks(
        maps,
        space,
        threshold=cutoffs,
        time_courses=runs or None,
        poles=poles,
        names=names,
        standardize=False,
        provenance=record.get("provenance"),
    )

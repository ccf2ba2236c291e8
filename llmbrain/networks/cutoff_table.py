"""All ways to cut a map, side by side."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np

from llmbrain._validation import InputError
from llmbrain.networks.functional import FunctionalNetworks
from llmbrain.networks.thresholds import METHODS, NullNetworks
from llmbrain.stats.sparsity import overlap_matrix

if TYPE_CHECKING:
    import pandas as pd


def compare_thresholds(
    networks: FunctionalNetworks, null: NullNetworks | None = None, **options: float
) -> pd.DataFrame:
    """All methods side by side: network, method, size, share, low, high, and Dice with the network as it is.

    Parameters
    ----------
    networks : FunctionalNetworks
    null : NullNetworks, optional
        With it, "fdr" and "fwe" are there too.
    **options
        threshold, ratio, probability, alpha: as for `FunctionalNetworks.rethreshold`.

    Returns
    -------
    DataFrame
        One row a network and method.
    """
    import pandas as pd

    frames = []
    for method in METHODS if null is not None else METHODS[:3]:
        try:
            other = networks.rethreshold(method, null=null, **options)
        except InputError as error:
            if "bulk of map" not in str(error):
                raise
            warnings.warn(f"left out: {error}", UserWarning, stacklevel=2)
            continue
        rows = other.summary().reset_index()[["network", "size", "share", "low", "high"]]
        rows.insert(1, "method", method)
        rows["dice"] = np.diag(overlap_matrix(other.masks, networks.masks))
        frames.append(rows)
    return pd.concat(frames, ignore_index=True)

"""What figures can be made of, said by what it has: the rooms above pass their own objects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from nibabel.nifti1 import Nifti1Image
    from numpy.typing import ArrayLike, NDArray

    from llmbrain.anatomy.space import NeuronSpace


class HasMap(Protocol):
    """One network: `llmbrain.networks.Network`."""

    @property
    def map(self) -> NDArray[np.float32]:
        """z over neurons, ``(n_neurons,)``."""


class HasMaps(Protocol):
    """Networks: `llmbrain.networks.FunctionalNetworks`."""

    maps: NDArray[np.float32]
    space: NeuronSpace | None


class HasKept(Protocol):
    """A plan: `llmbrain.pruning.PruningPlan`."""

    @property
    def kept(self) -> Sequence[ArrayLike]:
        """Indices that stay, of each layer."""


class HasFrame(Protocol):
    """A table of lesions: `llmbrain.intervention.LesionTable`."""

    @property
    def frame(self) -> pd.DataFrame:
        """One row a network and evaluation."""


class HasIq(Protocol):
    """A stability: `llmbrain.decomposition.Stability`."""

    @property
    def iq(self) -> NDArray[np.float64]:
        """Cluster quality of each component."""


class Masker(Protocol):
    """A fitted nilearn masker, or an own one."""

    def inverse_transform(self, values: NDArray[np.float32]) -> Nifti1Image:
        """An image of one value a region or voxel."""

"""`FunctionalNetworks`: z maps over neurons, the cut-offs that make networks of them, and their time courses."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmbrain._validation import InputError, check_option, check_range
from llmbrain.anatomy.space import NeuronSpace
from llmbrain.imaging.brain_mask import BrainMask
from llmbrain.networks.storage import read_networks, write_networks
from llmbrain.networks.thresholds import NullNetworks, cutoffs_for
from llmbrain.stats import PUBLISHED_Z
from llmbrain.stats.sparsity import gini, hoyer, overlap_matrix, zscore_maps

if TYPE_CHECKING:
    import pandas as pd

    from llmbrain.imaging.atlas import Atlas
    from llmbrain.imaging.surface import Grayordinates

POLES = ("both", "positive", "negative", "split")


@dataclass(frozen=True, eq=False)
class Network:
    """One functional network: a view of one row of `FunctionalNetworks`.

    Attributes
    ----------
    map : float32 array ``(n_neurons,)``
        z over neurons.
    mask : bool array ``(n_neurons,)``
        The neurons beyond the cut-offs.
    space : NeuronSpace or None
    index : int
        Row in the collection it comes from.
    name : str
    group : FunctionalNetworks
        That collection.
    """

    map: NDArray[np.float32]
    mask: NDArray[np.bool_]
    space: NeuronSpace | None
    index: int
    name: str
    group: FunctionalNetworks = field(repr=False)

    @property
    def size(self) -> int:
        """Number of neurons in the network."""
        return int(self.mask.sum())

    @property
    def neurons(self) -> NDArray[np.int64]:
        """Flat indices of its neurons, ascending."""
        return np.flatnonzero(self.mask)

    def key_neurons(self) -> pd.DataFrame:
        """Its neurons, strongest ``|z|`` first: columns layer, neuron, z (no layer column without a space)."""
        import pandas as pd

        order = self.neurons[np.argsort(-np.abs(self.map[self.neurons]), kind="stable")]
        frame = pd.DataFrame({"neuron": order, "z": self.map[order]})
        if self.space is not None:
            layer, neuron = self.space.locate(order)
            frame = pd.DataFrame({"layer": layer, "neuron": neuron, "z": self.map[order]})
        return frame

    def __repr__(self) -> str:
        return f"Network({self.name}: {self.size} of {self.mask.size} neurons)"


class FunctionalNetworks:
    """Functional networks of a model (or of a brain): maps, the neurons beyond a cut-off, time courses.

    Parameters
    ----------
    maps : array ``(n_networks, n_neurons)``
        Component maps. They are z-scored over neurons unless `standardize` is False; kept as float32.
    space : NeuronSpace, optional
        Where the neurons lie. Without one (fMRI voxels, say) everything works that needs no layers.
    threshold : float or array ``(n_networks, 2)``
        A neuron is in the network if ``|z| > threshold``; or a row of (low, high) a network: ``z < low or z > high``.
    time_courses : array ``(n_tokens, n_networks)`` or list of them, one a run, optional
    poles : {"both", "positive", "negative", "split"}, or a sequence of the first three, one a network
        Which side of the map makes the network; "split" makes two networks of every map (names end in + and -).
    names : sequence of str, optional
        Default: IC00, IC01, ...
    standardize : bool
    provenance : dict, optional
        Where the maps come from; saved with them. JSON values only.
    brain : BrainMask or Grayordinates, optional
        Where the voxels (or vertices) of maps of a brain lie; images and coordinates are saved with it.

    Attributes
    ----------
    maps : float32 array ``(n_networks, n_neurons)``
    masks : bool array ``(n_networks, n_neurons)``
    cutoffs : float32 array ``(n_networks, 2)``
        (low, high) of each network, in z; infinite where a side is not used.
    poles : list of str
        Side of each network.
    time_courses : list of float32 array ``(n_tokens, n_networks)``

    Raises
    ------
    InputError
        If maps are not finite, do not fit the space, or options are unknown.

    Examples
    --------
    >>> maps = np.zeros((1, 10)); maps[0, [2, 7]] = 5, -4
    >>> networks = FunctionalNetworks(maps, NeuronSpace([6, 4]), threshold=1.5)
    >>> networks.key_neurons(0)[["layer", "neuron"]].values.tolist()
    [[0, 2], [1, 1]]
    """

    def __init__(
        self,
        maps: ArrayLike,
        space: NeuronSpace | None = None,
        *,
        threshold: float | ArrayLike = PUBLISHED_Z,
        time_courses: ArrayLike | Sequence[ArrayLike] | None = None,
        poles: str | Sequence[str] = "both",
        names: Sequence[str] | None = None,
        standardize: bool = True,
        provenance: dict[str, Any] | None = None,
        brain: BrainMask | Grayordinates | None = None,
    ) -> None:
        values = np.atleast_2d(np.asarray(maps))
        if values.ndim != 2 or 0 in values.shape or values.dtype.kind not in "fiu":
            raise InputError(f"maps of shape {values.shape} must be real numbers (n_networks, n_neurons)")
        bad = ~np.isfinite(values).all(axis=1)
        if bad.any():
            raise InputError(f"maps holds nan or inf in networks {np.flatnonzero(bad).tolist()}")
        if space is not None and space.n_neurons != values.shape[1]:
            raise InputError(f"maps cover {values.shape[1]} neurons, but space is {space}")
        if brain is not None and (space is not None or _voxels_of(brain) != values.shape[1]):
            raise InputError(
                f"brain has {_voxels_of(brain)} voxels, the maps have {values.shape[1]}"
                if space is None else "maps have a NeuronSpace or lie in a brain: pass one of space and brain"
            )  # fmt: skip
        z = zscore_maps(values) if standardize else values.astype(np.float32)
        sides = _sides(poles, len(z))
        cutoffs = _cutoffs(threshold, sides)
        runs = _runs(time_courses, len(z))
        labels = [f"IC{k:02d}" for k in range(len(z))] if names is None else [str(n) for n in names]
        if len(labels) != len(z):
            raise InputError(f"names has {len(labels)} entries for {len(z)} networks")
        if len(sides) == 2 * len(z):
            z, runs = np.repeat(z, 2, axis=0), [np.repeat(run, 2, axis=1) for run in runs]
            labels = [label + sign for label in labels for sign in "+-"]
        self.maps: NDArray[np.float32] = z
        self.space = space
        self.cutoffs: NDArray[np.float32] = cutoffs
        self.poles: list[str] = sides
        self.time_courses: list[NDArray[np.float32]] = runs
        self.names: list[str] = labels
        self.provenance: dict[str, Any] = dict(provenance or {})
        self.brain = brain

    @classmethod
    def from_ica(
        cls, ica: Any, threshold: float = PUBLISHED_Z, *, poles: str = "both", space: NeuronSpace | None = None
    ) -> FunctionalNetworks:
        """Networks of a fitted `GroupICA`: the neurons whose ``|z|`` in the map over neurons exceeds `threshold`.

        z is over the neurons that the map covers: those that are exactly 0 (masked, or outside the map's layers) count
        neither for the mean nor for the SD. A clustering that says itself which neuron is in which module (``labels_``,
        as of `ULCMOD`) gives its modules, whatever the threshold; the maps stay as they are.

        Parameters
        ----------
        ica : GroupICA
            Anything fitted that has ``components_ (n_components, n_neurons)`` (and ``mixing_``, ``space_``).
        threshold : float
            3.6 as in arXiv 2502.20408; see `rethreshold` for others.
        poles : {"both", "positive", "negative", "split"}
        space : NeuronSpace, optional
            Default: the space of the ICA.
        """
        if not hasattr(ica, "components_"):
            raise InputError(f"ica={type(ica).__name__} has no components_: fit it first")
        provenance: dict[str, Any] = {"estimator": type(ica).__name__, "n_components": len(ica.components_)}
        for key in ("n_iter_", "converged_", "random_state"):
            value: Any = getattr(ica, key, None)
            value = value.item() if isinstance(value, np.generic) else value
            if isinstance(value, (bool, int, float, str)):
                provenance[key.rstrip("_")] = value
        if getattr(ica, "origin_", None):
            provenance["origin"] = dict(ica.origin_)
        space = space if space is not None else getattr(ica, "space_", None)
        places = getattr(ica, "brain_mask_", None) or getattr(ica, "surface_", None)
        modules = getattr(ica, "labels_", None) is not None
        found = cls(
            ica.components_ if modules else zscore_maps(ica.components_, skip_zeros=True),
            space,
            threshold=0.0 if modules else threshold,
            time_courses=getattr(ica, "mixing_", None),
            poles=poles,
            standardize=False,
            provenance=provenance,
            brain=None if space is not None else places,
        )
        if not found.masks.any():
            warnings.warn(
                f"no neuron exceeds threshold={threshold!r} in any network: lower it (of modules that share no neuron, "
                "z among a module's own is never large)",
                UserWarning,
                stacklevel=2,
            )
        return found

    # -- what is in them -----------------------------------------------------------------------------------------------

    @property
    def n_networks(self) -> int:
        """Number of networks."""
        return len(self.maps)

    @property
    def n_neurons(self) -> int:
        """Number of neurons that the maps cover."""
        return int(self.maps.shape[1])

    @cached_property
    def masks(self) -> NDArray[np.bool_]:
        """Which neurons are in which network; bool ``(n_networks, n_neurons)``."""
        low, high = self.cutoffs[:, :1], self.cutoffs[:, 1:]
        return np.asarray((self.maps < low) | (self.maps > high))

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Neurons of each network."""
        return np.asarray(self.masks.sum(axis=1))

    @property
    def union(self) -> NDArray[np.bool_]:
        """Neurons that are in any network; bool ``(n_neurons,)``."""
        return np.asarray(self.masks.any(axis=0))

    def __len__(self) -> int:
        return self.n_networks

    def __getitem__(self, k: int | str) -> Network:
        index = self._index(k)
        return Network(self.maps[index], self.masks[index], self.space, index, self.names[index], self)

    def __iter__(self) -> Iterator[Network]:
        return (self[k] for k in range(len(self)))

    def _index(self, k: int | str) -> int:
        if isinstance(k, str):
            return self.names.index(check_option("network", k, self.names))
        if not isinstance(k, (int, np.integer)) or isinstance(k, bool) or not -len(self) <= k < len(self):
            raise InputError(f"network={k!r} does not exist: allowed are 0 to {len(self) - 1}, or a name")
        return int(k) % len(self)

    def subset(self, which: Sequence[int | str]) -> FunctionalNetworks:
        """The given networks as a collection of their own, in the given order."""
        rows = [self._index(k) for k in which]
        if not rows:
            raise InputError("which=[] names no network")
        return FunctionalNetworks(
            self.maps[rows],
            self.space,
            threshold=self.cutoffs[rows],
            time_courses=[run[:, rows] for run in self.time_courses] or None,
            poles=[self.poles[k] for k in rows],
            names=[self.names[k] for k in rows],
            standardize=False,
            provenance=self.provenance,
            brain=self.brain,
        )

    def key_neurons(self, k: int | str) -> pd.DataFrame:
        """Neurons of network `k`, strongest ``|z|`` first: columns layer, neuron, z."""
        return self[k].key_neurons()

    def to_frame(self) -> pd.DataFrame:
        """Key neurons of all networks: columns network, layer, neuron, z."""
        import pandas as pd

        frames = [network.key_neurons() for network in self]
        frame = pd.concat(frames, ignore_index=True)
        frame.insert(0, "network", np.repeat(np.arange(len(self)), [len(f) for f in frames]))
        return frame

    def overlap(self, kind: str = "dice") -> NDArray[np.float64]:
        """Dice or IoU of every pair of networks, ``(n_networks, n_networks)``; nan where both are empty."""
        return overlap_matrix(self.masks, self.masks, kind)

    def layer_profile(self) -> pd.DataFrame:
        """Neurons of each network (rows, by name) in each layer (columns)."""
        import pandas as pd

        space = self._space("layer_profile")
        counts = [np.bincount(space.layer_of[mask], minlength=space.n_layers) for mask in self.masks]
        return pd.DataFrame(counts, index=pd.Index(self.names, name="network"), columns=range(space.n_layers))

    def summary(self) -> pd.DataFrame:
        """One row a network: size, share of all neurons, poles, cut-offs, sparsity of the map, peak layer.

        ``shared`` is the share of its neurons that are in another network too; ``gini`` and ``hoyer`` are of ``|z|``.
        """
        import pandas as pd

        masks = self.masks
        sizes = self.sizes
        shared = ((masks.sum(axis=0) > 1) & masks).sum(axis=1)
        frame = pd.DataFrame(
            {
                "size": sizes,
                "share": sizes / self.n_neurons,
                "positive": (masks & (self.maps > 0)).sum(axis=1),
                "negative": (masks & (self.maps < 0)).sum(axis=1),
                "low": self.cutoffs[:, 0],
                "high": self.cutoffs[:, 1],
                "max_z": np.abs(self.maps).max(axis=1),
                "gini": gini(self.maps),
                "hoyer": hoyer(self.maps),
                "shared": np.divide(shared, sizes, out=np.zeros(len(sizes)), where=sizes > 0),
            },
            index=pd.Index(self.names, name="network"),
        )
        if self.space is not None:
            profile = self.layer_profile().to_numpy()
            frame["layers"] = (profile > 0).sum(axis=1)
            frame["peak_layer"] = np.where(sizes > 0, profile.argmax(axis=1), -1)
        return frame

    def _space(self, purpose: str) -> NeuronSpace:
        if self.space is None:
            raise InputError(
                f"{purpose} needs to know the layers: pass space=NeuronSpace(widths) to FunctionalNetworks"
            )
        return self.space

    def rethreshold(
        self,
        method: str = "fixed",
        *,
        threshold: float = PUBLISHED_Z,
        ratio: float = 1.0,
        probability: float = 0.5,
        alpha: float = 0.05,
        null: NullNetworks | None = None,
    ) -> FunctionalNetworks:
        """The same maps with other cut-offs; poles, names and time courses stay.

        Parameters
        ----------
        method : {"fixed", "auto", "mixture", "fdr", "fwe"}
            ``|z| > threshold``; the largest ``ratio / n_networks`` share of all ``|z|`` (CanICA's "auto" at ratio 1);
            Gaussian/gamma mixture with posterior above `probability` (MELODIC); FDR in each map, or FWE over all maps,
            at `alpha` against `null`. See `llmbrain.networks.thresholds`.
        null : NullNetworks
            From `llmbrain.networks.null_networks`, for "fdr" and "fwe".
        """
        cutoffs = cutoffs_for(
            self.maps, method, threshold=threshold, ratio=ratio, probability=probability, alpha=alpha, null=null
        )
        return FunctionalNetworks(
            self.maps,
            self.space,
            threshold=cutoffs,
            time_courses=self.time_courses or None,
            poles=self.poles,
            names=self.names,
            standardize=False,
            provenance={**self.provenance, "threshold_method": method},
            brain=self.brain,
        )

    # -- files ---------------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path, *, overwrite: bool = False, atlas: Atlas | None = None) -> Path:
        """Write the networks into a folder, all files or none; see `llmbrain.networks.storage` for them.

        Parameters
        ----------
        folder : path
        overwrite : bool
            Write over networks that are there.
        atlas : Atlas, optional
            Names the region of every voxel in the coordinates, for networks of a brain.

        Raises
        ------
        FileExistsError
            If the folder already holds networks and `overwrite` is False.
        """
        arrays = {"maps": self.maps, "cutoffs": self.cutoffs}
        arrays |= {f"time_course_{i}": run for i, run in enumerate(self.time_courses)}
        record = {
            "names": self.names,
            "poles": self.poles,
            "space": None if self.space is None else self.space.to_dict(),
            "n_runs": len(self.time_courses),
            "provenance": self.provenance,
        }
        where = None
        if isinstance(self.brain, BrainMask):
            where = self.brain.coordinates(self, atlas)
        elif atlas is not None:
            raise InputError("atlas= names voxels of a brain mask: these networks have none")
        return write_networks(
            folder, arrays, record, self.to_frame(), brain=self.brain, coordinates=where, overwrite=overwrite
        )

    @classmethod
    def load(cls, folder: str | Path) -> FunctionalNetworks:
        """Read networks back; equal to the bit.

        Raises
        ------
        FileNotFoundError
            If the folder holds no networks.
        InputError
            If its files are damaged or do not belong together.
        """
        arrays, record, brain = read_networks(folder)
        return cls(
            arrays["maps"],
            None if record["space"] is None else NeuronSpace.from_dict(record["space"]),
            threshold=arrays["cutoffs"],
            time_courses=[arrays[f"time_course_{i}"] for i in range(record["n_runs"])] or None,
            poles=record["poles"],
            names=record["names"],
            standardize=False,
            provenance=record.get("provenance"),
            brain=brain,
        )

    def __repr__(self) -> str:
        where = self.space if self.space is not None else f"{self.n_neurons} neurons, no space"
        return f"FunctionalNetworks({len(self)} networks of {self.sizes.min()}-{self.sizes.max()} neurons; {where})"


def _voxels_of(brain: BrainMask | Grayordinates) -> int:
    return brain.n_voxels if isinstance(brain, BrainMask) else brain.n


def _sides(poles: str | Sequence[str], n: int) -> list[str]:
    """Side of each network; "split" gives two networks a map, the positive one first."""
    if isinstance(poles, str):
        check_option("poles", poles, POLES)
        return ["positive", "negative"] * n if poles == "split" else [poles] * n
    sides = [check_option("poles", side, POLES[:3]) for side in poles]
    if len(sides) != n:
        raise InputError(f"poles has {len(sides)} entries for {n} networks")
    return sides


def _cutoffs(threshold: float | ArrayLike, sides: list[str]) -> NDArray[np.float32]:
    """(low, high) of each network, infinite on a side that is not used."""
    n = len(sides)
    if np.ndim(threshold) == 0:
        high = float(check_range("threshold", threshold, 0))  # type: ignore[arg-type]
        cutoffs = np.tile(np.array([-high, high], dtype=np.float32), (n, 1))
    else:
        cutoffs = np.array(threshold, dtype=np.float32)
        if cutoffs.shape == (n // 2, 2) and sides[:2] == ["positive", "negative"]:
            cutoffs = np.repeat(cutoffs, 2, axis=0)
        if cutoffs.shape != (n, 2) or np.isnan(cutoffs).any() or (cutoffs[:, 0] > cutoffs[:, 1]).any():
            raise InputError(
                f"threshold of shape {cutoffs.shape} must be one number, or rows (low <= high) of shape ({n}, 2)"
            )
    cutoffs[[side == "positive" for side in sides], 0] = -np.inf
    cutoffs[[side == "negative" for side in sides], 1] = np.inf
    return cutoffs


def _runs(time_courses: ArrayLike | Sequence[ArrayLike] | None, n: int) -> list[NDArray[np.float32]]:
    if time_courses is None:
        return []
    single = isinstance(time_courses, np.ndarray) and time_courses.ndim == 2
    runs = [np.asarray(run, dtype=np.float32) for run in ([time_courses] if single else time_courses)]  # type: ignore[union-attr]
    for i, run in enumerate(runs):
        if run.ndim != 2 or run.shape[1] != n:
            raise InputError(f"time_courses[{i}] of shape {run.shape} must be (n_tokens, {n})")
    return runs

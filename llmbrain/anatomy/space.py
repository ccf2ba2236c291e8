"""Where a neuron lies: (layer, index) <-> flat index <-> voxel. The only place that knows geometry.

Layers are slices along z; the neurons of a layer fill a near-square grid, column first. All layers share one grid, that
of the widest; cells without a neuron are padding, and are masked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmbrain._validation import InputError

if TYPE_CHECKING:
    from nibabel.nifti1 import Nifti1Image

# A divisor pair flatter than this is less readable than a nearly square grid with some padding (172 = 4 x 43).
MAX_ASPECT = 4.0
MOST_NEURONS = 1 << 33  # a damaged header must not make arrays that no memory holds


def grid_of(width: int) -> tuple[int, int]:
    """Grid (columns, rows) for `width` neurons.

    The divisor pair nearest to a square where its aspect is at most 4, so that no cell is padding (11008 = 86 x 128);
    else the smallest near-square grid that holds them.
    """
    columns = next(c for c in range(math.isqrt(width), 0, -1) if width % c == 0)
    if width // columns <= MAX_ASPECT * columns:
        return columns, width // columns
    columns = math.isqrt(width)
    return columns, math.ceil(width / columns)


@dataclass(frozen=True)
class NeuronSpace:
    """The geometry of a model's neurons.

    Parameters
    ----------
    widths : sequence of int
        Number of neurons of each layer, in order. Layers may differ; a layer may be empty (width 0).

    Attributes
    ----------
    shape : tuple of int
        ``(columns, rows, layers)`` of a volume.

    Examples
    --------
    >>> space = NeuronSpace([6, 4])
    >>> space.index(1, 2), space.locate(8)
    (8, (1, 2))
    >>> space.shape, space.from_volume(space.to_volume(np.arange(10))).tolist()
    ((2, 3, 2), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    """

    widths: tuple[int, ...]

    def __init__(self, widths: Sequence[int]) -> None:
        try:
            values = tuple(int(w) for w in widths)
            exact = all(v == w for v, w in zip(values, widths))
        except (TypeError, ValueError, OverflowError):
            raise InputError(f"widths={str(widths)[:80]} must be a sequence of whole numbers, one per layer") from None
        if not exact or not values or min(values) < 0 or max(values) == 0:
            raise InputError(f"widths={list(widths)!r} must hold one whole number >= 0 per layer, at least one above 0")
        if sum(values) > MOST_NEURONS:
            raise InputError(
                f"widths={str(list(widths))[:80]} are {sum(values):.3g} neurons: at most {MOST_NEURONS} are read"
            )
        object.__setattr__(self, "widths", values)

    # -- sizes -----------------------------------------------------------------------------------------------------

    @property
    def n_layers(self) -> int:
        """Number of layers (slices)."""
        return len(self.widths)

    @property
    def n_neurons(self) -> int:
        """Number of neurons of all layers together."""
        return int(self.offsets[-1])

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """Flat index of each layer's first neuron, and the total at the end; shape ``(n_layers + 1,)``."""
        return np.concatenate([[0], np.cumsum(self.widths)]).astype(np.int64)

    @cached_property
    def grid(self) -> tuple[int, int]:
        """``(columns, rows)`` of a slice."""
        return grid_of(max(self.widths))

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(columns, rows, layers)`` of a volume."""
        return (*self.grid, self.n_layers)

    def layer_slice(self, layer: int) -> slice:
        """Flat indices of a layer, as a slice."""
        layer = int(self._checked("layer", layer, self.n_layers))
        return slice(int(self.offsets[layer]), int(self.offsets[layer + 1]))

    @cached_property
    def layer_of(self) -> NDArray[np.int64]:
        """Layer of each neuron; shape ``(n_neurons,)``."""
        return np.repeat(np.arange(self.n_layers), self.widths)

    @cached_property
    def neuron_of(self) -> NDArray[np.int64]:
        """Index within its layer of each neuron; shape ``(n_neurons,)``."""
        return np.arange(self.n_neurons) - self.offsets[self.layer_of]

    # -- (layer, neuron) <-> flat ------------------------------------------------------------------------------------

    def index(self, layer: ArrayLike, neuron: ArrayLike) -> Any:
        """Flat index of a neuron; scalars give an int, arrays an array.

        Raises
        ------
        InputError
            If a layer or a neuron does not exist; the message names it.
        """
        layers = self._checked("layer", layer, self.n_layers)
        neurons = np.asarray(neuron)
        if not np.issubdtype(neurons.dtype, np.integer):
            raise InputError(f"neuron={neuron!r} must be a whole number")
        layers, neurons = np.broadcast_arrays(layers, neurons)
        bad = (neurons < 0) | (neurons >= np.asarray(self.widths)[layers])
        if bad.any():
            at = tuple(np.argwhere(bad)[0])
            worst = int(layers[at])
            raise InputError(f"neuron={int(neurons[at])} does not exist in layer {worst}: it has {self.widths[worst]}")
        flat = self.offsets[layers] + neurons
        return int(flat) if flat.ndim == 0 else flat

    def locate(self, flat: ArrayLike) -> Any:
        """``(layer, neuron)`` of a flat index; scalars give two ints, arrays two arrays.

        Raises
        ------
        InputError
            If the index does not exist; the message names it.
        """
        index = self._checked("flat index", flat, self.n_neurons)
        layer, neuron = self.layer_of[index], self.neuron_of[index]
        return (int(layer), int(neuron)) if index.ndim == 0 else (layer, neuron)

    @staticmethod
    def _checked(name: str, value: ArrayLike, size: int) -> NDArray[np.int64]:
        index = np.asarray(value)
        if index.size and not np.issubdtype(index.dtype, np.integer):
            raise InputError(f"{name}={value!r} must be a whole number")
        index = index.astype(np.int64)
        bad = (index < 0) | (index >= size)
        if bad.any():
            raise InputError(f"{name}={int(index[bad].flat[0])} does not exist: allowed are 0 to {size - 1}")
        return index

    # -- flat <-> volume -----------------------------------------------------------------------------------------------

    @cached_property
    def voxels(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """``(column, row, layer)`` of each neuron, three arrays of shape ``(n_neurons,)``."""
        columns = self.grid[0]
        return self.neuron_of % columns, self.neuron_of // columns, self.layer_of

    def to_volume(self, values: ArrayLike, fill: float = 0) -> NDArray[Any]:
        """Lay values out on the grid.

        Parameters
        ----------
        values : array of shape ``(..., n_neurons)``
        fill : float
            What padding cells hold.

        Returns
        -------
        array of shape ``(columns, rows, layers, ...)``, same dtype
        """
        values = np.asarray(values)
        if values.ndim == 0 or values.shape[-1] != self.n_neurons:
            raise InputError(
                f"values of shape {values.shape} do not fit: the last axis must be {self.n_neurons} neurons"
            )
        volume = np.full((*self.shape, *values.shape[:-1]), fill, dtype=values.dtype)
        volume[self.voxels] = np.moveaxis(values, -1, 0)
        return volume

    def from_volume(self, volume: ArrayLike) -> NDArray[Any]:
        """Read values back from a volume ``(columns, rows, layers, ...)``, as ``(..., n_neurons)``."""
        volume = np.asarray(volume)
        if volume.shape[:3] != self.shape:
            raise InputError(f"volume of shape {volume.shape} does not fit: its first axes must be {self.shape}")
        return np.moveaxis(volume[self.voxels], 0, -1)

    @cached_property
    def affine(self) -> NDArray[np.float64]:
        """Identity: a voxel is a neuron, so there are no millimetres."""
        return np.eye(4)

    @property
    def mask(self) -> NDArray[np.bool_]:
        """Which voxels are neurons; shape ``(columns, rows, layers)``."""
        return self.to_volume(np.ones(self.n_neurons, dtype=bool))

    def mask_img(self) -> Nifti1Image:
        """Which voxels are neurons, as an image of 0 and 1 (uint8); NIfTI-2 where an axis exceeds 32767."""
        from nibabel.nifti1 import Nifti1Image
        from nibabel.nifti2 import Nifti2Image

        image = Nifti1Image if max(self.shape) <= 32767 else Nifti2Image
        return image(self.mask.astype(np.uint8), self.affine)

    # -- records -------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """What a JSON header or manifest keeps of this space."""
        return {"widths": list(self.widths), "grid": list(self.grid), "order": "column-fastest"}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> NeuronSpace:
        """Rebuild a space from `to_dict`; a grid that this version would lay out otherwise is an error."""
        widths = record["widths"]
        if not isinstance(widths, list) or any(type(width) is not int for width in widths):
            raise InputError(f"widths={str(widths)[:80]} must be a list of whole numbers, one per layer")
        space = cls(widths)
        grid = record.get("grid", list(space.grid))
        if grid != list(space.grid):
            raise InputError(
                f"grid={grid} is not the grid of these widths ({list(space.grid)}): made by another version?"
            )
        return space

    def __repr__(self) -> str:
        same = len(set(self.widths)) == 1
        widths = f"{self.n_layers} layers x {self.widths[0]}" if same else f"widths {list(self.widths)}"
        return f"NeuronSpace({widths}: {self.n_neurons} neurons)"

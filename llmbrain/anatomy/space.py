"""Where a neuron lies: (layer, index) <-> flat index <-> voxel. The only place that knows geometry.

Layers are slices along z; the neurons of a layer fill a near-square grid, column first. All layers share one grid, that
of the widest; cells without a neuron are padding, and are masked.
"""

from __future__ import annotations

import math
import operator
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
    experts : sequence of sequence of int, optional
        Of a mixture of experts: the widths of each layer's experts, which lie side by side in its slice, shared ones
        first; they sum to the layer's width. A dense layer is one expert.

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
    >>> mixture = NeuronSpace([6], experts=[[2, 2, 2]])
    >>> mixture.index(0, 1, expert=2), mixture.locate_expert(5)
    (5, (0, 2, 1))
    """

    widths: tuple[int, ...]
    experts: tuple[tuple[int, ...], ...] | None

    def __init__(self, widths: Sequence[int], experts: Sequence[Sequence[int]] | None = None) -> None:
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
        object.__setattr__(self, "experts", None if experts is None else self._parts(experts))

    def _parts(self, experts: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
        """Widths of experts that fit those of the layers."""
        try:
            parts = tuple(tuple(operator.index(w) for w in layer) for layer in experts)
        except TypeError:
            raise InputError(f"experts={str(experts)[:80]} must hold whole numbers, one sequence a layer") from None
        fit = len(parts) == len(self.widths) and all(sum(p) == w for p, w in zip(parts, self.widths))
        if not fit or any(width < 0 for layer in parts for width in layer):
            raise InputError(f"experts={str(experts)[:80]} do not add up to the widths {str(list(self.widths))[:80]}")
        return parts

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

    @cached_property
    def first_of_expert(self) -> tuple[NDArray[np.int64], ...]:
        """For each layer, where in it each of its experts begins, and its width at the end."""
        parts = self.experts if self.experts is not None else tuple((w,) for w in self.widths)
        return tuple(np.cumsum([0, *layer]).astype(np.int64) for layer in parts)

    def expert_slice(self, layer: int, expert: int) -> slice:
        """Flat indices of an expert, as a slice; shared experts are counted first."""
        start = self.layer_slice(layer).start
        firsts = self.first_of_expert[layer]
        number = int(self._checked("expert", expert, len(firsts) - 1))
        return slice(start + int(firsts[number]), start + int(firsts[number + 1]))

    # -- (layer, neuron) <-> flat ------------------------------------------------------------------------------------

    def index(self, layer: ArrayLike, neuron: ArrayLike, *, expert: ArrayLike | None = None) -> Any:
        """Flat index of a neuron; scalars give an int, arrays an array.

        Parameters
        ----------
        layer, neuron : int or array of int
        expert : int or array of int, optional
            Which of the layer's experts `neuron` is counted in, shared experts first; default: in the whole layer.

        Raises
        ------
        InputError
            If a layer or a neuron does not exist; the message names it.
        """
        layers = self._checked("layer", layer, self.n_layers)
        neurons = np.asarray(neuron)
        if not np.issubdtype(neurons.dtype, np.integer):
            raise InputError(f"neuron={neuron!r} must be a whole number")
        if expert is not None:
            neurons = self._in_layer(layers, expert, neurons)
        layers, neurons = np.broadcast_arrays(layers, neurons)
        bad = (neurons < 0) | (neurons >= np.asarray(self.widths)[layers])
        if bad.any():
            at = tuple(np.argwhere(bad)[0])
            worst = int(layers[at])
            raise InputError(f"neuron={int(neurons[at])} does not exist in layer {worst}: it has {self.widths[worst]}")
        flat = self.offsets[layers] + neurons
        return int(flat) if flat.ndim == 0 else flat

    def _in_layer(self, layer: ArrayLike, expert: ArrayLike, neuron: ArrayLike) -> NDArray[np.int64]:
        """Neurons counted within their layers, of neurons counted within their experts."""
        experts = self._checked("expert", expert, max(map(len, self.first_of_expert)) - 1)
        layers, experts, neurons = np.broadcast_arrays(layer, experts, neuron)
        found = np.empty(layers.shape, dtype=np.int64)
        for at in np.ndindex(layers.shape):
            part = self.expert_slice(int(layers[at]), int(experts[at]))
            number, size = int(neurons[at]), part.stop - part.start
            if not 0 <= number < size:
                raise InputError(
                    f"neuron={number} does not exist in expert {int(experts[at])} of layer {int(layers[at])}: it has "
                    f"{size}"
                )
            found[at] = part.start + number - int(self.offsets[layers[at]])
        return found

    def locate_expert(self, flat: ArrayLike) -> Any:
        """``(layer, expert, neuron)`` of a flat index: as `locate`, the neuron counted within its expert."""
        layers, neurons = (np.asarray(x) for x in self.locate(flat))
        experts, within = np.zeros(layers.shape, dtype=np.int64), np.zeros(layers.shape, dtype=np.int64)
        for layer in np.unique(layers):
            firsts, here = self.first_of_expert[layer], layers == layer
            number = np.searchsorted(firsts, neurons[here], side="right") - 1
            experts[here], within[here] = number, neurons[here] - firsts[number]
        if layers.ndim == 0:
            return int(layers), int(experts), int(within)
        return layers, experts, within

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
        record = {"widths": list(self.widths), "grid": list(self.grid), "order": "column-fastest"}
        return record if self.experts is None else {**record, "experts": [list(layer) for layer in self.experts]}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> NeuronSpace:
        """Rebuild a space from `to_dict`; a grid that this version would lay out otherwise is an error."""
        widths = record["widths"]
        if not isinstance(widths, list) or any(type(width) is not int for width in widths):
            raise InputError(f"widths={str(widths)[:80]} must be a list of whole numbers, one per layer")
        experts = record.get("experts")
        lists = isinstance(experts, list) and all(isinstance(layer, list) for layer in experts)
        if experts is not None and not lists:
            raise InputError(f"experts={str(experts)[:80]} must be a list of lists of whole numbers, one a layer")
        space = cls(widths, experts)
        grid = record.get("grid", list(space.grid))
        if grid != list(space.grid):
            raise InputError(
                f"grid={grid} is not the grid of these widths ({list(space.grid)}): made by another version?"
            )
        return space

    def __repr__(self) -> str:
        same = len(set(self.widths)) == 1
        widths = f"{self.n_layers} layers x {self.widths[0]}" if same else f"widths {list(self.widths)}"
        mixture = "" if self.experts is None else f" in {sum(map(len, self.experts))} experts"
        return f"NeuronSpace({widths}: {self.n_neurons} neurons{mixture})"

"""What is known of a block: where its neurons and heads lie in its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Projection:
    """A run of units (neurons, or key/value groups of heads) along one axis of a weight.

    Unit ``u`` is the ``size`` consecutive entries from ``start + u * size`` on, along `axis` of ``module.weight``;
    where the units are the module's outputs, its bias has them too.
    """

    module: nn.Module
    path: str
    axis: int
    units: int
    start: int = 0
    size: int = 1
    is_output: bool = True

    def rows(self, units: Tensor | Sequence[int]) -> Tensor:
        """Positions of the given units along the axis, in order; int64 on the CPU."""
        index = torch.as_tensor(units, dtype=torch.long).reshape(-1, 1) * self.size
        return (self.start + index + torch.arange(self.size)).reshape(-1)

    def weight(self) -> Tensor:
        """View of the weight with the units first: ``(units * size, other)``."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        weight = weight if self.axis == 0 else weight.T
        return weight[self.start : self.start + self.units * self.size]

    def bias(self) -> Tensor | None:
        """View of the bias entries of the units, where they are outputs and there is a bias."""
        bias = getattr(self.module, "bias", None)
        if not self.is_output or not isinstance(bias, Tensor):
            return None
        return bias[self.start : self.start + self.units * self.size]


@dataclass(frozen=True)
class PerHead:
    """What an attention holds for each head beside its projections: rows of a parameter, or entries of a list.

    Key/value group ``g`` owns the ``size`` entries from ``g * size`` on: along the first axis of the parameter `name`
    of `owner`, or of the list of modules of that name.
    """

    owner: nn.Module
    name: str
    size: int


@dataclass(frozen=True)
class LayerAnatomy:
    """The MLP and the attention of one block.

    Attributes
    ----------
    block : module
        The whole transformer block; its output is the site ``block_out``.
    inputs : tuple of Projection
        What makes the neurons: ``(up,)`` or ``(gate, up)``.
    down : Projection
        What the neurons enter; its input is the site ``neuron``, its output ``mlp_out``.
    act : module or None
        The activation; in a gated MLP its output is the site ``gate``.
    heads : tuple of Projection
        Query, key and value rows by key/value group; empty where heads can not be cut.
    out : Projection or None
        Output projection of the attention, by key/value group; None where there is no attention.
    per_head : tuple of PerHead
        What else goes with a group.
    reads_config : bool
        Whether the attention asks the config for its number of heads; see `llmbrain.anatomy.surgery.keep_heads`.
    neurons_fixed, heads_fixed : str
        Why neurons or heads can not be cut; empty where they can.
    gives : int
        How many values the attention returns: see `Family`.
    """

    index: int
    path: str
    block: nn.Module
    inputs: tuple[Projection, ...]
    down: Projection
    act: nn.Module | None
    attention: nn.Module | None = None
    heads: tuple[Projection, ...] = ()
    out: Projection | None = None
    n_heads: int = 0
    n_kv_heads: int = 0
    head_dim: int = 0
    per_head: tuple[PerHead, ...] = ()
    reads_config: bool = False
    neurons_fixed: str = ""
    heads_fixed: str = ""
    gives: int = 2

    @property
    def gated(self) -> bool:
        """Whether a neuron is the product of a gate and an up signal."""
        return len(self.inputs) == 2

    @property
    def width(self) -> int:
        """Number of neurons."""
        return self.down.units

    @property
    def neuron_projections(self) -> tuple[Projection, ...]:
        """Every weight that holds a row or column a neuron."""
        return (*self.inputs, self.down)


@dataclass(frozen=True)
class Anatomy:
    """Where a model keeps its neurons: one `LayerAnatomy` a block."""

    family: str
    layers: list[LayerAnatomy] = field(repr=False)

    @property
    def widths(self) -> tuple[int, ...]:
        """Neurons per layer."""
        return tuple(layer.width for layer in self.layers)

    @property
    def n_heads(self) -> tuple[int, ...]:
        """Attention heads per layer."""
        return tuple(layer.n_heads for layer in self.layers)


def get(module: nn.Module, path: str) -> nn.Module | None:
    """The submodule of that path, or None."""
    for name in path.split("."):
        child = getattr(module, name, None)
        if not isinstance(child, nn.Module):
            return None
        module = child
    return module


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is GPT-2's linear layer, whose weight is ``(in, out)``."""
    return type(module).__name__ == "Conv1D"


def is_linear(module: nn.Module | None) -> bool:
    """Whether it is a linear layer with a weight of its own."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and (weight.ndim == 2 or not weight.is_floating_point())


def sizes(module: nn.Module) -> tuple[int, int]:
    """``(in, out)`` of a linear module: torch keeps (out, in), GPT-2's Conv1D (in, out)."""
    inputs, outputs = getattr(module, "in_features", None), getattr(module, "out_features", None)
    weight = module.weight
    packed = not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.ndim != 2
    if packed and isinstance(inputs, int) and isinstance(outputs, int):  # of quantized layers
        return inputs, outputs
    a, b = module.weight.shape  # type: ignore[union-attr, misc]
    return (int(a), int(b)) if is_conv1d(module) else (int(b), int(a))  # type: ignore[arg-type]


def projection(
    module: nn.Module, path: str, units: int, *, start: int = 0, size: int = 1, out: bool = True
) -> Projection:
    """Units along the output axis of a linear module, or along its input axis."""
    axis = (1 if out else 0) if is_conv1d(module) else (0 if out else 1)
    return Projection(module, path, axis, units, start, size, out)

"""Neurons inside experts: every expert of a layer as an ordinary MLP, and cuts of their widths.

All routed experts of a layer share one tensor a projection, so each keeps as many neurons; which ones is its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llmbrain._validation import InputError
from llmbrain.anatomy.experts import ExpertAnatomy, ExpertLayer, ExpertTensor, Mlp, Routed
from llmbrain.anatomy.layers import Anatomy, LayerAnatomy, Projection
from llmbrain.anatomy.structure import mixing
from llmbrain.anatomy.surgery import check_cuttable, check_no_adapter, keep_units

# What experts modules call their width.
WIDTHS = (
    "intermediate_dim", "intermediate_size", "expert_dim", "moe_intermediate_size", "ffn_dim", "moe_intermediate_dim",
    "expert_intermediate_size", "hidden_inner_dim",
)  # fmt: skip
ROWS = ("gate_up_proj", "up_proj", "gate_up_proj_bias", "up_proj_bias")
WHOLE = ("down_proj_bias",)  # holds no neuron


class OneExpert(nn.Module):
    """A matrix of one expert, seen as a linear layer; what is written into its weight or bias is written to the model.

    Parameters
    ----------
    owner : module
        What holds the weights of all experts.
    name : str
        Of the weight.
    expert : int
    rows : slice
        Of its outputs.
    """

    def __init__(self, routed: Routed, name: str, expert: int, rows: slice) -> None:
        super().__init__()
        vars(self).update(owner=routed.module, name=name, expert=expert, rows=rows, turned=routed.transposed)

    @property
    def weight(self) -> Tensor:
        """View ``(outputs, inputs)``."""
        here = vars(self)
        weight: Tensor = getattr(here["owner"], here["name"])[here["expert"]].detach()
        return (weight.T if here["turned"] else weight)[here["rows"]]

    @property
    def bias(self) -> Tensor | None:
        """View ``(outputs,)``, where there is one."""
        here = vars(self)
        bias = getattr(here["owner"], f"{here['name']}_bias", None)
        return None if not isinstance(bias, Tensor) else bias[here["expert"]].detach()[here["rows"]]


@dataclass(frozen=True)
class Part:
    """Neurons of a layer that are chosen among: of one routed expert, or of an MLP that every token passes.

    Attributes
    ----------
    mlp : LayerAnatomy
        The expert as an ordinary MLP.
    routed : int or None
        Number of the routed expert.
    start : int
        Its first neuron in the layer's slice.
    """

    mlp: LayerAnatomy
    routed: int | None
    start: int

    @property
    def width(self) -> int:
        """Number of neurons."""
        return self.mlp.width

    @property
    def name(self) -> str:
        """What texts call it."""
        return f"layer {self.mlp.index}, " + ("shared expert" if self.routed is None else f"expert {self.routed}")

    @property
    def normed(self) -> bool:
        """Whether a norm follows its down projection."""
        return bool(getattr(vars(self.mlp.down.module).get("owner"), "has_post_expert_norm", False))

    @property
    def has_bias(self) -> bool:
        """Whether its output has a bias."""
        return isinstance(getattr(self.mlp.down.module, "bias", None), Tensor)


def parts_of(layer: ExpertLayer) -> list[Part]:
    """All parts of a layer, shared ones first, as its slice of the space has them."""
    parts, start = [], 0
    for mlp in layer.shared:
        parts.append(Part(_shared(layer, mlp), None, start))
        start += mlp.width
    if layer.routed is not None:
        for expert in range(layer.routed.count):
            parts.append(Part(_one(layer, layer.routed, expert), expert, start))
            start += layer.routed.width
    return parts


def _shared(layer: ExpertLayer, mlp: Mlp) -> LayerAnatomy:
    skip = len(layer.path) + 1
    paths = [p.path[skip:] for p in (*mlp.inputs, mlp.down)]
    fixed = mixing(layer.block, paths, mlp.width)
    return LayerAnatomy(layer.index, layer.path, layer.block, mlp.inputs, mlp.down, None, neurons_fixed=fixed)


def _one(layer: ExpertLayer, routed: Routed, expert: int) -> LayerAnatomy:
    m, path = routed.width, f"{routed.path}[{expert}]"
    if not routed.gated:
        rows = [slice(None)]
    elif routed.interleaved:
        rows = [slice(0, None, 2), slice(1, None, 2)]
    else:
        rows = [slice(0, m), slice(m, None)]
    name = "gate_up_proj" if routed.gated else "up_proj"
    inputs = tuple(Projection(OneExpert(routed, name, expert, r), f"{path}.{name}", 0, m) for r in rows)
    down = Projection(OneExpert(routed, "down_proj", expert, slice(None)), f"{path}.down_proj", 1, m, is_output=False)
    return LayerAnatomy(layer.index, layer.path, layer.block, inputs, down, None)


def check_neurons(body: ExpertAnatomy) -> None:
    """Refuse experts whose neurons can not be cut; nothing is changed.

    Raises
    ------
    InputError
        Naming the weight.
    """
    shared = [p.mlp for layer in body.layers for p in parts_of(layer) if p.routed is None]
    check_cuttable(Anatomy(body.family, shared))
    for layer, routed in body.routed:
        check_no_adapter(body.layers[layer].block)
        for tensor in routed.weights:
            if tensor.name not in (*ROWS, *WHOLE, "down_proj"):
                raise InputError(f"{tensor.path} is of no known layout: neurons of these experts cannot be cut")
            if tensor.value.is_meta:
                raise InputError(f"{tensor.path} is not in memory (offloaded): load the model whole to cut it")


def split(layer: ExpertLayer, kept: NDArray[np.int64] | Sequence[int]) -> list[NDArray[np.int64]]:
    """What stays of each part of a layer, counted within the part.

    Parameters
    ----------
    kept : (n,) int64
        Neurons that stay, counted within the layer's slice.

    Raises
    ------
    InputError
        If a part would be empty, or routed experts keep different numbers.
    """
    flat = np.asarray(kept, dtype=np.int64)
    parts = parts_of(layer)
    found = [flat[(flat >= p.start) & (flat < p.start + p.width)] - p.start for p in parts]
    for part, stays in zip(parts, found):
        if not len(stays):
            raise InputError(f"kept: {part.name} of {part.width} neurons would be empty")
    sizes = sorted({len(stays) for part, stays in zip(parts, found) if part.routed is not None})
    if len(sizes) > 1:
        raise InputError(
            f"kept: routed experts of layer {layer.index} would keep {sizes[0]} to {sizes[-1]} neurons: they share one "
            "tensor, so each must keep as many"
        )
    return found


def cut_neurons(layer: ExpertLayer, kept: NDArray[np.int64] | Sequence[int]) -> None:
    """Leave a layer only the neurons `kept`: look the anatomy up again afterwards; see `split`, `check_neurons`."""
    found = split(layer, kept)
    for mlp, stays in zip(layer.shared, found):
        if len(stays) < mlp.width:
            keep_units((*mlp.inputs, mlp.down), stays)
    routed = layer.routed
    if routed is None or len(found[-1]) == routed.width:
        return
    chosen = torch.from_numpy(np.stack(found[len(layer.shared) :]))  # (experts, neurons)
    for tensor in routed.weights:
        if tensor.name not in WHOLE:
            _keep(tensor, routed, chosen)
    module: Any = routed.module
    for name in WIDTHS:
        if type(getattr(module, name, None)) is int and getattr(module, name) == routed.width:
            setattr(module, name, chosen.shape[1])


def places_of(routed: Routed, name: str, neurons: Tensor) -> tuple[int, Tensor]:
    """Where neurons lie in what one expert has of a weight: the axis, and positions along it.

    Parameters
    ----------
    name : str
        Of the weight or bias.
    neurons : (experts, n) int64
    """
    if name == "down_proj":
        return (0 if routed.transposed else 1), neurons
    axis = 1 if routed.transposed and not name.endswith("_bias") else 0
    if routed.gated and routed.interleaved:
        return axis, torch.stack([2 * neurons, 2 * neurons + 1], dim=2).flatten(1)
    return axis, torch.cat([neurons, routed.width + neurons], dim=1) if routed.gated else neurons


def _keep(tensor: ExpertTensor, routed: Routed, chosen: Tensor) -> None:
    axis, places = places_of(routed, tensor.name, chosen)
    old = tensor.value
    value = torch.stack([one.index_select(axis, at.to(one.device)) for one, at in zip(old.detach(), places)])
    setattr(tensor.owner, tensor.name, nn.Parameter(value.contiguous(), requires_grad=old.requires_grad))

"""Cut units out of weights: the tensors get smaller, the modules stay what they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llmbrain._validation import InputError
from llmbrain.anatomy import structure
from llmbrain.anatomy.layers import Anatomy, LayerAnatomy, PerHead, Projection, get
from llmbrain.anatomy.nothing import become_nothing, empty_linear
from llmbrain.anatomy.offload import entries, is_away, put_back
from llmbrain.anatomy.units import HEADS, NEURONS, Units


def check_no_adapter(model: nn.Module) -> None:
    """Refuse models that carry an adapter (LoRA, say) beside their weights: those are not all of the model.

    Raises
    ------
    InputError
        Naming a module that carries one.
    """
    for path, module in model.named_modules():
        if isinstance(getattr(module, "base_layer", None), nn.Module):
            raise InputError(
                f"model {type(model).__name__} carries an adapter ({path}): merge the adapter first (of peft: "
                "model = model.merge_and_unload(); of transformers: load it with peft and do the same)"
            )


def check_cuttable(anatomy: Anatomy, units: Units = NEURONS, stays: Sequence[int] | None = None) -> None:
    """Refuse weights that can not be cut: with an adapter, mixed, quantized, without values, or shared between layers.

    Parameters
    ----------
    stays : sequence of int, optional
        How many units of each layer are to stay, where that is known: none is another thing than fewer (`drop`).

    Raises
    ------
    InputError
        Naming the weight.
    """
    seen: dict[int, str] = {}
    for layer in anatomy.layers:
        check_no_adapter(layer.block)
        if units.is_gone(layer):
            continue
        left = None if stays is None else stays[layer.index]
        if left == 0:
            check_droppable(layer, units)
        elif left != units.count(layer) and (why := units.fixed(layer)):
            raise InputError(f"{layer.path}: the {units.name} of this model cannot be cut: {why}")
        modules = {id(p.module): p for p in units.projections(layer)}
        for projection in modules.values():
            weight = getattr(projection.module, "weight", None)
            if not isinstance(weight, nn.Parameter) or not weight.is_floating_point() or weight.ndim != 2:
                kind = getattr(weight, "dtype", type(weight).__name__)
                raise InputError(
                    f"{projection.path}.weight ({kind}) is quantised or not a plain matrix: it cannot be cut"
                )
            if weight.device.type == "meta" and not is_away(projection.module):
                raise InputError(f"{projection.path}.weight has no values (meta device): load the model to cut it")
            if id(weight) in seen:
                raise InputError(
                    f"{projection.path}.weight is tied to {seen[id(weight)]}.weight: it cannot be cut alone"
                )
            seen[id(weight)] = projection.path


def cut(layer: LayerAnatomy, units: Units, kept: Sequence[int] | Tensor) -> None:
    """Leave a layer only the units `kept`, in ascending order.

    `layer` describes the weights as they were: look the anatomy up again afterwards.

    Raises
    ------
    InputError
        If the units of this architecture can not be cut, or none would be left.
    """
    output = units.output(layer)
    if not units.inputs(layer) or output is None:
        why = units.fixed(layer) or "there are none"
        raise InputError(f"{layer.path}: the {units.name} of this model cannot be cut: {why}")
    before = output.units
    structure.remember(layer)
    keep_units(units.projections(layer), kept)
    if units is HEADS and layer.attention is not None:
        with torch.device("cpu"):
            for part in layer.per_head:
                _keep_part(part, kept)
        _count_heads(layer.attention, len(torch.as_tensor(kept)) / before, layer.reads_config)


def check_droppable(layer: LayerAnatomy, units: Units) -> None:
    """Refuse an MLP or an attention that can not be set to nothing.

    Raises
    ------
    InputError
        Saying why.
    """
    output = units.output(layer)
    if output is None:
        raise InputError(f"{layer.path}: it has no {_NAMES[units]} that could be dropped")
    if units is HEADS and layer.attention is not None and not _is_child(output.module, layer.attention):
        raise InputError(
            f"{layer.path}: its attention adds to the residual stream and norms it itself, so that it cannot be "
            "dropped: drop MLPs, or cut heads (head_ratio)"
        )


def drop(layer: LayerAnatomy, units: Units) -> None:
    """Set a layer's MLP (neurons) or its attention (heads) to nothing: it is not run, and adds nothing, no bias either.

    `layer` describes the weights as they were: look the anatomy up again afterwards.

    Raises
    ------
    InputError
        If it can not be.
    """
    check_droppable(layer, units)
    if units.is_gone(layer):
        return
    if units is HEADS:
        assert layer.attention is not None
        assert layer.out is not None
        _hollow(layer.attention, [layer.out.module])
        empty_linear(layer.out.module, layer.out.axis)
        _set_sizes(layer.out.module, 0, output=False)
        number = getattr(layer.attention, "layer_idx", None)
        become_nothing(layer.attention, gives=layer.gives, layer=number if isinstance(number, int) else layer.index)
        return
    structure.remember(layer)
    holder = _holder(layer)
    if holder is not None:
        _hollow(holder, [p.module for p in layer.neuron_projections])
    for p in {id(p.module): p for p in layer.neuron_projections}.values():
        empty_linear(p.module, p.axis)
        _set_sizes(p.module, 0, output=p.is_output)
    if holder is not None:
        become_nothing(holder)


def part_parameters(layer: LayerAnatomy, units: Units) -> int:
    """Parameters of a layer's MLP or attention: those that go when it is dropped."""
    if units.output(layer) is None:
        return 0
    holder = layer.attention if units is HEADS else _holder(layer)
    modules = [p.module for p in units.projections(layer)] if holder is None else [holder]
    return sum(p.numel() for p in {id(p): p for m in modules for p in m.parameters()}.values())


_NAMES = {NEURONS: "MLP", HEADS: "attention"}


def _is_child(module: nn.Module, parent: nn.Module) -> bool:
    return any(child is module for child in parent.children())


def _holder(layer: LayerAnatomy) -> nn.Module | None:
    """The module that is the MLP and nothing else, where there is one."""
    skip = len(layer.path) + 1
    parents = {p.path[skip:].rpartition(".")[0] for p in layer.neuron_projections}
    holder = get(layer.block, next(iter(parents))) if len(parents) == 1 and "" not in parents else None
    if holder is None or any(module is layer.attention for module in holder.modules()):
        return None
    return holder


def _hollow(module: nn.Module, stays: Sequence[nn.Module]) -> None:
    """Take all weights out of a module but those of some modules in it."""
    kept = {id(m) for m in stays}
    for name, child in list(module.named_children()):
        if id(child) not in kept and any(True for _ in child.parameters()):
            if any(id(m) in kept for m in child.modules()):
                _hollow(child, stays)
            else:
                delattr(module, name)
    for name in list(module._parameters):
        module._parameters[name] = None


def _count_heads(attention: Any, ratio: float, reads_config: bool) -> None:
    """What an attention knows of its number of heads."""
    for module in attention.modules():
        for name in HEAD_COUNTS:
            value = getattr(module, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                setattr(module, name, round(value * ratio))
    if reads_config:
        config = attention.config
        counts = {n: round(getattr(config, n) * ratio) for n in CONFIG_COUNTS if hasattr(config, n)}
        attention.config = ConfigOfLayer(config, counts)


class ConfigOfLayer:
    """The model's config as one layer sees it: what `own` holds is the layer's, all else stays the model's."""

    def __init__(self, config: Any, own: dict[str, int]) -> None:
        self.__dict__.update(_config=config, own=own, **own)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_config":  # asked by copy and pickle before there is anything
            raise AttributeError(name)
        return getattr(self._config, name)


def keep_neurons(layer: LayerAnatomy, kept: Sequence[int] | Tensor) -> None:
    """Leave a layer only the neurons `kept`: see `cut`."""
    cut(layer, NEURONS, kept)


def keep_heads(layer: LayerAnatomy, kept: Sequence[int] | Tensor) -> None:
    """Leave a layer's attention only the key/value groups `kept`, each with all its query heads: see `cut`."""
    cut(layer, HEADS, kept)


# What attention modules compute from the number of heads when they are built.
HEAD_COUNTS = (
    "num_heads", "num_attention_heads", "n_heads", "n_head", "num_key_value_heads", "num_kv_heads", "embed_dim",
    "split_size", "all_head_size",
)  # fmt: skip
CONFIG_COUNTS = ("num_attention_heads", "num_key_value_heads")


def keep_units(projections: Iterable[Projection], kept: Sequence[int] | Tensor | NDArray[np.int64]) -> None:
    """Leave every weight that holds a part of some units only the units `kept`."""
    with torch.device("cpu"):  # positions are real also where a model is built without memory
        _select(list(projections), kept)


def _select(projections: list[Projection], kept: Sequence[int] | Tensor | NDArray[np.int64]) -> None:
    units = torch.unique(torch.as_tensor(kept, dtype=torch.long))
    by_module: dict[int, list[Projection]] = {}
    for projection in projections:
        by_module.setdefault(id(projection.module), []).append(projection)
        if len(units) == 0 or int(units[0]) < 0 or int(units[-1]) >= projection.units:
            raise InputError(
                f"kept={units.tolist()} must name at least one of {projection.units} units of {projection.path}"
            )
    for group in by_module.values():
        module, axis = group[0].module, group[0].axis
        weight = module.weight
        assert isinstance(weight, Tensor)
        stays = torch.ones(weight.shape[axis], dtype=torch.bool)
        for p in group:  # a fused weight loses the units of each of its parts
            stays[p.start : p.start + p.units * p.size] = False
            stays[p.rows(units)] = True
        index = stays.nonzero().squeeze(1)
        _set(module, "weight", weight.data.index_select(axis, index.to(weight.device)))
        bias = getattr(module, "bias", None)
        if group[0].is_output and isinstance(bias, Tensor):
            _set(module, "bias", bias.data[index.to(bias.device)])
        _set_sizes(module, len(index), output=group[0].is_output)


def _keep_part(part: PerHead, kept: Sequence[int] | Tensor) -> None:
    """Leave what an attention holds for each head beside its projections only the entries of `kept`."""
    thing = getattr(part.owner, part.name)
    groups = torch.unique(torch.as_tensor(kept, dtype=torch.long)).reshape(-1, 1)
    index = (groups * part.size + torch.arange(part.size)).reshape(-1)
    if isinstance(thing, nn.ModuleList):
        setattr(part.owner, part.name, nn.ModuleList(thing[i] for i in index.tolist()))
        return
    _set(part.owner, part.name, thing.data.index_select(0, index.to(thing.device)))
    _set_sizes(part.owner, len(index), output=True)


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    old = getattr(module, name)
    setattr(module, name, nn.Parameter(value.contiguous(), requires_grad=old.requires_grad))


def _set_sizes(module: nn.Module, size: int, *, output: bool) -> None:
    """Keep the module's own record of its shape true: Linear's two names, Conv1D's nf (out) and nx (in)."""
    for name in ("out_features", "nf") if output else ("in_features", "nx"):
        if hasattr(module, name):
            setattr(module, name, size)


def add_bias(projection: Projection) -> Tensor:
    """The bias of an output projection, made of zeros where there is none."""
    module = projection.module
    bias = getattr(module, "bias", None)
    if isinstance(bias, Tensor):
        return bias
    weight = module.weight
    assert isinstance(weight, Tensor)
    size = weight.shape[1 - projection.axis]
    module.bias = nn.Parameter(weight.new_zeros(size), requires_grad=weight.requires_grad)
    return module.bias


@dataclass
class Refit:
    """New entries of an output projection for the units that stay.

    Attributes
    ----------
    weight : (kept columns, outputs)
    bias : (outputs,), optional
        Instead of the old one.
    ridge : float
        What it was fitted with.
    """

    weight: Tensor
    bias: Tensor | None = None
    ridge: float = 0.0


@dataclass
class Change:
    """What becomes of an output projection: which units stay, and their new weights where it is refitted."""

    kept: Tensor
    refit: Refit | None = None


def write(output: Projection, change: Change) -> None:
    """Write a change into an output projection: new columns for units that stay, zeros for those that go."""
    weight = output.weight()
    device = weight.device
    rows = output.rows(change.kept.cpu()) - output.start
    with torch.no_grad():
        if change.refit is None:
            gone = torch.ones(len(weight), dtype=torch.bool)
            gone[rows] = False
            weight[gone.to(device)] = 0
            if not len(change.kept) and isinstance(bias := getattr(output.module, "bias", None), Tensor):
                bias.zero_()  # nothing is left of it
            return
        new = torch.zeros_like(weight)
        new[rows.to(device)] = change.refit.weight.to(device, weight.dtype)
        weight.copy_(new)
        if change.refit.bias is not None:  # the target is the whole output, old bias included
            bias = add_bias(output)
            bias.copy_(change.refit.bias.to(bias.device, bias.dtype))


@contextmanager
def restored(layers: Sequence[LayerAnatomy], kinds: Sequence[Units] = (NEURONS,)) -> Iterator[None]:
    """Within the block output projections may be written to; afterwards they are as before, whatever happened."""
    modules: list[Any] = [p.module for layer in layers for units in kinds if (p := units.output(layer)) is not None]
    away = [(m, entries(m), getattr(m, "bias", None) is None) for m in modules if is_away(m)]
    saved = [(m, *(_copy(getattr(m, n, None)) for n in ("weight", "bias"))) for m in modules if not is_away(m)]
    try:
        yield
    finally:
        for module, before, plain in away:
            put_back(module, before)
            if plain:
                module.bias = None
        with torch.no_grad():
            for module, weight, bias in saved:
                module.weight.copy_(weight)
                if bias is None:
                    module.bias = None
                else:
                    module.bias.copy_(bias)


def _copy(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach().clone()

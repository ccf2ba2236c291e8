"""Cut neurons and heads out of weights: the tensors get smaller, the modules stay what they are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from llmbrain._validation import InputError
from llmbrain.anatomy.families import Anatomy, LayerAnatomy, Projection


def check_cuttable(anatomy: Anatomy) -> None:
    """Refuse weights that can not be cut: quantised, offloaded, or shared between layers.

    Raises
    ------
    InputError
        Naming the weight.
    """
    seen: dict[int, str] = {}
    for layer in anatomy.layers:
        modules = {id(p.module): p for p in layer.neuron_projections}
        for projection in modules.values():
            weight = getattr(projection.module, "weight", None)
            if not isinstance(weight, nn.Parameter) or not weight.is_floating_point() or weight.ndim != 2:
                kind = getattr(weight, "dtype", type(weight).__name__)
                raise InputError(
                    f"{projection.path}.weight ({kind}) is quantised or not a plain matrix: it cannot be cut"
                )
            if weight.device.type == "meta":
                raise InputError(
                    f"{projection.path}.weight is not in memory (offloaded): load the model whole to cut it"
                )
            if id(weight) in seen:
                raise InputError(
                    f"{projection.path}.weight is tied to {seen[id(weight)]}.weight: it cannot be cut alone"
                )
            seen[id(weight)] = projection.path


def keep_neurons(layer: LayerAnatomy, kept: Sequence[int] | Tensor) -> None:
    """Leave a layer only the neurons `kept`, in this order's ascending form.

    `layer` describes the weights as they were: look the anatomy up again afterwards.
    """
    _keep(layer.neuron_projections, kept)


def keep_heads(layer: LayerAnatomy, kept: Sequence[int] | Tensor) -> None:
    """Leave a layer's attention only the key/value groups `kept`, each with all its query heads.

    Raises
    ------
    InputError
        If the heads of this architecture can not be cut, or none would be left.
    """
    if not layer.heads or layer.out is None or layer.attention is None:
        raise InputError(f"{layer.path}: the heads of this architecture cannot be cut")
    groups = layer.out.units
    _keep((*layer.heads, layer.out), kept)
    ratio = len(torch.as_tensor(kept)) / groups
    for module in (layer.attention, getattr(layer.attention, "self", None)):
        for name in HEAD_COUNTS if module is not None else ():
            value = getattr(module, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                setattr(module, name, round(value * ratio))


# What attention modules compute from the number of heads when they are built.
HEAD_COUNTS = (
    "num_heads", "num_attention_heads", "n_heads", "n_head", "num_key_value_heads", "num_kv_heads", "embed_dim",
    "split_size", "all_head_size",
)  # fmt: skip


def _keep(projections: Iterable[Projection], kept: Sequence[int] | Tensor) -> None:
    with torch.device("cpu"):  # positions are real also where a model is built without memory
        _cut(list(projections), kept)


def _cut(projections: list[Projection], kept: Sequence[int] | Tensor) -> None:
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


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    old = getattr(module, name)
    setattr(module, name, nn.Parameter(value.contiguous(), requires_grad=old.requires_grad))


def _set_sizes(module: nn.Module, size: int, *, output: bool) -> None:
    """Keep the module's own record of its shape true: Linear's two names, Conv1D's nf (out) and nx (in)."""
    for name in ("out_features", "nf") if output else ("in_features", "nx"):
        if hasattr(module, name):
            setattr(module, name, size)


def add_bias(projection: Projection) -> nn.Parameter:
    """The bias of an output projection, made of zeros where there is none."""
    module = projection.module
    bias = getattr(module, "bias", None)
    if isinstance(bias, nn.Parameter):
        return bias
    weight = module.weight
    assert isinstance(weight, Tensor)
    size = weight.shape[1 - projection.axis]
    module.bias = nn.Parameter(weight.new_zeros(size), requires_grad=weight.requires_grad)
    return module.bias

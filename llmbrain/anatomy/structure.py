"""MLPs by the shapes of their weights: of a block that no row of the families describes, and what a row leaves over."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import Tensor, nn

from llmbrain._validation import InputError
from llmbrain.anatomy.layers import LayerAnatomy, Projection, get, is_conv1d, is_linear, projection, sizes

# A part of a block's path that says it is a mixture of experts.
EXPERTS = re.compile(r"^(experts?|.*_experts?|.*_moe|moe_.*|router|router_gate)$")
TOWERS = {"vision_tower", "vision_model", "visual", "audio_tower"}
OUTSIDE = re.compile(r"att(entio)?n|lora|mixer|mamba|ssm|rwkv|xlstm|recurrent|conv", re.IGNORECASE)
STATE_SPACE = re.compile(r"mixer|mamba|ssm|rwkv|xlstm|recurrent", re.IGNORECASE)


def experts(model: nn.Module) -> str:
    """Path of the first experts of a model, or ""; those of a tower for images do not count."""
    for path, module in model.named_modules():
        *parents, name = path.split(".")
        if EXPERTS.match(name) and not TOWERS & set(parents) and any(True for _ in module.parameters()):
            return path
    return ""


def is_state_space(block: nn.Module) -> bool:
    """Whether a block holds a state space or recurrent layer."""
    return any(STATE_SPACE.search(f"{path} {type(module).__name__}") for path, module in block.named_modules())


def mlp_of(
    path: str, down: nn.Module, down_name: str, inputs: Sequence[tuple[nn.Module, str]]
) -> tuple[tuple[Projection, ...], Projection]:
    """What makes the neurons, and what they enter, of the MLP of a block at `path`."""
    width = sizes(down)[0]
    fused = len({id(module) for module, _ in inputs}) < len(inputs)
    projections = [
        projection(module, f"{path}.{name}", width, start=i * width if fused else 0)
        for i, (module, name) in enumerate(inputs)
    ]
    wanted = width * (2 if fused else 1)
    for p in projections:
        if sizes(p.module)[1] != wanted:
            raise InputError(f"{p.path} has {sizes(p.module)[1]} outputs where {wanted} fit {path}.{down_name}")
    return tuple(projections), projection(down, f"{path}.{down_name}", width, out=False)


def _rest(block: nn.Module, paths: Sequence[str]) -> list[tuple[str, Tensor]]:
    """Parameters of the module that holds the MLP, beside those of `paths`; none where the block itself holds it."""
    holders = {path.rpartition(".")[0] for path in paths}
    found: list[tuple[str, Tensor]] = []
    for holder in holders - {""}:
        module = get(block, holder)
        for name, parameter in module.named_parameters() if module is not None else ():
            full = f"{holder}.{name}"
            if not any(full.startswith(f"{path}.") for path in paths):
                found.append((full, parameter))
    return found


def left_over(block: nn.Module, paths: Sequence[str]) -> str:
    """A matrix beside those of a row in the same MLP: then the row does not describe it. Adapters are no part of it."""
    names = [name for name, p in _rest(block, paths) if p.ndim > 1 and not re.search("lora|norm", name, re.I)]
    holder = {path.rpartition(".")[0] for path in paths}
    return next((name for name in names if name.rpartition(".")[0].rpartition(".")[0] in holder), "")


def mixing(block: nn.Module, paths: Sequence[str], width: int) -> str:
    """Why neurons can not be cut: something in the MLP is as wide as they are and mixes them (a norm, say); or ""."""
    for name, parameter in _rest(block, paths):
        if parameter.ndim == 1 and len(parameter) == width:
            return f"{name.rpartition('.')[0]} norms all neurons of the layer together"
    return ""


# -- recognition -----------------------------------------------------------------------------------------------------


def recognize(path: str, blocks: list[nn.Module]) -> list[LayerAnatomy] | None:
    """The layers of a stack whose blocks have one MLP each, by shape."""
    layers = [mlp_by_shape(i, f"{path}.{i}", block) for i, block in enumerate(blocks)]
    known = next((layer for layer in layers if layer is not None), None)
    if known is None:
        return None
    # As wide as the residual stream, an MLP cannot be told by its shape: then it lies where it lies in other blocks.
    names = _names(known)
    layers = [
        layer if layer is not None else _mlp_by_name(i, f"{path}.{i}", block, *names)
        for i, (layer, block) in enumerate(zip(layers, blocks))
    ]
    return [x for x in layers if x is not None] if all(x is not None for x in layers) else None


def remember(layer: LayerAnatomy) -> None:
    """Note in a block where its MLP is, so that it is found again at any width."""
    vars(layer.block)["llmbrain_mlp"] = _names(layer)


def _names(layer: LayerAnatomy) -> tuple[list[str], str]:
    skip = len(layer.path) + 1
    return [p.path[skip:] for p in layer.inputs], layer.down.path[skip:]


def _mlp_by_name(index: int, path: str, block: nn.Module, inputs: Sequence[str], down_name: str) -> LayerAnatomy | None:
    modules = [(get(block, name), name) for name in inputs]
    down = get(block, down_name)
    found = [(m, n) for m, n in modules if m is not None and is_linear(m)]
    if down is None or not is_linear(down) or len(found) < len(modules):
        return None
    inputs_, down_ = mlp_of(path, down, down_name, found)
    return _layer(index, path, block, inputs_, down_)


def mlp_by_shape(index: int, path: str, block: nn.Module) -> LayerAnatomy | None:
    """The one MLP of a block, by the shapes of its linear layers, or None where there is none or more than one."""
    if "llmbrain_mlp" in vars(block):
        return _mlp_by_name(index, path, block, *vars(block)["llmbrain_mlp"])
    linear = [
        (name, module, *sizes(module))
        for name, module in block.named_modules()
        if getattr(getattr(module, "weight", None), "ndim", 0) == 2
        and (isinstance(module, nn.Linear) or is_conv1d(module))
        and not OUTSIDE.search(name)
    ]
    found = []
    for down_name, down, width, hidden in linear:
        ups = [(m, n) for n, m, i, o in linear if n != down_name and i == hidden and o == width]
        fused = [(m, n) for n, m, i, o in linear if n != down_name and i == hidden and o == 2 * width]
        if width != hidden and len(ups) in (1, 2) and not fused:
            found.append((down_name, down, sorted(ups, key=lambda x: "gate" not in x[1])))
        elif width != hidden and len(fused) == 1 and not ups:
            found.append((down_name, down, fused * 2))
    # hidden->width and width->hidden is one MLP; with the two swapped it is the same pair read backwards.
    if len(found) > 1:
        order = [name for name, *_ in linear]  # what makes the neurons is declared before what they enter
        declared = [f for f in found if all(order.index(n) < order.index(f[0]) for _, n in f[2])]
        found = declared or [f for f in found if sizes(f[1])[0] >= sizes(f[1])[1]]
    if len(found) != 1:
        return None
    down_name, down, inputs = found[0]
    return _layer(index, path, block, *mlp_of(path, down, down_name, inputs))


def _layer(index: int, path: str, block: nn.Module, inputs: tuple[Projection, ...], down: Projection) -> LayerAnatomy:
    skip = len(path) + 1
    parent = block.get_submodule(down.path[skip:].rpartition(".")[0])
    act = [
        m for n, m in parent.named_children() if not list(m.parameters()) and re.search("act|gelu|relu|silu", n, re.I)
    ]
    paths = [p.path[skip:] for p in (*inputs, down)]
    fixed = mixing(block, paths, down.units)
    return LayerAnatomy(index, path, block, inputs, down, act[0] if len(act) == 1 else None, neurons_fixed=fixed)

"""What a config says about the shapes of a mixture of experts, and how it says that its layers differ.

As `llmbrain.checkpoints.shapes`: a plain config says it where one can; else ``per_layer_config`` does, for every layer,
and only llmbrain's loader builds it (stock classes build layers alike, which the weights then do not fit).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from llmbrain._validation import InputError
from llmbrain.anatomy.expert_parts import cut_neurons
from llmbrain.anatomy.expert_surgery import COUNTS, cut_experts
from llmbrain.anatomy.experts import ExpertLayer, expert_anatomy
from llmbrain.checkpoints.shapes import OF_EXPERTS, build_empty, own_layers, text_config

WIDTH_KEY = re.compile(r"intermediate|ffn|moe.*(dim|size|width)|expert.*(dim|size|width)")
FAILURES = (ValueError, TypeError, RuntimeError, ZeroDivisionError, InputError)

Shape = dict[str, int]


def _shape(layer: ExpertLayer) -> Shape:
    routed = layer.routed
    numbers = (0, 0) if routed is None else (routed.count, routed.width)
    return dict(zip(OF_EXPERTS, (*numbers, sum(mlp.width for mlp in layer.shared))))


def expert_shapes(model: nn.Module) -> list[Shape]:
    """Routed experts, neurons of each, and neurons that every token passes, of every layer."""
    return [_shape(layer) for layer in expert_anatomy(model).layers]


def shapes_text(model: nn.Module) -> str:
    """The same, for people: ``8 x 96, 6 x 96``."""
    return ", ".join(map(shape_text, expert_shapes(model)))


def shape_text(shape: Shape) -> str:
    """Of one layer: ``12 + 8 x 96`` with a shared expert of 12 neurons."""
    count, width, shared = (shape[name] for name in OF_EXPERTS)
    return " + ".join([str(shared)] * bool(shared) + [f"{count} x {width}"] * bool(count))


def record_expert_shapes(model: nn.Module) -> None:
    """Make a model's config tell the shapes it has now: by its own entries where they can, else by layer."""
    shapes, config = expert_shapes(model), text_config(model.config)
    own = own_layers(model.config)
    config.per_layer_config = own
    entries = plain_entries(type(model), model.config, shapes)
    if entries is not None:
        for name, value in entries.items():
            setattr(config, name, value)
        return
    config.per_layer_config = {i: {**(own or {}).get(i, {}), **shape} for i, shape in enumerate(shapes)}


def plain_entries(model_class: type[nn.Module], config: Any, wanted: list[Shape]) -> dict[str, int] | None:
    """Entries of a config that builds these shapes, or None."""
    try:
        stock = expert_shapes(build_empty(model_class, config))
        if stock == wanted:
            return {}
        entries = {**_counts(config, stock, wanted), **_widths(model_class, config, stock, wanted)}
        trial = copy.deepcopy(config)
        for name, value in entries.items():
            setattr(text_config(trial), name, value)
        return entries if expert_shapes(build_empty(model_class, trial)) == wanted else None
    except FAILURES:  # a config that no model can be built from
        return None


def _counts(config: Any, stock: list[Shape], wanted: list[Shape]) -> dict[str, int]:
    before, after = ({s["routed_experts"] for s in shapes} - {0} for shapes in (stock, wanted))
    if len(before) != 1 or len(after) != 1:
        return {}
    values = vars(text_config(config))
    (old,), (new,) = before, after
    return {name: new for name in COUNTS if type(values.get(name)) is int and values[name] == old != new}


def _widths(model_class: type[nn.Module], config: Any, stock: list[Shape], wanted: list[Shape]) -> dict[str, int]:
    """What each entry that sounds like a width does is seen by doubling it; then it is scaled as what it does is."""
    found: dict[str, int] = {}
    for name, value in vars(text_config(config)).items():
        if type(value) is not int or value < 1 or not WIDTH_KEY.search(name):
            continue
        trial = copy.deepcopy(config)
        setattr(text_config(trial), name, 2 * value)
        try:
            changed = expert_shapes(build_empty(model_class, trial))
        except FAILURES:
            continue
        scales = {
            after[key] / before[key]
            for key in OF_EXPERTS[1:]
            for before, after, other in zip(stock, wanted, changed)
            if before[key] != other[key] and before[key]
        }
        if len(scales) == 1 and scales != {1.0}:
            found[name] = round(value * scales.pop())
    return found


def apply_expert_shapes(model: nn.Module, shapes: Sequence[dict[str, Any]]) -> None:
    """Shrink a freshly built mixture of experts to what its config records; values are meaningless until loaded."""
    for i, shape in enumerate(shapes):
        layer = expert_anatomy(model).layers[i]
        count = layer.routed.count if layer.routed is not None else 0
        if shape.get("routed_experts", count) < count and layer.routed is not None:
            cut_experts(layer.routed, range(shape["routed_experts"]))
            layer = expert_anatomy(model).layers[i]
        before = _shape(layer)
        small = {name: int(shape.get(name, before[name])) for name in OF_EXPERTS}
        if any(small[name] > before[name] or (before[name] and small[name] < 1) for name in OF_EXPERTS):
            raise InputError(f"per_layer_config: {layer.path} cannot have {small}, its config gives {before}")
        if small == before:
            continue
        kept = list(range(small["shared_width"]))
        for expert in range(small["routed_experts"]):
            first = before["shared_width"] + expert * before["expert_width"]
            kept += range(first, first + small["expert_width"])
        cut_neurons(layer, kept)

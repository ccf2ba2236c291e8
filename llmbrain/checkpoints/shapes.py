"""What a config says about the shapes of layers, and how it says that layers differ (`per_layer_config`)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from llmbrain._validation import InputError
from llmbrain.anatomy.families import LayerAnatomy, anatomy
from llmbrain.anatomy.surgery import add_bias, drop, keep_heads, keep_neurons
from llmbrain.anatomy.units import HEADS, NEURONS

# Where the families keep the width of their MLP. BLOOM has none: it is always four times the hidden size.
WIDTH_KEYS = (
    "ffn_hidden_size", "ffn_dim", "n_inner", "hidden_dim", "d_ff", "dff", "dim_ff",
    "block_ff_dim", "decoder_ffn_dim", "encoder_ffn_dim", "d_inner", "intermediate_size",
)  # fmt: skip
TOLD = "_llmbrain_shapes"  # attribute of a model: its shapes, and the config that tells them
RECORD = "llmbrain_pruning"  # attribute of a model: list of dicts, one a cut; `pruning.json` in a folder


def text_config(config: Any) -> Any:
    """The part of a config that describes the language model."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def build_empty(model_class: type[nn.Module], config: Any) -> Any:
    """The model of a config, without memory for its weights (meta device)."""
    from transformers.initialization import no_init_weights

    config = copy.deepcopy(config)
    for part in (config, text_config(config)):
        if isinstance(getattr(part, "dtype", None), str):  # as saving leaves it; some models make tensors of it
            part.dtype = getattr(torch, part.dtype)
    with torch.device("meta"), no_init_weights():
        return model_class(config)


def _shape(layer: LayerAnatomy) -> dict[str, Any]:
    """What may differ between layers, by the names used in `per_layer_config`."""
    shape: dict[str, Any] = {
        "intermediate_size": layer.width,
        "mlp_down_bias": getattr(layer.down.module, "bias", None) is not None,
    }
    if layer.out is not None:
        shape["attention_groups"] = layer.out.units  # not num_key_value_heads: stock code reads that of the whole model
        shape["attention_out_bias"] = getattr(layer.out.module, "bias", None) is not None
    return shape


OF_EXPERTS = ("routed_experts", "expert_width", "shared_width")  # of a mixture of experts
OURS = ("intermediate_size", "mlp_down_bias", "attention_groups", "attention_out_bias", *OF_EXPERTS)
# What `remote-code` says beside them for other programs (vLLM): the same facts by their common names.
STANDARD = ("num_attention_heads", "num_key_value_heads", "head_dim")


def per_layer_entries(config: Any) -> dict[int, dict[str, Any]]:
    """All of a config's `per_layer_config`, as plain dicts, without what `remote-code` repeats for other programs."""
    written = text_config(config).to_dict()
    ours = STANDARD if written.get("allow_global_per_layer_attribute_access") else ()
    found = written.get("per_layer_config") or {}
    return {int(i): {n: v for n, v in entry.items() if n not in ours} for i, entry in found.items()}


def own_layers(config: Any) -> dict[int, dict[str, Any]] | None:
    """What a family itself says of single layers (Gemma 4: the size of its heads); None where it says nothing."""
    own = {i: {n: v for n, v in entry.items() if n not in OURS} for i, entry in per_layer_entries(config).items()}
    return {i: entry for i, entry in own.items() if entry} or None


def stock_config(config: Any) -> Any:
    """Copy of a config without what `record_shapes` says of single layers."""
    config = copy.deepcopy(config)
    text = text_config(config)
    text.per_layer_config = own_layers(config)
    return config


def shapes_of(model_class: type[nn.Module], config: Any) -> list[dict[str, Any]]:
    """The shapes that a plain config builds."""
    return [_shape(layer) for layer in anatomy(build_empty(model_class, config)).layers]


def set_widths(model_class: type[nn.Module], config: Any, widths: Sequence[int]) -> bool:
    """Make a plain config build layers of these widths, if it can say so; whether it could.

    Families keep the width under many names, some derive it from the entry (RecurrentGemma halves it, LFM2 rounds it
    unless told not to), one keeps a list. So an entry is believed only once a model built from it has the widths.
    """
    if not all(widths):
        return False  # no config says of a layer that it has no MLP
    text = text_config(config)
    before = {key: value for key in WIDTH_KEYS if (value := vars(text).get(key, text)) is not text}
    for key, value in before.items():
        attempts: list[dict[str, Any]] = []
        if isinstance(value, (list, tuple)):
            attempts = [{key: list(widths)}]
        elif len(set(widths)) <= 2:  # some families have one layer in so many twice as wide
            attempts = [{key: widths[0]}, *({key: min(widths) * times} for times in (1, 2, 3))]
            if hasattr(text, "block_auto_adjust_ff_dim"):
                attempts.append({key: widths[0], "block_auto_adjust_ff_dim": False})
        for attempt in attempts:
            old = {name: getattr(text, name) for name in attempt}
            _set(text, attempt)
            try:
                if [s["intermediate_size"] for s in shapes_of(model_class, config)] == list(widths):
                    return True
            except (ValueError, TypeError, RuntimeError, ZeroDivisionError):
                pass  # a config that no model can be built from
            _set(text, old)
    return False


def _set(config: Any, entries: dict[str, Any]) -> None:
    for name, value in entries.items():
        setattr(config, name, value)


def record_shapes(model: nn.Module) -> None:
    """Make a model's config tell the shapes it has now.

    Where a plain config can say all of it, it does; else all that differs from a plain model goes to
    `per_layer_config`, for every layer and beside what the family itself says there. The width then is among it, so
    that stock classes refuse the config rather than build another model from it.
    """
    config = text_config(model.config)
    shapes = [_shape(layer) for layer in anatomy(model).layers]
    if vars(model).get(TOLD) == (shapes, config.to_dict()):
        return  # nothing has changed since
    _tell(model, shapes)
    vars(model)[TOLD] = (shapes, config.to_dict())


def _tell(model: nn.Module, shapes: list[dict[str, Any]]) -> None:
    config, own = text_config(model.config), own_layers(model.config)
    config.per_layer_config = own
    trial = copy.deepcopy(model.config)
    stock = shapes_of(type(model), trial)
    if stock == shapes:
        return
    widths = [s["intermediate_size"] for s in shapes]
    if set_widths(type(model), trial, widths) and shapes_of(type(model), trial) == shapes:
        set_widths(type(model), model.config, widths)
        return
    stock = _told_apart(type(model), model.config, widths, stock)
    names = [n for n in OURS if any(s.get(n) != t.get(n) for s, t in zip(shapes, stock))]
    config.per_layer_config = {
        i: {**(own or {}).get(i, {}), **{n: s.get(n, 0) for n in names}} for i, s in enumerate(shapes)
    }


def _told_apart(
    model_class: type[nn.Module], config: Any, widths: list[int], stock: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Let the config's own ``intermediate_size`` be none of the widths: entries equal to it are dropped.

    A stock class that reads it then refuses the config. Else it would build layers of one width, without their biases.
    """
    text = text_config(config)
    value = vars(text).get("intermediate_size")
    if value not in widths:
        return stock
    text.intermediate_size = max([*widths, *(t["intermediate_size"] for t in stock)]) + 1
    try:
        found = shapes_of(model_class, config)
        if all(t["intermediate_size"] >= w for t, w in zip(found, widths)):
            return found
    except (ValueError, TypeError, RuntimeError):
        pass  # the entry means something else
    text.intermediate_size = value
    return stock


def layer_shapes(config: Any) -> list[dict[str, Any]]:
    """What `per_layer_config` says of each layer in our words; an empty list where it says nothing in them."""
    entries = per_layer_entries(config)
    shapes = [{n: v for n, v in entries.get(i, {}).items() if n in OURS} for i in range(max(entries, default=-1) + 1)]
    return shapes if any(shapes) else []


def apply_shapes(model: nn.Module, shapes: list[dict[str, Any]]) -> None:
    """Shrink a freshly built model to the shapes that its config records; the values are meaningless until loaded."""
    layers = anatomy(model).layers
    for layer, shape in zip(layers, shapes):
        width = shape.get("intermediate_size", layer.width)
        if width > layer.width:
            raise InputError(
                f"per_layer_config: {layer.path} cannot have {width} neurons, its config gives {layer.width}"
            )
        if not width:
            drop(layer, NEURONS)
        elif width < layer.width:
            keep_neurons(layer, range(width))
        if layer.out is not None:
            groups = shape.get("attention_groups", layer.out.units)
            if not groups:
                drop(layer, HEADS)
            elif groups < layer.out.units:
                keep_heads(layer, range(groups))
            if groups and shape.get("attention_out_bias"):
                add_bias(layer.out)
        if width and shape.get("mlp_down_bias"):
            add_bias(layer.down)

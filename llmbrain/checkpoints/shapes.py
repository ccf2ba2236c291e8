"""What a config says about the shapes of layers, and how it says that layers differ (`per_layer_config`)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from llmbrain._validation import InputError
from llmbrain.anatomy.families import LayerAnatomy, anatomy
from llmbrain.anatomy.surgery import add_bias, keep_heads, keep_neurons

# Where the families keep the width of their MLP. BLOOM has none: it is always four times the hidden size.
WIDTH_KEYS = ("ffn_hidden_size", "ffn_dim", "n_inner", "hidden_dim", "intermediate_size")  # the special ones first
TOLD = "_llmbrain_shapes"  # attribute of a model: its shapes, and the config that tells them
RECORD = "llmbrain_pruning"  # attribute of a model: list of dicts, one a cut; `pruning.json` in a folder


def text_config(config: Any) -> Any:
    """The part of a config that describes the language model."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def width_key(config: Any) -> str | None:
    """Name of the config entry that sets the MLP width, where the family has one."""
    return next((key for key in WIDTH_KEYS if key in vars(text_config(config))), None)


def build_empty(model_class: type[nn.Module], config: Any) -> Any:
    """The model of a config, without memory for its weights (meta device)."""
    from transformers.initialization import no_init_weights

    with torch.device("meta"), no_init_weights():
        return model_class(copy.deepcopy(config))


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


def stock_config(config: Any) -> Any:
    """Copy of a config without what sets layers apart."""
    config = copy.deepcopy(config)
    text_config(config).per_layer_config = None
    return config


def record_shapes(model: nn.Module) -> None:
    """Make a model's config tell the shapes it has now.

    One width everywhere goes where the family keeps it, so that the config is a plain one; what a plain config can not
    say goes to `per_layer_config`, for every layer.
    """
    config = text_config(model.config)
    shapes = [_shape(layer) for layer in anatomy(model).layers]
    if vars(model).get(TOLD) == (shapes, config.to_dict()):
        return  # nothing has changed since
    config.per_layer_config = None
    key = width_key(config)
    widths = {s["intermediate_size"] for s in shapes}
    if key is not None and len(widths) == 1:
        setattr(config, key, widths.pop())
    stock = [_shape(layer) for layer in anatomy(build_empty(type(model), model.config)).layers]
    names = [n for n in shapes[0] if any(s.get(n) != t.get(n) for s, t in zip(shapes, stock))]
    if names:
        config.per_layer_config = {i: {n: s[n] for n in names} for i, s in enumerate(shapes)}
    vars(model)[TOLD] = (shapes, config.to_dict())


def layer_shapes(config: Any) -> list[dict[str, Any]]:
    """What `per_layer_config` says of each layer; a list of empty dicts where layers do not differ."""
    config = text_config(config)
    known = ("intermediate_size", "mlp_down_bias", "attention_groups", "attention_out_bias")
    if not getattr(config, "is_heterogeneous", False):
        return []
    shapes = [{n: getattr(c, n) for n in known if n in config.per_layer_attributes} for c in config.per_layer_config]
    unknown = set(config.per_layer_attributes) - set(known)
    if unknown:
        raise InputError(f"per_layer_config has {sorted(unknown)}: llmbrain knows {list(known)}")
    return shapes


def apply_shapes(model: nn.Module, shapes: list[dict[str, Any]]) -> None:
    """Shrink a freshly built model to the shapes that its config records; the values are meaningless until loaded."""
    for layer, shape in zip(anatomy(model).layers, shapes):
        width = shape.get("intermediate_size", layer.width)
        if width > layer.width:
            raise InputError(
                f"per_layer_config: {layer.path} cannot have {width} neurons, its config gives {layer.width}"
            )
        if width < layer.width:
            keep_neurons(layer, range(width))
        if layer.out is not None:
            groups = shape.get("attention_groups", layer.out.units)
            if groups < layer.out.units:
                keep_heads(layer, range(groups))
            if shape.get("attention_out_bias"):
                add_bias(layer.out)
        if shape.get("mlp_down_bias"):
            add_bias(layer.down)

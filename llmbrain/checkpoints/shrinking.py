"""Layers that hold nothing any more: ordinary checkpoints leave them out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from llmbrain._validation import InputError
from llmbrain.anatomy.families import LayerAnatomy, anatomy
from llmbrain.anatomy.nothing import Nothing
from llmbrain.anatomy.units import HEADS, NEURONS

PER_LAYER = re.compile("layer|pattern|types")  # config entries that may hold one value a layer


def is_empty(layer: LayerAnatomy) -> bool:
    """Whether both its MLP and its attention were dropped."""
    return NEURONS.is_gone(layer) and HEADS.is_gone(layer)


def blocks_of(layers: Sequence[LayerAnatomy]) -> list[LayerAnatomy]:
    """Layers without those that were dropped whole."""
    return [layer for layer in layers if not is_empty(layer)]


def kept_layers(model: nn.Module, format: str) -> list[int]:
    """Layers that an ordinary checkpoint keeps; those that were dropped whole are left out.

    Raises
    ------
    InputError
        If a layer has lost its MLP or its attention alone, which no plain config says.
    """
    keep = []
    for layer in anatomy(model).layers:
        parts = {"MLP": NEURONS.is_gone(layer), "attention": HEADS.is_gone(layer)}
        if any(parts.values()) and not is_empty(layer):
            gone, stays = sorted(parts, key=lambda name: not parts[name])
            raise InputError(
                f"format={format!r}: layer {layer.index} has lost its {gone} but not its {stays}, which no plain "
                "config says: use 'padded' or 'masked' (plain transformers, with zeros), 'per-layer' or 'remote-code', "
                "or plan whole layers (method='shortgpt')"
            )
        if not is_empty(layer):
            keep.append(layer.index)
    return keep


def shrink_config(config: Any, keep: Sequence[int], n_layers: int) -> None:
    """Let a config (of the language model) say that only the layers `keep` of `n_layers` are there."""
    for name, value in list(vars(config).items()):
        if PER_LAYER.search(name) and isinstance(value, (list, tuple)) and len(value) == n_layers:
            setattr(config, name, [value[i] for i in keep])
    config.num_hidden_layers = len(keep)


def renumber(state: dict[str, Tensor], layers: Sequence[LayerAnatomy]) -> dict[str, Tensor]:
    """Entries of a state dict as if `layers` were all there are; those of other layers go."""
    stack = layers[0].path.rpartition(".")[0] + "."
    number = {str(layer.index): str(i) for i, layer in enumerate(layers)}
    found = {}
    for name, value in state.items():
        if not name.startswith(stack):
            found[name] = value
            continue
        old, _, rest = name.removeprefix(stack).partition(".")
        if old in number:
            found[f"{stack}{number[old]}.{rest}"] = value
    return found


def prefixes_of_nothing(model: nn.Module) -> tuple[str, ...]:
    """What names of weights of dropped parts begin with, in a model that still has them."""
    return tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, Nothing))

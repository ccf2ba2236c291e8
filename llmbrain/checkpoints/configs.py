"""The shapes of a model from its config alone: no weight is read, and none has memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from llmbrain._validation import InputError
from llmbrain.anatomy.experts import has_experts
from llmbrain.checkpoints.bounds import check_config, check_file
from llmbrain.checkpoints.expert_shapes import apply_expert_shapes
from llmbrain.checkpoints.gguf_layout import CONFIG
from llmbrain.checkpoints.gguf_opening import first_line, open_gguf
from llmbrain.checkpoints.gguf_reading import config_of, is_gguf
from llmbrain.checkpoints.loading import model_class_of
from llmbrain.checkpoints.placing import empty_of
from llmbrain.checkpoints.shapes import apply_shapes, layer_shapes, own_layers, text_config

# What transformers raises for configs that make no sense.
_UNREADABLE = (
    ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, AssertionError,
    StrictDataclassError,
)  # fmt: skip


def read_config(source: str | Path) -> Any:
    """The config of a model: a folder, a ``config.json`` (or a file like it), the header of a GGUF, or a hub id.

    Raises
    ------
    FileNotFoundError
        If there is none.
    InputError
        If it cannot be read, or is of no architecture that transformers knows.
    """
    import transformers
    from transformers import AutoConfig

    path = Path(source)
    try:
        if is_gguf(path):
            if not path.is_file():
                raise FileNotFoundError(f"GGUF file {path} does not exist")
            reader = open_gguf(path)
            field = reader.fields.get(CONFIG)
            if field is not None:  # one that llmbrain wrote
                written = json.loads(field.contents())
                check_config(written, path)
                return transformers.CONFIG_MAPPING[written["model_type"]].from_dict(written)
            config = config_of(path, reader)
            config.tie_word_embeddings = all(t.name != "output.weight" for t in reader.tensors)
            config.dtype = torch.float32  # as it is loaded
            return config
        if path.is_dir() and not (path / "config.json").is_file():
            raise FileNotFoundError(f"{path} holds no config.json: it is not a model folder")
        check_file(path)
        return AutoConfig.from_pretrained(str(source))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise FileNotFoundError(
            f"{source} is neither a folder, a config.json nor a GGUF, and not found on the hub: {first_line(error)}"
        ) from error
    except InputError:
        raise
    except _UNREADABLE as error:
        raise InputError(f"{source}: its config cannot be read: {first_line(error)}") from error


def model_of_config(config: Any, dtype: torch.dtype | None = None) -> nn.Module:
    """The model of a config on the meta device, in `dtype` (default its own, else float32).

    Raises
    ------
    InputError
        If it describes no model.
    """
    check_config(config, type(config).__name__)
    try:
        return _built(config, dtype)
    except InputError:
        raise
    except _UNREADABLE as error:
        raise InputError(
            f"config of {type(config).__name__} describes no model: {type(error).__name__}: {first_line(error)}"
        ) from error


def _built(config: Any, dtype: torch.dtype | None) -> nn.Module:
    model_class, shapes = model_class_of(config, False), layer_shapes(config)
    if shapes:
        text_config(config).per_layer_config = own_layers(config)
    model = empty_of(model_class, config, {})
    if shapes:
        (apply_expert_shapes if has_experts(model) else apply_shapes)(model, shapes)
    if hasattr(model, "tie_weights"):
        model.tie_weights()  # type: ignore[operator]
    own = getattr(text_config(config), "dtype", None) or getattr(config, "dtype", None)
    own = getattr(torch, own) if isinstance(own, str) else own
    return model.to(dtype or own or torch.float32)

"""Before the work: whether what will be left of a model can be saved as it was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmbrain._validation import InputError, check_option
from llmbrain.anatomy.experts import has_experts
from llmbrain.checkpoints import FORMATS
from llmbrain.checkpoints.gguf_reading import is_gguf
from llmbrain.checkpoints.gguf_writing import GGUF_TYPES, check_tokenizer, demands, holds_lone_mlps
from llmbrain.pruning.allocate.blocks import WHOLE_LAYERS
from llmbrain.pruning.criteria import CRITERIA
from llmbrain.scanning.manifest import model_id

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase


def check_saving(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, format: str, gguf_type: str = "f16",
    like: str | Path | None = None,
) -> None:  # fmt: skip
    """Whether a format is known, and has a place for this model and its tokenizer.

    Raises
    ------
    InputError
        If not.
    FileNotFoundError
        If `like` is not there.
    """
    check_option("format", format, FORMATS)
    check_option("gguf_type", gguf_type, GGUF_TYPES)
    if format != "gguf":
        if like is not None:
            raise InputError(f"like={str(like)!r} is for format='gguf', this is format={format!r}")
        return
    demands(model)
    if like is not None or gguf_of(model) is None:
        check_tokenizer(model, tokenizer, like)


def gguf_of(model: nn.Module) -> Path | None:
    """The GGUF file that a model was loaded from, if it was and is there."""
    source = Path(model_id(model))
    return source if is_gguf(source) and source.is_file() else None


def is_of_one_width(model: nn.Module, format: str) -> bool:
    """Whether a format asks for one width in all layers of this model."""
    return (format == "uniform" or (format == "gguf" and demands(model)[0])) and not has_experts(model)


def check_alike(model: nn.Module, format: str, allocation: object, protect: Sequence[int] | None) -> None:
    """Whether experts will be as wide in all layers, where a GGUF asks for it.

    Raises
    ------
    InputError
        If not.
    """
    if format == "gguf" and has_experts(model) and (allocation not in (None, "uniform") or protect):
        what = f"protect={list(protect)!r}" if protect else f"allocation={allocation!r}"
        raise InputError(
            f"format='gguf': llama.cpp reads mixtures of experts whose layers are alike, {what} makes them differ: use "
            "allocation='uniform' and protect nothing, or format='per-layer'"
        )


def check_drop_fits(model: nn.Module, drop: Sequence[str], method: str, format: str) -> None:
    """Whether a format has a place for what will be dropped.

    Raises
    ------
    InputError
        If it has none.
    """
    alone = method in CRITERIA and CRITERIA[method].blocks not in ("", WHOLE_LAYERS)
    if (alone or drop) and is_of_one_width(model, format):
        raise InputError(
            f"format={format!r} holds whole layers of one width only, no layer that lacks its MLP or its attention "
            "alone: use method='shortgpt', or another format"
        )
    if format == "gguf" and (alone or "attention" in drop) and not holds_lone_mlps(model):
        raise InputError(
            f"format='gguf': llama.cpp reads no {type(model).__name__} whose layers lack their attention alone: "
            "drop='mlp', or method='shortgpt', or another format"
        )

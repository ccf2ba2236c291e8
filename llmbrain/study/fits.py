"""Before the work: whether what will be left of a model can be saved as it was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmbrain._validation import InputError, check_option
from llmbrain.anatomy.experts import has_experts
from llmbrain.anatomy.families import anatomy
from llmbrain.anatomy.units import HEADS
from llmbrain.checkpoints import FORMATS
from llmbrain.checkpoints.gguf_reading import is_gguf
from llmbrain.checkpoints.gguf_writing import GGUF_TYPES, check_tokenizer, demands, holds_lone_mlps
from llmbrain.checkpoints.shapes import text_config
from llmbrain.hooks.probe import ordinary_ids
from llmbrain.hooks.text import window_length
from llmbrain.pruning.allocate.blocks import WHOLE_LAYERS
from llmbrain.pruning.allocate.budget import Budget
from llmbrain.pruning.allocate.search import ALLOCATIONS
from llmbrain.pruning.criteria import CRITERIA
from llmbrain.pruning.forget.conditions import condition_numbers
from llmbrain.pruning.plan import check_protect
from llmbrain.pruning.repair.propagation import PROBE, propagation_of
from llmbrain.scanning.manifest import model_id
from llmbrain.study.settings import Settings

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase


OF_NEURONS = ("neuron", "gate", "up")  # sites whose units are neurons
PLAIN = ("uniform", "padded", "masked")  # formats of plain transformers classes


def check_asked(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, how: Settings, texts: Sequence[str], n_tokens: int
) -> None:
    """Refuse what the main job would stop at after hours of work.

    Parameters
    ----------
    how : Settings
    texts : sequence of str
        What is read; `n_tokens` of it are scanned.

    Raises
    ------
    InputError
        As the step would that cannot be done.
    """
    check_saving(model, tokenizer, how.format, how.gguf_type, how.like)
    check_drop_fits(model, how.drop or (), how.method, how.format)
    if isinstance(how.n_components, int) and how.n_components > n_tokens:
        raise InputError(
            f"n_components={how.n_components} is more than the data allow: {n_tokens:,} tokens are scanned"
        )
    if (how.keep or how.forget) and not has_experts(model):
        _check_conditions(how, texts)
    if how.site not in OF_NEURONS and not has_experts(model) and "networks" in CRITERIA[how.method].needs:
        raise InputError(
            f"site={how.site!r}: method={how.method!r} needs networks of neurons: record {', '.join(OF_NEURONS)}, or "
            "use another method, such as 'flap'"
        )
    if how.propagation:
        check_carried(model, how.propagation)
    check_cut(
        model, format=how.format, method=how.method, ratio=how.ratio, allocation=how.allocation, protect=how.protect,
        multiple_of=how.multiple_of, head_ratio=how.head_ratio, forget=how.forget, compensate=how.compensate,
    )  # fmt: skip


def check_cut(
    model: nn.Module, *, format: str, method: str, ratio: float | None, allocation: object = None,
    protect: Sequence[int] | None = None, multiple_of: int = 1, head_ratio: float = 0.0,
    forget: Sequence[str] | None = None, compensate: str | None = None,
) -> None:  # fmt: skip
    """Whether a model has what a plan is to remove, and a format a place for what stays; as `plan` and `cut` say it.

    Raises
    ------
    InputError
        If not.
    """
    check_alike(model, format, allocation, protect)
    if has_experts(model) or method not in CRITERIA:
        return
    body = anatomy(model)
    protected = check_protect(protect, len(body.layers))
    if isinstance(allocation, str) and allocation:
        check_option("allocation", allocation, ALLOCATIONS)
    blocks = CRITERIA[method].blocks
    if is_of_one_width(model, format) and not blocks:
        check_one_width(format, allocation, protect, forget)
        names = ("num_attention_heads", "num_key_value_heads", "head_dim")
        if head_ratio and format == "uniform" and not all(hasattr(text_config(model.config), n) for n in names):
            raise InputError(
                f"format='uniform': the config of {type(model).__name__} cannot say that heads are fewer and no wider: "
                "use 'per-layer', 'remote-code', 'padded' or 'masked'"
            )
    elif head_ratio:
        HEADS.check(body, head_ratio)
        Budget.of(HEADS.counts(body), head_ratio, protected, name=HEADS.option)
    if ratio and not forget and not blocks and (allocation is None or isinstance(allocation, str)):
        Budget.of(body.widths, ratio, protected, multiple_of)
    check_bias(model, format, compensate, heads=bool(head_ratio))


def check_carried(model: nn.Module, propagation: float) -> None:
    """Whether the blocks of a model allow what was asked for; seen on a few tokens, drawn."""
    if has_experts(model):
        raise InputError(f"propagation={propagation}: the repair of experts does not know it, use 0")
    windows = ordinary_ids(model, min(PROBE, window_length(model)))[None]
    propagation_of(model, anatomy(model), windows, propagation, compensate="least-squares", sequential=True)


def _check_conditions(how: Settings, texts: Sequence[str]) -> None:
    """Whether texts have the conditions that are to be kept or forgotten."""
    tables = [events for text in texts if (events := getattr(text, "events", None)) is not None]
    names = sorted({str(name) for events in tables for name in events["trial_type"]})
    if not names:
        raise InputError(
            "keep and forget need texts with conditions (Stimulus in Python), which a text file has not: `llmbrain "
            "scan --forget ROWS --retain ROWS` makes a scan that has two, for `llmbrain prune --study`"
        )
    for option in ("keep", "forget"):
        condition_numbers(option, getattr(how, option) or (), names)


def check_one_width(
    format: str, allocation: object, protect: Sequence[int] | None, forget: Sequence[str] | None = None
) -> None:
    """Whether all layers will be as wide, where a format asks for it.

    Raises
    ------
    InputError
        If not.
    """
    if forget:
        raise InputError(f"format={format!r}: forget says itself how wide each layer stays; use per-layer or masked")
    if protect:
        raise InputError(f"format={format!r}: one width everywhere protects no layer; use per-layer or masked")
    if isinstance(allocation, str) and allocation not in ("", "uniform"):
        raise InputError(
            f"format={format!r}: one width everywhere is allocation='uniform', not {allocation!r}; use per-layer or "
            "masked"
        )


def has_place_for_bias(model: nn.Module, format: str, *, heads: bool = False) -> bool:
    """Whether output projections of the smaller model may have a bias: there is one, or the format has a place.

    Parameters
    ----------
    heads : bool
        Whether attentions are refitted too.
    """
    if format == "gguf":
        return not demands(model)[1]
    if format not in PLAIN or has_experts(model):
        return True
    text = text_config(model.config)  # type: ignore[arg-type]
    for layer in anatomy(model).layers:
        for part, entry in ((layer.down, "mlp_bias"), (layer.out if heads else None, "attention_bias")):
            bias = part is None or getattr(part.module, "bias", None) is not None
            if not bias and (format == "uniform" or not hasattr(text, entry)):
                return False
    return True


def check_bias(model: nn.Module, format: str, compensate: str | None, *, heads: bool = False) -> None:
    """Whether a repair that adds biases can be saved in a format.

    Raises
    ------
    InputError
        If it cannot.
    """
    if compensate == "bias" and not has_place_for_bias(model, format, heads=heads):
        raise InputError(
            f"compensate='bias': format={format!r} has no place for biases of {type(model).__name__}: use "
            "compensate='least-squares', or format='per-layer'"
        )


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

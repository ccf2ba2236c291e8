"""GGUF files out: pruned models for llama.cpp, with layers that differ in neurons and heads where it can hold them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llmbrain._files import writing
from llmbrain._validation import InputError, check_option
from llmbrain.anatomy.experts import has_experts
from llmbrain.anatomy.families import LayerAnatomy, anatomy
from llmbrain.anatomy.units import HEADS, NEURONS
from llmbrain.checkpoints import gguf_experts
from llmbrain.checkpoints.gguf_layout import (
    BLOCK,
    CLASS,
    CONFIG,
    K_BLOCK,
    NORM_OF_ATTENTION,
    PROVENANCE,
    ROPE_FACTORS,
    TARGETS,
    WHOLE,
    ZEROS_OF_ATTENTION,
    ZEROS_OF_MLP,
    Target,
    interleave,
    rotary_factors,
)
from llmbrain.checkpoints.gguf_mixtures import Mixture
from llmbrain.checkpoints.gguf_opening import CHECKSUM, EMPTY, seal_gguf
from llmbrain.checkpoints.gguf_tokenizers import check_like, copy_tokenizer, write_tokenizer, write_whole
from llmbrain.checkpoints.shrinking import blocks_of, is_empty

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GGUF_TYPES = ("f32", "f16", "bf16", "q8_0")
_PLAIN = "save as 'padded' (plain transformers)"
_INSTEAD = f"{_PLAIN}, or plan with allocation='uniform' and intercept=False"


def write_gguf(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    path: str | Path,
    *,
    gguf_type: str = "f16",
    like: str | Path | None = None,
    record: dict[str, Any] | None = None,
    check: Callable[[Path], None] | None = None,
    overwrite: bool = True,
) -> Path:
    """Write a model as a GGUF file, whole or not at all.

    Parameters
    ----------
    model : transformers model
        Llama, Mistral, Qwen2, Qwen3 or Gemma 1 to 3 (text), pruned or not; or a mixture of experts whose layers are
        alike, of a family in `llmbrain.checkpoints.gguf_mixtures.MIXTURES`.
    tokenizer : tokenizer or None
        Written where its kind is known for certain; not needed with `like`.
    path : str or Path
        The file.
    gguf_type : {"f32", "f16", "bf16", "q8_0"}
        Of the matrices; norms and biases stay float32. With ``"q8_0"`` a matrix whose rows are no multiple of 32 long
        stays float16.
    like : str or Path, optional
        A GGUF of the dense model, whose tokenizer is taken.
    record : dict, optional
        What was cut; kept in the file under ``llmbrain.pruning``.
    check : function, optional
        Gets the written file before it is put into its place; what it raises keeps it from there.
    overwrite : bool
        Replace a file that is there by then.

    Returns
    -------
    Path

    Raises
    ------
    FileExistsError
        If there is a file by then, and `overwrite` is not set.
    InputError
        If llama.cpp has no place for this model; the message says why and what would work. Nothing is written.
    """
    import gguf

    check_option("gguf_type", gguf_type, GGUF_TYPES)
    path = check_gguf_path(path)
    target = target_of(model)
    fields = check_tokenizer(model, tokenizer, like)
    with writing(path, fresh=not overwrite) as temporary:
        writer = gguf.GGUFWriter(temporary, target.arch)
        try:
            writer.add_string(CHECKSUM, EMPTY)
            _write_keys(writer, model, target, gguf_type)
            vocabulary = _rows(model)
            if fields is not None:
                copy_tokenizer(writer, fields)
            elif tokenizer is not None:
                write_tokenizer(writer, tokenizer, vocabulary)
            if tokenizer is not None:
                write_whole(writer, tokenizer)
            writer.add_string(CONFIG, json.dumps(model.config.to_diff_dict()))  # type: ignore[operator, union-attr]
            writer.add_string(CLASS, type(model).__name__)
            if record is not None:
                writer.add_string(PROVENANCE, json.dumps(record))
            for name, values, kind in tensors_of(model, target, gguf_type):
                writer.add_tensor(name, values, raw_dtype=kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
        seal_gguf(temporary)
        if check is not None:
            check(Path(temporary))
    return path


class _Nowhere:
    """A writer that keeps nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


def check_tokenizer(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, like: str | Path | None
) -> dict[str, Any] | None:
    """Whether a GGUF can have the tokenizer of this model: from `like` (whose fields are given back), or written.

    Raises
    ------
    InputError
        If it can not; saying what to give.
    FileNotFoundError
        If `like` is not there.
    """
    if like is not None:
        return check_like(like, _rows(model), tokenizer)
    if tokenizer is None:
        raise InputError("tokenizer=None: a GGUF needs a tokenizer, or like= a GGUF of the dense model")
    write_tokenizer(_Nowhere(), tokenizer, _rows(model))  # type: ignore[arg-type]
    return None


def _rows(model: nn.Module) -> int:
    return int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]


def check_gguf_path(path: str | Path) -> Path:
    """A GGUF is one file, by whose ending it is known."""
    path = Path(path)
    if path.suffix.lower() != ".gguf":
        raise InputError(f"path={str(path)!r}: a GGUF is one file, whose name must end in .gguf")
    return path


def check_folder_path(path: str | Path, format: str) -> Path:
    """A folder is not called like a GGUF: everything that reads would take it for one.

    Raises
    ------
    InputError
        If it is.
    """
    path = Path(path)
    if path.suffix.lower() == ".gguf":
        raise InputError(f"path={str(path)!r} is the name of a GGUF, format={format!r} a folder: say format='gguf' "
                         "(--format gguf), or give another name")  # fmt: skip
    return path


def target_of(model: nn.Module) -> Target | Mixture:
    """Where llmbrain puts a model in llama.cpp, or why there is no place for it.

    Raises
    ------
    InputError
        If there is none.
    """
    return gguf_experts.mixture_of(model) if has_experts(model) else _dense_target(model)


def _dense_target(model: nn.Module) -> Target:
    config: Any = model.config
    kind = str(config.model_type)
    if kind not in TARGETS or not type(model).__name__.endswith("ForCausalLM"):
        raise InputError(
            f"format='gguf' knows {', '.join(sorted(TARGETS))} language models, not {type(model).__name__}: {_PLAIN}"
        )
    own, other = TARGETS[kind]
    blocks = blocks_of(anatomy(model).layers)
    if all(HEADS.is_gone(layer) for layer in blocks):
        raise InputError(f"format='gguf': no layer of this {kind} model has its attention, which llama.cpp asks for")
    _check_config(model, kind)
    uneven = len({(width_of(layer), *heads_of(i, layer)) for i, layer in enumerate(blocks)}) > 1
    biased = any(_bias(part) for layer in blocks for part in (layer.down, layer.out))
    missing = any(layer.out is None or (layer.n_kv_heads < 1 and not HEADS.is_gone(layer)) for layer in blocks)
    if missing:
        raise InputError(f"format='gguf': the heads of {type(model).__name__} could not be counted")
    if any(HEADS.is_gone(layer) for layer in blocks) and (other is None or other.fused):
        raise InputError(
            f"format='gguf': llama.cpp reads no {kind} model whose layers lack their attention alone: save as 'padded' "
            "(plain transformers), or plan whole layers (method='shortgpt')"
        )
    # qwen2 of llama.cpp takes for granted that all heads together are as wide as the model
    odd = kind == "qwen2" and any(layer.n_heads * layer.head_dim != config.hidden_size for layer in blocks)
    if not uneven and not odd and (not biased or own.output_bias):
        return own
    why = "layers that differ" if uneven else "a bias (the intercept of the repair)"
    if biased and not uneven and getattr(config, "attention_bias", False):
        raise InputError(f"format='gguf': llama.cpp reads no {kind} model with attention_bias=True: {_PLAIN}")
    if other is None:
        raise InputError(f"format='gguf': llama.cpp reads no {kind} model with {why}: {_INSTEAD}")
    if other.fused and (biased or not config.tie_word_embeddings):
        what = "a bias of output projections" if biased else "an output matrix of its own (untied embeddings)"
        raise InputError(f"format='gguf': llama.cpp reads a {kind} model with {why} only without {what}: {_INSTEAD}")
    return other


def width_of(layer: LayerAnatomy) -> int:
    """Neurons that a file gives a layer.

    One without an MLP gets some that are zero: llama.cpp leaves out the attention too where there are none.
    """
    return BLOCK if NEURONS.is_gone(layer) else layer.width


def heads_of(number: int, layer: LayerAnatomy) -> tuple[int, int]:
    """Query and key/value heads that a file gives its block of this number.

    The first one without an attention gets a head that is zero: llama.cpp reads the size of all heads there.
    """
    return (1, 1) if not number and HEADS.is_gone(layer) else (layer.n_heads, layer.n_kv_heads)


def demands(model: nn.Module) -> tuple[bool, bool]:
    """What a GGUF asks of a cut of this model: ``(one width in all layers, no bias on output projections)``.

    Raises
    ------
    InputError
        If llama.cpp has no place for this model at all.
    """
    if has_experts(model):
        gguf_experts.mixture_of(model)
        return True, True
    own = _dense_target(model)
    config: Any = model.config
    other = TARGETS[config.model_type][1]
    if other is None or (other.fused and not config.tie_word_embeddings):
        return True, not own.output_bias
    return False, not other.output_bias


def holds_lone_mlps(model: nn.Module) -> bool:
    """Whether llama.cpp has a place for layers of this model without their attention."""
    config: Any = model.config
    other = TARGETS[config.model_type][1]
    return other is not None and not other.fused


def odd_widths(widths: Sequence[int], gguf_type: str = "f16") -> str | None:
    """Why widths are bad for llama.cpp, or None: blocks of 32 numbers are quantized, and read, at once."""
    odd = [width for width in widths if width % BLOCK]
    if not odd:
        return None
    stays = f"; with {gguf_type} their ffn_down stays float16" if gguf_type == "q8_0" else ""
    return (
        f"{len(odd)} of {len(widths)} layers have a width that is no multiple of {BLOCK}, such as {odd[0]}: llama.cpp "
        f"is slower there, and cannot quantize them{stays}: plan with multiple_of={BLOCK} ({K_BLOCK} for K-quants)"
    )


def _bias(part: Any) -> bool:
    return part is not None and getattr(part.module, "bias", None) is not None


def _check_config(model: nn.Module, kind: str) -> None:
    """What llama.cpp would compute in another way than transformers."""
    config: Any = model.config
    rope = dict(getattr(config, "rope_parameters", None) or {})
    for inner in (rope.get("full_attention", rope) or {}, rope.get("sliding_attention") or {}):
        scaling = inner.get("rope_type", "default")
        if scaling not in ("default", "llama3") or (scaling == "llama3" and kind not in ("llama", "mistral")):
            raise InputError(f"format='gguf': rotary positions of type {scaling!r} are not written: {_PLAIN}")
        if inner.get("partial_rotary_factor", 1.0) != 1.0:
            raise InputError(f"format='gguf': partial_rotary_factor={inner['partial_rotary_factor']} is not written")
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    allowed = ("gelu_pytorch_tanh",) if kind.startswith("gemma") else ("silu", "swish")
    if activation not in allowed:
        raise InputError(f"format='gguf': llama.cpp computes {kind} with {allowed[0]}, this model with {activation!r}")
    window = getattr(config, "sliding_window", None)
    longest = config.max_position_embeddings
    if kind == "mistral" and window is not None and window < longest:
        raise InputError(f"format='gguf': sliding_window={window} below the context of {longest} is not written")
    if kind in ("qwen2", "qwen3") and getattr(config, "use_sliding_window", False):
        raise InputError(f"format='gguf': use_sliding_window=True of {kind} is not written")
    if kind.startswith("gemma"):
        _check_gemma(model, kind)


def _check_gemma(model: nn.Module, kind: str) -> None:
    config: Any = model.config
    if kind in ("gemma", "gemma2") and not config.tie_word_embeddings:
        raise InputError(
            f"format='gguf': llama.cpp reads no {kind} model with an output matrix of its own (untied embeddings): "
            "save as 'padded' (plain transformers)"
        )
    if kind == "gemma":
        return
    every = 2 if kind == "gemma2" else 6
    blocks = blocks_of(anatomy(model).layers)
    wanted = ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(len(blocks))]
    if [config.layer_types[layer.index] for layer in blocks] != wanted:
        raise InputError(f"format='gguf': llama.cpp computes every {every}th layer of {kind} with full attention")
    first = max(blocks, key=lambda layer: layer.head_dim)
    scale, name = first.head_dim, "head_dim"
    if len(blocks) == (46 if kind == "gemma2" else 62):  # by this number llama.cpp knows the 27B models
        scale, name = config.hidden_size / max(first.n_heads, 1), "the hidden size over the heads"
    if config.query_pre_attn_scalar != scale:
        raise InputError(
            f"format='gguf': query_pre_attn_scalar={config.query_pre_attn_scalar}, of a {kind} model of {len(blocks)} "
            f"layers llama.cpp takes {name}, {scale:g}"
        )
    if kind == "gemma2" and not (config.final_logit_softcapping and config.attn_logit_softcapping):
        raise InputError("format='gguf': llama.cpp computes no gemma2 without soft caps of logits and attention")
    if kind == "gemma3_text" and config.attn_logit_softcapping:
        raise InputError(f"format='gguf': attn_logit_softcapping={config.attn_logit_softcapping} of gemma3 is not read")
    if getattr(config, "use_bidirectional_attention", False):
        raise InputError("format='gguf': use_bidirectional_attention=True is not written")


def _write_keys(writer: Any, model: nn.Module, target: Target | Mixture, gguf_type: str) -> None:
    import gguf

    config: Any = model.config
    writer.add_name(Path(str(getattr(config, "_name_or_path", "") or config.model_type)).name)
    file_type = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}[gguf_type]
    writer.add_file_type(gguf.LlamaFileType[file_type])
    if isinstance(target, Mixture):
        gguf_experts.write_entries(writer, model, target)
        return
    layers = blocks_of(anatomy(model).layers)
    first = max(layers, key=lambda layer: layer.head_dim)  # one that has its attention
    rope = dict(config.rope_parameters)
    full = rope.get("full_attention", rope)

    def each(values: list[int]) -> list[int] | int:
        return values if target.per_layer else values[0]

    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(layers))
    writer.add_feed_forward_length(each([width_of(layer) for layer in layers]))
    heads = [heads_of(i, layer) for i, layer in enumerate(layers)]
    writer.add_head_count(each([n for n, _ in heads]))
    writer.add_head_count_kv(each([n for _, n in heads]))
    writer.add_key_length(first.head_dim)
    writer.add_value_length(first.head_dim)
    writer.add_rope_dimension_count(first.head_dim)
    writer.add_rope_freq_base(float(full["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(_rows(model))
    if target.arch in ("gemma2", "gemma3"):
        writer.add_sliding_window(config.sliding_window)
    if target.arch == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if target.arch in ("gemma2", "gemma3") and config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if "sliding_attention" in rope:
        writer.add_float32(f"{target.arch}.rope.freq_base_swa", float(rope["sliding_attention"]["rope_theta"]))


def tensors_of(model: nn.Module, target: Target | Mixture, gguf_type: str) -> Iterator[tuple[str, NDArray[Any], Any]]:
    """``(name, values, quantization)`` of every tensor of a file, in order."""
    config: Any = model.config
    if isinstance(target, Mixture):
        for name, tensor in gguf_experts.tensors(model, target):
            yield _encoded(name, tensor, "f32" if gguf_experts.stays_float(name) else gguf_type)
        factors = _factors(model, gguf_experts.head_size(config))
        if factors is not None:
            yield _encoded(ROPE_FACTORS, factors, gguf_type)
        return
    layers = blocks_of(anatomy(model).layers)
    state = model.state_dict()
    written = set()
    for name, tensor in state.items():
        module, _, suffix = name.rpartition(".")
        if module in WHOLE:
            if module == "lm_head" and config.tie_word_embeddings:
                continue
            yield _encoded(f"{WHOLE[module]}.{suffix}", _shift(tensor, module, target), gguf_type)
            written.add(name)
    for i, layer in enumerate(layers):
        fused: dict[str, list[Tensor]] = {}
        for name, tensor in state.items():
            inner = name.removeprefix(f"{layer.path}.")
            if inner == name:
                continue
            module, _, suffix = inner.rpartition(".")
            if module == NORM_OF_ATTENTION and not heads_of(i, layer)[0]:
                written.add(name)
                continue
            if module not in target.names:
                raise InputError(f"format='gguf': {name} has no place in llama.cpp's {target.arch}: {_INSTEAD}")
            written.add(name)
            value = _shift(tensor, module, target)
            if module.endswith(("q_proj", "k_proj")) and target.interleaved:
                value = interleave(value, layer.head_dim)
            if target.fused and module.endswith(("q_proj", "k_proj", "v_proj")):
                fused.setdefault(suffix, []).append(value)
            else:
                yield _encoded(f"blk.{i}.{target.names[module]}.{suffix}", value, gguf_type)
        zeros = BLOCK if NEURONS.is_gone(layer) else 0
        for name in ZEROS_OF_MLP if zeros else ():
            shape = (config.hidden_size, zeros) if name == ZEROS_OF_MLP[-1] else (zeros, config.hidden_size)
            yield _encoded(f"blk.{i}.{name}.weight", torch.zeros(shape), gguf_type)
        zeros = max(x.head_dim for x in layers) if HEADS.is_gone(layer) and heads_of(i, layer)[0] else 0
        for name in ZEROS_OF_ATTENTION if zeros else ():
            shape = (config.hidden_size, zeros) if name == ZEROS_OF_ATTENTION[-1] else (zeros, config.hidden_size)
            yield _encoded(f"blk.{i}.{name}.weight", torch.zeros(shape), gguf_type)
        for suffix, parts in fused.items():
            yield _encoded(f"blk.{i}.attn_qkv.{suffix}", torch.cat(parts), gguf_type)
    factors = _factors(model, max(layer.head_dim for layer in layers))
    if factors is not None:
        yield _encoded(ROPE_FACTORS, factors, gguf_type)
    empty = tuple(f"{layer.path}." for layer in anatomy(model).layers if is_empty(layer))
    written |= {name for name in state if name.startswith(empty)}  # norms that nothing reads
    left = sorted(set(state) - written - ({"lm_head.weight"} if config.tie_word_embeddings else set()))
    if left:
        raise InputError(f"format='gguf': {left[0]} has no place in llama.cpp's {target.arch}: {_INSTEAD}")


def _shift(tensor: Tensor, module: str, target: Target) -> Tensor:
    is_norm = module.endswith(("norm", "layernorm"))
    return tensor.float() + 1 if is_norm and target.shifted_norms else tensor


def _factors(model: Any, head_dim: int) -> Tensor | None:
    rope = dict(model.config.rope_parameters)
    if rope.get("rope_type", "default") != "llama3":
        return None
    return rotary_factors(model.model.rotary_emb.inv_freq, float(rope["rope_theta"]), head_dim)


def _encoded(name: str, tensor: Tensor, gguf_type: str) -> tuple[str, NDArray[Any], Any]:
    import gguf

    values = tensor.detach().float().cpu().contiguous().numpy()
    if values.ndim < 2:
        return name, values, gguf.GGMLQuantizationType.F32
    kind = gguf_type
    if kind == "q8_0" and values.shape[-1] % BLOCK:
        kind = "f16"
    if kind == "f16" and np.abs(values).max(initial=0) > np.finfo(np.float16).max:
        raise InputError(f"gguf_type={gguf_type!r}: {name} holds values beyond float16: use 'bf16' or 'f32'")
    quantization = gguf.GGMLQuantizationType[kind.upper()]
    if kind == "f32":
        return name, values, quantization
    if kind == "f16":
        return name, values.astype(np.float16), quantization
    return name, gguf.quants.quantize(values, quantization), quantization

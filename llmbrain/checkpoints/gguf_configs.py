"""Configs of GGUF files that other programs wrote: what transformers does not take from their keys."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llmbrain._validation import InputError
from llmbrain.checkpoints.gguf_layout import ROPE_FACTORS, rotary_factors

if TYPE_CHECKING:
    from transformers import PretrainedConfig

LLAMA3_ROPE = tuple(
    {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 8192} for factor in (8.0, 32.0, 16.0)
)  # fmt: skip
NEEDED = ("context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count",
          "attention.layer_norm_rms_epsilon")  # fmt: skip
THETA = 10000.0  # base of the rotary positions, where a file does not say it
FAMILIES = ("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3")  # architectures whose keys are all looked at
HEADS_BY_HIDDEN = {"gemma2": 46, "gemma3": 62}  # layers of models whose queries are scaled by hidden size over heads


def config_of_gemma(path: Path, fields: Mapping[str, Any], shapes: Mapping[str, Any]) -> PretrainedConfig:
    """The config of a file of the first Gemma, which transformers does not read."""
    from transformers import GemmaConfig

    own = _keys_of(fields, "gemma")
    _check_keys(path, own, "gemma")
    if "token_embd.weight" not in shapes:
        raise InputError(f"{path} lacks the tensor token_embd.weight: load its transformers folder")
    entries = ("max_position_embeddings", "hidden_size", "num_hidden_layers", "intermediate_size",
               "num_attention_heads", "rms_norm_eps")  # fmt: skip
    found = {entry: own[key] for key, entry in zip(NEEDED, entries)}
    heads = int(found["num_attention_heads"])
    ids = {f"{role}_token_id": fields.get(f"tokenizer.ggml.{name}_token_id")
           for role, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))}  # fmt: skip
    return GemmaConfig(
        **found | ids, vocab_size=int(shapes["token_embd.weight"][-1]),
        num_key_value_heads=own.get("attention.head_count_kv", heads),
        head_dim=own.get("attention.key_length", found["hidden_size"] // max(heads, 1)),
        rope_parameters={"rope_type": "default", "rope_theta": float(own.get("rope.freq_base", THETA))},
        tie_word_embeddings="output.weight" not in shapes,
    )  # fmt: skip


def as_llama(config: PretrainedConfig) -> PretrainedConfig:
    """Of a file that is called ``mistral`` transformers makes a Mistral, whose tensors it then does not find."""
    if config.model_type != "mistral":
        return config
    from transformers import LlamaConfig

    return LlamaConfig(**{k: v for k, v in config.to_dict().items() if k not in ("model_type", "sliding_window")})


def complete(
    path: Path, reader: Any, fields: Mapping[str, Any], architecture: str, config: PretrainedConfig,
    shapes: Mapping[str, Any],
) -> None:  # fmt: skip
    """Put into a config what its file says and transformers passes over.

    Parameters
    ----------
    fields : mapping
        Keys of the file.
    shapes : mapping
        Of its tensors, by their names.

    Raises
    ------
    InputError
        If it says what no config can.
    """
    own = _keys_of(fields, architecture)
    if architecture in FAMILIES:
        _check_keys(path, own, architecture)
        if "token_embd.weight" in shapes:  # there may be more rows than tokens
            config.vocab_size = int(shapes["token_embd.weight"][-1])
        _set_heads(path, own, config)
        if "rope.freq_base" not in own:
            _set_theta(config)
    if architecture == "llama":
        config.attention_bias = any(name.endswith("attn_q.bias") for name in shapes)
        config.mlp_bias = any(name.endswith("ffn_up.bias") for name in shapes)
    if architecture in ("gemma2", "gemma3"):
        _set_gemma(path, own, architecture, config)
    set_scaling(path, fields, architecture, config)
    set_factors(path, reader, config)


def _keys_of(fields: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    """The keys of an architecture, without its name in front."""
    prefix = f"{architecture}."
    return {key.removeprefix(prefix): value for key, value in fields.items() if key.startswith(prefix)}


def _check_keys(path: Path, own: Mapping[str, Any], architecture: str) -> None:
    """Refuse a file without a key for which a default of transformers would stand in."""
    lacking = [key for key in NEEDED if key not in own]
    if lacking:
        raise InputError(f"{path} lacks the key {architecture}.{lacking[0]}: load its transformers folder")
    for key, least in (("attention.layer_norm_rms_epsilon", 0.0), ("rope.freq_base", 0.0),
                       ("rope.scaling.factor", None), ("rope.scale_linear", None)):  # fmt: skip
        value = float(own.get(key, 1.0))
        if not math.isfinite(value) or value < 0 or value == least:  # a factor of 0 is none
            raise InputError(f"{path}: {architecture}.{key}={value} must be above 0: the file is damaged")


def _set_theta(config: Any) -> None:
    """The base that llama.cpp takes where a file says none."""
    rope = dict(config.rope_parameters)
    if "full_attention" in rope:
        rope["full_attention"] = {**rope["full_attention"], "rope_theta": THETA}
    config.rope_parameters = rope if "full_attention" in rope else rope | {"rope_theta": THETA}


def _set_heads(path: Path, own: Mapping[str, Any], config: Any) -> None:
    """The width of heads, which a file of these families says by itself where it is not the hidden size over them."""
    width = int(own.get("attention.key_length", 0) or getattr(config, "head_dim", None) or 0)
    width = width or int(config.hidden_size) // max(int(config.num_attention_heads), 1)
    turned = int(own.get("rope.dimension_count", width))
    if turned != width:
        raise InputError(f"{path} turns {turned} of the {width} numbers of a head by its position: load its "
                         "transformers folder")  # fmt: skip
    if getattr(config, "head_dim", None) != width:
        config.head_dim = width


def _set_gemma(path: Path, own: Mapping[str, Any], architecture: str, config: Any) -> None:
    """Soft caps, and what queries are scaled by: no file says it, llama.cpp knows it by the number of layers."""
    for key, entry in (("attn_logit_softcapping", "attn_logit_softcapping"),
                       ("final_logit_softcapping", "final_logit_softcapping")):  # fmt: skip
        if key in own:
            setattr(config, entry, float(f"{own[key]:.7g}") or None)
    if "rope.freq_base_swa" in own:
        turns = {kind: dict(rule) for kind, rule in config.rope_parameters.items()}
        turns["sliding_attention"]["rope_theta"] = float(own["rope.freq_base_swa"])
        config.rope_parameters = turns
    pattern = own.get("attention.sliding_window_pattern")
    usual = 2 if architecture == "gemma2" else 6
    if pattern is not None and pattern != usual:
        raise InputError(
            f"{path} has full attention in other layers than every {usual}th: load its transformers folder"
        )
    by_hidden, rest = divmod(config.hidden_size, config.num_attention_heads)
    if config.num_hidden_layers == HEADS_BY_HIDDEN[architecture] and not rest:
        config.query_pre_attn_scalar = by_hidden
    elif config.query_pre_attn_scalar != config.head_dim:
        warnings.warn(
            f"{path} does not say what queries are scaled by: {config.query_pre_attn_scalar} is taken, as transformers "
            f"does; llama.cpp takes the width of heads, {config.head_dim}",
            UserWarning,
            stacklevel=2,
        )


def set_scaling(path: Path, fields: Mapping[str, Any], architecture: str, config: Any) -> None:
    """Rotary positions that are divided by a factor; where a file has one and does not say how, it is so.

    Raises
    ------
    InputError
        If they are scaled in another way.
    """
    factor = fields.get(f"{architecture}.rope.scaling.factor", fields.get(f"{architecture}.rope.scale_linear"))
    factor = float(factor or 1.0)
    kind = str(fields.get(f"{architecture}.rope.scaling.type", "linear" if factor != 1.0 else "none"))
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if kind != "linear" or architecture not in FAMILIES or not rope:
        raise InputError(f"{path} scales its rotary positions ({kind!r}), which a GGUF does not say in full: "
                         "load its transformers folder")  # fmt: skip
    scaled: dict[str, Any] = {"rope_type": "linear", "factor": factor}
    if "full_attention" in rope:  # the others' positions are not divided
        config.rope_parameters = rope | {"full_attention": dict(rope["full_attention"]) | scaled}
    else:
        config.rope_parameters = rope | scaled


def set_factors(path: Path, reader: Any, config: PretrainedConfig) -> None:
    """Llama 3's rotary factors: the file holds them as a tensor, transformers wants the rule that makes them."""
    factors = next((t for t in reader.tensors if t.name == ROPE_FACTORS), None)
    if factors is None:
        return
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    text = config.get_text_config()
    base = dict(text.rope_parameters)
    stored = torch.tensor(np.array(factors.data, dtype=np.float32))
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if torch.equal(stored, torch.ones_like(stored)):
        return
    if stored.shape != (head // 2,):
        raise InputError(f"{path}: {ROPE_FACTORS} has {stored.numel()} values, its heads are {head} wide")
    for rule in LLAMA3_ROPE:
        text.rope_parameters = {**base, **rule}
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](text, torch.device("cpu"))
        if torch.allclose(rotary_factors(scaled, base["rope_theta"], head), stored, rtol=1e-4):
            return
    text.rope_parameters = base
    raise InputError(f"{path}: its rotary factors ({ROPE_FACTORS}) follow no known rule: load its transformers folder")

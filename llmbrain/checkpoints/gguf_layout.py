"""What the tensors and keys of a GGUF file are called, and how its rows lie, for the families that can be written."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 32  # numbers in one block of Q8_0, which are read and quantized at once
K_BLOCK = 256  # the same of K-quants
CONFIG = "llmbrain.config"  # our own key: config.json of the model, so that files of uneven layers open here again
CLASS = "llmbrain.class"
PROVENANCE = "llmbrain.pruning"
ROPE_FACTORS = "rope_freqs.weight"
ZEROS_OF_MLP = ("ffn_gate", "ffn_up", "ffn_down")  # what stands for a part that was dropped; the output comes last
ZEROS_OF_ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_output")
NORM_OF_ATTENTION = "input_layernorm"  # not written where there is no attention

WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_COMMON = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
PRE_NORM = {**_COMMON, "post_attention_layernorm": "ffn_norm"}
SANDWICH = {
    **_COMMON,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


@dataclass(frozen=True)
class Target:
    """An architecture of llama.cpp as a place for one family's model.

    Attributes
    ----------
    arch : str
        Its name there.
    names : dict
        Module inside a block to tensor.
    interleaved : bool
        Whether rows of queries and keys go in pairs (2i, 2i + 1) instead of halves (i, i + half).
    output_bias : bool
        Whether ``ffn_down`` and ``attn_output`` may have a bias.
    per_layer : bool
        Whether layers may differ in neurons and heads.
    fused : bool
        Whether queries, keys and values are one tensor.
    shifted_norms : bool
        Whether norms are stored as ``1 + w``.
    """

    arch: str
    names: dict[str, str]
    interleaved: bool = False
    output_bias: bool = False
    per_layer: bool = False
    fused: bool = False
    shifted_norms: bool = False


DECI = Target("deci", PRE_NORM, interleaved=True, output_bias=True, per_layer=True)
OPENELM = Target("openelm", PRE_NORM, per_layer=True, fused=True)
# model_type: (the family's own architecture, the one for uneven layers or biases)
TARGETS: dict[str, tuple[Target, Target | None]] = {
    "llama": (Target("llama", PRE_NORM, interleaved=True, output_bias=True), DECI),
    "mistral": (Target("llama", PRE_NORM, interleaved=True, output_bias=True), DECI),
    "qwen2": (Target("qwen2", PRE_NORM), DECI),
    "qwen3": (Target("qwen3", PRE_NORM), OPENELM),
    "gemma": (Target("gemma", PRE_NORM, shifted_norms=True), None),
    "gemma2": (Target("gemma2", SANDWICH, shifted_norms=True), None),
    "gemma3_text": (Target("gemma3", SANDWICH, shifted_norms=True), None),
}


def interleave(rows: Tensor, head_dim: int) -> Tensor:
    """Rows ``(heads * head_dim, ...)`` from half-split to interleaved rotary order, head by head."""
    half = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return half.transpose(1, 2).reshape(rows.shape)


def split_halves(rows: Tensor, head_dim: int) -> Tensor:
    """The inverse of `interleave`."""
    pairs = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)


def rotary_factors(inverse: Tensor, theta: float, head_dim: int) -> Tensor:
    """How much slower each rotary frequency turns than the plain ``theta ** (-2i / head_dim)``; float32."""
    plain = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    return plain / inverse.float().cpu()

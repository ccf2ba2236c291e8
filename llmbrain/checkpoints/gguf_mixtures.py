"""Mixtures of experts as GGUF files: which families llama.cpp computes as transformers does, and where tensors lie.

Every tensor of a file is a view of one of the model's (rows of a fused matrix, turned, or in another order), so one
table serves both ways: what is written is read out of the view, what is read is copied into it. Each family here was
held against llama.cpp itself. What llama.cpp takes for granted (that gates are normalized, say) must be so in the
config; a model of which it is not so is refused, since llama.cpp would compute something else without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

SOFTMAX, SIGMOID = 1, 2  # llama.cpp's numbers of how gates are made

View = Callable[[Tensor, Any], Tensor]


def whole(value: Tensor, config: Any) -> Tensor:
    """All of it, as it is."""
    return value


def first(value: Tensor, config: Any) -> Tensor:
    """The first half of the rows of a matrix, or of each of several."""
    return value.chunk(2, dim=-2)[0]


def second(value: Tensor, config: Any) -> Tensor:
    """The second half."""
    return value.chunk(2, dim=-2)[1]


def turned(value: Tensor, config: Any) -> Tensor:
    """Rows and columns in each other's place."""
    return value.mT


def turned_first(value: Tensor, config: Any) -> Tensor:
    """The first half of columns, as rows."""
    return first(value.mT, config)


def turned_second(value: Tensor, config: Any) -> Tensor:
    """The second half of columns, as rows."""
    return second(value.mT, config)


def turned_even(value: Tensor, config: Any) -> Tensor:
    """Every other column, as rows."""
    return value.mT[..., 0::2, :]


def turned_odd(value: Tensor, config: Any) -> Tensor:
    """The others."""
    return value.mT[..., 1::2, :]


def even(value: Tensor, config: Any) -> Tensor:
    """Every other entry of a row."""
    return value[..., 0::2]


def odd(value: Tensor, config: Any) -> Tensor:
    """The others."""
    return value[..., 1::2]


def head_size(config: Any) -> int:
    """Numbers of one head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def paired(value: Tensor, config: Any) -> Tensor:
    """Rows of heads in pairs ``(2i, 2i + 1)`` instead of halves ``(i, i + half)``."""
    return value.unflatten(0, (-1, 2, head_size(config) // 2)).transpose(1, 2)


def flat(value: Tensor, config: Any) -> Tensor:
    """A matrix of one row, as that row."""
    return value[0]


def keys_of_latent(value: Tensor, config: Any) -> Tensor:
    """Of the matrix out of the latent space, what makes keys: ``(heads, latent, size)``."""
    parts = value.unflatten(0, (config.num_attention_heads, -1))
    return parts[:, : config.qk_nope_head_dim].mT


def values_of_latent(value: Tensor, config: Any) -> Tensor:
    """Of the same, what makes values: ``(heads, size, latent)``."""
    parts = value.unflatten(0, (config.num_attention_heads, -1))
    return parts[:, config.qk_nope_head_dim :]


Places = Mapping[str, tuple[tuple[str, View], ...]]
"""Name inside a block: tensors of the block in the file, and the view of it that each is."""


def _linear(names: Mapping[str, str], view: View = whole) -> dict[str, tuple[tuple[str, View], ...]]:
    return {
        f"{ours}.{part}": ((f"{theirs}.{part}", view),) for ours, theirs in names.items() for part in ("weight", "bias")
    }


def _same(ours: str, theirs: str) -> dict[str, tuple[tuple[str, View], ...]]:
    return {ours: ((theirs, whole),)}


def _mlp(ours: str, suffix: str = "") -> dict[str, tuple[tuple[str, View], ...]]:
    return {f"{ours}.{part}_proj.weight": ((f"ffn_{part}{suffix}.weight", whole),) for part in ("gate", "up", "down")}


def _experts(ours: str) -> dict[str, tuple[tuple[str, View], ...]]:
    return {
        f"{ours}.gate_up_proj": (("ffn_gate_exps.weight", first), ("ffn_up_exps.weight", second)),
        f"{ours}.down_proj": (("ffn_down_exps.weight", whole),),
    }


_NORMS = {
    **_same("input_layernorm.weight", "attn_norm.weight"),
    **_same("post_attention_layernorm.weight", "ffn_norm.weight"),
}
_SIDES = _linear({"self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output"})
_HALVES = {**_NORMS, **_SIDES, **_linear({"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k"})}
_PAIRED = {**_NORMS, **_SIDES, **_linear({"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k"}, paired)}
_QK_NORMS = {
    **_same("self_attn.q_norm.weight", "attn_q_norm.weight"),
    **_same("self_attn.k_norm.weight", "attn_k_norm.weight"),
}
_ROUTER = _same("mlp.gate.weight", "ffn_gate_inp.weight")
_CORRECTION = _same("mlp.gate.e_score_correction_bias", "exp_probs_b.bias")
_LATENT = {
    **_NORMS,
    **_linear({
        "self_attn.q_proj": "attn_q", "self_attn.q_a_proj": "attn_q_a", "self_attn.q_b_proj": "attn_q_b",
        "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa", "self_attn.o_proj": "attn_output",
    }),
    **_same("self_attn.q_a_layernorm.weight", "attn_q_a_norm.weight"),
    **_same("self_attn.kv_a_layernorm.weight", "attn_kv_a_norm.weight"),
    "self_attn.kv_b_proj.weight": (("attn_k_b.weight", keys_of_latent), ("attn_v_b.weight", values_of_latent)),
}  # fmt: skip


@dataclass(frozen=True)
class Mixture:
    """An architecture of llama.cpp as a place for one family of mixtures.

    Attributes
    ----------
    arch : str
        Its name there.
    places : dict
        See `Places`.
    keys : dict
        Key of the file, without the architecture: entry of the config.
    granted : dict
        Entry of the config: what llama.cpp takes for granted of it.
    always : dict
        Keys that are the same in every file of the family.
    biases : tuple of str
        Linear layers of a block that may have a bias in llama.cpp.
    output : bool
        Whether the output matrix must be in the file, also where it is that of the embedding.
    square : bool
        Whether all heads together must be as wide as the model.
    shared : {"", "free", "times"}
        How wide shared experts may be: there are none, as wide as the file says, or a whole number of experts.
    leading : bool
        Whether the first blocks may be dense.
    factors : bool
        Whether Llama 3's rotary factors are read.
    yarn : bool
        Whether YaRN of its rotary positions was held against llama.cpp.
    check : function, optional
        Gives the reason why llama.cpp would compute a config in another way, or "".
    """

    arch: str
    places: Places
    keys: Mapping[str, str]
    granted: Mapping[str, object] = field(default_factory=dict)
    always: Mapping[str, object] = field(default_factory=dict)
    biases: tuple[str, ...] = ()
    output: bool = False
    square: bool = False
    shared: str = ""
    leading: bool = False
    factors: bool = False
    yarn: bool = False
    check: Callable[[Any], str] | None = None


_KEYS = {
    "context_length": "max_position_embeddings", "embedding_length": "hidden_size", "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads", "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "vocab_size": "vocab_size", "expert_used_count": "num_experts_per_tok",
}  # fmt: skip
_HEADS = {"attention.head_count_kv": "num_key_value_heads"}
_LOCAL = {**_KEYS, **_HEADS, "expert_count": "num_local_experts", "feed_forward_length": "intermediate_size"}
_QWEN = {
    **_KEYS, **_HEADS, "expert_count": "num_experts", "feed_forward_length": "intermediate_size",
    "expert_feed_forward_length": "moe_intermediate_size",
}  # fmt: skip
_ROUTED = {
    **_KEYS, "expert_count": "n_routed_experts", "feed_forward_length": "intermediate_size",
    "expert_feed_forward_length": "moe_intermediate_size", "expert_shared_count": "n_shared_experts",
    "leading_dense_block_count": "first_k_dense_replace", "expert_weights_scale": "routed_scaling_factor",
}  # fmt: skip
_LATENT_KEYS = {
    **_ROUTED, "attention.kv_lora_rank": "kv_lora_rank", "attention.q_lora_rank": "q_lora_rank",
    "rope.dimension_count": "qk_rope_head_dim", "attention.value_length_mla": "v_head_dim",
}  # fmt: skip
_SCALES = {
    "attention.scale": "attention_multiplier", "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier", "logit_scale": "logits_scaling",
}  # fmt: skip
_WINDOWS = {"use_sliding_window": False}
_ALL = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_SILU = {"hidden_act": "silu"}


def _every_layer(config: Any) -> str:
    return (
        "blocks without experts (mlp_only_layers, decoder_sparse_step)"
        if list(config.mlp_only_layers or ()) or config.decoder_sparse_step != 1
        else ""
    )


def _window(config: Any) -> str:
    window, longest = config.sliding_window, config.max_position_embeddings
    return f"sliding_window={window} below the context of {longest}" if window and window < longest else ""


def _scales(config: Any) -> str:
    zero = [name for name in _SCALES.values() if not getattr(config, name)]
    return f"{zero[0]}=0" if zero else ""


def _turns(config: Any) -> str:
    if not config.sliding_window:
        return f"sliding_window={config.sliding_window}"
    wanted = ["sliding_attention" if i % 2 == 0 else "full_attention" for i in range(config.num_hidden_layers)]
    return "" if list(config.layer_types) == wanted else "layers whose windows do not take turns, a sliding one first"


def _latent(config: Any) -> str:
    if config.rms_norm_eps != 1e-6:
        return f"rms_norm_eps={config.rms_norm_eps} beside the 1e-06 of its latent norms"
    small = config.num_hidden_layers in (26, 27)
    if (config.q_lora_rank is None) != small:
        return f"q_lora_rank={config.q_lora_rank} in {config.num_hidden_layers} layers (26 and 27 have none, others do)"
    if not config.n_shared_experts:
        return "no shared expert"
    return ""


def _latent_v2(config: Any) -> str:
    groups = config.topk_method != "greedy" and (config.topk_group or 0) < (config.n_group or 0)
    return "groups of experts chosen by their best one (topk_method)" if groups else _latent(config)


def _chunked(config: Any) -> str:
    steps, n = config.interleave_moe_layer_step, config.num_hidden_layers
    if list(config.moe_layers) != list(range(steps - 1, n, steps)):
        return f"moe_layers={list(config.moe_layers)} beside interleave_moe_layer_step={steps}"
    rope = [bool((i + 1) % 4) for i in range(n)]
    kinds = ["chunked_attention" if r else "full_attention" for r in rope]
    if [bool(r) for r in config.no_rope_layers] != rope or list(config.layer_types) != kinds:
        return "rotary positions other than in three of four layers"
    chunk, longest = config.attention_chunk_size or 0, config.max_position_embeddings
    if min(chunk, longest) != min(8192, longest):
        return f"attention_chunk_size={config.attention_chunk_size}"
    return ""


_QWEN2 = Mixture(
    "qwen2moe",
    {**_HALVES, **_ROUTER, **_experts("mlp.experts"), **_mlp("mlp.shared_expert", "_shexp"),
     "mlp.shared_expert_gate.weight": (("ffn_gate_inp_shexp.weight", flat),)},
    {**_QWEN, "expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
    {"norm_topk_prob": False, **_WINDOWS, **_SILU}, biases=_ALL[:3], output=True, square=True, shared="free",
    check=_every_layer,
)  # fmt: skip
_GRANITE = Mixture(
    "granitemoe",
    {**_PAIRED, "block_sparse_moe.router.weight": (("ffn_gate_inp.weight", whole),),
     **_experts("block_sparse_moe.experts"),
     "shared_mlp.input_linear.weight": (("ffn_gate_shexp.weight", first), ("ffn_up_shexp.weight", second)),
     "shared_mlp.output_linear.weight": (("ffn_down_shexp.weight", whole),)},
    {**_LOCAL, **_SCALES}, _SILU, factors=True, check=_scales,
)  # fmt: skip
_DEEPSEEK = Mixture(
    "deepseek2",
    {**_LATENT, **_ROUTER, **_CORRECTION, **_experts("mlp.experts"), **_mlp("mlp"),
     **_mlp("mlp.shared_experts", "_shexp")},
    {**_LATENT_KEYS, "expert_weights_norm": "norm_topk_prob"}, {"rope_interleave": True, **_SILU},
    {"attention.head_count_kv": 1, "expert_gating_func": SIGMOID}, shared="times", leading=True, yarn=True,
    check=_latent,
)  # fmt: skip

MIXTURES: dict[str, Mixture] = {
    "mixtral": Mixture(
        "llama", {**_PAIRED, **_ROUTER, **_experts("mlp.experts")}, _LOCAL, _SILU, factors=True, check=_window
    ),
    "qwen2_moe": _QWEN2,
    "qwen3_moe": Mixture(
        "qwen3moe", {**_HALVES, **_QK_NORMS, **_ROUTER, **_experts("mlp.experts")}, _QWEN,
        {"norm_topk_prob": True, **_WINDOWS, **_SILU}, yarn=True, check=_every_layer,
    ),
    "olmoe": Mixture(
        "olmoe", {**_HALVES, **_QK_NORMS, **_ROUTER, **_experts("mlp.experts")},
        {**_LOCAL, "expert_count": "num_experts"}, {"norm_topk_prob": False, "clip_qkv": None, **_SILU},
        output=True, square=True,
    ),
    "granitemoe": _GRANITE,
    "granitemoeshared": Mixture(
        "granitemoe", _GRANITE.places,
        {**_GRANITE.keys, "expert_shared_feed_forward_length": "shared_intermediate_size"}, _SILU, shared="free",
        factors=True, check=_scales,
    ),
    "glm4_moe": Mixture(
        "glm4moe",
        {**_HALVES, **_QK_NORMS, **_same("post_attention_layernorm.weight", "post_attention_norm.weight"), **_ROUTER,
         **_CORRECTION, **_experts("mlp.experts"), **_mlp("mlp"), **_mlp("mlp.shared_experts", "_shexp")},
        {**_ROUTED, **_HEADS, "expert_weights_norm": "norm_topk_prob"}, _SILU, {"expert_gating_func": SIGMOID},
        biases=_ALL[:3], shared="times", leading=True,
    ),
    "gpt_oss": Mixture(
        "gpt-oss",
        {**_HALVES, **_same("post_attention_layernorm.weight", "post_attention_norm.weight"),
         **_same("self_attn.sinks", "attn_sinks.weight"), **_linear({"mlp.router": "ffn_gate_inp"}),
         "mlp.experts.gate_up_proj": (("ffn_gate_exps.weight", turned_even), ("ffn_up_exps.weight", turned_odd)),
         "mlp.experts.gate_up_proj_bias": (("ffn_gate_exps.bias", even), ("ffn_up_exps.bias", odd)),
         "mlp.experts.down_proj": (("ffn_down_exps.weight", turned),),
         "mlp.experts.down_proj_bias": (("ffn_down_exps.bias", whole),)},
        {**_LOCAL, "expert_feed_forward_length": "intermediate_size", "attention.sliding_window": "sliding_window"},
        {"attention_bias": True, "swiglu_alpha": 1.702, "swiglu_limit": 7.0}, biases=_ALL, output=True, yarn=True,
        check=_turns,
    ),
    "deepseek_v2": Mixture(
        "deepseek2", _DEEPSEEK.places, _LATENT_KEYS, _SILU,
        {"attention.head_count_kv": 1, "expert_gating_func": SOFTMAX}, shared="times", leading=True, yarn=True,
        check=_latent_v2,
    ),
    "deepseek_v3": _DEEPSEEK,
    "llama4_text": Mixture(
        "llama4",
        {**_HALVES, "feed_forward.router.weight": (("ffn_gate_inp.weight", whole),), **_mlp("feed_forward"),
         **_mlp("feed_forward.shared_expert", "_shexp"),
         "feed_forward.experts.gate_up_proj": (
             ("ffn_gate_exps.weight", turned_first), ("ffn_up_exps.weight", turned_second)),
         "feed_forward.experts.down_proj": (("ffn_down_exps.weight", turned),)},
        {**_LOCAL, "feed_forward_length": "intermediate_size_mlp", "expert_feed_forward_length": "intermediate_size",
         "interleave_moe_layer_step": "interleave_moe_layer_step"},
        {"attn_temperature_tuning": True, "floor_scale": 8192, "attn_scale": 0.1, **_SILU}, shared="times",
        factors=True, check=_chunked,
    ),
}  # fmt: skip
OTHERWISE = {
    "phimoe": "llama.cpp weights the experts of Phi-MoE by a softmax, transformers by a sparse mixer: they say "
    "different things",
}
"""Families that llama.cpp reads, but computes in another way."""

"""Small random mixtures of experts of the families that llama.cpp reads, with settings of every kind."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers as t
from gguf_models import SHARED
from transformers import AutoModelForCausalLM

PLAIN = {"rope_theta": 1e4, "rope_type": "default"}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {"rope_theta": 500000.0, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
QWEN = {"moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 3}
QWEN2 = {**QWEN, "shared_expert_intermediate_size": 40}
QWEN3 = {**QWEN, "head_dim": 32, "norm_topk_prob": True}
LOCAL = {"num_local_experts": 6, "num_experts_per_tok": 3}
ROUTED = {"moe_intermediate_size": 24, "n_routed_experts": 6, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
LATENT = {**ROUTED, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
          "v_head_dim": 12, "n_shared_experts": 2, "num_key_value_heads": 4}  # fmt: skip
GLM = {**ROUTED, "head_dim": 32, "use_qk_norm": True, "attention_bias": True, "n_shared_experts": 1,
       "routed_scaling_factor": 1.7}  # fmt: skip
OSS = {"num_local_experts": 5, "num_experts_per_tok": 2, "head_dim": 32, "sliding_window": 16,
       "rope_parameters": PLAIN}  # fmt: skip
LLAMA4 = {"intermediate_size_mlp": 56, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16,
          "interleave_moe_layer_step": 2, "num_hidden_layers": 4, "rope_parameters": PLAIN}  # fmt: skip
SCALES = {"embedding_multiplier": 3.0, "residual_multiplier": 0.7, "logits_scaling": 2.0, "attention_multiplier": 0.3}
MIXTURES = {
    "mixtral": (t.MixtralConfig, {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "qwen2_moe": (t.Qwen2MoeConfig, QWEN2),
    "qwen3_moe": (t.Qwen3MoeConfig, QWEN3),
    "olmoe": (t.OlmoeConfig, {"num_experts": 6, "num_experts_per_tok": 3, "num_key_value_heads": 4}),
    "granitemoe": (t.GraniteMoeConfig, {**LOCAL, **SCALES}),
    "granitemoeshared": (t.GraniteMoeSharedConfig, {**LOCAL, "shared_intermediate_size": 20,
                                                    "tie_word_embeddings": True}),
    "glm4_moe": (t.Glm4MoeConfig, GLM),
    "gpt_oss": (t.GptOssConfig, OSS),
    "deepseek_v2": (t.DeepseekV2Config, LATENT),
    "deepseek_v3": (t.DeepseekV3Config, {**LATENT, "n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.5}),
    "llama4_text": (t.Llama4TextConfig, LLAMA4),
}  # fmt: skip
VARIANTS = {
    "mixtral, one expert a token, tied, wide heads": (t.MixtralConfig, {
        "num_local_experts": 4, "num_experts_per_tok": 1, "tie_word_embeddings": True, "head_dim": 32}),
    "qwen2_moe, tied, no biases": (t.Qwen2MoeConfig, {**QWEN2, "qkv_bias": False, "tie_word_embeddings": True}),
    "qwen3_moe, yarn": (t.Qwen3MoeConfig, {**QWEN3, "rope_parameters": YARN}),
    "granitemoe, rotary factors": (t.GraniteMoeConfig, {**LOCAL, "rope_parameters": LLAMA3}),
    "glm4_moe in groups, gates as they are": (t.Glm4MoeConfig, {
        **ROUTED, "n_routed_experts": 9, "num_experts_per_tok": 3, "n_group": 3, "topk_group": 2, "head_dim": 32,
        "first_k_dense_replace": 0, "norm_topk_prob": False, "n_shared_experts": 1}),
    "glm4_moe, tied, no norms of heads": (t.Glm4MoeConfig, {
        **GLM, "tie_word_embeddings": True, "use_qk_norm": False, "n_shared_experts": 2, "first_k_dense_replace": 2}),
    "gpt_oss, yarn": (t.GptOssConfig, {**OSS, "rope_parameters": {**YARN, "truncate": True}}),
    "deepseek_v2, yarn, tied": (t.DeepseekV2Config, {
        **LATENT, "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.7}, "tie_word_embeddings": True}),
    "deepseek_v2, groups that its router does not look at": (t.DeepseekV2Config, {
        **LATENT, "n_group": 3, "topk_group": 1}),
    "deepseek_v2 of 27 layers, queries whole": (t.DeepseekV2Config, {
        **LATENT, "q_lora_rank": None, "num_hidden_layers": 27, "hidden_size": 32, "first_k_dense_replace": 2}),
    "deepseek_v3, yarn, no groups": (t.DeepseekV3Config, {
        **LATENT, "n_group": 1, "topk_group": 1, "norm_topk_prob": False,
        "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}}),
    "llama4_text of 128 experts, tied": (t.Llama4TextConfig, {
        **LLAMA4, "num_local_experts": 128, "use_qk_norm": False, "num_experts_per_tok": 1, "intermediate_size": 8,
        "tie_word_embeddings": True}),
    "llama4_text, rotary factors": (t.Llama4TextConfig, {**LLAMA4, "rope_parameters": LLAMA3}),
}  # fmt: skip


def make(name: str, **options: object) -> torch.nn.Module:
    """A random model whose norms, biases and corrections are not 1 and 0."""
    config, own = {**MIXTURES, **VARIANTS}[name]
    torch.manual_seed(0)
    base = {**SHARED, "intermediate_size": 48}
    model = AutoModelForCausalLM.from_config(config(**{**base, **own, **options})).eval()
    with torch.no_grad():
        for _, value in [*model.named_parameters(), *(b for b in model.named_buffers() if "correction" in b[0])]:
            value.add_(torch.randn_like(value), alpha=0.3 if value.ndim == 1 else 0.08)
    return model


def as_of_others(path: Path, out: Path, **changes: object) -> Path:
    """A copy of a file without what only llmbrain writes, as other programs would write it; `changes` by last names."""
    import gguf

    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith(("llmbrain.", "GGUF.")) or name == "general.architecture":
            continue
        value = changes.get(name.split(".", 1)[-1].replace(".", "_"), field.contents())
        sub = field.types[1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        if value is not None:
            writer.add_key_value(name, value, field.types[0], sub)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out

"""Small random models of the families that llama.cpp reads."""

from __future__ import annotations

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

SHARED = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
          "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0,
          "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
LLAMA3 = {"rope_theta": 500000.0, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip
TURNS = {"full_attention": {"rope_theta": 5e5, "rope_type": "default"},
         "sliding_attention": {"rope_theta": 300.0, "rope_type": "default"}}  # fmt: skip
FAMILIES = {
    "llama": (LlamaConfig, {}),
    "llama3": (LlamaConfig, {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama-biased": (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "mistral": (MistralConfig, {"sliding_window": None}),
    "qwen2": (Qwen2Config, {}),
    "qwen2-wide": (Qwen2Config, {"head_dim": 32}),  # heads that are wider together than the model
    "qwen3": (Qwen3Config, {"head_dim": 16, "tie_word_embeddings": True}),
    "gemma": (GemmaConfig, {"head_dim": 16}),
    "gemma2": (Gemma2Config, {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 32}),
    "gemma3": (Gemma3TextConfig, {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 32,
                                  "num_hidden_layers": 6}),
    "gemma3-capped": (Gemma3TextConfig, {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 32,
                                         "num_hidden_layers": 6, "final_logit_softcapping": 2.0,
                                         "rope_parameters": TURNS, "tie_word_embeddings": False}),
}  # fmt: skip
PROMPT = "Once upon a time, there was a little girl"


class TableGelu(torch.nn.Module):
    """llama.cpp looks GELU up in a table of float16."""

    def forward(self, x):
        return torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()


def make(family: str, **options):
    """A random model whose norms and biases are not 1 and 0."""
    config, own = FAMILIES[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(**SHARED | own | options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3 if parameter.ndim == 1 else 0.05)
    return model

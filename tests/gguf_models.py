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


def by_hand(path, model, *, tokens=None, keys=(), without=(), kind=None, name="small"):
    """A GGUF as another program writes it: by the `gguf` package alone, without anything of llmbrain's.

    `keys` are ``(name, value)`` beside the usual ones, those `without` are left out; `tokens` writes the tokenizer.
    """
    import gguf

    config = model.config
    arch = {"gemma3_text": "gemma3", "mistral": "llama"}.get(config.model_type, config.model_type)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    usual = {
        "context_length": config.max_position_embeddings, "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers, "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads, "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head, "attention.value_length": head, "rope.dimension_count": head,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps), "rope.freq_base": float(rope["rope_theta"]),
    }  # fmt: skip
    if arch in ("gemma2", "gemma3"):
        usual["attention.sliding_window"] = config.sliding_window
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name(name)
    for key, value in {**usual, **dict(keys)}.items():
        if key not in without:
            add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
            add(f"{arch}.{key}", value)
    (tokens or _bytes)(writer, config.vocab_size)
    names = {
        "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "q_norm": "attn_q_norm",
        "k_norm": "attn_k_norm", "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
        "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm",
    }  # fmt: skip
    if arch in ("gemma2", "gemma3"):
        names["post_attention_layernorm"] = "post_attention_norm"
    for full, tensor in model.state_dict().items():
        *_, module, suffix = full.split(".")
        if module == "lm_head" and config.tie_word_embeddings:
            continue
        place = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}.get(module)
        values = tensor.float()
        if arch == "llama" and module in ("q_proj", "k_proj"):  # rows of a head go in pairs
            halves = values.reshape(-1, 2, head // 2, *values.shape[1:])
            values = halves.transpose(1, 2).reshape(values.shape)
        if arch.startswith("gemma") and module.endswith("norm"):
            values = values + 1
        values = values.numpy()
        stored = gguf.GGMLQuantizationType.F32 if kind is None or values.ndim < 2 else kind
        if stored != gguf.GGMLQuantizationType.F32:
            values = gguf.quants.quantize(values, stored)
        writer.add_tensor(
            f"{place or f'blk.{full.split(chr(46))[2]}.{names[module]}'}.{suffix}", values, raw_dtype=stored
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _bytes(writer, size):
    """A SentencePiece tokenizer of bytes, with unused tokens up to the size of the vocabulary."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581"]
    kinds = [2, 3, 3, *[6] * 256, 1] + [5] * (size - len(tokens))
    tokens += [f"[PAD{i}]" for i in range(len(tokens), size)]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)

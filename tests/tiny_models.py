"""Models and tokenizers small enough to be made on the spot: one of each family, random but never trivial.

Biases, norms and embeddings are randomised too: a model whose biases are zero lets wrong code pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

VOCAB = 48
CONTEXT = 64
CHARACTERS = "abcdefghijklmnopqrstuvwxyz .,!?'"  # 32, plus pad, bos and unk


def tiny(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    """The model of family `name` (a key of `MODELS`), in evaluation mode, with seeded random weights.

    `changes` override entries of the config, e.g. ``num_hidden_layers=3``.
    """
    import transformers

    config_class, model_class, options = MODELS[name]
    config = getattr(transformers, config_class)(**{**options, **changes})
    model = getattr(transformers, model_class)._from_config(config).to(dtype)
    randomise(model, seed)
    return model.eval()


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Weights ~ N(0, 0.15), one-dimensional ones (biases, norm gains) shifted by what they were."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter + 0.2 * noise if parameter.ndim == 1 else 0.15 * noise)


_SIZES = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
_LLAMA = {**_SIZES, "num_key_value_heads": 2}
_GPT2 = {
    "vocab_size": VOCAB, "n_positions": CONTEXT, "n_embd": 16, "n_inner": 24, "n_layer": 2, "n_head": 4,
    "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
_ENCODER = {**_SIZES, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
_FALCON = {**_SIZES, "ffn_hidden_size": 24, "alibi": False, "bias": True}

# name -> (config class, model class, config)
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {**_LLAMA, "mlp_bias": True}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**_LLAMA, "sliding_window": None}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _LLAMA),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**_LLAMA, "head_dim": 8}),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {**_LLAMA, "head_dim": 8}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**_LLAMA, "head_dim": 8}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {**_LLAMA, "head_dim": 8}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", _LLAMA),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", _GPT2),
    "opt": ("OPTConfig", "OPTForCausalLM", {**_SIZES, "ffn_dim": 24, "word_embed_proj_dim": 16}),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", _SIZES),
    "bloom": ("BloomConfig", "BloomForCausalLM", {
        "vocab_size": VOCAB, "hidden_size": 16, "n_layer": 2, "n_head": 4, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 1,
    }),
    "falcon": ("FalconConfig", "FalconForCausalLM", {**_FALCON, "multi_query": False, "parallel_attn": True}),
    "falcon_new": ("FalconConfig", "FalconForCausalLM", {
        **_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2,
    }),
    "gptj": ("GPTJConfig", "GPTJForCausalLM", {**_GPT2, "rotary_dim": 4}),
    "phi": ("PhiConfig", "PhiForCausalLM", _SIZES),
    "starcoder2": ("Starcoder2Config", "Starcoder2ForCausalLM", _LLAMA),
    "bert": ("BertConfig", "BertForMaskedLM", _ENCODER),
    "roberta": ("RobertaConfig", "RobertaForMaskedLM", _ENCODER),
    "distilbert": ("DistilBertConfig", "DistilBertForMaskedLM", {
        "vocab_size": VOCAB, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 4, "pad_token_id": 0,
        "max_position_embeddings": CONTEXT,
    }),
    "modernbert": ("ModernBertConfig", "ModernBertForMaskedLM", {
        **_SIZES, "cls_token_id": 1, "sep_token_id": 1, "local_attention": 16,
    }),
    "gpt_neo": ("GPTNeoConfig", "GPTNeoForCausalLM", {
        "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_layers": 2, "num_heads": 4,
        "attention_types": [[["global", "local"], 1]], "max_position_embeddings": CONTEXT, "bos_token_id": 1,
        "eos_token_id": 1,
    }),
    "codegen": ("CodeGenConfig", "CodeGenForCausalLM", {**_GPT2, "rotary_dim": 4}),
    "mpt": ("MptConfig", "MptForCausalLM", {
        "vocab_size": VOCAB, "d_model": 16, "n_heads": 4, "n_layers": 2, "max_seq_len": CONTEXT,
    }),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {**_LLAMA, "num_local_experts": 4}),
}  # fmt: skip


def tiny_tokenizer(*, bos: bool = True, pad: bool = True, unknown: bool = True) -> Any:
    """A fast tokenizer, one token a character, vocabulary within `VOCAB`; ids 0 pad, 1 bos, 2 unk.

    Without `unknown`, characters outside `CHARACTERS` are dropped, as some character models do.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "<unk>", *CHARACTERS])}
    if unknown:
        backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    else:
        backend = Tokenizer(models.BPE(vocabulary, merges=[]))
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"bos_token": "<s>", "unk_token": "<unk>" if unknown else None, "pad_token": "<pad>" if pad else None}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{k: v for k, v in special.items() if v})

"""Every family that transformers offers, made tiny from its config: one generic rule, and a table of what is special.

A row is a model class. `rows` lists them from the tables of transformers itself, so that a new family in a new version
is built and checked without being named here.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any
from unittest import mock

import torch
from torch import nn

VOCAB = 64
CONTEXT = 64

# What a config entry of this name becomes, wherever it occurs.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "n_vocab", "src_vocab_size", "tgt_vocab_size", "decoder_vocab_size"), VOCAB),
    **dict.fromkeys(("t2u_vocab_size", "unit_hifi_gan_vocab_size", "vocab_size_per_layer_input"), VOCAB),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), CONTEXT),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "emb_dim", "word_embed_proj_dim"), 16),
    **dict.fromkeys(("embedding_size", "dim_model", "d_embed", "lru_width", "input_embedding_size"), 16),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "d_ff", "hidden_dim", "ffn_hidden_size"), 24),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "dff", "dim_ff", "d_inner", "feed_forward_size"), 24),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 12),
    **dict.fromkeys(("expert_ffn_hidden_size", "dense_intermediate_size", "intermediate_size_mlp"), 12),
    **dict.fromkeys(("shared_experts_intermediate_size", "moe_shared_expert_intermediate_size"), 12),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_encoder_layers", "depth"), 2),
    **dict.fromkeys(("speech_encoder_layers", "t2u_encoder_layers", "t2u_decoder_layers"), 1),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("swa_num_attention_heads", "speech_encoder_attention_heads"), 4),
    **dict.fromkeys(("t2u_encoder_attention_heads", "t2u_decoder_attention_heads", "attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_groups"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "index_head_dim", "d_kv"), 8),
    **dict.fromkeys(("index_n_heads", "n_mamba_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_d_head", "mamba_head_dim"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size", "mamba_d_ssm"), 16),
    **dict.fromkeys(("hidden_size_per_layer_input", "laurel_rank", "projection_dim"), 8),
    "projector_hidden_size": 16, "vision_hidden_size": 16, "out_hidden_size": 16, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 1, "sep_token_id": 1, "cls_token_id": 1, "mask_token_id": 2,
    "decoder_start_token_id": 1, "type_vocab_size": 2, "rotary_dim": 4, "first_k_dense_replace": 1,
    "global_head_dim": 8, "swa_head_dim": 8, "head_dim": 8, "max_source_positions": CONTEXT,
    "max_target_positions": CONTEXT,
    "forced_eos_token_id": None, "forced_bos_token_id": None, "mamba_n_heads": 4, "mamba_num_heads": 4,
    "image_token_id": 60, "video_token_id": 61, "audio_token_id": 62, "image_token_index": 60, "video_token_index": 61,
    "audio_token_index": 62, "sliding_window": 16, "attention_window_size": 16, "num_nextn_predict_layers": 0,
}  # fmt: skip

_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 0]}}
_MLA = {"num_key_value_heads": 4}
_LINEAR = {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2}

# model_type -> entries that the rule gets wrong; of any model_type, also one that is a part of another.
OVERRIDES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text", "glm4v_text", "glm46v_text", "paddleocr_vl_text",
                     "glm_ocr_text", "qwen2_5_omni_text", "hunyuan_vl_text"), _MROPE),
    "glm4v_moe_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 0, 0]}},
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "qwen4_exp_text"), _LINEAR),
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa",
                     "longcat_flash", "minicpm3", "mistral4", "mistral_large4_text", "youtu"), _MLA),
    "bailing_hybrid": {"num_hidden_layers": 4, "layer_group_size": 2, "num_key_value_heads": 4,
                       "layer_types": ["linear_attention", "full_attention"] * 2},
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 8},
    "cohere_compass_text": {"layer_types": ["full_attention", "full_attention"]},
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "moe"]},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots3_note_text": {"num_key_value_heads": 4},
    "esmc": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8},
    "gemma3n_text": {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "intermediate_size": 24,
                     "layer_types": ["sliding_attention", "full_attention"] * 2,
                     "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "mamba_n_heads": 4, "mamba_d_head": 8},
    "helium": {"head_dim": 4},
    "hunyuan_v1_dense": {"head_dim": 8}, "hunyuan_v1_moe": {"head_dim": 8},
    "ministral": {"head_dim": 8},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "kimi_k25": {}, "kimi_linear": {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2,
                    "linear_head_dim": 8, "linear_num_heads": 2, "num_key_value_heads": 4, "qk_rope_head_dim": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "luke": {"entity_vocab_size": 8, "entity_emb_size": 8},
    "mamba2": {"n_groups": 1, "num_heads": 4, "head_dim": 8, "chunk_size": 8},
    "musicgen_decoder": {"ffn_dim": 24}, "musicgen_melody_decoder": {"ffn_dim": 24},
    "nemotron_h": {"n_groups": 1, "chunk_size": 8, "num_hidden_layers": 4,
                   "layers_block_type": ["mamba", "attention", "mlp", "moe"]},
    "neomme": {"head_dim": 16},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "stablelm": {"qk_layernorm": True},
    "vibevoice_asr": {"acoustic_tokenizer_encoder_config": {"num_filters": 2}},
    "xlm-prophetnet": {}, "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 3, "attention_head_dim": 8, "attention_hidden_size": 32},
    "zamba2": {"num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "mamba"], "n_mamba_heads": 4,
               "chunk_size": 8, "num_key_value_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
    "xlstm": {"num_heads": 2, "chunk_size": 8},
    "rwkv": {"attention_hidden_size": 16},
}  # fmt: skip

# Classes that are no text model or cannot be built tiny; said here, so that none is lost quietly.
_LARGE = "its other parts are large at any size of the text model"
_SHAPE = "the sizes of its positions or states fit no config of ours"
LEFT_OUT: dict[str, str] = {
    "Qwen2_5OmniThinkerForConditionalGeneration": "transformers itself cannot read a padded batch of text with it",
    "GlmOcrForConditionalGeneration": _SHAPE, "PaddleOCRVLForConditionalGeneration": _SHAPE,
    "Step3p7ForConditionalGeneration": _SHAPE, "xLSTMForCausalLM": _SHAPE,
    "VibeVoiceAsrForConditionalGeneration": _LARGE, "Kosmos2_5ForConditionalGeneration": _LARGE,
    "PerceiverForMaskedLM": _LARGE, "JanusForConditionalGeneration": _LARGE,
    "Kosmos2ForConditionalGeneration": _LARGE, "Emu3ForConditionalGeneration": _LARGE,
    "Qwen2VLForConditionalGeneration": _LARGE, "BltForCausalLM": _LARGE,
    "DeepseekVLHybridForConditionalGeneration": _LARGE, "PPFormulaNetForConditionalGeneration": _LARGE,
}  # fmt: skip


def rows() -> dict[str, str]:
    """Model class -> model type, of everything that transformers calls a language model."""
    from transformers.models.auto import modeling_auto as auto

    found: dict[str, str] = {}
    for table in (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    ):
        for model_type, name in table.items():
            found.setdefault(name, model_type)
    return {name: model_type for name, model_type in sorted(found.items()) if name not in LEFT_OUT}


def tiny_config(model_class: type, model_type: str) -> Any:
    """The config of a class with every size made small."""
    from transformers import CONFIG_MAPPING

    config_class = getattr(model_class, "config_class", None) or CONFIG_MAPPING[model_type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return config_class(**_entries(config_class))


def _entries(config_class: Any) -> dict[str, Any]:
    special = OVERRIDES.get(config_class.model_type, {})
    entries: dict[str, Any] = {}
    for f in dataclasses.fields(config_class):
        default = None if f.default is dataclasses.MISSING else f.default
        if f.name in ("head_dim", "sliding_window", "q_lora_rank", "mamba_d_ssm") and default is None:
            continue  # derived, or off: as the family has it
        if f.name in SIZES:
            entries[f.name] = SIZES[f.name]
    if getattr(config_class, "sub_configs", None):
        try:
            default = config_class(**{k: v for k, v in special.items() if k not in config_class.sub_configs})
        except Exception:
            default = config_class
        for name in config_class.sub_configs:
            part = getattr(default, name, None)
            if dataclasses.is_dataclass(part) and not isinstance(part, type):
                entries[name] = {"model_type": part.model_type, **_entries(type(part)), **special.get(name, {})}
    return {**entries, **{k: v for k, v in special.items() if k not in entries or not isinstance(v, dict)}}


def build(name: str, model_type: str, seed: int = 0, **special: dict[str, Any]) -> nn.Module:
    """The model of a row, in evaluation mode, with random weights and gains and biases that are neither 1 nor 0.

    Further entries, by model type, go before those of `OVERRIDES`.
    """
    import transformers

    model_class = getattr(transformers, name)
    with mock.patch.dict(OVERRIDES, {of: {**OVERRIDES.get(of, {}), **entries} for of, entries in special.items()}):
        config = tiny_config(model_class, model_type)
    torch.manual_seed(seed)
    model = model_class._from_config(config) if hasattr(model_class, "_from_config") else model_class(config)
    perturb(model, seed)
    for name, table in model.named_buffers():
        if name.endswith("tid2eid"):  # which experts a token calls: every one is called by some
            count = model.get_submodule(name.removesuffix(".tid2eid")).num_experts
            table.copy_((torch.arange(len(table))[:, None] + torch.arange(table.shape[1])) % count)
    return model.float().eval()


def perturb(model: nn.Module, seed: int = 0) -> None:
    """Matrices ~ N(0, 0.15), vectors (gains, biases) shifted by N(0, 0.2): what is 1 or 0 hides mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(parameter + 0.2 * noise if parameter.ndim < 2 else 0.15 * noise)

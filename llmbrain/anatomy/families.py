"""Where each model family keeps its MLP neurons and its attention heads.

One row of `FAMILIES` describes a family by the paths inside one of its blocks; which axis of a weight the neurons lie
on follows from the class of the module. A model is matched by structure: the first row whose MLP is in every block and
whose attention is in at least one (some stacks attend in some layers only). A model that no row fits is recognised by
the shapes of its linear layers where those are unambiguous, else one error says why not. To teach llmbrain a new
family, add a row; what is special about a family that a row fits goes to the tables below it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn

from llmbrain._validation import InputError
from llmbrain.anatomy import structure
from llmbrain.anatomy.attention import attention_of
from llmbrain.anatomy.family import Family
from llmbrain.anatomy.layers import Anatomy, LayerAnatomy, PerHead, Projection, get
from llmbrain.anatomy.nothing import Nothing
from llmbrain.anatomy.spread import refuse_spread

__all__ = [
    "FAMILIES", "HEADS_FIXED", "REFUSED", "Anatomy", "Family", "LayerAnatomy", "PerHead", "Projection", "anatomy",
    "context_length",
]  # fmt: skip


_LLAMA_MLP: dict[str, Any] = {
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "act": "mlp.act_fn",
}
_FUSED_MLP: dict[str, Any] = {"gate": "mlp.gate_up_proj", "up": "mlp.gate_up_proj", "down": "mlp.down_proj",
              "act": "mlp.activation_fn"}  # fmt: skip
_NEOX_MLP: dict[str, Any] = {"up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h"}
_FF_MLP: dict[str, Any] = {"gate": "feed_forward.gate_proj", "up": "feed_forward.up_proj",
                           "down": "feed_forward.down_proj", "act": "feed_forward.act_fn"}  # fmt: skip
_BERT_MLP: dict[str, Any] = {"up": "intermediate.dense", "down": "output.dense"}
_BERT_ACT: dict[str, Any] = {"act": "intermediate.intermediate_act_fn"}
_BERT_QKV = ("self.query", "self.key", "self.value")
_FUSED_QKV: dict[str, Any] = {"qkv": ("query_key_value",), "qkv_layout": "grouped", "out": "dense"}
_T5: dict[str, Any] = {"attention": "layer.0.SelfAttention", "qkv": ("q", "k", "v"), "out": "o"}

FAMILIES: tuple[Family, ...] = (
    Family("llama (Mistral, Qwen2, Qwen3, Gemma, OLMo, ...)", **_LLAMA_MLP,
           per_head=("sinks", "gate_proj", "gate_bias", "q_layernorm.norms", "k_layernorm.norms")),
    Family("phi3", **_FUSED_MLP, qkv=("qkv_proj",), reads_config=True),
    Family("glm", **_FUSED_MLP),
    Family("llama with other attention (DeepSeek, MiniCPM3, ...)", **_LLAMA_MLP, qkv=()),
    Family("llama with attention named otherwise", **_LLAMA_MLP, attention=""),
    Family("apertus (Arcee, Nemotron, ...)", up="mlp.up_proj", down="mlp.down_proj", act="mlp.act_fn"),
    Family("bamba (Jamba, Falcon-H1, ...)", **_FF_MLP),
    Family("lfm2", gate="feed_forward.w1", up="feed_forward.w3", down="feed_forward.w2", out="out_proj"),
    Family("recurrent_gemma", gate="mlp_block.gate_proj", up="mlp_block.up_proj", down="mlp_block.down_proj",
           act="mlp_block.act_fn", attention="temporal_block"),
    Family("granite hybrid", gate="shared_mlp.input_linear", up="shared_mlp.input_linear",
           down="shared_mlp.output_linear", act="shared_mlp.activation"),
    Family("gpt2", up="mlp.c_fc", down="mlp.c_proj", act="mlp.act", attention="attn", qkv=("c_attn",), out="c_proj"),
    Family("gpt_neo", up="mlp.c_fc", down="mlp.c_proj", act="mlp.act", attention="attn.attention", out="out_proj"),
    Family("opt", up="fc1", down="fc2", act="activation_fn", out="out_proj"),
    Family("gpt_neox", **_NEOX_MLP, act="mlp.act", attention="attention", **_FUSED_QKV),
    Family("bloom", **_NEOX_MLP, act="mlp.gelu_impl", attention="self_attention", **_FUSED_QKV),
    Family("falcon", **_NEOX_MLP, act="mlp.act", attention="self_attention", **_FUSED_QKV),
    Family("persimmon", **_NEOX_MLP, act="mlp.act", attention="self_attn", **_FUSED_QKV),
    Family("gptj", up="mlp.fc_in", down="mlp.fc_out", act="mlp.act", attention="attn", out="out_proj"),
    Family("codegen", up="mlp.fc_in", down="mlp.fc_out", act="mlp.act", attention="attn", qkv=(), out="out_proj"),
    Family("phi", up="mlp.fc1", down="mlp.fc2", act="mlp.activation_fn", out="dense"),
    Family("starcoder2", up="mlp.c_fc", down="mlp.c_proj", act="mlp.act"),
    Family("mpt", up="ffn.up_proj", down="ffn.down_proj", act="ffn.act", attention="attn", qkv=("Wqkv",),
           out="out_proj"),
    Family("ctrl", up="ffn.0", down="ffn.2", act="ffn.1", attention="multi_head_attention", qkv=("Wq", "Wk", "Wv"),
           out="dense"),
    Family("bert (RoBERTa, ELECTRA, ...)", **_BERT_MLP, **_BERT_ACT, attention="attention", qkv=_BERT_QKV,
           out="output.dense"),
    Family("esm", **_BERT_MLP, attention="attention", qkv=_BERT_QKV, out="output.dense"),
    Family("deberta", **_BERT_MLP, **_BERT_ACT, attention="attention", qkv=(), out="output.dense"),
    Family("fnet", **_BERT_MLP, **_BERT_ACT, attention=""),
    Family("distilbert", up="ffn.lin1", down="ffn.lin2", act="ffn.activation", attention="attention",
           qkv=("q_lin", "k_lin", "v_lin"), out="out_lin"),
    Family("modernbert", gate="mlp.Wi", up="mlp.Wi", down="mlp.Wo", act="mlp.act", attention="attn", qkv=("Wqkv",),
           out="Wo"),
    Family("modernbert decoder", gate="mlp.Wi", up="mlp.Wi", down="mlp.Wo", act="mlp.act", attention="attn",
           out="Wo"),
    Family("t5 encoder", up="layer.1.DenseReluDense.wi", down="layer.1.DenseReluDense.wo",
           act="layer.1.DenseReluDense.act", **_T5),
    Family("t5 encoder, gated", gate="layer.1.DenseReluDense.wi_0", up="layer.1.DenseReluDense.wi_1",
           down="layer.1.DenseReluDense.wo", act="layer.1.DenseReluDense.act", **_T5),
    Family("xlnet", up="ff.layer_1", down="ff.layer_2", act="ff.activation_function", attention=""),
)  # fmt: skip

# model_type -> why its heads can not be cut, though they are where its row says.
HEADS_FIXED = {
    "bloom": "its positions (ALiBi) are made for all heads of the model at once",
    "mpt": "its positions (ALiBi) are made for all heads of the model at once",
    "big_bird": "its attention is built anew from the config for short texts",
    "convbert": "convolutions share the width of its heads",
    "diffllama": "its heads work in pairs",
    "led": "its attention has a fixed size",
    "longformer": "its attention has a fixed size",
    "t5": "its positions are made for all heads by the first layer",
    "mt5": "its positions are made for all heads by the first layer",
    "umt5": "its positions are made for all heads of a layer at once",
    "mpnet": "its positions are made for all heads of the model at once",
}

# Config entry -> the same, where the entry is set.
HEADS_FIXED_BY = {
    "alibi": "its positions (ALiBi) are made for all heads of the model at once",
    "num_kv_shared_layers": "keys and values are shared between layers",
    "slow_but_exact": "its output projection is applied in slices",
}

# model_type -> why the model can not be used, where it looks as if it could.
REFUSED = {
    "albert": "all its layers share one set of weights, so no layer has neurons of its own",
    "funnel": "its layers pool tokens, so that a row is no longer a token",
    "mobilebert": "each of its blocks holds several MLPs",
    "reformer": "its MLPs are read in chunks and its layers in reverse",
    "ibert": "its layers hand on numbers with scales (integer arithmetic)",
    "squeezebert": "its layers are grouped convolutions",
    "perceiver": "its rows are latents, not tokens",
    **dict.fromkeys(("idefics", "kosmos-2", "pix2struct", "udop", "pp_formulanet"), "it reads images with every text"),
    **dict.fromkeys(("musicgen_decoder", "musicgen_melody_decoder"), "it reads several codebooks of sound at once"),
    "voxtral_realtime": "it reads speech with every text",
    "hrm_text": "its layers run several times for one token",
}


def anatomy(model: nn.Module, *, spread: bool = False) -> Anatomy:
    """Find the neurons and heads of a model.

    Parameters
    ----------
    model : torch.nn.Module
        A transformers model, or any module built of like blocks in a ``ModuleList``.
    spread : bool
        Take one whose weights are spread over ranks (``tp_plan``), too: sizes are those of the whole.

    Returns
    -------
    Anatomy

    Raises
    ------
    InputError
        If the model is of a kind that has no neurons of its own a layer, or no row of `FAMILIES` fits and the shapes
        are not unambiguous; says why. Or if its weights are spread over ranks.
    """
    if not spread:
        refuse_spread(model, f"model {type(model).__name__}")
    _refuse(model)
    stacks = list(_stacks(model))
    for attending in (True, False):
        for family in FAMILIES:
            if attending != bool(family.attention):
                continue
            fits = [s for s in stacks if _fits(s[1], family)]
            if len(fits) > 1:
                fits = _of_the_decoder(model, fits)
            if len(fits) == 1:
                path, blocks = fits[0]
                return Anatomy(family.name, _layers(model, path, blocks, family))
            if len(fits) > 1:
                raise InputError(
                    f"model {type(model).__name__} has {len(fits)} stacks of {family.name} blocks "
                    f"({', '.join(p for p, _ in fits)}): pass the one to look at, "
                    f"e.g. model.get_submodule('{fits[0][0].rpartition('.')[0]}')"
                )
    found = [recognized for path, blocks in stacks if (recognized := structure.recognize(path, blocks))]
    if len(found) == 1:
        return Anatomy("recognised by structure", found[0])
    raise InputError(_why_not(model, stacks))


def context_length(model: nn.Module) -> int | None:
    """Longest text, in tokens, that the model's positions cover; None where there is no limit."""
    config = _config(model)
    if config is None or getattr(config, "alibi", False) or getattr(config, "model_type", "") == "bloom":
        return None
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")
    length = next((getattr(config, n) for n in names if isinstance(getattr(config, n, None), int)), None)
    if length is None or length <= 0:  # XLNet says -1 for no limit
        return None
    for name, module in model.named_modules():  # RoBERTa counts positions from padding_idx + 1
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(length) - int(module.padding_idx) - 1
    return int(length)


# -- matching by table -----------------------------------------------------------------------------------------------


def _config(model: nn.Module) -> object | None:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _stacks(model: nn.Module) -> Iterator[tuple[str, list[nn.Module]]]:
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module):
            yield path, list(module)


def _has(block: nn.Module, paths: list[str]) -> bool:
    return all(get(block, path) is not None for path in paths)


def _fits(blocks: list[nn.Module], family: Family) -> bool:
    if not all(_has(block, family.mlp_paths()) for block in blocks):
        return False
    if any(structure.left_over(block, family.mlp_paths()) for block in blocks):
        return False
    return not family.attention or any(
        _has(block, family.attention_paths()) or isinstance(get(block, family.attention), Nothing) for block in blocks
    )


def _of_the_decoder(model: nn.Module, fits: list[tuple[str, list[nn.Module]]]) -> list[tuple[str, list[nn.Module]]]:
    """Of several stacks those of the language model, where the model says which that is (towers for images, speech)."""
    ask: Any = getattr(model, "get_decoder", None)
    decoder = ask() if callable(ask) else None
    if not isinstance(decoder, nn.Module) or decoder is model:
        return fits
    inside = {id(m) for m in decoder.modules()}
    return [s for s in fits if id(s[1][0]) in inside] or fits


def _layers(model: nn.Module, path: str, blocks: list[nn.Module], family: Family) -> list[LayerAnatomy]:
    config = _config(model)
    fixed = HEADS_FIXED.get(getattr(config, "model_type", ""), "")
    fixed = fixed or next((why for name, why in HEADS_FIXED_BY.items() if getattr(config, name, None)), "")
    return [_layer(i, f"{path}.{i}", block, family, config, fixed) for i, block in enumerate(blocks)]


def _layer(index: int, path: str, block: nn.Module, family: Family, config: object | None, fixed: str) -> LayerAnatomy:
    def part(name: str) -> nn.Module:
        module = get(block, name)
        assert module is not None  # checked by _fits
        return module

    inputs = [(part(name), name) for name in (family.gate, family.up) if name]
    projections, down = structure.mlp_of(path, part(family.down), family.down, inputs)
    return LayerAnatomy(
        index, path, block, projections, down, part(family.act) if family.act else None,
        neurons_fixed=structure.mixing(block, family.mlp_paths(), down.units) or _thresholded(config, index),
        **attention_of(path, block, family, config, fixed),
    )  # fmt: skip


def _thresholded(config: object | None, layer: int) -> str:
    sparsity = getattr(config, "activation_sparsity_pattern", None)
    share = sparsity[layer] if isinstance(sparsity, (list, tuple)) and layer < len(sparsity) else sparsity
    return "a threshold over all neurons of the layer silences them" if isinstance(share, float) and share > 0 else ""


# -- why not ---------------------------------------------------------------------------------------------------------


def _refuse(model: nn.Module) -> None:
    """Kinds of models that are not read or cut, each for its own reason."""
    name, config = type(model).__name__, getattr(model, "config", None)
    text = _config(model)
    why = REFUSED.get(getattr(text, "model_type", "")) or REFUSED.get(getattr(config, "model_type", ""))
    if why:
        raise InputError(f"model {name} cannot be used: {why}")
    needed = [
        p.name for p in inspect.signature(model.forward).parameters.values()
        if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "input_ids"
    ] if hasattr(model, "save_pretrained") else []  # fmt: skip
    if needed:
        raise InputError(f"model {name} cannot read text alone: its forward pass needs {', '.join(needed)}")
    if getattr(config, "is_encoder_decoder", False) and _has_both(model):
        raise InputError(
            f"model {name} is an encoder-decoder: llmbrain reads one stack of blocks from token ids to the end. Pass "
            "its encoder alone (model.get_encoder()), or a decoder-only or encoder-only model"
        )
    found = structure.experts(model)
    if found:
        raise InputError(
            f"model {name} is a mixture of experts ({found}): its neurons lie in experts, which this does not "
            "take yet (scan, lesion, lesion_table, plan_pruning and prune take experts that transformers' own classes "
            "hold together in one module, and Llama-4's)"
        )


def _has_both(model: nn.Module) -> bool:
    names = {path.rpartition(".")[2] for path, _ in model.named_modules()}
    return "encoder" in names and bool(names & {"decoder", "decoders", "text_decoder", "text_model"})


def _why_not(model: nn.Module, stacks: list[tuple[str, list[nn.Module]]]) -> str:
    name = type(model).__name__
    for path, blocks in stacks:
        without = [i for i, block in enumerate(blocks) if structure.mlp_by_shape(i, f"{path}.{i}", block) is None]
        if without and any(structure.is_state_space(block) for block in blocks):
            return (
                f"model {name}: blocks {without} of {path} hold a state space or recurrent layer and no MLP of their "
                "own: llmbrain needs an MLP in every block"
            )
    for path, blocks in stacks:
        for family in FAMILIES:
            has = [_has(block, family.mlp_paths()) for block in blocks]
            if any(has) and not all(has):
                without = [i for i, h in enumerate(has) if not h]
                return (
                    f"model {name}: blocks {without} of {path} have no MLP as the others have (those of {family.name})"
                )
    return (
        f"model {name} is of no known family and its blocks are ambiguous: looked for a ModuleList of blocks with the "
        f"paths of one of {[f.name for f in FAMILIES]}, or for exactly one MLP a block (linear layers hidden->width, "
        f"width->hidden outside the attention). Found stacks: {[p for p, _ in stacks] or 'none'}. Add a row to "
        "llmbrain.anatomy.families.FAMILIES"
    )

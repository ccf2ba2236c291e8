"""Every family of the table, on a tiny random model: where its neurons and heads are, and that a scan hears them.

The paths below were written from the transformers sources, not from `llmbrain.anatomy.families`; what a scan gives is
held against plain hooks there, in a forward pass of the whole model that the scanner has no part in.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import CONTEXT, MODELS, VOCAB, tiny, tiny_tokenizer

import llmbrain as lb
from llmbrain._validation import InputError
from llmbrain.anatomy.families import anatomy, context_length

# family -> block, then within the block: down, up, which part of up, act, attention output
PLACES: dict[str, tuple[str, str, str, slice, str, str]] = {
    **{name: ("model.layers.{}", "mlp.down_proj", "mlp.up_proj", slice(None), "mlp.act_fn", "self_attn.o_proj")
       for name in ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3")},
    "phi3": ("model.layers.{}", "mlp.down_proj", "mlp.gate_up_proj", slice(24, 48), "mlp.activation_fn",
             "self_attn.o_proj"),
    "gpt2": ("transformer.h.{}", "mlp.c_proj", "mlp.c_fc", slice(None), "mlp.act", "attn.c_proj"),
    "opt": ("model.decoder.layers.{}", "fc2", "fc1", slice(None), "activation_fn", "self_attn.out_proj"),
    "gpt_neox": ("gpt_neox.layers.{}", "mlp.dense_4h_to_h", "mlp.dense_h_to_4h", slice(None), "mlp.act",
                 "attention.dense"),
    "bloom": ("transformer.h.{}", "mlp.dense_4h_to_h", "mlp.dense_h_to_4h", slice(None), "mlp.gelu_impl",
              "self_attention.dense"),
    **{name: ("transformer.h.{}", "mlp.dense_4h_to_h", "mlp.dense_h_to_4h", slice(None), "mlp.act",
              "self_attention.dense") for name in ("falcon", "falcon_new")},
    "gptj": ("transformer.h.{}", "mlp.fc_out", "mlp.fc_in", slice(None), "mlp.act", "attn.out_proj"),
    "phi": ("model.layers.{}", "mlp.fc2", "mlp.fc1", slice(None), "mlp.activation_fn", "self_attn.dense"),
    "starcoder2": ("model.layers.{}", "mlp.c_proj", "mlp.c_fc", slice(None), "mlp.act", "self_attn.o_proj"),
    "bert": ("bert.encoder.layer.{}", "output.dense", "intermediate.dense", slice(None),
             "intermediate.intermediate_act_fn", "attention.output.dense"),
    "roberta": ("roberta.encoder.layer.{}", "output.dense", "intermediate.dense", slice(None),
                "intermediate.intermediate_act_fn", "attention.output.dense"),
    "distilbert": ("distilbert.transformer.layer.{}", "ffn.lin2", "ffn.lin1", slice(None), "ffn.activation",
                   "attention.out_lin"),
    "modernbert": ("model.layers.{}", "mlp.Wo", "mlp.Wi", slice(24, 48), "mlp.act", "attn.Wo"),
    "gpt_neo": ("transformer.h.{}", "mlp.c_proj", "mlp.c_fc", slice(None), "mlp.act", "attn.attention.out_proj"),
    "codegen": ("transformer.h.{}", "mlp.fc_out", "mlp.fc_in", slice(None), "mlp.act", "attn.out_proj"),
    "mpt": ("transformer.blocks.{}", "ffn.down_proj", "ffn.up_proj", slice(None), "ffn.act", "attn.out_proj"),
}  # fmt: skip
GATED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "modernbert")
BY_STRUCTURE = ("gpt_neo", "codegen", "mpt")
TEXTS = ["hello there, you.", "hi", "what is it about, then? no one knows"]


def sites_of(family: str) -> list[str]:
    """All sites that exist in this family."""
    sites = ["neuron", "up", "mlp_out", "block_out"]
    return sites + ["gate"] * (family in GATED) + ["head"] * (family not in BY_STRUCTURE)


def heard_by_plain_hooks(model: Any, family: str, texts: list[str]) -> dict[tuple[str, int], torch.Tensor]:
    """What each site's module computes when the whole model reads the padded batch; ``(texts, tokens, units)``."""
    block_path, down, up, part, act, out = PLACES[family]
    heard: dict[tuple[str, int], torch.Tensor] = {}

    def keep(site: str, layer: int, value: Any) -> None:
        value = value[0] if isinstance(value, tuple) else value
        heard[site, layer] = value.detach().clone()

    handles = []
    for i in range(2):
        block = model.get_submodule(block_path.format(i))
        places = {"mlp_out": block.get_submodule(down), "up": block.get_submodule(up), "block_out": block}
        if family in GATED:
            places["gate"] = block.get_submodule(act)
        for site, module in places.items():
            handles.append(module.register_forward_hook(lambda m, a, o, s=site, i=i: keep(s, i, o)))
        for site, path in (("neuron", down), ("head", out)):
            module = block.get_submodule(path)
            handles.append(module.register_forward_pre_hook(lambda m, a, s=site, i=i: keep(s, i, a)))
    batch = tiny_tokenizer()(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    shape = batch["input_ids"].shape
    heard = {key: value.reshape(*shape, value.shape[-1]) for key, value in heard.items()}
    for i in range(2):
        heard["up", i] = heard["up", i][..., part]
        heard["head", i] = heard["head", i].unflatten(-1, (4, -1)).square().sum(-1).sqrt()
    return heard


@pytest.mark.parametrize("family", list(PLACES))
def test_scan_equals_the_model(family: str) -> None:
    model, sites = tiny(family), sites_of(family)
    truth = heard_by_plain_hooks(model, family, TEXTS)
    scans = lb.scan(model, tiny_tokenizer(), TEXTS, site=sites)
    for row, (scan, text) in enumerate(zip(scans, TEXTS)):
        n = len(text) + 1  # a token a character, after <s>
        assert scan.n_tokens == n
        for site in sites:
            for layer in range(2):
                expected, got = truth[site, layer][row, :n].numpy(), scan.data(layer, site=site)
                if site == "head":  # a sum of squares may be added up in another order
                    assert abs(got - expected).max() < 1e-6
                else:
                    assert (got == expected).all(), (site, layer)


@pytest.mark.parametrize("family", list(PLACES))
def test_alone_or_in_a_batch(family: str) -> None:
    model, sites = tiny(family), sites_of(family)
    alone = lb.scan(model, tiny_tokenizer(), TEXTS, site=sites, batch_size=1)
    together = lb.scan(model, tiny_tokenizer(), TEXTS, site=sites, batch_size=8)
    for one, other in zip(alone, together):
        for site in sites:
            assert abs(one.data(site=site) - other.data(site=site)).max() < 1e-5


@pytest.mark.parametrize("family", list(PLACES))
def test_anatomy(family: str) -> None:
    model = tiny(family)
    found = anatomy(model)
    width = 64 if family in ("bloom", "mpt") else 24  # these two take no width, but four times the hidden size
    assert found.widths == (width, width)
    block_path, down, up, part, act, out = PLACES[family]
    for i, layer in enumerate(found.layers):
        block = model.get_submodule(block_path.format(i))
        assert layer.block is block
        assert layer.down.module is block.get_submodule(down)
        assert layer.inputs[-1].module is block.get_submodule(up)
        assert layer.inputs[-1].start == (part.start or 0)
        assert layer.gated == (family in GATED)
        assert layer.act is block.get_submodule(act)
        if family not in BY_STRUCTURE:
            assert layer.out is not None
            assert layer.out.module is block.get_submodule(out)
            assert layer.n_heads == 4
    # The neurons of a down projection are its inputs: zeroing unit 3 of the weight silences neuron 3 and no other.
    projection = found.layers[0].down
    assert projection.weight().shape[0] == width
    before = projection.module(torch.eye(width)) - projection.module(torch.zeros(1, width))
    with torch.no_grad():
        projection.weight()[3] = 0
    after = projection.module(torch.eye(width)) - projection.module(torch.zeros(1, width))
    changed = (before - after).abs().sum(1).nonzero().flatten().tolist()
    assert changed == [3]


@pytest.mark.parametrize("family", list(PLACES))
def test_context_length(family: str) -> None:
    model = tiny(family)
    length = context_length(model)
    if family == "bloom":
        assert length is None
        return
    assert length == CONTEXT - (family == "roberta")
    ids = torch.randint(3, VOCAB - 10, (1, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(input_ids=ids)  # the longest text can be read
    scans = lb.scan(model, tiny_tokenizer(), ["a" * (CONTEXT - 3)])
    assert scans[0].n_tokens == CONTEXT - 2


def test_a_mixture_of_experts_is_refused() -> None:
    with pytest.raises(InputError, match="MixtralForCausalLM"):
        anatomy(tiny("mixtral"))


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(InputError, match="looked for"):
        anatomy(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 3)))


def test_every_tiny_model_is_tested() -> None:
    assert set(MODELS) == {*PLACES, "mixtral"}

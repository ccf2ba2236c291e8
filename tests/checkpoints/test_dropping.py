"""Models without some of their MLPs and attentions: every format carries them, or says why not."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from gguf_models import PROMPT, SHARED, make
from tiny_models import tiny, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmbrain as lb
from llmbrain import InputError, prune
from llmbrain.anatomy.families import anatomy
from llmbrain.anatomy.surgery import drop, keep_neurons
from llmbrain.anatomy.units import HEADS, NEURONS
from llmbrain.evaluation import LlamaCpp
from llmbrain.pruning.plan import PruningPlan, weights_digest

IDS = torch.arange(3, 15)[None]
WHOLE = {"mlp": [0], "attention": [0]}
APART = {"mlp": [0], "attention": [1]}
THREE = {"gpt2": "n_layer", "bloom": "n_layer", "gptj": "n_layer", "mpt": "n_layers"}
NAMES = ["llama", "qwen3", "gemma3", "gpt2", "opt", "bloom", "falcon", "mpt", "phi3"]


def dropped(name, mlp, attention, narrow=5):
    """The model and a cut one, three layers each; layer 1 also loses neurons."""
    model = tiny(name, **{THREE.get(name, "num_hidden_layers"): 3})
    body = anatomy(model)
    kept = [np.arange(0 if i in mlp else w - narrow * (i == 1)) for i, w in enumerate(body.widths)]
    heads = [np.arange(0 if i in attention else n) for i, n in enumerate(HEADS.counts(body))]
    plan = PruningPlan(
        "hand", "given", 0.3, tuple(kept), body.widths, weights_digest(body), tuple(heads), HEADS.counts(body)
    )
    return model, prune(model, plan)


def logits(model, ids=IDS):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def written(model, **options):
    mask = torch.ones_like(IDS)
    return model.generate(input_ids=IDS, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0,
                          eos_token_id=None, **options)[0].tolist()  # fmt: skip


def open_again(model, path, format):
    if format == "per-layer":
        return lb.load_pruned(path)[0]
    if format == "remote-code":
        return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
    return type(model).from_pretrained(path)


@pytest.mark.parametrize("format", ["per-layer", "remote-code", "padded", "masked"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bloom", "falcon", "gemma3"])
def test_folders_hold_what_is_left(name, format, tmp_path):
    _, small = dropped(name, **APART)
    lb.save_pruned(small, tiny_tokenizer(), tmp_path / "small", format=format)
    again = open_again(small, tmp_path / "small", format)
    assert torch.allclose(logits(again), logits(small), atol=1e-5)
    assert written(again) == written(small)
    if format in ("per-layer", "remote-code"):
        assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in small.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_that_is_gone_whole_is_left_out_of_an_ordinary_checkpoint(name, tmp_path):
    _, small = dropped(name, **WHOLE, narrow=0)
    if name not in ("bloom", "mpt"):  # they are always as wide
        for layer in anatomy(small).layers[1:]:
            keep_neurons(layer, range(7))
    wanted = logits(small)
    lb.save_pruned(small, None, tmp_path / "small", format="uniform")
    again = type(small).from_pretrained(tmp_path / "small")
    assert again.config.num_hidden_layers == 2
    assert len(getattr(again.config, "layer_types", None) or [0, 0]) == 2
    assert torch.allclose(logits(again), wanted, atol=1e-5)
    loaded = lb.load_pruned(tmp_path / "small")[0]
    with pytest.raises(InputError, match="layers of this model were left out"):
        lb.save_pruned(loaded, None, tmp_path / "masked", format="masked")


def test_an_ordinary_checkpoint_has_no_place_for_half_a_layer(tmp_path):
    _, small = dropped("llama", **APART)
    with pytest.raises(InputError, match=r"layer 0 has lost its MLP but not its attention.*'padded' or 'masked'"):
        lb.save_pruned(small, None, tmp_path / "small", format="uniform")
    assert not list(tmp_path.iterdir())


# -- llama.cpp ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tokenizer(shared_data):
    return AutoTokenizer.from_pretrained(shared_data / "models/stories260K")


PLACES = [("llama", (1,), (0,)), ("llama", (2,), (2,)), ("llama", (0,), ()), ("llama3", (), (1, 2)),
          ("mistral", (1, 2), (0,)), ("qwen2", (2,), (1,)), ("qwen3", (1,), ()), ("qwen3", (0,), (0,)),
          ("gemma", (1,), (1,))]  # fmt: skip


@pytest.mark.parametrize(("family", "mlp", "attention"), PLACES)
def test_llama_cpp_computes_what_is_left(family, mlp, attention, tokenizer, tmp_path):
    model = make(family)
    for units, gone in ((NEURONS, mlp), (HEADS, attention)):
        for layer in anatomy(model).layers:
            if layer.index in gone:
                drop(layer, units)
    path = lb.save_pruned(model, tokenizer, tmp_path / "small.gguf", format="gguf", gguf_type="f32")
    ids = torch.tensor([tokenizer(PROMPT).input_ids])
    wanted = logits(model, ids)
    again, _ = lb.load_model(path)
    assert torch.allclose(logits(again, ids), wanted, atol=1e-4 if family == "gemma" else 0, rtol=0)
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("llama.cpp is not here: pip install 'llmbrain[serve]'")
    engine = LlamaCpp(path, exact=True)
    found = engine.logprobs(ids[0].tolist(), SHARED["vocab_size"])
    reference = wanted[0, -1].double().log_softmax(-1)
    near = 1e-2 if family == "gemma" else 1e-4 * max(1.0, float(wanted[0, -1].abs().max()))  # its GELU is a table
    assert max(abs(found[i] - float(reference[i])) for i in found) < near
    text = model.generate(ids, max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert engine.generate(ids[0].tolist(), 16) == text[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_llama_cpp_asks_for_one_attention(family, tokenizer, tmp_path):
    model = make(family)
    for layer in anatomy(model).layers:
        drop(layer, HEADS)
    with pytest.raises(InputError, match=f"no layer of this {family} model has its attention"):
        lb.save_pruned(model, tokenizer, tmp_path / "small.gguf", format="gguf")


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_llama_cpp_has_no_place_for_these_without_an_attention(family, tokenizer, tmp_path):
    model = make(family)
    drop(anatomy(model).layers[0], HEADS)
    with pytest.raises(InputError, match=rf"reads no {family} model whose layers lack their attention alone"):
        lb.save_pruned(model, tokenizer, tmp_path / "small.gguf", format="gguf")

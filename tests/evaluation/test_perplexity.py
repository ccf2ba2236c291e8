"""Perplexity against known answers and against transformers' own loss."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest
import torch
from tiny_models import tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmbrain import InputError
from llmbrain.evaluation import latency, perplexity, throughput
from llmbrain.evaluation.perplexity import next_token_losses
from llmbrain.hooks.text import evaluating, packed_windows


@pytest.fixture(scope="module")
def stories(shared_data):
    folder = shared_data / "models" / "stories260K"
    texts = json.loads((shared_data / "corpora/tinystories-1000.json").read_text(encoding="utf-8"))
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), texts


def test_known_answer_on_stories(stories):
    model, tokenizer, texts = stories
    assert perplexity(model, tokenizer, texts[700:], window=256, max_windows=96) == pytest.approx(4.6457, abs=1e-3)


@pytest.mark.slow
def test_known_answer_on_shakespeare(shared_data):
    folder = shared_data / "models" / "shakespeare-gpt2"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    text = (shared_data / "corpora/tinyshakespeare.txt").read_text(encoding="utf-8")
    assert perplexity(model, tokenizer, [text[int(0.9 * len(text)) :]], window=48) == pytest.approx(6.1107, abs=1e-3)


def test_equals_the_loss_of_transformers(stories):
    model, tokenizer, texts = stories
    windows = packed_windows(tokenizer, texts[900:], 64, 5)
    with torch.inference_mode():
        losses = [model(input_ids=w[None], labels=w[None]).loss.item() for w in windows]
    assert perplexity(model, None, windows) == pytest.approx(math.exp(sum(losses) / 5), rel=1e-5)


def test_windows_start_with_bos_and_drop_the_rest(stories):
    _, tokenizer, texts = stories
    ids = [i for t in texts[:3] for i in [1, *tokenizer(t, add_special_tokens=False).input_ids]]
    windows = packed_windows(tokenizer, texts[:3], 100)
    assert windows.flatten().tolist() == ids[: len(ids) // 100 * 100]


def test_bad_input_is_named(stories):
    model, tokenizer, texts = stories
    with pytest.raises(InputError, match=r"fewer than one window=256"):
        perplexity(model, tokenizer, ["Once"], window=256)
    with pytest.raises(InputError, match="context of 512"):
        perplexity(model, tokenizer, texts, window=600)
    with pytest.raises(InputError, match="at least one text"):
        perplexity(model, tokenizer, [])
    with pytest.raises(InputError, match="max_windows=0"):
        perplexity(model, tokenizer, texts, window=256, max_windows=0)


def test_the_training_mode_comes_back(stories):
    model, *_ = stories
    model.train()
    model.lm_head.eval()
    with evaluating(model):
        assert not any(m.training for m in model.modules())
    with pytest.raises(InputError), evaluating(model):
        raise InputError("inside")
    assert model.training
    assert not model.lm_head.training
    model.eval()


def test_throughput_and_latency_of_a_tiny_model():
    model = tiny("llama").train()
    assert throughput(model, n_tokens=64, repeats=1) > 0
    table = latency(model, batch_sizes=(1, 2), prompt=16, new_tokens=4, repeats=2)
    assert list(zip(table["phase"], table["batch"])) == [("prefill", 1), ("decode", 1), ("prefill", 2), ("decode", 2)]
    np.testing.assert_allclose(
        table["tokens_per_second"] * table["seconds"], table["batch"] * np.tile([16, 4], 2), rtol=1e-9
    )
    assert (table["seconds_low"] <= table["seconds_high"]).all()
    assert model.training  # as it was
    with pytest.raises(InputError, match="context of 64"):
        latency(model, prompt=64, new_tokens=1)
    with pytest.raises(InputError, match="does not generate"):
        latency(tiny("bert"), prompt=8, new_tokens=2)


def test_throughput_is_on_random_tokens_of_the_context(monkeypatch):
    model = tiny("gpt2")
    seen = []
    model.register_forward_pre_hook(lambda m, a, k: seen.append(k["input_ids"]), with_kwargs=True)
    throughput(model, n_tokens=256, repeats=3)
    assert len(seen) == 4
    assert tuple(seen[0].shape) == (4, 64)
    assert len(seen[0].unique()) > 20


def test_losses_and_gradients_are_the_same_a_part_at_a_time(monkeypatch):
    model = tiny("llama")
    ids = torch.randint(0, model.config.vocab_size, (3, 8), generator=torch.Generator().manual_seed(0))
    weight = model.get_output_embeddings().weight

    def found():
        losses = next_token_losses(model, ids)
        return losses.detach(), *torch.autograd.grad(losses.sum(), [weight])

    whole = found()
    monkeypatch.setattr(sys.modules[next_token_losses.__module__], "AT_ONCE", 5 * weight.shape[0])  # five tokens
    for a, b in zip(found(), whole):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(next_token_losses(model, ids), whole[0], rtol=1e-5, atol=1e-6)

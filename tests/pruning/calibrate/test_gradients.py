"""Gradient metrics and first-order importances against autograd by hand."""

from __future__ import annotations

import pytest
import torch
from pruning_data import windows
from tiny_models import tiny

from llmbrain.anatomy.families import anatomy
from llmbrain.anatomy.units import HEADS
from llmbrain.pruning.calibrate.gradients import gradient_pass


def test_gradients_of_heads_against_autograd_by_hand():
    model, ids = tiny("llama"), windows(3)
    body = anatomy(model)
    found = gradient_pass(model, body, ids, HEADS, metric=True, taylor=True)
    layer, outputs = body.layers[1], {}

    def hook(module, args, output):
        output.retain_grad()
        outputs["y"] = output

    handle = layer.out.module.register_forward_hook(hook)
    (model(input_ids=ids, labels=ids).loss * ids[:, 1:].numel()).backward()
    handle.remove()
    g = outputs["y"].grad.flatten(0, 1).double()
    assert torch.allclose(found["metric"][1], g.T @ g / ids.numel(), rtol=1e-4, atol=1e-10)
    attention, size = layer.attention, layer.head_dim
    repeats = layer.n_heads // layer.n_kv_heads

    def change(p):
        return (p.weight * p.weight.grad).abs()

    for group in range(layer.n_kv_heads):
        own, wide = slice(group * size, (group + 1) * size), slice(group * repeats * size, (group + 1) * repeats * size)
        by_hand = change(attention.q_proj)[wide].sum() + change(attention.o_proj)[:, wide].sum()
        by_hand += change(attention.k_proj)[own].sum() + change(attention.v_proj)[own].sum()
        assert float(found["taylor"][1][group]) == pytest.approx(float(by_hand.detach()), rel=1e-4)


def test_gradient_metric_against_autograd_by_hand():
    model, ids = tiny("llama"), windows(3)
    body = anatomy(model)
    found = gradient_pass(model, body, ids, metric=True, taylor=True)
    outputs = {}
    layer = body.layers[1]

    def hook(module, args, output):
        output.retain_grad()
        outputs["y"] = output

    handle = layer.down.module.register_forward_hook(hook)
    loss = model(input_ids=ids, labels=ids).loss * ids[:, 1:].numel()
    handle.remove()
    loss.backward()
    g = outputs["y"].grad.flatten(0, 1).double()
    assert torch.allclose(found["metric"][1], g.T @ g / ids.numel(), rtol=1e-4, atol=1e-10)
    down = layer.down.module.weight
    by_hand = (down * down.grad).abs().sum(0) + sum(
        (p.module.weight * p.module.weight.grad).abs().sum(1) for p in layer.inputs
    )
    assert torch.allclose(found["taylor"][1], by_hand.double(), rtol=1e-4)


def test_the_metric_of_an_encoder_is_the_curvature_of_its_last_states():
    """Mean of J^T r r^T J over many r against J^T J by autograd, for a single-token text."""
    from transformers import BertModel

    torch.manual_seed(0)
    bert = BertModel(tiny("bert").config).eval()
    layer, ids = anatomy(bert).layers[1], torch.tensor([[5]])
    jacobian = torch.zeros(16, 16)
    caught = []
    handle = layer.down.module.register_forward_hook(lambda m, a, out: caught.append(out))
    states = bert(input_ids=ids).last_hidden_state[0, 0]
    handle.remove()
    for i in range(16):
        jacobian[i] = torch.autograd.grad(states[i], caught[0], retain_graph=True)[0].flatten()
    found = gradient_pass(bert, anatomy(bert), ids.repeat(20000, 1))["metric"][1].float()
    exact = jacobian.T @ jacobian
    assert (found - exact).norm() < 0.05 * exact.norm()


def test_blocks_that_run_twice_give_the_same(monkeypatch):
    from llmbrain.pruning.calibrate import gradients

    model, ids = tiny("llama"), windows(3)
    body = anatomy(model)
    once = gradient_pass(model, body, ids, metric=True, taylor=True)
    monkeypatch.setattr(gradients, "LARGE", 0)
    twice = gradient_pass(model, body, ids, metric=True, taylor=True)
    for name in ("metric", "taylor"):
        for a, b in zip(once[name], twice[name]):
            assert torch.equal(a, b)


def test_smaller_batches_spare_the_second_run(monkeypatch):
    """Where a window's signals can be kept, batches are as small as that needs; the moments are the same."""
    from llmbrain.pruning.calibrate import gradients

    model, ids = tiny("llama"), windows(8)
    body, counts = anatomy(model), torch.rand(8, ids.shape[1], generator=torch.Generator().manual_seed(0))
    at_once = gradient_pass(model, body, ids, weights=counts)["metric"]
    monkeypatch.setattr(gradients, "LARGE", 2 * ids.shape[1] * 20 * sum(body.widths))  # two windows
    assert gradients.batch_tokens(body, ids.shape[1]) == 2 * ids.shape[1]
    assert not gradients.to_recompute(body, 2 * ids.shape[1])
    assert gradients.batch_tokens(body, 3 * ids.shape[1]) == gradients.BATCH_TOKENS  # not even one fits
    read = []
    handle = model.register_forward_pre_hook(lambda m, a, k: read.append(len(k["input_ids"])), with_kwargs=True)
    for a, b in zip(at_once, gradient_pass(model, body, ids, weights=counts)["metric"]):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6 * float(a.abs().max()))
    handle.remove()
    assert read[-4:] == [2, 2, 2, 2]

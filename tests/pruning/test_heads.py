"""Attention heads: cut by whole key/value groups, by every method, and as part of networks."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from tiny_models import VOCAB, tiny, tiny_tokenizer

import llmbrain as lb
from llmbrain import FunctionalNetworks, InputError, plan_pruning, prune, scan
from llmbrain.anatomy.families import anatomy
from llmbrain.anatomy.units import HEADS
from llmbrain.pruning.allocate.losses import LEVELS
from llmbrain.pruning.calibrate.gradients import gradient_pass
from llmbrain.pruning.criteria import CRITERIA
from llmbrain.pruning.criteria.networks import layer_masks, unexplained_energy
from llmbrain.pruning.planner import Planner


def windows(n=40, length=16, seed=0):
    return torch.randint(3, VOCAB, (n, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "opt", "gpt_neox", "bert", "gemma2"])
def test_heads_go_by_whole_groups(name):
    model, ids = tiny(name), windows()
    plan = plan_pruning(model, ratio=0.2, method="obs", calibration=ids, head_ratio=0.5)
    before = [layer.out.units for layer in anatomy(model).layers]
    assert [len(k) for k in plan.kept_heads] == [b // 2 for b in before]
    small = prune(model, plan)
    gone = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in small.parameters())
    assert gone == plan.parameters_removed
    masks = []
    for layer, kept in zip(anatomy(model).layers, plan.kept_heads):
        keep = torch.zeros(layer.out.units * layer.out.size)
        keep[layer.out.rows(kept) - layer.out.start] = 1.0
        masks.append(layer.out.module.register_forward_pre_hook(lambda m, a, keep=keep: (a[0] * keep,)))
        units = torch.zeros(layer.width).index_fill_(0, torch.as_tensor(plan.kept[layer.index]), 1.0)
        masks.append(layer.down.module.register_forward_pre_hook(lambda m, a, units=units: (a[0] * units,)))
    with torch.no_grad():
        expected, got = model(input_ids=ids[:2]).logits, small(input_ids=ids[:2]).logits
        for handle in masks:
            handle.remove()
        assert torch.allclose(got, expected, atol=1e-5)
        dense = model(input_ids=ids[:2]).logits
        refit = prune(model, plan, calibration=ids, compensate="least-squares")(input_ids=ids[:2]).logits
    assert (refit - dense).square().mean() < (got - dense).square().mean()


@pytest.mark.parametrize("allocation", [None, "global", "sensitivity"])
@pytest.mark.parametrize("method", sorted(CRITERIA))
def test_every_method_cuts_heads_and_protects_layers(method, allocation):
    model, ids = tiny("llama", num_hidden_layers=3), windows()
    options = {"ratio": 0.3, "method": method, "calibration": ids, "head_ratio": 0.4, "allocation": allocation}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        plans = [plan_pruning(model, rule={"n_components": 4}, protect=[1], **options) for _ in range(2)]
    groups = [len(k) for k in plans[0].kept_heads]
    assert sum(groups) == 6 - round(0.4 * 6)
    assert groups[1] == 2
    assert plans[0].widths[1] == 24
    assert all(np.array_equal(a, b) for a, b in zip(plans[0].kept_heads, plans[1].kept_heads))
    small = prune(model, plans[0], calibration=ids, compensate="least-squares")
    assert [layer.n_kv_heads for layer in anatomy(small).layers] == groups
    assert small(input_ids=ids[:1]).logits.isfinite().all()


def test_impossible_shares_of_heads_are_refused():
    model = tiny("llama")
    with pytest.raises(InputError, match=r"head_ratio=1\.5 must be"):
        plan_pruning(model, ratio=0.3, method="magnitude", head_ratio=1.5)
    with pytest.raises(InputError, match=r"head_ratio=0\.9 leaves 0 of 4 units.*largest ratio is 0\.500"):
        plan_pruning(model, ratio=0.3, method="magnitude", head_ratio=0.9)
    with pytest.raises(InputError, match=r"head_ratio=0\.5 leaves 2 of 4 units, but 3 must stay \(protect=\[0\]"):
        plan_pruning(model, ratio=0.3, method="magnitude", head_ratio=0.5, protect=[0])


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


def test_few_heads_are_measured_once_for_each_number():
    planner = Planner(tiny("llama"), "obs", windows())
    losses = planner.allocator.sensitivity(HEADS)
    assert losses.shape == (2, len(LEVELS))
    half, one = losses[:, [k for k, x in enumerate(LEVELS) if round((1 - x) * 2) == 2]], losses[:, 4:]
    assert (half == 0).all()  # two of two heads stay
    assert (one == one[:, :1]).all()
    assert (one != 0).all()


def test_networks_span_neurons_and_heads():
    model, tokenizer, ids = tiny("llama", num_hidden_layers=3), tiny_tokenizer(), windows()
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcdefghijklmnop .,"), 40)) for _ in range(6)]
    scans = [s.joined("neuron", "head") for s in scan(model, tokenizer, texts, site=("neuron", "head"))]
    assert np.array_equal(scans[0].data()[:, 72:], scan(model, tokenizer, texts[:1], site="head")[0].data())
    nets = FunctionalNetworks.from_ica(lb.GroupICA(3, random_state=0).fit(scans), threshold=1.5)
    assert nets.maps.shape[1] == 3 * 24 + 3 * 4
    body = anatomy(model)
    heads = layer_masks(nets, body, HEADS)
    by_hand = np.asarray(nets.masks)[:, 72 + 4 : 72 + 8].reshape(3, 2, 2).any(2)  # two query heads a group
    assert np.array_equal(heads[1], by_hand)
    plan = plan_pruning(model, nets, ratio=0.3, calibration=ids, head_ratio=0.3, protect=[0])
    assert plan.details["networks"]["n"] == 3
    assert len(plan.kept_heads[0]) == 2
    assert sum(len(k) for k in plan.kept_heads) == 4
    alone = plan_pruning(model, nets, ratio=0.3, calibration=ids)
    assert alone.kept_heads is None
    small = prune(model, plan, calibration=ids, compensate="least-squares")
    assert sum(layer.n_kv_heads for layer in anatomy(small).layers) == 4
    token_ids = torch.from_numpy(scans[0].token_ids.astype(np.int64))[None]
    x, basis = scans[0].data()[:, :72].astype(float), np.asarray(nets.maps, dtype=float)[:, :72].T
    z = ((x - x.mean(0)) / x.std(0)).T
    left = np.square(z - basis @ np.linalg.lstsq(basis, z, rcond=None)[0]).sum(0)  # by their neurons
    assert np.allclose(unexplained_energy(model, body, token_ids, nets)[0], left / left.mean(), rtol=1e-3)
    key = nets[0].mask
    with lb.lesion(model, nets[0]):
        gone = scan(model, tokenizer, texts[:1], site=("neuron", "head"))[0].joined("neuron", "head").data()
    assert (gone[:, np.flatnonzero(key)] == 0).all()
    assert not (gone[:, ~key] == 0).all(0).any()

"""Attention heads: cut by whole key/value groups, by every method."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from pruning_data import windows
from sklearn.exceptions import ConvergenceWarning
from tiny_models import tiny

from llmbrain import (
    InputError,
    plan_pruning,
    prune,
)
from llmbrain.anatomy.families import anatomy
from llmbrain.pruning.criteria import CRITERIA


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
@pytest.mark.parametrize("method", sorted(name for name in CRITERIA if not CRITERIA[name].blocks and name != "relp"))
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

"""Recovery by low-rank fine-tuning."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny

import llmbrain as lb
from llmbrain import (
    plan_pruning,
    prune,
)
from llmbrain.anatomy.families import anatomy
from llmbrain.pruning.recovery import recover


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_recovery_lowers_the_loss_and_keeps_shapes(name):
    pytest.importorskip("peft")
    model = tiny(name)
    small = prune(model, plan_pruning(model, ratio=0.4, method="random", protect=[0]))
    ids = torch.arange(3, 19).repeat(34, 1)  # a text that can be learned
    state = {k: v.clone() for k, v in small.state_dict().items()}
    better, table = recover(small, None, ids, steps=20, rank=2, learning_rate=0.02)
    assert (table["after"] < 0.7 * table["before"]).all()
    assert anatomy(better).widths == anatomy(small).widths
    assert {k: v.shape for k, v in better.state_dict().items()} == {k: v.shape for k, v in state.items()}
    assert all(torch.equal(v, small.state_dict()[k]) for k, v in state.items())
    assert lb.perplexity(better, None, ids[-1:]) < lb.perplexity(small, None, ids[-1:])

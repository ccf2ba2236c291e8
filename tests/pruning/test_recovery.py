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


def test_a_batch_that_is_read_in_parts_trains_alike(monkeypatch):
    pytest.importorskip("peft")
    model, ids = tiny("llama"), torch.randint(3, 40, (20, 16), generator=torch.Generator().manual_seed(0))
    found = []
    for tokens in (10_000, 48):
        monkeypatch.setattr("llmbrain.pruning.recovery.AT_ONCE", tokens)
        found.append(recover(model, None, ids, steps=4, rank=2, learning_rate=0.02, batch_size=7)[0])
    apart = max(float((a - b).detach().abs().max()) for a, b in zip(found[0].parameters(), found[1].parameters()))
    moved = max(float((a - b).detach().abs().max()) for a, b in zip(found[0].parameters(), model.parameters()))
    assert apart < 1e-4 * moved

"""Losses and states that a cut is measured by, against transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pruning_data import windows
from tiny_models import tiny

from llmbrain import (
    plan_pruning,
)
from llmbrain.anatomy.families import anatomy
from llmbrain.pruning.calibrate.losses import Objective, last_states, log_odds


def test_log_odds_and_losses_of_tokens_against_transformers(two_abilities):
    model, _, ids = two_abilities
    with torch.no_grad():
        p = torch.softmax(model(input_ids=ids).logits[:, :-1].double(), -1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        assert torch.allclose(log_odds(model(input_ids=ids).logits, ids).double(), (p / (1 - p)).log(), atol=1e-3)
        mean = model(input_ids=ids, labels=ids).loss.item()
    assert Objective(model, ids).mean() == pytest.approx(mean, rel=1e-5)
    weights = torch.zeros(ids.shape)
    weights[0, 3], weights[1, 7] = 1.0, 3.0
    by_hand = -(p[0, 2].log() + 3 * p[1, 6].log()) / 4
    assert Objective(model, ids, weights).by_window().shape == (len(ids),)
    assert Objective(model, ids, weights).mean() == pytest.approx(float(by_hand), rel=1e-4)


@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_models_without_a_next_token_are_measured_by_their_last_states(name):
    from transformers import AutoModel

    full, ids = tiny(name), windows(20)
    bare = AutoModel.from_config(full.config).eval()
    bare.load_state_dict(getattr(full, full.base_model_prefix).state_dict(), strict=False)
    plans = [plan_pruning(m, ratio=0.3, calibration=ids) for m in (full, bare)]  # the head has no part in it
    assert all(np.array_equal(a, b) for a, b in zip(plans[0].kept, plans[1].kept))
    objective = Objective(bare, ids)
    assert objective.mean() == 0
    with torch.no_grad():
        dense = bare(input_ids=ids).last_hidden_state
        assert torch.equal(last_states(full, ids), dense)
        layer = anatomy(bare).layers[0]
        layer.down.module.weight.mul_(0.5)
        change = (bare(input_ids=ids).last_hidden_state - dense).square().sum(-1).mean()
    assert objective.mean() == pytest.approx(float(change / dense.flatten(0, 1).var(0, correction=0).sum()), rel=1e-4)

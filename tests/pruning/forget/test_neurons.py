"""Which neurons go when a condition is to be forgotten."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from far_device import FarDevice, far_away
from tiny_models import tiny

from llmbrain import (
    InputError,
    plan_pruning,
    prune,
)
from llmbrain.pruning.forget import relearning, unlearning
from llmbrain.pruning.forget.neurons import spread


def test_forgetting_refuses_what_can_not_be(two_abilities):
    model, scans, _ = two_abilities
    with pytest.raises(InputError, match="names every condition"):
        plan_pruning(model, None, scans, ratio=0.25, forget=["low", "high"])
    with pytest.raises(InputError, match="forget='loud' is not known"):
        plan_pruning(model, None, scans, ratio=0.25, forget=["loud"])
    with pytest.raises(InputError, match="level=2"):
        plan_pruning(model, None, scans, forget=["low"], level=2)
    with pytest.raises(InputError, match="predicts none of these tokens"):
        plan_pruning(tiny("llama", intermediate_size=48), None, scans, forget=["low"], window=8)


def test_windows_are_spread_over_texts_that_come_sorted():
    holds = np.arange(60) >= 50
    chosen = spread(holds, 16)
    assert len(chosen) == len(set(chosen)) == 16
    assert holds[chosen].sum() == 8
    np.testing.assert_array_equal(chosen[:3], [0, 6, 12])
    np.testing.assert_array_equal(spread(holds, 100), np.arange(60))
    np.testing.assert_array_equal(spread(np.ones(64, dtype=bool), 16), np.arange(0, 64, 4))
    assert holds[spread(holds, 1)].all()


def test_a_condition_beyond_the_windows_is_named(two_abilities):
    model, scans, _ = two_abilities
    with pytest.raises(InputError, match="none of these tokens are in the 1 calibration windows"):
        plan_pruning(model, None, scans, forget=["high"], window=8, max_windows=1)


def test_forgetting_on_another_device(two_abilities, monkeypatch):
    """What is chosen there is what is chosen here; the repair and the attack run there."""
    monkeypatch.setattr(unlearning, "STEPS", 1)
    model, scans, ids = two_abilities
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    here = plan_pruning(model, None, scans, ratio=0.3, forget=["low"], window=ids.shape[1])
    with FarDevice():
        there = far_away(model)
        plan = plan_pruning(there, None, scans, ratio=0.3, forget=["low"], window=ids.shape[1])
        for one, other in zip(here.kept, plan.kept):
            np.testing.assert_array_equal(one, other)
        attack = relearning.Relearning(lines=(4,), steps=2, every=1)
        small = prune(
            there, plan, calibration=scans, window=ids.shape[1], compensate="least-squares", relearning=attack
        )
        record = small.llmbrain_pruning[-1]["forgetting"]["relearning"]
        assert set(record["accuracy"]) == {"4", "unrelated"}
        probes = relearning.lines_of(scans, ["low"])
        assert relearning.probe_accuracy(there, probes[:30], probes[30:]).max() > 0.9

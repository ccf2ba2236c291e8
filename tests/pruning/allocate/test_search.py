"""Measured losses and the search over allocations."""

from __future__ import annotations

import numpy as np
import pytest
from pruning_data import windows
from tiny_models import tiny

from llmbrain import (
    InputError,
    plan_pruning,
)
from llmbrain.anatomy.units import HEADS, NEURONS
from llmbrain.pruning.allocate.budget import Budget
from llmbrain.pruning.allocate.losses import LEVELS, from_curves
from llmbrain.pruning.planner import Planner


def test_few_heads_are_measured_once_for_each_number():
    planner = Planner(tiny("llama"), "obs", windows(), passes=400)
    losses = planner.allocator.sensitivity(HEADS)
    assert losses.shape == (2, len(LEVELS))
    half, one = losses[:, [k for k, x in enumerate(LEVELS) if round((1 - x) * 2) == 2]], losses[:, 4:]
    assert (half == 0).all()  # two of two heads stay
    assert (one == one[:, :1]).all()
    assert (one != 0).all()


def test_the_search_keeps_to_the_smooth_widths_unless_others_are_surely_better(monkeypatch):
    planner = Planner(tiny("llama"), "networks", windows(), passes=400)
    best = from_curves(Budget.of(planner.body.widths, 0.4), planner.allocator.sensitivity())
    noise = np.random.default_rng(0).normal(size=(9, 20))
    for gain, stays in ((0.02, True), (0.9, False)):  # against a standard error of about 0.3
        calls = iter(noise)
        monkeypatch.setattr(planner.allocator, "measure", lambda c, sequential, gain=gain, calls=calls: (
                            next(calls) - gain) * (c[NEURONS] != best))  # fmt: skip
        chosen = planner.plan(0.4)
        assert (chosen.widths == best) == stays
        assert sum(chosen.widths) == sum(best)


def test_sensitivities_of_long_windows_keep_to_their_passes():
    model, ids = tiny("llama"), windows(64).reshape(4, -1)
    seen = []
    model.model.layers[0].register_forward_hook(lambda m, args, out: seen.append(args[0].shape[:2].numel()))
    planner = Planner(model, "obs", ids, passes=12)
    dense = len(seen)
    assert planner.allocator.sensitivity().shape == (2, 2)  # few levels, of the beginnings of windows
    measuring = [n for n in seen[dense:] if n < ids.shape[1]]
    assert measuring
    assert sum(measuring) <= 12 / 3 * ids.numel() + 4 * 64
    assert planner.allocator.facts("sensitivity", NEURONS)["sensitivity"]["levels"] == [0.3, 0.7]


@pytest.mark.parametrize("passes", [3, 24, 60])
def test_a_search_keeps_to_its_forward_passes(passes):
    model, ids = tiny("llama"), windows(400)
    seen = []
    model.model.layers[0].register_forward_hook(lambda m, args, out: seen.append(args[0].shape[:2].numel()))
    planner = Planner(model, "obs", ids, passes=passes)
    plan = planner.plan(0.4, allocation="search")
    used = sum(seen) / ids.numel()
    assert used < passes + 1.2 + 2.2  # one look at the dense layers, the choice; each records the calls of one batch
    assert used > min(passes, 6 * 2.1) / 2
    assert ("search" in plan.details) == (passes > 3)
    with pytest.raises(InputError, match="passes=0 must be a number"):
        plan_pruning(model, ratio=0.4, calibration=ids, passes=0)

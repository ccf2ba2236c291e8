"""Widths from measured losses against closed forms."""

from __future__ import annotations

import numpy as np
import pytest

from llmbrain.pruning.allocate.budget import Budget
from llmbrain.pruning.allocate.losses import LEVELS, from_curves, from_losses


@pytest.mark.parametrize("widths_of", [from_losses, from_curves])
def test_sensitive_layers_keep_more(widths_of):
    losses = np.outer([1.0, 10.0], np.array(LEVELS) ** 2)
    few, many = widths_of(Budget.of([100, 100], 0.5), losses)
    assert few + many == 100
    assert many > 80


def test_smooth_losses_have_their_closed_form_minimum_and_bear_noise():
    # Sum of a s_1^2 + b s_2^2 with s_1 + s_2 = 1: shares removed b / (a + b) and a / (a + b).
    budget, exact = Budget.of([1000, 1000], 0.5), np.outer([1.0, 3.0], np.array(LEVELS) ** 2)
    assert np.allclose(from_curves(budget, exact), [250, 750], atol=2)
    noise = np.random.default_rng(0).normal(0, 0.02, (50, *exact.shape))
    errors = {
        f.__name__: np.mean([abs(f(budget, exact + e)[0] - 250) for e in noise]) for f in (from_curves, from_losses)
    }
    assert errors["from_curves"] < errors["from_losses"] / 2

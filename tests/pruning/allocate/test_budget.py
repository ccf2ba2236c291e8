"""Every allocation keeps the budget."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbrain import (
    InputError,
)
from llmbrain.pruning.allocate.budget import Budget
from llmbrain.pruning.allocate.losses import LEVELS, from_curves, from_losses
from llmbrain.pruning.allocate.shares import ranked, uniform


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(2, 60), min_size=1, max_size=6),
    st.floats(0.02, 0.97),
    st.sampled_from([1, 2, 8]),
    st.integers(0, 99),
)  # fmt: skip
def test_every_allocation_keeps_the_budget(widths, ratio, multiple, seed):
    rng = np.random.default_rng(seed)
    protect = [0] if len(widths) > 2 else []
    least = sum(w if i in protect or w < multiple else multiple for i, w in enumerate(widths))
    if sum(widths) - round(ratio * sum(widths)) < least:
        with pytest.raises(InputError, match="largest ratio"):
            Budget.of(widths, ratio, protect, multiple)
        return
    budget = Budget.of(widths, ratio, protect, multiple)
    scores = [rng.random(w) * rng.integers(1, 9) for w in widths]
    results = [
        uniform(budget),
        ranked(budget, scores, standardize=True, clamp=False),
        ranked(budget, scores, standardize=False, clamp=True),
        from_losses(budget, np.sort(rng.random((len(widths), len(LEVELS))), 1)),
        from_curves(budget, np.sort(rng.random((len(widths), len(LEVELS))), 1)),
    ]
    for found in results:
        assert all(1 <= f <= w for f, w in zip(found, widths))
        assert all(found[i] == widths[i] for i in protect)
        assert all(f % multiple == 0 or f == w for f, w in zip(found, widths))
        assert sum(found) == budget.keep if multiple == 1 else sum(found) <= budget.keep
        room = [w for f, w in zip(found, widths) if f < w and f + multiple <= w]
        assert sum(found) > budget.keep - multiple or not room

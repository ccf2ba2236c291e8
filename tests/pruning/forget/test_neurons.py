"""Which neurons go when a condition is to be forgotten."""

from __future__ import annotations

import pytest
from tiny_models import tiny

from llmbrain import (
    InputError,
    plan_pruning,
)


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

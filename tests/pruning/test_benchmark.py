"""Comparison of methods over draws."""

from __future__ import annotations

import pytest
from pruning_data import windows
from tiny_models import tiny

import llmbrain as lb
from llmbrain import (
    plan_pruning,
    prune,
)
from llmbrain.pruning.benchmark import compare_methods


def test_comparison_repeats_its_main_rows_over_draws():
    model, ids = tiny("llama"), windows(30)
    table = compare_methods(
        model, None, ids[:20], ids[20:], ratios=[0.3], methods=["random", "magnitude", "networks"], draws=3
    )
    assert table["method"].tolist() == ["dense", "random", "random", "magnitude", "magnitude", "networks"]
    assert table["perplexity"][0] == pytest.approx(lb.perplexity(model, None, ids[20:]))
    repeated = table[table["draws"] == 3]
    assert list(zip(repeated["method"], repeated["compensate"])) == [
        ("random", "least-squares"), ("networks", "least-squares")]  # fmt: skip
    assert (repeated["low"] < repeated["perplexity"]).all()
    single = table[table["draws"] == 1]
    assert single[["low", "high"]].isna().all(axis=None)
    plan = plan_pruning(model, ratio=0.3, method="magnitude")
    expected = prune(model, plan, calibration=ids[:20], compensate="least-squares")
    row = single[(single["method"] == "magnitude") & (single["compensate"] == "least-squares")].iloc[0]
    assert row["perplexity"] == pytest.approx(lb.perplexity(expected, None, ids[20:]), rel=1e-5)

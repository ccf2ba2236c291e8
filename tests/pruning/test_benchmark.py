"""Comparison of methods over draws."""

from __future__ import annotations

import pytest
from pruning_data import windows
from tiny_models import tiny

import llmbrain as lb
from llmbrain import (
    InputError,
    plan_pruning,
    prune,
)
from llmbrain.pruning.benchmark import ROWS, compare_methods, rows_of


def test_methods_without_rows_of_their_own_get_one():
    model, ids = tiny("llama", num_hidden_layers=3), windows(30)
    assert rows_of() == list(ROWS)
    table = compare_methods(
        model, None, ids[:20], ids[20:], ratios=[0.5], methods=["2ssp", "shortgpt", "random"], draws=1
    )
    assert table["method"].tolist() == ["dense", "random", "random", "2ssp", "shortgpt"]
    assert (table["parameters_removed"][1:] > 0).all()
    with pytest.raises(InputError, match=r"methods=\['guess'\] are not known"):
        rows_of(["guess"])


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

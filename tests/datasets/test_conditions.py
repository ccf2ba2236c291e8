"""Eight kinds of text for real models."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import tiny_tokenizer

from llmbrain import InputError
from llmbrain.datasets import condition_rows, condition_runs, condition_texts
from llmbrain.datasets.conditions import CONDITIONS


@pytest.fixture(scope="module")
def tokenizer():
    """One token a character."""
    return tiny_tokenizer()


def test_a_condition_is_the_same_from_a_seed_and_another_on_the_other_side(tokenizer):
    for condition in CONDITIONS:
        texts = condition_texts(tokenizer, condition, 3, n_tokens=64)
        assert texts == condition_texts(tokenizer, condition, 3, n_tokens=64)
        assert len(set(texts)) == 3
        held_out = condition_texts(tokenizer, condition, 3, n_tokens=64, split="heldout")
        assert not set(texts) & set(held_out)


def test_sums_are_right(tokenizer):
    lines = "\n".join(condition_texts(tokenizer, "arithmetic", 20)).split("\n")
    whole = [line for line in lines if line.count("=") == 1 and line.split("=")[1].strip()]
    right = [eval(a.replace("/", "//")) == int(b) for a, b in (line.split("=") for line in whole)]
    assert np.mean(right) > 0.8  # the last of a piece may be cut short


@pytest.mark.filterwarnings("ignore::llmbrain.hooks.text.ScanWarning")
def test_runs_have_every_condition_once_and_events_that_hold_its_tokens(tokenizer):
    runs = condition_runs(tokenizer, 3, n_tokens=40)
    assert len({run.name for run in runs}) == 3
    orders = [list(run.events["trial_type"]) for run in runs]
    assert all(sorted(order) == sorted(CONDITIONS) for order in orders)
    assert orders[0] != orders[1] or orders[0] != orders[2]
    some = condition_runs(tokenizer, 1, conditions=["code", "prose"])[0]
    assert sorted(some.events["trial_type"]) == ["code", "prose"]


def test_rows_are_what_lesions_are_measured_on(tokenizer):
    ids, scored = condition_rows(tokenizer, "names", 3, n_tokens=40, skip=8)
    assert ids.dtype == torch.int64
    assert ids.shape == scored.shape
    assert not scored[:, :8].any()
    assert scored.any(dim=1).all()
    _, repeated = condition_rows(tokenizer, "repetition", 2, n_tokens=200, skip=8)
    assert not repeated[:, :60].any()  # the first copy of what is said again is not scored
    assert repeated.any(dim=1).all()


def test_what_is_not_known_is_refused(tokenizer):
    with pytest.raises(InputError, match="condition='poetry'"):
        condition_texts(tokenizer, "poetry")
    with pytest.raises(InputError, match="split='test'"):
        condition_texts(tokenizer, "prose", split="test")
    with pytest.raises(InputError, match="conditions='songs'"):
        condition_runs(tokenizer, conditions=["songs"])

"""Conditions of scans as weights of calibration tokens."""

from __future__ import annotations

import numpy as np
import pytest
from pruning_data import stimuli, windows
from tiny_models import tiny

import llmbrain as lb
from llmbrain import (
    FunctionalNetworks,
    InputError,
    plan_pruning,
    prune,
    scan,
)
from llmbrain.anatomy.families import anatomy
from llmbrain.pruning.calibrate.windows import calibration_windows
from llmbrain.pruning.forget.conditions import condition_weights, token_conditions


def test_conditions_weigh_tokens():
    tokenizer, texts = stimuli()
    scans = scan(tiny("llama"), tokenizer, texts)
    total = sum(s.n_tokens for s in scans)
    weights = condition_weights(scans, (1, total), ["low"], None)[0]
    at = np.concatenate([np.arange(s.n_tokens) for s in scans])
    first = scans[0].events.iloc[0]
    inside = weights[: scans[0].n_tokens][int(first.onset) : int(first.onset + first.duration)]
    assert inside.min() == weights.max() > 40 * weights.min() > 0
    assert len(at) == total
    assert float(condition_weights(scans, (1, total), None, ["low"]).min()) == 0
    with pytest.raises(InputError, match="keep='loud' is not known"):
        condition_weights(scans, (1, total), ["loud"], None)


def test_tokens_keep_their_conditions_beside_a_scan_without_tokens():
    """Windows leave such a scan out; so must the conditions, or every later token gets another's."""
    tokenizer, texts = stimuli(2)
    model = tiny("llama")
    first, second = scan(model, tokenizer, texts)
    bare = lb.Scan.from_array(np.ones((7, 48)), first.space, events=first.events.head(0))
    found = calibration_windows(model, tokenizer, None, [first, bare, second], 8, None)
    labels, names = token_conditions([first, bare, second], tuple(found.shape))
    low = {tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in "abc"}
    for token, label in zip(found.flatten().tolist(), labels.flatten().tolist()):
        assert label == (-1 if token == 1 else names.index("low" if token in low else "high"))


def test_plans_for_functions_take_their_calibration_from_scans():
    model = tiny("llama")
    tokenizer, texts = stimuli()
    scans = scan(model, tokenizer, texts)
    x = np.concatenate([s.data() for s in scans])
    low = np.concatenate([np.isin(s.tokens, list("abc")) for s in scans])
    # Two maps that follow the two conditions: the mean pattern of each.
    maps = np.stack([x[low].mean(0) - x[~low].mean(0), x[~low].mean(0) - x[low].mean(0) + 0.3 * x.std(0)])
    nets = FunctionalNetworks(maps, scans[0].space, threshold=1.5)
    conditions = plan_pruning(model, nets, scans, ratio=0.3, keep=["low"], allocation="uniform")
    assert conditions.details["functions"] == {"keep": ["low"], "forget": []}
    small = prune(model, conditions, calibration=scans, compensate="least-squares")
    assert anatomy(small).widths == conditions.widths
    with pytest.raises(InputError, match="scans it was made from"):
        prune(model, conditions, calibration=windows(), compensate="least-squares")
    with pytest.raises(InputError, match="take scans with events"):
        plan_pruning(model, nets, calibration=windows(), ratio=0.3, keep=["low"])
    with pytest.raises(InputError, match="ratio=None"):
        plan_pruning(model, calibration=windows())

"""Wanda, FLAP, magnitude and their control against numpy, neurons and heads alike."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pruning_data import windows
from tiny_models import tiny

from llmbrain import InputError
from llmbrain.anatomy.families import anatomy
from llmbrain.anatomy.units import HEADS, NEURONS
from llmbrain.pruning.planner import Planner

KINDS = pytest.mark.parametrize("units", [NEURONS, HEADS], ids=repr)


def scores_and_signals(method, units):
    """Scores of the second layer, its signals ``(tokens, columns)`` and W ``(columns, outputs)``."""
    model, ids, caught = tiny("llama"), windows(), []
    layer = anatomy(model).layers[1]
    output = units.output(layer)
    handle = output.module.register_forward_pre_hook(lambda m, args: caught.append(args[0].flatten(0, 1).double()))
    with torch.no_grad():
        model(input_ids=ids)
    handle.remove()
    scores = Planner(model, method, ids).scorer.dense_scores(units)[1]
    return scores, torch.cat(caught).numpy(), output.weight().detach().double().numpy(), layer


def by_unit(columns, n):
    return columns.reshape(n, -1).sum(1)


@KINDS
def test_wanda_is_the_sum_of_weights_times_norms(units):
    scores, x, w, _ = scores_and_signals("wanda-sp", units)
    expected = by_unit(np.abs(w).sum(1) * np.sqrt(np.square(x).mean(0)), len(scores))
    assert np.allclose(scores, expected, rtol=1e-4)


@KINDS
def test_flap_is_the_variance_times_squared_weights(units):
    scores, x, w, _ = scores_and_signals("flap", units)
    assert np.allclose(scores, by_unit(x.var(0) * np.square(w).sum(1), len(scores)), rtol=1e-4)


@KINDS
def test_magnitude_is_the_product_of_norms(units):
    scores, _, w, layer = scores_and_signals("magnitude", units)
    expected = np.sqrt(by_unit(np.square(w).sum(1), len(scores)))
    for p in layer.inputs if units is NEURONS else ():
        expected = expected * p.weight().detach().double().norm(dim=1).numpy()
    assert np.allclose(scores, expected, rtol=1e-6)


def test_random_scores_are_of_the_seed_alone():
    planners = [Planner(tiny("llama"), "random", random_state=seed) for seed in (1, 1, 2)]
    a, b, c = (p.scorer.dense_scores() for p in planners)
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)
    with pytest.raises(InputError, match="random_state"):
        Planner(tiny("llama"), "random", random_state="now")

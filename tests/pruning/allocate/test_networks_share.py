"""Widths from where networks live."""

from __future__ import annotations

import numpy as np
import pytest
from pruning_data import windows
from tiny_models import tiny

from llmbrain import FunctionalNetworks, InputError, NeuronSpace, plan_pruning
from llmbrain.pruning.allocate.budget import Budget
from llmbrain.pruning.allocate.shares import by_density


def maps_of(dense_layer):
    space = NeuronSpace([100, 100, 100])
    maps = np.random.default_rng(0).normal(size=(4, 300)) * 0.5
    maps[:, space.layer_slice(dense_layer)][:, :30] = 5
    return maps, space


@pytest.mark.parametrize("dense_layer", [0, 1, 2])
def test_a_layer_full_of_key_neurons_keeps_more(dense_layer):
    maps, space = maps_of(dense_layer)
    widths = by_density(Budget.of(space.widths, 0.3), maps, space)
    assert sum(widths) == 210
    assert widths[dense_layer] == max(widths) == 85  # half of its share of the cut, as clamped allows
    assert min(widths) >= 55
    protected = by_density(Budget.of(space.widths, 0.3, [dense_layer]), maps, space)
    assert protected[dense_layer] == 100
    assert sum(protected) == 210


def test_plans_take_it_with_any_method():
    model = tiny("llama", intermediate_size=48)
    space = NeuronSpace([48, 48])
    maps = np.random.default_rng(0).normal(size=(3, 96)) * 0.5
    maps[:, 48:60] = 5
    networks = FunctionalNetworks(maps, space, standardize=False)
    plan = plan_pruning(model, networks, ratio=0.25, method="flap", calibration=windows(), allocation="networks")
    assert plan.allocation == "networks"
    assert sum(plan.widths) == 72
    assert plan.widths[1] > plan.widths[0]
    with pytest.raises(InputError, match="allocation='networks' needs networks"):
        plan_pruning(model, ratio=0.25, method="flap", calibration=windows(), allocation="networks")

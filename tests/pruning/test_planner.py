"""Plans: budgets, defaults, refusals, nothing changed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pruning_data import windows
from tiny_models import tiny

from llmbrain import (
    InputError,
    plan_pruning,
    prune,
)
from llmbrain.anatomy.families import anatomy
from llmbrain.pruning import Calibration, write_windows
from llmbrain.pruning.criteria import CRITERIA
from llmbrain.pruning.planner import Planner


def test_what_ratios_share_is_computed_once(monkeypatch):
    model, ids = tiny("llama"), windows()
    planner = Planner(model, "obs-gradient", ids)
    shared = [planner.plan(r, allocation="sensitivity") for r in (0.3, 0.5)]
    monkeypatch.setattr(planner.scorer, "score", None)  # would fail if called again
    assert planner.scorer.dense_scores() is planner.scorer.dense_scores()
    assert planner.plan(0.3, allocation="sensitivity", sequential=False).widths == shared[0].widths
    alone = plan_pruning(model, ratio=0.5, method="obs-gradient", allocation="sensitivity", calibration=ids)
    assert all(np.array_equal(a, b) for a, b in zip(alone.kept, shared[1].kept))


@pytest.mark.parametrize("method", sorted(name for name in CRITERIA if not CRITERIA[name].blocks))
def test_every_method_meets_the_budget_exactly_and_repeats(method):
    model, ids = tiny("llama", num_hidden_layers=3), windows()
    rule = {"n_components": 6}
    plans = [plan_pruning(model, ratio=0.31, method=method, calibration=ids, rule=rule) for _ in range(2)]
    assert sum(plans[0].widths) == 72 - round(0.31 * 72)
    assert all(np.array_equal(a, b) for a, b in zip(plans[0].kept, plans[1].kept))
    assert all((np.diff(k) > 0).all() and k.min() >= 0 and k.max() < 24 for k in plans[0].kept)


@pytest.mark.parametrize("ratio", [0, 1, -0.1, float("nan"), "half"])
def test_ratios_outside_zero_and_one_are_refused(ratio):
    with pytest.raises(InputError, match="ratio="):
        plan_pruning(tiny("llama"), ratio=ratio, method="magnitude")


def test_unknown_names_are_listed():
    with pytest.raises(InputError, match=r"method='best' is not known.*'flap'"):
        plan_pruning(tiny("llama"), ratio=0.3, method="best")
    with pytest.raises(InputError, match="allocation='fair' is not known"):
        plan_pruning(tiny("llama"), ratio=0.3, method="random", allocation="fair")
    with pytest.raises(InputError, match="protect=5 is not a layer"):
        plan_pruning(tiny("llama"), ratio=0.3, method="random", protect=[5])
    with pytest.raises(InputError, match=r"method='flap'.*needs calibration"):
        plan_pruning(tiny("llama"), ratio=0.3, method="flap")


@pytest.mark.parametrize("method", ["networks", "obs-gradient", "obs", "flap"])
def test_encoders_are_pruned_too(method):
    from transformers import BertModel

    bare = BertModel(tiny("bert").config).eval()
    plan = plan_pruning(bare, ratio=0.3, method=method, calibration=windows())
    small = prune(bare, plan, calibration=windows(), compensate="least-squares")
    assert anatomy(small).widths == plan.widths
    with pytest.raises(InputError, match=r"BertModel predicts no next token, as method='taylor' needs"):
        plan_pruning(bare, ratio=0.3, method="taylor", calibration=windows())


def test_planning_changes_nothing():
    model = tiny("falcon")
    state = {k: v.clone() for k, v in model.state_dict().items()}
    for method, allocation in (("obs", "sensitivity"), ("obs-gradient", "global"), ("flap", "clamped")):
        plan_pruning(model, ratio=0.4, method=method, allocation=allocation, calibration=windows())
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_widths_that_contradict_the_rest_are_refused():
    model = tiny("llama", num_hidden_layers=3)  # 3 x 24
    options = {"method": "magnitude"}
    plan = plan_pruning(model, ratio=0.5, allocation=[12, 8, 16], **options)
    assert plan.widths == (12, 8, 16)
    assert plan_pruning(model, allocation=[12, 8, 16], **options).ratio == 0.5  # says the ratio itself
    assert plan_pruning(model, ratio=0.3, allocation=[17, 17, 17], **options).widths == (17,) * 3  # as one width allows
    with pytest.raises(InputError, match=r"keeps 60 of 72 neurons, ratio=0\.5 asks for 36: leave ratio away"):
        plan_pruning(model, ratio=0.5, allocation=[20, 20, 20], **options)
    with pytest.raises(InputError, match=r"cuts layer 2 to 16 neurons, but protect=\[2\]"):
        plan_pruning(model, ratio=0.5, allocation=[12, 8, 16], protect=[-1], **options)
    with pytest.raises(InputError, match=r"12 neurons of layer 0 are no multiple_of=8"):
        plan_pruning(model, ratio=0.5, allocation=[12, 8, 16], multiple_of=8, **options)
    for wrong in ([12, 8], [12, 8, 1.9], [12, 8, 25], [0, 12, 24], [True, 12, 23]):
        with pytest.raises(InputError, match="must give each layer 1 to"):
            plan_pruning(model, allocation=wrong, **options)
    with pytest.raises(InputError, match="removes nothing"):
        plan_pruning(model, allocation=[24, 24, 24], **options)


def test_text_is_one_object_or_its_parts():
    model, ids = tiny("llama"), windows(30)
    weights = torch.rand(20, 16)
    whole = Calibration(ids, max_windows=20, weights=weights)
    plans = [
        plan_pruning(model, ratio=0.4, method="flap", calibration=whole),
        plan_pruning(model, ratio=0.4, method="flap", calibration=ids, max_windows=20, weights=weights),
    ]
    assert plans[0].to_dict() == plans[1].to_dict()
    assert plans[0].details["calibration"]["shape"] == [20, 16]
    small = [
        prune(model, plans[0], calibration=whole, compensate="least-squares"),
        prune(model, plans[0], calibration=ids[:20], weights=weights, compensate="least-squares"),
    ]
    assert torch.equal(*(m.model.layers[1].mlp.down_proj.weight for m in small))
    with pytest.raises(InputError, match=r"calibration is a Calibration: give \['window'\] there"):
        plan_pruning(model, ratio=0.4, method="flap", calibration=whole, window=8)
    with pytest.raises(TypeError, match=r"unexpected keyword arguments \['mulitple_of'\]"):
        plan_pruning(model, ratio=0.4, method="flap", calibration=whole, mulitple_of=8)


def test_a_seed_may_be_left_open():
    model = tiny("llama")
    plans = [plan_pruning(model, ratio=0.5, method="random", random_state=None) for _ in range(3)]
    assert len({p.mask.tobytes() for p in plans}) > 1
    assert write_windows(model, None, 2, 5, random_state=None).shape == (2, 5)
    with pytest.raises(InputError, match="random_state=-1"):
        plan_pruning(model, ratio=0.5, method="random", random_state=-1)

"""A criterion from outside the package, as a function and as a class, goes the whole way."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pruning_data import windows
from tiny_models import tiny

from llmbrain import InputError, plan_pruning, prune
from llmbrain.anatomy.families import anatomy
from llmbrain.pruning.criteria import CRITERIA, Criterion, register


@pytest.fixture
def registered():
    before = dict(CRITERIA)
    yield
    CRITERIA.clear()
    CRITERIA.update(before)


def test_a_function_from_outside_is_a_criterion(registered):
    @register("loudest", "activations", allocation="global")
    def loudest(e):
        """Mean square of the signals."""
        return e.by_unit(e.measured.mean_square)

    model, ids = tiny("llama"), windows()
    plan = plan_pruning(model, ratio=0.4, method="loudest", calibration=ids, head_ratio=0.5)
    assert (plan.method, plan.allocation) == ("loudest", "global")
    caught = []
    handle = anatomy(model).layers[0].down.module.register_forward_pre_hook(lambda m, a: caught.append(a[0]))
    with torch.no_grad():
        model(input_ids=ids)
    handle.remove()
    loud = caught[0].flatten(0, 1).square().mean(0).numpy()
    kept = plan.kept[0]
    assert loud[kept].min() >= np.delete(loud, kept).max()
    small = prune(model, plan, calibration=ids, compensate="least-squares")
    assert anatomy(small).widths == plan.widths
    with pytest.raises(InputError, match="method='loudest' needs calibration texts"):
        plan_pruning(model, ratio=0.4, method="loudest")


def test_a_class_from_outside_prepares_protects_and_says_so(registered):
    @register("even", "text", standardize=False)
    class Even(Criterion):
        """Even units."""

        def __init__(self):
            self.seen = {}

        def prepare(self, material, units):
            self.seen[units] = units.counts(material.body)
            material.notes.append(f"{units.name} looked at")

        def score(self, evidence):
            return 1.0 - torch.arange(self.seen[evidence.units][evidence.layer.index]) % 2

        def protect(self, n_layers, notes):
            return (n_layers - 1,)

        def facts(self, dense, kept, protect):
            return {"even": [len(s) for s in dense()]}

    model = tiny("llama", num_hidden_layers=3)
    plan = plan_pruning(model, ratio=0.3, method="even", calibration=windows(), head_ratio=0.3)
    assert plan.protect == (2,)
    assert plan.widths == (13, 13, 24)
    assert set(plan.kept[0][:12]) <= set(range(0, 24, 2)) | {1}
    assert plan.details["even"] == [24, 24, 24]
    assert plan.details["notes"] == ["neurons looked at", "heads looked at"]
    assert plan_pruning(model, ratio=0.3, method="even", calibration=windows(), protect=[0]).protect == (0,)


def test_wrong_criteria_are_refused(registered):
    with pytest.raises(InputError, match="needs='luck' is not known"):
        register("lucky", "luck")

    @register("short")
    def short(e):
        return torch.zeros(3)

    with pytest.raises(InputError, match=r"method='short' gave scores of shape \(3,\) for 24 neurons"):
        plan_pruning(tiny("llama"), ratio=0.3, method="short")

    @register("nan")
    def nan(e):
        return torch.full((e.output.units,), torch.nan)

    with pytest.raises(InputError, match="has no finite score"):
        plan_pruning(tiny("llama"), ratio=0.3, method="nan")

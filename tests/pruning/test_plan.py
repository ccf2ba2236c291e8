"""Plans are saved, replayed and refused."""

from __future__ import annotations

import pytest
import torch
from pruning_data import logits
from tiny_models import tiny

from llmbrain import (
    InputError,
    PruningPlan,
    plan_pruning,
    prune,
)


def test_plans_are_saved_and_replayed(tmp_path):
    model = tiny("gpt2")
    plan = plan_pruning(model, ratio=0.3, method="magnitude", protect=[-1])
    back = PruningPlan.load(plan.save(tmp_path / "plan.json"))
    assert back.to_dict() == plan.to_dict()
    assert torch.equal(logits(prune(model, back)), logits(prune(model, plan)))
    frame = back.to_frame()
    assert frame["kept"].tolist() == [48 - round(0.3 * 48) - 24, 24]
    assert frame["protected"].tolist() == [False, True]
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(InputError, match="not a pruning plan"):
        PruningPlan.load(tmp_path / "bad.json")


def test_a_plan_of_another_model_is_refused():
    plan = plan_pruning(tiny("llama"), ratio=0.3, method="magnitude")
    with pytest.raises(InputError, match="plan was made for weights"):
        prune(tiny("llama", seed=1), plan)
    with pytest.raises(InputError, match="layers of 2 x 24 neurons, this model has 3 x 24"):
        prune(tiny("llama", num_hidden_layers=3), plan)

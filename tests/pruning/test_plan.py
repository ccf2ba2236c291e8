"""Plans are saved, replayed and refused."""

from __future__ import annotations

import json

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


def test_widths_that_engines_dislike_are_named():
    model = tiny("llama", intermediate_size=512)
    even = plan_pruning(model, ratio=0.5, method="magnitude", multiple_of=256)
    assert "no multiple of" not in even.summary()
    given = plan_pruning(model, method="magnitude", allocation=[512, 480]).summary()
    assert "no multiple of 256: 1 of 2 widths, such as 480" in given
    assert "multiple_of=256 avoids it" in given
    odd = plan_pruning(model, method="magnitude", allocation=[491, 480]).summary()
    assert "no multiple of 32: 1 of 2 widths, such as 491" in odd
    small = plan_pruning(tiny("llama"), ratio=0.5, method="magnitude").summary()  # its own width is none either
    assert "no multiple of" not in small


def test_a_plan_of_another_model_is_refused():
    plan = plan_pruning(tiny("llama"), ratio=0.3, method="magnitude")
    with pytest.raises(InputError, match="plan was made for weights"):
        prune(tiny("llama", seed=1), plan)
    with pytest.raises(InputError, match="layers of 2 x 24 neurons, this model has 3 x 24"):
        prune(tiny("llama", num_hidden_layers=3), plan)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kept": [[0, 1]]}, "kept of this plan has 1 layers, the model had 2"),
        ({"kept": [[0, 0], [1]]}, r"kept\[0\] of this plan must be ascending, each unit once"),
        ({"kept": [[3, 1], [1]]}, r"kept\[0\] of this plan must be ascending"),
        ({"kept": [[0], [1.9]]}, r"kept\[1\] of this plan holds 1\.9: whole numbers"),
        ({"kept": [[0], [True]]}, r"kept\[1\] of this plan holds True"),
        ({"kept": [[0], [24]]}, r"kept\[1\] of this plan names unit 24 of 24"),
        ({"kept": [[0], [10**30]]}, r"kept\[1\] of this plan names unit 1000"),
        ({"kept": [[0], [-1]]}, r"kept\[1\] of this plan holds -1"),
        ({"kept": [[], []]}, "kept of this plan is empty"),
        ({"kept": "all"}, "has 'all' layers|has 3 layers"),
        ({"kept_heads": [[0], [2]]}, r"kept_heads\[1\] of this plan names unit 2 of 2"),
        ({"ratio": float("nan")}, "ratio=nan"),
        ({"widths_before": [24, 24.5]}, r"widths_before of this plan holds 24\.5"),
        ({"protect": [7]}, "names layers that are not there"),
        ({"method": None}, "method=None of this plan is no text"),
        ({"surprise": 1}, "not a pruning plan"),
    ],
)
def test_plans_that_cannot_be_right_are_refused(change, message, tmp_path):
    record = plan_pruning(tiny("llama"), ratio=0.3, method="magnitude").to_dict() | change
    with pytest.raises(InputError, match=message):
        PruningPlan.from_dict(record)
    (tmp_path / "plan.json").write_text(json.dumps({"llmbrain": "pruning plan", **record}))
    with pytest.raises(InputError, match=message):
        PruningPlan.load(tmp_path / "plan.json")


def test_an_altered_plan_file_is_found(tmp_path):
    path = plan_pruning(tiny("llama"), ratio=0.3, method="magnitude").save(tmp_path / "plan.json")
    text = path.read_text()
    assert json.loads(text)["llmbrain"] == "pruning plan"
    path.write_text(text.replace('"ratio": 0.3', '"ratio": 0.4'))
    with pytest.raises(InputError, match=r"plan\.json"):
        PruningPlan.load(path)
    path.write_text(text[:-40])
    with pytest.raises(InputError, match=r"plan\.json"):
        PruningPlan.load(path)

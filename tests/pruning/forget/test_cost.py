"""What forgetting takes beside a cut: the estimate counts the steps that are done."""

from __future__ import annotations

import pytest
from tiny_models import tiny_tokenizer

from llmbrain import PruningPlan, plan_pruning, prune
from llmbrain.pruning.forget import unlearning
from llmbrain.pruning.forget.relearning import Relearning
from llmbrain.study import cost
from llmbrain.study.cost import Forgetting, Subject, run_cost
from llmbrain.study.plan_cost import plan_cost
from llmbrain.study.settings import Settings
from tests.study.test_budget import counted


def steps(parts):
    return {part.name: part.passes * part.tokens for part in parts}


@pytest.mark.parametrize("last", [False, True])
def test_the_passes_are_those_that_forgetting_takes(two_abilities, monkeypatch, last):
    model, scans, ids = two_abilities
    monkeypatch.setattr(unlearning, "STEPS", 8)
    monkeypatch.setattr(unlearning, "MENDS", 0)
    found = []
    ask = {"forget": ["low"], "last": last, "method": "magnitude", "window": ids.shape[1]}
    searched = counted(model, lambda: found.append(plan_pruning(model, None, scans, **ask)))
    monkeypatch.setattr(cost, "ROUNDS", len(found[0].details["functions"]["left"]))
    attack = Relearning(lines=(8, 32), steps=6, every=3, test=16)
    said = Forgetting.of(scans, ["low"], last=last, attack=attack)
    parts = steps(said.parts(Subject.of(model).parameters, ids.numel(), ids.shape[1]))
    assert searched == pytest.approx(parts["neurons to forget"], rel=0.15)

    how = {"calibration": scans, "window": ids.shape[1], "compensate": "least-squares", "verify": False}
    plain = PruningPlan.from_dict({**found[0].to_dict(), "details": {}})
    took = [
        counted(model, lambda plan=plan, again=again: prune(model, plan, relearning=again, **how))
        for plan, again in ((plain, False), (found[0], False), (found[0], attack))
    ]
    name = "repair that makes forgetting last" if last else "repair that forgets"
    assert took[1] - took[0] == pytest.approx(parts[name], rel=0.3)
    assert took[2] - took[1] == pytest.approx(parts["teaching it again"], rel=0.3)


def test_costs_count_what_lasts_and_what_is_foretold(two_abilities):
    model, scans, _ = two_abilities
    subject = Subject.of(model)

    def names(**options):
        how = Settings(ratio=None, method="flap", **options) if "forget" in options else Settings(method="flap")
        found = run_cost(subject, how, n_tokens=2000, eval_tokens=500, window=64, per_token=1e-4, read=scans)
        return found, [part.name for part in found.parts]

    plain, forgets, lasts = names(), names(forget=("low",)), names(forget=("low",), last=True)
    assert "forecast of the loss, beside what was lost" in plain[1]
    assert not any(name.startswith("forecast") for name in forgets[1])
    assert {"neurons to forget", "repair that forgets", "teaching it again"} <= set(forgets[1])
    assert "repair that makes forgetting last" in lasts[1]
    assert lasts[0].seconds > 2 * forgets[0].seconds > 2 * plain[0].seconds
    assert lasts[0].memory > forgets[0].memory > plain[0].memory


def test_a_plan_of_a_study_counts_its_forecast_and_what_a_given_plan_forgets(two_abilities, tmp_path):
    from llmbrain import scan
    from llmbrain.scanning import Stimulus

    model, scans, ids = two_abilities
    texts = [Stimulus(s.text, events=s.events, name=s.name) for s in scans]
    scan(model, tiny_tokenizer(), texts, out=tmp_path)

    def names(**options):
        made = plan_cost(model, tiny_tokenizer(), None, study=tmp_path, method="flap", self_text=0, **options)
        return [part.name for part in made.parts]

    assert names() == ["plan (flap)"]
    assert names(forecast=True) == ["plan (flap)", "forecast of the loss"]
    assert names(forecast=True, measured=True)[1] == "forecast of the loss, beside what was lost"
    assert names(forecast=True, head_ratio=0.5) == ["plan (flap)"]  # there is none
    assert names(forecast=True, keep=["low"]) == ["plan (flap)"]
    assert names(forecast=True, forget=["low"]) == ["plan (flap)", "neurons to forget"]
    repaired = names(forget=["low"], last=True, compensate="least-squares", relearning=True)
    assert repaired[1:] == ["neurons to forget", "repair that makes forgetting last", "teaching it again"]
    given = plan_pruning(model, None, scans, forget=["low"], last=True, method="magnitude", window=ids.shape[1])
    assert names(plan=given, compensate="least-squares", relearning=True)[1:] == repaired[2:]

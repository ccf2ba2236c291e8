"""What a cut will cost, before it is made."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from pruning_data import make_networks, stimuli
from tiny_models import tiny

import llmbrain as lb
from llmbrain import InputError, PruningPlan, plan_pruning, prune, scan
from llmbrain.anatomy.families import anatomy
from llmbrain.decomposition import dual_regression
from llmbrain.hooks.text import ScanWarning
from llmbrain.networks.localizer import time_courses_of
from llmbrain.pruning.forecast import PREDICTORS, share_cut, token_losses_of
from llmbrain.study.forecasting import forecast_of


@pytest.fixture(scope="module")
def setting():
    model = tiny("llama", intermediate_size=48)
    tokenizer, texts = stimuli()
    scans = scan(model, tokenizer, texts)
    return model, scans, make_networks(anatomy(model).widths)


def test_a_small_change_costs_what_was_foretold(setting):
    """The sum over all tokens against the real loss, for a cut that is small enough for an expansion."""
    model, scans, _ = setting
    model = tiny("llama", intermediate_size=48)
    body = anatomy(model)
    with torch.no_grad():
        for layer in body.layers:
            layer.down.weight()[:20] *= 3e-2
    scans = scan(model, *stimuli())
    kept = [np.arange(20, 48).tolist() for _ in body.layers]
    plan = plan_pruning(model, ratio=0.25, method="random", scans=scans)
    plan = PruningPlan.from_dict({**plan.to_dict(), "kept": kept})
    small = prune(model, plan)
    before, after = (token_losses_of(m, scans) for m in (model, small))
    found = plan.forecast(None, scans, model=model, predictor="taylor", compensate=None)
    predicted, measured = (np.array([np.nansum(x) for x in runs]) for runs in (
        found.tokens, [b - a for a, b in zip(before, after)]))  # fmt: skip
    assert np.abs(measured).max() > 1e-3
    np.testing.assert_allclose(predicted, measured, rtol=0.15, atol=0.05 * np.abs(measured).max())
    both = plan.forecast(None, scans, model=model, compensate=None)
    parts = [plan.forecast(None, scans, model=model, compensate=None, predictor=p) for p in ("taylor", "curvature")]
    np.testing.assert_allclose(both.tokens[0][1:], sum(p.tokens[0][1:] for p in parts), rtol=1e-4, atol=1e-6)
    assert np.isnan(both.tokens[0][0])


def test_blocks_that_run_again_say_the_same(setting, monkeypatch):
    """Where a backward pass would keep too much, blocks run twice: no number changes."""
    model, scans, networks = setting
    plan = plan_pruning(model, networks, scans, ratio=0.4, method="flap", calibration=scans)
    kept = plan.forecast(networks, scans, model=model)
    runs = []
    monkeypatch.setattr("llmbrain.pruning.calibrate.gradients.LARGE", 0)
    handle = anatomy(model).layers[0].down.module.register_forward_hook(lambda *_: runs.append(1))
    again = plan.forecast(networks, scans, model=model)
    handle.remove()
    assert len(runs) >= 2 * len(scans)
    for a, b in zip(kept.tokens, again.tokens):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_losses_of_tokens_are_those_of_a_plain_forward_pass(setting):
    model, scans, _ = setting
    ids = torch.from_numpy(scans[0].token_ids)[None]
    with torch.no_grad():
        plain = torch.nn.functional.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="none")
    np.testing.assert_allclose(token_losses_of(model, scans)[0][1:], plain.numpy(), rtol=1e-5)


def test_tables_say_what_is_predicted_and_what_came(setting):
    model, scans, networks = setting
    plan = plan_pruning(model, networks, scans, ratio=0.4, method="flap", calibration=scans)
    found = plan.forecast(networks, scans)  # the model is still there
    assert found.predictor == "taylor2"
    assert found.unit == "nats a token"
    assert list(found.conditions["condition"]) == ["high", "low"]
    assert len(found.texts) == len(scans)
    assert list(found.networks["network"]) == networks.names
    gone = ~plan.mask
    energy = networks.maps[0].astype(float) ** 2
    assert share_cut(networks, plan.kept)[0] == pytest.approx(energy[gone].sum() / energy.sum())
    assert found.networks["share_cut"][0] == pytest.approx(energy[gone].sum() / energy.sum())
    with pytest.raises(InputError, match="not measured yet"):
        found.agreement()
    small = prune(model, plan, calibration=scans, compensate="least-squares", window=16)
    measured = found.measure(model, small)
    change = np.concatenate([b - a for a, b in zip(*(token_losses_of(m, scans) for m in (model, small)))])
    assert measured.texts["measured"].mean() == pytest.approx(np.nanmean(change), rel=1e-3)
    assert list(measured.agreement()["over"]) == ["networks", "conditions", "texts"]
    page = lb.report(plan, forecast=measured).html()
    assert "predicted before the cut (taylor2), and measured after it" in page


@pytest.mark.parametrize("predictor", PREDICTORS)
@pytest.mark.parametrize("compensate", [None, "bias", "least-squares"])
def test_every_predictor_gives_a_number_for_every_token(setting, predictor, compensate):
    model, scans, networks = setting
    plan = plan_pruning(model, ratio=0.4, method="magnitude", scans=scans)
    found = plan.forecast(networks, scans[:2], predictor=predictor, compensate=compensate)
    for values, one in zip(found.tokens, scans):
        assert np.isfinite(values[1:]).all()
        assert len(values) == one.n_tokens


def test_a_plan_from_a_file_asks_for_its_model(setting, tmp_path):
    model, scans, networks = setting
    plan = plan_pruning(model, ratio=0.4, method="magnitude", scans=scans)
    again = PruningPlan.load(plan.save(tmp_path / "plan.json"))
    assert "_model" not in json.loads((tmp_path / "plan.json").read_text())
    with pytest.raises(InputError, match="needs the model that the plan was made for"):
        again.forecast(networks, scans)
    np.testing.assert_array_equal(again.forecast(networks, scans, model=model).tokens[0],
                                  plan.forecast(networks, scans).tokens[0])  # fmt: skip
    with pytest.raises(InputError, match="make a new plan"):
        again.forecast(networks, scans, model=tiny("llama", intermediate_size=48, seed=1))


def test_what_does_not_belong_together_is_refused(setting):
    model, scans, networks = setting
    plan = plan_pruning(model, ratio=0.4, method="magnitude", scans=scans)
    with pytest.raises(InputError, match="networks lie in"):
        plan.forecast(make_networks([5, 5]), scans)
    with pytest.raises(InputError, match="none of them holds token ids"):
        plan.forecast(networks, [lb.Scan.from_array(scans[0].data(), scans[0].space)])
    with pytest.raises(InputError, match="predictor='magic' is not known"):
        plan.forecast(networks, scans, predictor="magic")
    with pytest.raises(InputError, match="predictor='networks' needs networks"):
        plan.forecast(None, scans, predictor="networks")
    with pytest.raises(InputError, match="networks=list must be a FunctionalNetworks"):
        plan.forecast(scans, networks)
    with pytest.raises(InputError, match="scans of str must be scans"):
        plan.forecast(networks, ["a text"])
    with pytest.raises(InputError, match="none of them holds token ids"):
        plan.forecast(networks, [])


def test_scans_of_another_model_are_refused(setting):
    """Of the same widths, they would give a number."""
    model, scans, _ = setting
    plan = plan_pruning(model, ratio=0.4, method="magnitude")
    other = scan(tiny("llama", intermediate_size=48, seed=1), *stimuli())
    with pytest.raises(InputError, match="is not of this model: what it holds of layer 0"):
        plan.forecast(None, other)
    with pytest.raises(InputError, match="is not of this model"):
        plan.forecast(None, [*scans, other[0]])
    half = scan(model, *stimuli(), dtype="float16")
    found, wanted = (plan.forecast(None, of).texts["predicted"] for of in (half, scans))
    np.testing.assert_allclose(found, wanted, rtol=0.05, atol=1e-4)
    with pytest.warns(ScanWarning, match="no forecast: scan .* is not of this model"):
        assert forecast_of(model, plan, None, other, "least-squares") is None


def test_a_repair_that_keeps_a_function_is_not_foretold(setting):
    model, scans, _ = setting
    plan = plan_pruning(model, None, scans, ratio=0.4, method="magnitude", keep=["low"], window=16)
    with pytest.raises(InputError, match="keeps or forgets functions"):
        plan.forecast(None, scans)
    assert plan.forecast(None, scans, compensate=None).unit == "nats a token"


def test_time_courses_of_other_texts_are_not_taken_for_these(setting):
    """Networks bring the time courses of their own runs; others may be as long."""
    _, scans, _ = setting
    rng = np.random.default_rng(0)
    other = [lb.Scan.from_array(s.data()[rng.permutation(s.n_tokens)], s.space) for s in scans]  # as long, not the same
    ica = lb.GroupICA(4, random_state=0).fit(other)
    own = lb.FunctionalNetworks.from_ica(ica, threshold=1.5)
    bare = lb.FunctionalNetworks(own.maps, own.space, threshold=1.5, standardize=False)
    for found, wanted in zip(time_courses_of(own, scans), dual_regression(bare.maps, scans).time_courses):
        np.testing.assert_array_equal(found, wanted)
    for found, wanted in zip(time_courses_of(own, other), ica.mixing_):
        np.testing.assert_array_equal(found, wanted)

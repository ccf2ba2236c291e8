"""Network terms: token weights, coverage, heads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pruning_data import make_networks, windows
from tiny_models import tiny, tiny_tokenizer

import llmbrain as lb
from llmbrain import (
    FunctionalNetworks,
    InputError,
    plan_pruning,
    prune,
    scan,
)
from llmbrain.anatomy.families import anatomy
from llmbrain.anatomy.units import HEADS
from llmbrain.pruning.criteria.networks import balanced_weights, covered, layer_masks, unexplained_energy


def test_networks_span_neurons_and_heads():
    model, tokenizer, ids = tiny("llama", num_hidden_layers=3), tiny_tokenizer(), windows()
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcdefghijklmnop .,"), 40)) for _ in range(6)]
    scans = [s.joined("neuron", "head") for s in scan(model, tokenizer, texts, site=("neuron", "head"))]
    assert np.array_equal(scans[0].data()[:, 72:], scan(model, tokenizer, texts[:1], site="head")[0].data())
    nets = FunctionalNetworks.from_ica(lb.GroupICA(3, random_state=0).fit(scans), threshold=1.5)
    assert nets.maps.shape[1] == 3 * 24 + 3 * 4
    body = anatomy(model)
    heads = layer_masks(nets, body, HEADS)
    by_hand = np.asarray(nets.masks)[:, 72 + 4 : 72 + 8].reshape(3, 2, 2).any(2)  # two query heads a group
    assert np.array_equal(heads[1], by_hand)
    plan = plan_pruning(model, nets, ratio=0.3, calibration=ids, head_ratio=0.3, protect=[0])
    assert plan.details["networks"]["n"] == 3
    assert len(plan.kept_heads[0]) == 2
    assert sum(len(k) for k in plan.kept_heads) == 4
    alone = plan_pruning(model, nets, ratio=0.3, calibration=ids)
    assert alone.kept_heads is None
    small = prune(model, plan, calibration=ids, compensate="least-squares")
    assert sum(layer.n_kv_heads for layer in anatomy(small).layers) == 4
    token_ids = torch.from_numpy(scans[0].token_ids.astype(np.int64))[None]
    x, basis = scans[0].data()[:, :72].astype(float), np.asarray(nets.maps, dtype=float)[:, :72].T
    z = ((x - x.mean(0)) / x.std(0)).T
    left = np.square(z - basis @ np.linalg.lstsq(basis, z, rcond=None)[0]).sum(0)  # by their neurons
    assert np.allclose(unexplained_energy(model, body, token_ids, nets)[0], left / left.mean(), rtol=1e-3)
    key = nets[0].mask
    with lb.lesion(model, nets[0]):
        gone = scan(model, tokenizer, texts[:1], site=("neuron", "head"))[0].joined("neuron", "head").data()
    assert (gone[:, np.flatnonzero(key)] == 0).all()
    assert not (gone[:, ~key] == 0).all(0).any()


def test_unexplained_energy_in_closed_form():
    model, ids = tiny("gpt2"), windows(30)
    body, nets = anatomy(model), make_networks((24, 24))
    caught = []
    handles = [layer.down.module.register_forward_pre_hook(lambda m, a: caught.append(a[0].detach())) for layer in
               body.layers]  # fmt: skip
    with torch.no_grad():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    x = torch.cat(caught, -1).flatten(0, 1).double().numpy()
    z = (x - x.mean(0)) / x.std(0)
    basis = np.asarray(nets.maps, dtype=float).T
    fitted = basis @ np.linalg.lstsq(basis, z.T, rcond=None)[0]
    left = np.square(z.T - fitted).sum(0)
    energy = unexplained_energy(model, body, ids, nets)
    assert np.allclose(energy.flatten().numpy(), left / left.mean(), rtol=1e-4)
    assert not any(m._forward_pre_hooks for m in model.modules())
    half = balanced_weights(energy, 0.5)
    assert half.mean() == pytest.approx(1, rel=1e-5)
    assert torch.allclose(half, 0.5 + 0.5 * energy, atol=1e-4)
    assert torch.equal(balanced_weights(energy, 0.0), torch.ones(ids.shape))
    assert float(balanced_weights(torch.tensor([[1000.0, 0.0]]), 1.0).max()) == 2.0  # no token counts without limit


def test_plans_hand_their_token_weights_to_the_repair(tmp_path):
    model, ids, nets = tiny("llama"), windows(), make_networks((24, 24))
    plan = plan_pruning(model, nets, ratio=0.4, calibration=ids)
    weights = plan.token_weights(ids)
    expected = balanced_weights(unexplained_energy(model, anatomy(model), ids, nets), 0.5)
    assert torch.allclose(weights, expected, atol=0.006)
    assert plan.token_weights(windows(seed=1)) is None
    back = lb.PruningPlan.load(plan.save(tmp_path / "plan.json"))
    a, b, c = (prune(model, back, calibration=ids, compensate="least-squares", weights=w) for w in (
        None, weights, torch.ones(ids.shape)))  # fmt: skip
    heavy = [m.model.layers[1].mlp.down_proj.weight for m in (a, b, c)]
    assert torch.equal(heavy[0], heavy[1])
    assert not torch.allclose(heavy[0], heavy[2])
    assert "token_weights" not in a.llmbrain_pruning[-1]["plan"]["details"]
    equal = plan_pruning(model, nets, ratio=0.4, calibration=ids, token_balance=0.0)
    assert equal.token_weights(ids) is None


def test_every_network_is_covered():
    scores, masks = np.arange(100.0), np.zeros((2, 100), dtype=bool)
    masks[0, :20] = masks[1, 60:80] = True  # the first network has the worst scores
    kept = covered(scores, 40, masks)
    assert len(kept) == 40
    assert masks[0][kept].sum() == 4  # half of 20 x 40%
    assert set(kept) >= {16, 17, 18, 19}
    assert np.array_equal(covered(scores, 40, masks[:0]), np.arange(60, 100))


def test_the_network_method_reports_what_it_used():
    model, ids = tiny("llama"), windows()
    plan = plan_pruning(model, make_networks((24, 24)), ratio=0.4, method="networks", calibration=ids)
    assert plan.details["networks"]["n"] == 3
    assert len({tuple(c["widths"]) for c in plan.details["search"]}) == len(plan.details["search"]) > 1
    (best,) = [c for c in plan.details["search"] if c["chosen"]]
    assert tuple(best["widths"]) == plan.widths
    assert best is plan.details["search"][0] or best["loss"] < plan.details["search"][0]["loss"]
    assert "no networks given" in plan_pruning(model, ratio=0.4, calibration=ids).summary()
    with pytest.raises(InputError, match=r"networks lie in layers of \[30, 30\] neurons"):
        plan_pruning(model, make_networks((30, 30)), ratio=0.4, calibration=ids)


def test_ends_of_deep_models_are_not_cut_unless_asked_or_too_much_would_go():
    model, ids = tiny("llama", num_hidden_layers=20), windows()
    options = {"calibration": ids, "allocation": "uniform", "sequential": False}
    plan = plan_pruning(model, ratio=0.3, **options)
    assert plan.protect == (0, 1, 2, 18, 19)
    assert all(plan.widths[i] == 24 for i in plan.protect)
    assert sum(plan.widths) == 20 * 24 - round(0.3 * 20 * 24)
    assert any("protect=[]" in note for note in plan.details["notes"])
    assert plan_pruning(model, ratio=0.3, protect=[], **options).protect == ()
    asked = {"ratio": 0.3, "calibration": ids, "sequential": False, "passes": 4}
    assert plan_pruning(model, **asked).allocation == "uniform"  # a search only where it is asked for
    assert plan_pruning(model, allocation="search", **asked).allocation == "search"
    most = plan_pruning(model, ratio=0.7, **options)
    assert most.protect == ()
    assert any("no layer is protected" in note for note in most.details["notes"])
    shallow = plan_pruning(tiny("llama", num_hidden_layers=6), ratio=0.3, **options)
    assert shallow.protect == ()

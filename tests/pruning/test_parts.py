"""The parts of pruning against closed forms: moments, OBS, allocation, streams, network terms, functions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import MODELS, VOCAB, tiny, tiny_tokenizer

import llmbrain as lb
from llmbrain import FunctionalNetworks, InputError, NeuronSpace, plan_pruning, prune
from llmbrain.anatomy.families import anatomy
from llmbrain.anatomy.units import NEURONS
from llmbrain.pruning.allocate.budget import Budget
from llmbrain.pruning.allocate.losses import LEVELS, from_curves, from_losses
from llmbrain.pruning.allocate.shares import ranked, uniform
from llmbrain.pruning.benchmark import compare_methods
from llmbrain.pruning.calibrate.gradients import gradient_pass
from llmbrain.pruning.calibrate.losses import Objective, last_states
from llmbrain.pruning.calibrate.moments import Moments
from llmbrain.pruning.calibrate.stream import Stream, split_windows
from llmbrain.pruning.calibrate.windows import mixed_windows, write_windows
from llmbrain.pruning.criteria.networks import balanced_weights, covered, unexplained_energy
from llmbrain.pruning.criteria.obs import removal_costs
from llmbrain.pruning.planner import Planner
from llmbrain.pruning.recovery import recover

FAMILIES = sorted(set(MODELS) - {"mixtral"})


def windows(n=40, length=16, seed=0):
    return torch.randint(3, VOCAB, (n, length), generator=torch.Generator().manual_seed(seed))


def test_moments_of_drifting_batches_are_exact():
    """Forty batches whose mean moves, as fails FLAP's running variance; and a mean of a thousand sigma."""
    rng = np.random.default_rng(0)
    batches = [1000 + 0.1 * b + rng.normal(size=(50, 5)) for b in range(40)]
    targets = [b @ np.ones((5, 2)) + rng.normal(size=(50, 2)) for b in batches]
    moments = Moments()
    for x, t in zip(batches, targets):
        moments.add(torch.from_numpy(x), torch.from_numpy(t))
    x, t = np.concatenate(batches), np.concatenate(targets)
    both = np.cov(x.T, t.T, ddof=0)
    assert np.allclose(moments.variance, x.var(0), rtol=1e-3)
    assert np.allclose(moments.covariance, both[:5, :5], atol=2e-3)
    assert np.allclose(moments.cross_covariance, both[5:, :5], atol=5e-3)
    assert np.allclose(moments.mean, x.mean(0), rtol=1e-6)


def test_weighted_moments_equal_repeated_tokens():
    rng = np.random.default_rng(1)
    x, t, w = rng.normal(size=(30, 4)), rng.normal(size=(30, 2)), rng.integers(0, 4, 30)
    weighted, repeated = Moments(), Moments()
    weighted.add(torch.from_numpy(x), torch.from_numpy(t), torch.from_numpy(w).float())
    repeated.add(torch.from_numpy(np.repeat(x, w, 0)), torch.from_numpy(np.repeat(t, w, 0)))
    assert torch.allclose(weighted.covariance, repeated.covariance, atol=1e-6)
    assert torch.allclose(weighted.cross_covariance, repeated.cross_covariance, atol=1e-6)
    assert torch.allclose(weighted.mean, repeated.mean, atol=1e-6)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("with_metric", [False, True])
def test_obs_costs_are_the_errors_of_refitted_outputs(size, with_metric):
    """Each greedy removal costs what a fresh least-squares fit without the unit adds in squared error."""
    rng = np.random.default_rng(2)
    units, outputs = 6, 4
    x = rng.normal(size=(400, units * size)) @ rng.normal(size=(units * size,) * 2)
    cov = np.cov(x.T, ddof=0)
    w = rng.normal(size=(units * size, outputs))
    root = rng.normal(size=(outputs, outputs)) if with_metric else np.eye(outputs)
    metric = root @ root.T
    damped = metric + 1e-2 * np.diag(metric).mean() * np.eye(outputs) if with_metric else metric
    costs = removal_costs(
        torch.from_numpy(cov), torch.from_numpy(w), ridge=1e-12, size=size,
        metric=torch.from_numpy(metric) if with_metric else None,
    ).numpy()  # fmt: skip

    def error(kept):
        columns = [u * size + i for u in kept for i in range(size)]
        new = np.linalg.solve(cov[np.ix_(columns, columns)], cov[columns] @ w) if columns else np.zeros((0, outputs))
        lost = w.copy()
        lost[columns] -= new
        return np.trace(lost.T @ cov @ lost @ damped)

    kept, total = list(range(units)), 0.0
    for unit in np.argsort(costs, kind="stable")[: units - 1]:
        trials = {u: error([v for v in kept if v != u]) for u in kept}
        assert trials[unit] == pytest.approx(min(trials.values()), rel=1e-6)
        kept.remove(unit)
        total += costs[unit]
        assert total >= trials[unit] * (1 - 1e-6)  # equal, but for costs that were raised to stay in order
    assert costs.min() == pytest.approx(error([u for u in range(units) if u != int(np.argmin(costs))]), rel=1e-6)


def test_wide_layers_lose_several_units_a_step():
    cov, w = torch.eye(600, dtype=torch.float64), torch.arange(600, dtype=torch.float64)[:, None] + 1
    costs = removal_costs(cov, w, ridge=1e-9)
    assert torch.equal(costs.argsort(), torch.arange(600))
    assert torch.allclose(costs, w[:, 0] ** 2, rtol=1e-6)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(2, 60), min_size=1, max_size=6),
    st.floats(0.02, 0.97),
    st.sampled_from([1, 2, 8]),
    st.integers(0, 99),
)  # fmt: skip
def test_every_allocation_keeps_the_budget(widths, ratio, multiple, seed):
    rng = np.random.default_rng(seed)
    protect = [0] if len(widths) > 2 else []
    least = sum(w if i in protect or w < multiple else multiple for i, w in enumerate(widths))
    if sum(widths) - round(ratio * sum(widths)) < least:
        with pytest.raises(InputError, match="largest ratio"):
            Budget.of(widths, ratio, protect, multiple)
        return
    budget = Budget.of(widths, ratio, protect, multiple)
    scores = [rng.random(w) * rng.integers(1, 9) for w in widths]
    results = [
        uniform(budget),
        ranked(budget, scores, standardize=True, clamp=False),
        ranked(budget, scores, standardize=False, clamp=True),
        from_losses(budget, np.sort(rng.random((len(widths), len(LEVELS))), 1)),
        from_curves(budget, np.sort(rng.random((len(widths), len(LEVELS))), 1)),
    ]
    for found in results:
        assert all(1 <= f <= w for f, w in zip(found, widths))
        assert all(found[i] == widths[i] for i in protect)
        assert all(f % multiple == 0 or f == w for f, w in zip(found, widths))
        assert sum(found) == budget.keep if multiple == 1 else sum(found) <= budget.keep
        room = [w for f, w in zip(found, widths) if f < w and f + multiple <= w]
        assert sum(found) > budget.keep - multiple or not room


@pytest.mark.parametrize("widths_of", [from_losses, from_curves])
def test_sensitive_layers_keep_more(widths_of):
    losses = np.outer([1.0, 10.0], np.array(LEVELS) ** 2)
    few, many = widths_of(Budget.of([100, 100], 0.5), losses)
    assert few + many == 100
    assert many > 80


def test_smooth_losses_have_their_closed_form_minimum_and_bear_noise():
    # Sum of a s_1^2 + b s_2^2 with s_1 + s_2 = 1: shares removed b / (a + b) and a / (a + b).
    budget, exact = Budget.of([1000, 1000], 0.5), np.outer([1.0, 3.0], np.array(LEVELS) ** 2)
    assert np.allclose(from_curves(budget, exact), [250, 750], atol=2)
    noise = np.random.default_rng(0).normal(0, 0.02, (50, *exact.shape))
    errors = {
        f.__name__: np.mean([abs(f(budget, exact + e)[0] - 250) for e in noise]) for f in (from_curves, from_losses)
    }
    assert errors["from_curves"] < errors["from_losses"] / 2


@pytest.mark.parametrize("name", FAMILIES)
def test_streams_replay_the_model_bit_for_bit(name):
    model, ids = tiny(name), windows(5)
    body = anatomy(model)
    caught = []
    handle = body.layers[-1].block.register_forward_hook(
        lambda m, a, o: caught.append(o if torch.is_tensor(o) else o[0])
    )
    with torch.no_grad():
        model(input_ids=ids)
        handle.remove()
        stream = Stream(model, body, ids)
        for _ in body.layers:
            stream.advance()
    assert torch.equal(torch.cat(stream.hidden), caught[0])


def test_gradient_metric_against_autograd_by_hand():
    model, ids = tiny("llama"), windows(3)
    body = anatomy(model)
    found = gradient_pass(model, body, ids, metric=True, taylor=True)
    outputs = {}
    layer = body.layers[1]

    def hook(module, args, output):
        output.retain_grad()
        outputs["y"] = output

    handle = layer.down.module.register_forward_hook(hook)
    loss = model(input_ids=ids, labels=ids).loss * ids[:, 1:].numel()
    handle.remove()
    loss.backward()
    g = outputs["y"].grad.flatten(0, 1).double()
    assert torch.allclose(found["metric"][1], g.T @ g / ids.numel(), rtol=1e-4, atol=1e-10)
    down = layer.down.module.weight
    by_hand = (down * down.grad).abs().sum(0) + sum(
        (p.module.weight * p.module.weight.grad).abs().sum(1) for p in layer.inputs
    )
    assert torch.allclose(found["taylor"][1], by_hand.double(), rtol=1e-4)


def make_networks(widths, k=3, seed=0):
    space = NeuronSpace(widths)
    return FunctionalNetworks(np.random.default_rng(seed).normal(size=(k, space.n_neurons)), space, threshold=1.5)


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


def test_windows_that_the_model_writes_follow_its_distribution():
    model, tokenizer = tiny("llama"), tiny_tokenizer()
    state = torch.random.get_rng_state()
    ids = write_windows(model, tokenizer, 300, 3, random_state=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert ids.shape == (300, 3)
    assert torch.equal(ids, write_windows(model, tokenizer, 300, 3, random_state=1))
    assert not torch.equal(ids, write_windows(model, tokenizer, 300, 3, random_state=2))
    assert (ids[:, 0] == tokenizer.bos_token_id).all()
    with torch.no_grad():
        p = model(input_ids=ids[:1, :1]).logits[0, 0].softmax(-1).numpy()
    counts = np.bincount(ids[:, 1], minlength=len(p))
    often = p * 300 >= 5
    chi2 = (np.square(counts - 300 * p) / (300 * p))[often].sum()
    assert chi2 < 2 * often.sum() + 10
    mixed = mixed_windows(ids[:5], ids[5:9])
    assert sorted(map(tuple, mixed.tolist())) == sorted(map(tuple, ids[:9].tolist()))
    with pytest.raises(InputError, match="predicts no next token: it writes no"):
        write_windows(tiny("bert"), tokenizer)


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


def test_the_search_keeps_to_the_smooth_widths_unless_others_are_surely_better(monkeypatch):
    planner = Planner(tiny("llama"), "networks", windows())
    best = from_curves(Budget.of(planner.body.widths, 0.4), planner.allocator.sensitivity())
    noise = np.random.default_rng(0).normal(size=(9, 20))
    for gain, stays in ((0.02, True), (0.9, False)):  # against a standard error of about 0.3
        calls = iter(noise)
        monkeypatch.setattr(planner.allocator, "measure", lambda c, sequential, gain=gain, calls=calls: (
                            next(calls) - gain) * (c[NEURONS] != best))  # fmt: skip
        chosen = planner.plan(0.4)
        assert (chosen.widths == best) == stays
        assert sum(chosen.widths) == sum(best)


@pytest.mark.parametrize("passes", [3, 24, 60])
def test_a_search_keeps_to_its_forward_passes(passes):
    model, ids = tiny("llama"), windows(400)
    seen = []
    model.model.layers[0].register_forward_hook(lambda m, args, out: seen.append(args[0].shape[:2].numel()))
    planner = Planner(model, "obs", ids, passes=passes)
    plan = planner.plan(0.4, allocation="search")
    used = sum(seen) / ids.numel()
    assert used < passes + 1.2 + 2.2  # one look at the dense layers, the choice; each records the calls of one batch
    assert used > min(passes, 6 * 2.1) / 2
    assert ("search" in plan.details) == (passes > 3)
    with pytest.raises(InputError, match="passes=0 must be above 0"):
        plan_pruning(model, ratio=0.4, calibration=ids, passes=0)


def test_what_ratios_share_is_computed_once(monkeypatch):
    model, ids = tiny("llama"), windows()
    planner = Planner(model, "obs-gradient", ids)
    shared = [planner.plan(r, allocation="sensitivity") for r in (0.3, 0.5)]
    monkeypatch.setattr(planner.scorer, "score", None)  # would fail if called again
    assert planner.scorer.dense_scores() is planner.scorer.dense_scores()
    assert planner.plan(0.3, allocation="sensitivity", sequential=False).widths == shared[0].widths
    alone = plan_pruning(model, ratio=0.5, method="obs-gradient", allocation="sensitivity", calibration=ids)
    assert all(np.array_equal(a, b) for a, b in zip(alone.kept, shared[1].kept))


def test_little_text_is_split_so_that_some_is_held_out():
    ids = windows(9, 16)
    held, train = split_windows(ids)
    assert len(held) >= 1
    assert torch.equal(torch.cat([held, train]).sort(0).values, ids.sort(0).values)
    plan = plan_pruning(tiny("llama"), ratio=0.5, calibration=ids)
    assert sum(plan.widths) == 24


@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_models_without_a_next_token_are_measured_by_their_last_states(name):
    from transformers import AutoModel

    full, ids = tiny(name), windows(20)
    bare = AutoModel.from_config(full.config).eval()
    bare.load_state_dict(getattr(full, full.base_model_prefix).state_dict(), strict=False)
    plans = [plan_pruning(m, ratio=0.3, calibration=ids) for m in (full, bare)]  # the head has no part in it
    assert all(np.array_equal(a, b) for a, b in zip(plans[0].kept, plans[1].kept))
    objective = Objective(bare, ids)
    assert objective.mean() == 0
    with torch.no_grad():
        dense = bare(input_ids=ids).last_hidden_state
        assert torch.equal(last_states(full, ids), dense)
        layer = anatomy(bare).layers[0]
        layer.down.module.weight.mul_(0.5)
        change = (bare(input_ids=ids).last_hidden_state - dense).square().sum(-1).mean()
    assert objective.mean() == pytest.approx(float(change / dense.flatten(0, 1).var(0, correction=0).sum()), rel=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_recovery_lowers_the_loss_and_keeps_shapes(name):
    pytest.importorskip("peft")
    model = tiny(name)
    small = prune(model, plan_pruning(model, ratio=0.4, method="random", protect=[0]))
    ids = torch.arange(3, 19).repeat(34, 1)  # a text that can be learned
    state = {k: v.clone() for k, v in small.state_dict().items()}
    better, table = recover(small, None, ids, steps=20, rank=2, learning_rate=0.02)
    assert (table["after"] < 0.7 * table["before"]).all()
    assert anatomy(better).widths == anatomy(small).widths
    assert {k: v.shape for k, v in better.state_dict().items()} == {k: v.shape for k, v in state.items()}
    assert all(torch.equal(v, small.state_dict()[k]) for k, v in state.items())
    assert lb.perplexity(better, None, ids[-1:]) < lb.perplexity(small, None, ids[-1:])


def test_comparison_repeats_its_main_rows_over_draws():
    model, ids = tiny("llama"), windows(30)
    table = compare_methods(
        model, None, ids[:20], ids[20:], ratios=[0.3], methods=["random", "magnitude", "networks"], draws=3
    )
    assert table["method"].tolist() == ["dense", "random", "random", "magnitude", "magnitude", "networks"]
    assert table["perplexity"][0] == pytest.approx(lb.perplexity(model, None, ids[20:]))
    repeated = table[table["draws"] == 3]
    assert list(zip(repeated["method"], repeated["compensate"])) == [
        ("random", "least-squares"), ("networks", "least-squares")]  # fmt: skip
    assert (repeated["low"] < repeated["perplexity"]).all()
    single = table[table["draws"] == 1]
    assert single[["low", "high"]].isna().all(axis=None)
    plan = plan_pruning(model, ratio=0.3, method="magnitude")
    expected = prune(model, plan, calibration=ids[:20], compensate="least-squares")
    row = single[(single["method"] == "magnitude") & (single["compensate"] == "least-squares")].iloc[0]
    assert row["perplexity"] == pytest.approx(lb.perplexity(expected, None, ids[20:]), rel=1e-5)

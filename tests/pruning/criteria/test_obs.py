"""Greedy optimal brain surgeon against refits by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llmbrain.pruning.criteria.obs import removal_costs


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


def test_updates_that_wait_change_nothing(monkeypatch):
    """The inverse and W are brought up to date every `BLOCK` columns: at every column they give the same costs."""
    from llmbrain.pruning.criteria import obs

    rng = np.random.default_rng(4)
    x = rng.normal(size=(900, 150)) @ rng.normal(size=(150, 150))
    cov, w = torch.from_numpy(np.cov(x.T)), torch.from_numpy(rng.normal(size=(150, 7)))
    waiting = removal_costs(cov, w, ridge=1e-6)
    monkeypatch.setattr(obs, "BLOCK", 1)
    at_once = removal_costs(cov, w, ridge=1e-6)
    assert torch.equal(waiting.argsort(), at_once.argsort())
    assert torch.allclose(waiting, at_once, rtol=1e-9)


def test_neurons_that_never_move_go_by_their_weights():
    """The covariance of one token is nothing but rounding, which can be below zero: an expert called once."""
    weight = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for rounding in (0.0, 1e-19):
        covariance = -rounding * torch.ones(6, 6, dtype=torch.float64)
        costs = removal_costs(covariance, weight, ridge=1e-3)
        assert torch.isfinite(costs).all()
        assert costs.argsort().tolist() == weight.square().sum(1).argsort().tolist()

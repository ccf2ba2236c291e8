"""Least squares against scikit-learn, and where nothing is lost."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pruning_data import FAMILIES, logits, windows
from tiny_models import tiny

from llmbrain import (
    PruningPlan,
    plan_pruning,
    prune,
)
from llmbrain.anatomy.families import anatomy


@pytest.mark.parametrize("name", FAMILIES)
def test_least_squares_is_exact_where_nothing_is_lost(name):
    """Neurons that repeat others can be refitted without a trace, whatever surrounds the MLP."""
    model = tiny(name)
    for layer in anatomy(model).layers:
        half = layer.width // 2
        with torch.no_grad():
            for projection in layer.inputs:
                projection.weight()[half:] = projection.weight()[:half]
                if projection.bias() is not None:
                    projection.bias()[half:] = projection.bias()[:half]
    plan = plan_pruning(model, ratio=0.5, method="random")
    kept = tuple(np.arange(w // 2) for w in plan.widths_before)
    plan = PruningPlan.from_dict({**plan.to_dict(), "kept": [k.tolist() for k in kept]})
    small = prune(model, plan, calibration=windows(), compensate="least-squares", ridge=1e-9)
    assert torch.allclose(logits(small), logits(model), atol=2e-3)
    assert not torch.allclose(logits(prune(model, plan)), logits(model), atol=0.05)


def test_least_squares_equals_ridge_of_scikit_learn():
    from sklearn.linear_model import Ridge

    model, ids = tiny("llama", num_hidden_layers=1), windows(60)
    plan = plan_pruning(model, ratio=0.5, method="random")
    layer = anatomy(model).layers[0]
    caught = {}
    handle = layer.down.module.register_forward_hook(lambda m, a, o: caught.update(x=a[0], y=o))
    with torch.no_grad():
        model(input_ids=ids)
    handle.remove()
    x, y = (caught[k].flatten(0, 1).double().numpy() for k in "xy")
    old = layer.down.weight().detach().double().numpy()[plan.kept[0]]
    penalty = 1e-2 * x.var(0).mean() * len(x)
    fitted = Ridge(alpha=penalty).fit(x[:, plan.kept[0]], y - x[:, plan.kept[0]] @ old)
    small = prune(model, plan, calibration=ids, compensate="least-squares", ridge=1e-2)
    down = anatomy(small).layers[0].down
    assert np.allclose(down.weight().detach().numpy(), old + fitted.coef_.T, atol=1e-4)
    assert np.allclose(down.module.bias.detach().numpy(), fitted.intercept_, atol=1e-4)


@pytest.mark.parametrize("heads", [0.0, 0.25])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gpt_neox", "phi", "gptj", "qwen2"])
def test_without_an_intercept_a_bias_that_is_there_counts_once(name, heads):
    model, ids = tiny(name), windows(60)
    plan = plan_pruning(model, ratio=0.1, method="magnitude", head_ratio=heads, calibration=ids)
    small = prune(model, plan, calibration=ids, compensate="least-squares", intercept=False)
    free = prune(model, plan, calibration=ids, compensate="least-squares")
    assert set(small.state_dict()) == set(model.state_dict())  # none was added
    if name != "qwen2":
        cut = (logits(prune(model, plan)) - logits(model)).square().mean()
        assert (logits(small) - logits(model)).square().mean() < cut
    if name in ("llama", "opt", "gpt2"):  # all of its output projections have one
        own = [set(m.state_dict()) == set(model.state_dict()) for m in (small, free)]
        if all(own):
            assert torch.equal(logits(small), logits(free))


@pytest.mark.parametrize("noise", [0.01, 1.0, 30.0])
def test_the_ridge_is_the_one_that_errs_least_of_all(noise):
    from llmbrain.pruning.calibrate.moments import Moments
    from llmbrain.pruning.repair.least_squares import RIDGES, choose_ridge, error, least_squares

    generator = torch.Generator().manual_seed(1)
    x = torch.randn(120, 60, generator=generator) @ torch.randn(60, 60, generator=generator)
    w = torch.randn(60, 5, generator=generator)
    t = x @ w + noise * torch.randn(120, 5, generator=generator)
    train = Moments()
    train.add(x[:90], t[:90])
    held_out = Moments(train)
    held_out.add(x[90:], t[90:])
    kept = torch.arange(45)
    errors = [error(held_out, least_squares(train, w.double(), kept, ridge=r), kept) for r in RIDGES]
    assert choose_ridge(train, held_out, w.double(), kept) == RIDGES[int(np.argmin(errors))]

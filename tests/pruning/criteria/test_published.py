"""The published rule against plain numpy."""

from __future__ import annotations

import numpy as np
import pytest
from pruning_data import windows
from tiny_models import tiny, tiny_tokenizer

from llmbrain import (
    InputError,
    plan_pruning,
    scan,
)


def test_the_published_rule_against_plain_numpy():
    """The rule written out: z-score, SVD, sklearn's FastICA with cube, |z| of maps, union, threshold."""
    from scipy.linalg import sqrtm
    from sklearn.decomposition import FastICA
    from sklearn.utils.extmath import svd_flip

    model, tokenizer = tiny("llama", intermediate_size=96), tiny_tokenizer()
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcdefghijklmnop .,"), 60)) for _ in range(6)]
    scans = scan(model, tokenizer, texts, site=("gate", "up"))
    k = 3
    plan = plan_pruning(model, None, scans, ratio=0.25, method="published", rule={"n_components": k, "n_groups": 2})
    scores = []
    for layer in range(2):
        best = np.zeros(96)
        for group in (scans[:3], scans[3:]):
            x = np.concatenate(
                [np.concatenate([s.data([layer], site=site) for s in group]) for site in ("gate", "up")], axis=1
            ).astype(float)
            x = (x - x.mean(0)) / x.std(0)
            left = svd_flip(*np.linalg.svd(x.T, full_matrices=False)[::2])[0][:, :k]
            centred = left - left.mean(0)
            white = centred @ np.linalg.inv(sqrtm(centred.T @ centred)) * np.sqrt(192)
            start = np.random.RandomState(0).normal(size=(k, k))
            maps = FastICA(fun="cube", max_iter=300, tol=1e-4, w_init=start, whiten=False).fit_transform(white).T
            z = np.abs((maps - maps.mean(1, keepdims=True)) / maps.std(1, keepdims=True))
            best = np.maximum(best, z.max(0).reshape(2, 96).max(0))
        scores.append(best)
    order = np.argsort(-np.concatenate(scores))[:144]
    assert set(np.flatnonzero(plan.mask)) == set(order)
    assert plan.details["published"]["ica_runs"] == 4
    assert plan.details["published"]["ica_not_converged"] == 0
    cut = np.delete(np.concatenate(scores), order)
    assert plan.details["threshold"] == pytest.approx(cut.max(), rel=1e-3)


def test_the_published_rule_protects_first_three_and_last_two():
    ids = windows(20)
    plan = plan_pruning(tiny("llama", num_hidden_layers=7), ratio=0.2, method="published", calibration=ids,
                        rule={"n_components": 5})  # fmt: skip
    assert plan.protect == (0, 1, 2, 5, 6)
    assert [w for i, w in enumerate(plan.widths) if i in plan.protect] == [24] * 5
    assert sum(plan.widths) == 168 - round(0.2 * 168)
    small = plan_pruning(tiny("llama"), ratio=0.2, method="published", calibration=ids, rule={"n_components": 5})
    assert small.protect == ()
    assert "none is protected" in small.summary()
    with pytest.raises(InputError, match=r"ratio=0\.5 leaves 84 of 168 units.*largest ratio is 0\.2"):
        plan_pruning(tiny("llama", num_hidden_layers=7), ratio=0.5, method="published", calibration=ids)


def test_a_model_without_gate_is_read_at_the_neuron():
    plan = plan_pruning(tiny("gpt2"), ratio=0.2, method="published", calibration=windows(20), rule={"n_components": 5})
    assert plan.details["published"]["sites"] == ["neuron"]
    assert "no gate" in plan.summary()

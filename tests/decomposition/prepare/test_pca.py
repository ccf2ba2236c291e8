"""PCA of a run and over runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ica_data import K, T, V, planted, prepared

from llmbrain._validation import InputError
from llmbrain.decomposition import GroupICA
from llmbrain.decomposition.prepare.pca import GroupPCA, pca_of_run, run_pca
from llmbrain.decomposition.prepare.preprocess import Preprocessing, prepare


def test_pca_of_a_run_is_the_svd(data):
    _, runs = data
    run = prepare(runs[0], Preprocessing(), dtype=torch.float64)
    expected = np.linalg.svd(prepared(runs[0]), compute_uv=False)
    for found in (pca_of_run(run, slice(0, V), 10), run_pca(torch.from_numpy(prepared(runs[0])), 10)):
        known = found.eigenvalues[: T - 1]
        assert len(known) >= 10
        np.testing.assert_allclose(known.sqrt(), expected[: len(known)], rtol=1e-6)
        np.testing.assert_allclose((found.rows @ found.rows.T).diagonal().sqrt(), expected[:10], rtol=1e-8)
    tall = prepare(runs[0][:, :60], Preprocessing(), dtype=torch.float64)  # the small side is the neurons
    found = pca_of_run(tall, slice(0, 60), 10)
    expected = np.linalg.svd(prepared(runs[0][:, :60]), compute_uv=False)
    np.testing.assert_allclose((found.rows @ found.rows.T).diagonal().sqrt(), expected[:10], rtol=1e-8)


@pytest.mark.slow
def test_pca_of_a_long_run_keeps_every_source():
    """More than 1,024 tokens: the components come from Krylov iteration."""
    rng = np.random.default_rng(0)
    maps = planted(1)[0][:, :1600]
    run = rng.laplace(size=(1200, K)) @ maps + rng.normal(size=(1200, 1600))
    found = pca_of_run(prepare(run, Preprocessing(), dtype=torch.float64), slice(0, 1600), 3 * K)
    _, lengths, exact = np.linalg.svd(prepared(run), full_matrices=False)
    np.testing.assert_allclose(found.eigenvalues[:K].sqrt(), lengths[:K], rtol=1e-7)
    angles = np.linalg.svd(exact[:K] @ np.linalg.qr(found.rows.numpy().T)[0], compute_uv=False)
    np.testing.assert_allclose(angles, 1, atol=1e-6)
    np.testing.assert_allclose(found.total, (lengths**2).sum(), rtol=1e-9)
    low = rng.normal(size=(1200, 5)) @ rng.laplace(size=(5, 1600))
    with pytest.raises(InputError, match="rank of the data, 5"):
        GroupICA(20, standardize="center").fit(low)


def test_group_pca_over_many_runs_is_the_pca_of_all_of_them():
    _, runs = planted(24)
    group, all_rows = GroupPCA(30), []
    for run in runs:
        rows = run_pca(torch.from_numpy(prepared(run)), 12).rows
        all_rows.append(rows)
        group.add(rows)
        assert group.n_rows <= 60
    exact = np.linalg.svd(torch.cat(all_rows).numpy(), full_matrices=False)[2][:K]
    ours = np.linalg.svd(group.stack().numpy(), full_matrices=False)[2][:K]
    assert np.linalg.svd(exact @ ours.T, compute_uv=False).min() > 0.9999

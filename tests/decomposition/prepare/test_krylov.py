"""Leading components of long runs, without their Gram matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import eigh

from llmbrain.decomposition.prepare import krylov, pca
from llmbrain.decomposition.prepare.pca import RunPCA, pca_of_run
from llmbrain.decomposition.prepare.preprocess import Preprocessing, prepare

N, V = 1056, 1500


def with_spectrum(values: np.ndarray, n: int = N, v: int = V, seed: int = 0) -> np.ndarray:
    """Data (n, v) whose Gram matrix has these eigenvalues; rows and columns have zero mean."""
    rng = np.random.default_rng(seed)

    def orthonormal(rows: int) -> np.ndarray:
        return np.linalg.qr(np.column_stack([np.ones(rows), rng.normal(size=(rows, len(values)))]))[0][:, 1:]

    return orthonormal(n) * np.sqrt(values) @ orthonormal(v).T


def components(data: np.ndarray, k: int, *, center: bool = True, settings: Preprocessing | None = None) -> RunPCA:
    run = prepare(data, settings or Preprocessing(standardize="center"), dtype=torch.float32)
    return pca_of_run(run, slice(0, data.shape[1]), k, center=center)


def exact(data: np.ndarray, k: int, *, center: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues (all) and the leading k right singular vectors, by LAPACK in float64."""
    data = data - data.mean(axis=0)
    data = data - data.mean(axis=1, keepdims=True) if center else data
    values, vectors = eigh(data @ data.T)
    rows = vectors[:, ::-1][:, :k].T @ data
    return values[::-1], rows / np.linalg.norm(rows, axis=1, keepdims=True)


def cosines(rows: np.ndarray, found: RunPCA) -> np.ndarray:
    """Of the angles between rows and what was found, the subspaces."""
    return np.linalg.svd(rows @ np.linalg.qr(found.rows.double().numpy().T)[0], compute_uv=False)


def consistent(found: RunPCA, total: float) -> None:
    """Rows are as long as singular values and orthogonal; the total is the whole variance."""
    products = (found.rows.double() @ found.rows.double().T).numpy()
    values = found.eigenvalues[: len(found.rows)].numpy()
    np.testing.assert_allclose(np.diag(products), values, rtol=1e-4)
    np.testing.assert_allclose(products - np.diag(np.diag(products)), 0, atol=1e-5 * values[0])
    assert (np.diff(values) <= 0).all()
    np.testing.assert_allclose(found.total, total, rtol=1e-5)


def refused(*_: object, **__: object) -> None:
    raise AssertionError("the Gram matrix of a long run is formed")


def test_few_components_of_a_long_run_form_no_gram_matrix(monkeypatch):
    data = with_spectrum(100 * np.arange(1, 600) ** -1.0)
    monkeypatch.setattr(pca, "gram_of_blocks", refused)
    assert len(components(data, 12).rows) == 12
    for many in (200, 0.9):  # of many, or of a share, all eigenvalues are needed
        with pytest.raises(AssertionError, match="Gram"):
            components(data, many)
    with pytest.raises(AssertionError, match="Gram"):
        components(data[:900], 12)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("k", [1, 5, 60])
def test_spectra_without_a_gap(monkeypatch, power, k):
    monkeypatch.setattr(pca, "gram_of_blocks", refused)
    values = 1000 * np.arange(1, 900) ** -power
    data = with_spectrum(values)
    found = components(data, k)
    consistent(found, values.sum())
    error = 1 - found.eigenvalues.numpy() / values[:k]
    assert error.min() > -1e-5
    assert error.max() < 0.2
    assert error[: k // 3].max(initial=0) < 1e-3
    assert found.eigenvalues.sum() > 0.98 * values[:k].sum()
    leading = max(k // 3, 1)
    assert cosines(exact(data, leading)[1], found).min() > 0.998


@pytest.mark.parametrize("center", [True, False])
def test_what_stands_out_of_the_noise_is_exact(monkeypatch, center):
    monkeypatch.setattr(pca, "gram_of_blocks", refused)
    rng = np.random.default_rng(1)
    data = 3 * rng.normal(size=(N, 20)) @ rng.laplace(size=(20, V)) * 0.2 + rng.normal(size=(N, V))
    data += rng.normal(size=(N, 1))
    data[:, 100:130] = 7.0  # constant neurons
    live = np.r_[0:100, 130:V]
    values, rows = exact(data[:, live], 21, center=center)
    found = components(data, 60, center=center)
    np.testing.assert_allclose(found.eigenvalues[:20], values[:20], rtol=1e-5)
    assert cosines(rows[:20], RunPCA(found.rows[:, live], found.eigenvalues, 0)).min() > 1 - 1e-5
    assert not found.rows[:, 100:130].any()
    consistent(found, values.sum())


def test_pure_noise(monkeypatch):
    monkeypatch.setattr(pca, "gram_of_blocks", refused)
    data = np.random.default_rng(2).normal(size=(N, 4000))
    values, _ = exact(data, 1)
    found = components(data, 30)
    consistent(found, values.sum())
    assert (found.eigenvalues.numpy() <= values[:30] * (1 + 1e-6)).all()
    assert (found.eigenvalues.numpy() > 0.7 * values[:30]).all()


@pytest.mark.parametrize("strength", [10.0, 1000.0])
def test_an_eigenvalue_that_repeats_more_often_than_a_block_is_wide(strength):
    values = np.r_[np.full(50, strength), np.linspace(1.5, 0.5, 900)]
    found = components(with_spectrum(values), 60)
    np.testing.assert_allclose(found.eigenvalues[:50], strength, rtol=1e-4)
    assert found.eigenvalues[50] < 2


@pytest.mark.parametrize("rank", [1, 5, 40])
def test_a_run_of_lower_rank(monkeypatch, rank):
    monkeypatch.setattr(pca, "gram_of_blocks", refused)
    values = np.linspace(100, 50, rank)
    found = components(with_spectrum(values), 50)
    assert len(found.rows) == rank
    np.testing.assert_allclose(found.eigenvalues[:rank], values, rtol=1e-5)
    consistent(found, values.sum())


def test_components_outside_the_sample_that_starts_the_iteration(monkeypatch):
    monkeypatch.setattr(pca, "gram_of_blocks", refused)
    rng = np.random.default_rng(3)
    data = rng.normal(size=(N, 8800)).astype(np.float32)
    data[:, :1024] += rng.normal(size=(N, 30)) @ rng.normal(size=(30, 1024)) * 3
    for i in range(6):  # neurons that follow one course, all in the part of a chunk that the sample leaves out
        data[:, 2700 + 30 * i : 2730 + 30 * i] += 6 * rng.normal(size=(N, 1))
    values, rows = exact(data.astype(np.float64), 36)
    found = components(data, 45)
    np.testing.assert_allclose(found.eigenvalues[:36], values[:36], rtol=2e-5)
    assert cosines(rows, found).min() > 0.9999


def test_half_precision_and_tokens_left_out(monkeypatch):
    monkeypatch.setattr(pca, "gram_of_blocks", refused)
    data = with_spectrum(1e4 * np.arange(1, 500) ** -1.5).astype(np.float16)
    values, rows = exact(data.astype(np.float64), 5)
    found = components(data, 20)
    np.testing.assert_allclose(found.eigenvalues[:5], values[:5], rtol=1e-5)
    assert cosines(rows, found).min() > 1 - 1e-5
    run = prepare(
        np.concatenate([data[:3], data]).astype(np.float32), Preprocessing(standardize="center", drop_first=3)
    )
    assert run.n_kept == N
    np.testing.assert_allclose(pca_of_run(run, slice(0, V), 20).eigenvalues, found.eigenvalues, rtol=1e-4)


def test_duplicated_tokens(monkeypatch):
    monkeypatch.setattr(pca, "gram_of_blocks", refused)
    data = with_spectrum(100 * np.arange(1, 500) ** -1.5, n=N // 2)
    values, rows = exact(data, 5)
    found = components(np.repeat(data, 2, axis=0), 20)
    np.testing.assert_allclose(found.eigenvalues[:5], 2 * values[:5], rtol=1e-5)
    assert cosines(rows, found).min() > 1 - 1e-5


def test_part_of_the_neurons_and_z_scores(monkeypatch):
    monkeypatch.setattr(pca, "gram_of_blocks", refused)
    rng = np.random.default_rng(4)
    data = rng.normal(size=(N, 3 * V)) * rng.uniform(1, 9, size=3 * V) + 100
    data[:, V : 2 * V] += 10 * rng.normal(size=(N, 4)) @ rng.normal(size=(4, V))
    part = data[:, V : 2 * V]
    values, rows = exact((part - part.mean(axis=0)) / part.std(axis=0), 4)
    run = prepare(data, Preprocessing(), dtype=torch.float64)
    found = pca_of_run(run, slice(V, 2 * V), 10)
    np.testing.assert_allclose(found.eigenvalues[:4], values[:4], rtol=1e-6)
    assert cosines(rows, found).min() > 1 - 1e-6
    assert found.rows.dtype == torch.float64


def test_the_same_on_any_number_of_threads():
    data = with_spectrum(100 * np.arange(1, 600) ** -1.0)
    n_threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3, 2):
            torch.set_num_threads(n)
            results.append(components(data, 20))
    finally:
        torch.set_num_threads(n_threads)
    for found in results[1:]:
        np.testing.assert_allclose(found.eigenvalues, results[0].eigenvalues, rtol=1e-5)
        np.testing.assert_allclose(found.rows[:5].abs(), results[0].rows[:5].abs(), atol=1e-4)
    assert torch.equal(results[1].rows, results[3].rows)


def test_without_convergence_the_gram_matrix_tells(monkeypatch):
    values = 100 * np.arange(1, 900) ** -0.5
    data = with_spectrum(values)
    monkeypatch.setattr(krylov, "_STEPS", 3)
    monkeypatch.setattr(krylov, "_TOLERANCE", 1e-6)
    formed = []
    whole = pca.gram_of_blocks
    monkeypatch.setattr(pca, "gram_of_blocks", lambda *args: formed.append(1) or whole(*args))
    found = components(data, 60)
    assert formed
    np.testing.assert_allclose(found.eigenvalues[:60], values[:60], rtol=1e-5)

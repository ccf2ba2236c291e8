"""FastICA on white data, against scikit-learn, picard and known sources."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ica_data import matched
from sklearn.decomposition import fastica as sklearn_fastica
from sklearn.exceptions import ConvergenceWarning

from llmbrain._validation import InputError
from llmbrain.decomposition import fastica
from llmbrain.decomposition.prepare import pca
from llmbrain.decomposition.prepare.pca import whiten
from llmbrain.decomposition.solvers import Settings, unmix
from llmbrain.decomposition.solvers.fastica import negentropy, random_start
from llmbrain.decomposition.workers import workers

K, N = 6, 30_000


@pytest.fixture(scope="module")
def sources() -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.where(rng.random((K, N)) < 0.1, rng.laplace(size=(K, N)), 0.01 * rng.normal(size=(K, N)))


@pytest.fixture(scope="module")
def white(sources) -> np.ndarray:
    rng = np.random.default_rng(1)
    turn = np.linalg.qr(rng.normal(size=(K, K)))[0]  # well conditioned, so that the noise stays small everywhere
    mixed = turn @ sources + 0.05 * rng.normal(size=(K, N))
    mixed -= mixed.mean(axis=1, keepdims=True)
    values, vectors = np.linalg.eigh(mixed @ mixed.T / N)
    return (vectors / np.sqrt(values)).T @ mixed


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("fun", ["logcosh", "exp", "cube"])
def test_agrees_with_scikit_learn(white, fun, dtype):
    start = random_start(K, 3)
    ours = fastica(white.astype(dtype), fun=fun, w_init=start, tol=1e-4)
    _, _, theirs, n_iter = sklearn_fastica(
        white.T, whiten=False, fun=fun, w_init=start, tol=1e-4, max_iter=200, return_n_iter=True
    )
    assert ours.converged
    assert ours.n_iter == n_iter
    paired = np.abs(np.diag(np.corrcoef(ours.unmixing @ white, theirs.T)[:K, K:]))
    assert paired.min() > 0.9999


@pytest.mark.parametrize("fun", ["logcosh", "exp", "cube"])
def test_finds_the_sources_from_any_start(white, sources, fun):
    for seed in range(3):
        result = fastica(white, fun=fun, random_state=seed)
        np.testing.assert_allclose(result.unmixing @ result.unmixing.T, np.eye(K), atol=1e-10)
        assert matched(result.unmixing @ white, sources).min() > 0.97


def test_picard_agrees(white):
    pytest.importorskip("picard", reason="python-picard is an extra")
    for fun in ("logcosh", "exp"):
        settings = {"fun": fun, "n_init": 1, "max_iter": 300, "tol": 1e-8}
        found = [
            unmix(torch.from_numpy(white), Settings(method, **settings), np.random.RandomState(0))
            for method in ("fastica", "picard")
        ]
        assert all(result.converged for result in found)
        assert matched(*(result.unmixing @ white for result in found)).min() > 0.9999


@pytest.mark.parametrize("fun", ["logcosh", "exp", "cube"])
def test_columns_of_zeros_change_nothing(white, fun):
    padded = np.concatenate([white, np.zeros((K, 5000))], axis=1)
    plain = fastica(white, fun=fun)
    result = fastica(padded, fun=fun, n_samples=N)
    np.testing.assert_allclose(result.unmixing, plain.unmixing, atol=1e-8)
    for one, other in [(white, N), (padded, N)]:
        value = negentropy(torch.from_numpy(plain.unmixing @ one), fun, n_samples=other)
        np.testing.assert_allclose(value, negentropy(torch.from_numpy(plain.unmixing @ white), fun), rtol=1e-9)


@pytest.mark.parametrize("fun", ["logcosh", "exp", "cube"])
def test_negentropy_is_zero_for_normal_and_larger_for_sparse(fun, white, sources):
    normal = torch.from_numpy(np.random.default_rng(0).normal(size=(4, 400_000)))
    scaled = torch.from_numpy(sources / sources.std(axis=1, keepdims=True))
    assert negentropy(normal, fun) < 1e-3 < negentropy(scaled, fun)


def test_best_of_several_starts_is_kept(white):
    settings = {"method": "fastica", "fun": "logcosh", "max_iter": 200, "tol": 1e-4}
    result = unmix(torch.from_numpy(white), Settings(**settings, n_init=4), np.random.RandomState(0))
    kept = negentropy(torch.from_numpy(result.unmixing @ white), "logcosh")
    assert len(result.scores) == 4
    np.testing.assert_allclose(kept, max(result.scores), rtol=1e-9)


def test_not_converged_warns_with_the_number_to_change(white):
    with pytest.warns(ConvergenceWarning, match=r"max_iter=2 .*raise max_iter"):
        result = fastica(white, max_iter=2, tol=1e-12)
    assert not result.converged
    assert result.n_iter == 2
    assert result.change > 1e-12


def test_result_does_not_depend_on_the_number_of_cores(white):
    before = torch.get_num_threads()
    found = []
    try:
        for n_threads in (1, 2, 3):
            torch.set_num_threads(n_threads)
            found.append(fastica(white.astype(np.float32), random_state=0).unmixing)
            assert torch.get_num_threads() == n_threads  # put back
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


def test_workers_map_in_order_and_raise():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with workers(torch.device("cpu")) as team:
            assert [part.start for part in team.map(lambda part: part, 1000, width=300)] == [0, 300, 600, 900]
            (total,) = team.sum(lambda part: (torch.ones(part.stop - part.start).sum(),), 1000, width=7)
            assert float(total) == 1000
            assert total.dtype == torch.float64

        def fail(part: slice) -> None:
            raise RuntimeError("block")

        with pytest.raises(RuntimeError, match="block"), workers(torch.device("cpu")) as team:
            list(team.map(fail, 1000, width=10))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fun": "tanh"}, "fun='tanh' is not known"),
        ({"max_iter": 0}, "max_iter=0"),
        ({"tol": -1.0}, "tol=-1.0"),
        ({"w_init": np.eye(3)}, r"w_init has shape \(3, 3\)"),
        ({"w_init": np.full((K, K), np.nan)}, "w_init"),
    ],
)
def test_bad_input(white, change, message):
    with pytest.raises(InputError, match=message):
        fastica(white, **change)


def test_whitening_of_orthonormal_rows_keeps_every_component():
    """An SVD's output, whose first entries may be exactly 0: where scikit-learn's own whitening loses a component."""
    rng = np.random.default_rng(0)
    rows = np.zeros((8, 4000))
    rows[:, 8:] = rng.laplace(size=(8, 3992))
    rows[:, 8:] -= rows[:, 8:].mean(axis=1, keepdims=True)
    rows = np.linalg.svd(rows, full_matrices=False)[2]
    result = whiten(torch.from_numpy(rows))
    np.testing.assert_allclose((result.data @ result.data.T / 4000).numpy(), np.eye(8), atol=1e-12)
    np.testing.assert_allclose((result.dewhitening @ result.data).numpy(), rows, atol=1e-12)
    assert np.isfinite(fastica(result.data, fun="cube", tol=1e-3, max_iter=1000, warn=False).unmixing).all()


def test_signs_of_principal_components_do_not_come_from_lapack(monkeypatch):
    rows = torch.from_numpy(np.random.default_rng(3).laplace(size=(6, 500)))
    rows -= rows.mean(dim=1, keepdim=True)
    one = whiten(rows, 4)
    plain = pca.symmetric_eigen

    def turned(matrix):
        values, vectors = plain(matrix)
        return values, vectors * torch.where(torch.arange(len(values)) % 2 == 0, -1.0, 1.0)

    monkeypatch.setattr(pca, "symmetric_eigen", turned)
    other = whiten(rows, 4)
    for name in ("data", "whitening", "dewhitening"):
        assert torch.allclose(getattr(one, name), getattr(other, name), atol=1e-12)
    assert torch.allclose(one.whitening @ rows, one.data)
    assert torch.allclose(one.dewhitening @ one.data, rows @ one.data.T @ one.data / 500, atol=1e-9)


def test_single_precision_whitening_is_exact_for_small_components():
    rng = np.random.default_rng(0)
    rows = np.geomspace(1, 0.01, 10)[:, None] * rng.laplace(size=(10, 20_000))
    rows = np.linalg.qr(rng.normal(size=(10, 10)))[0] @ (rows - rows.mean(axis=1, keepdims=True))
    data = whiten(torch.from_numpy(rows.astype(np.float32))).data.double()
    np.testing.assert_allclose((data @ data.T / 20_000).numpy(), np.eye(10), atol=1e-5)


def test_rank_deficient_data_name_their_rank():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(12, 5)) @ rng.normal(size=(5, 3000))
    for dtype in (np.float32, np.float64):
        with pytest.raises(InputError, match="rank of the data, 5: ask for at most 5"):
            whiten(torch.from_numpy(rows.astype(dtype)), 8)
        assert len(whiten(torch.from_numpy(rows.astype(dtype)), 5).data) == 5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_with_cpu(white):
    for fun in ("logcosh", "exp", "cube"):
        data = torch.from_numpy(white.astype(np.float32))
        found = [fastica(where, fun=fun, random_state=0).unmixing @ white for where in (data, data.cuda())]
        assert matched(*found).min() > 0.999

"""The steps of group ICA: reduction, preprocessing, model order, reading runs."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch
from ica_data import K, Run, T, V, planted, prepared

from llmbrain._validation import InputError
from llmbrain.decomposition import GroupICA
from llmbrain.decomposition.prepare.order import mdl_order, parallel_order
from llmbrain.decomposition.prepare.pca import GroupPCA, pca_of_run, run_pca
from llmbrain.decomposition.prepare.preprocess import Preprocessing, prepare
from llmbrain.decomposition.prepare.source import Source
from llmbrain.scanning.inputs import Runs


@pytest.fixture(scope="module")
def data() -> tuple[np.ndarray, list[np.ndarray]]:
    return planted()


# ---------------------------------------------------------------- reduction


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
    """More than 1,024 tokens: the eigenvectors come from Krylov iteration."""
    rng = np.random.default_rng(0)
    maps = planted(1)[0][:, :1600]
    run = rng.laplace(size=(1200, K)) @ maps + rng.normal(size=(1200, 1600))
    found = pca_of_run(prepare(run, Preprocessing(), dtype=torch.float64), slice(0, 1600), 3 * K)
    _, lengths, exact = np.linalg.svd(prepared(run), full_matrices=False)
    np.testing.assert_allclose(found.eigenvalues[:K].sqrt(), lengths[:K], rtol=1e-9)
    angles = np.linalg.svd(exact[:K] @ np.linalg.qr(found.rows.numpy().T)[0], compute_uv=False)
    np.testing.assert_allclose(angles, 1, atol=1e-9)
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


def test_detrending_takes_polynomials_out_and_leaves_the_callers_data_alone(data):
    rng = np.random.default_rng(0)
    time = np.linspace(-1, 1, 90)
    run = rng.normal(size=(90, 50)) + np.vander(time, 4) @ rng.normal(size=(4, 50)) * 5
    before = run.copy()
    for detrend, degree in [("none", 0), ("linear", 1), (3, 3)]:
        ready = prepare(run, Preprocessing(detrend=detrend, standardize="center", drop_first=4), dtype=torch.float64)
        fit = np.polynomial.polynomial.polyfit(time[4:], run[4:], degree)
        expected = run - np.polynomial.polynomial.polyval(time, fit).T
        np.testing.assert_allclose(ready.data.numpy(), expected, atol=1e-10)
    np.testing.assert_array_equal(run, before)


def test_one_run_is_in_memory_at_a_time():
    """However many runs there are: what was read is let go before the next is."""
    _, runs = planted(2)
    read: list[weakref.ref] = []
    alive = []

    class Lazy(Run):
        def data(self):
            alive.append(sum(array() is not None for array in read))
            array = self.array.copy()
            read.append(weakref.ref(array))
            return array

    GroupICA(K).fit([Lazy(runs[i % 2]) for i in range(12)])
    assert len(alive) >= 24
    assert max(alive) == 0


@pytest.mark.parametrize("criterion", ["auto", "parallel"])
def test_number_of_components_is_estimated(data, criterion):
    _, runs = data
    ica = GroupICA(criterion).fit(runs)
    assert ica.n_components_ == K
    estimates = ica.order_estimates_["model"]
    assert estimates["mdl_per_run"] == estimates["parallel_per_run"] == [K] * 3


@pytest.mark.parametrize("shape", [(700, 400), (420, 400), (300, 2000)])
def test_number_of_components_of_any_shape_and_of_none(shape):
    """More tokens than neurons, nearly square, more neurons than tokens; and noise alone."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=shape)
    signal = 3 * rng.normal(size=(shape[0], 5)) @ np.where(rng.random((5, shape[1])) < 0.2, 1.0, 0.0)
    for run, expected in [(noise + signal, 5), (noise, 1)]:
        centred = run - run.mean(axis=0)
        centred = torch.from_numpy(centred - centred.mean(axis=1, keepdims=True))
        assert mdl_order(centred)[0] == expected
        assert parallel_order(centred, np.random.RandomState(0)) == expected


def test_number_of_components_when_neighbours_resemble_each_other(data):
    """Smooth noise is what the subsampling is for: each neuron's noise is half its neighbour's."""
    maps, _ = data
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(T, V + 3))
    noise = (noise[:, :-3] + noise[:, 1:-2] + noise[:, 2:-1] + noise[:, 3:]) / 2
    run = 2 * rng.normal(size=(T, K)) @ maps + noise
    estimates = GroupICA("auto", standardize="center").fit([run]).order_estimates_["model"]
    assert estimates["subsampling_per_run"][0] > 1
    assert abs(estimates["mdl"] - K) <= 1


def test_source_reads_runs_again(data):
    _, runs = data
    source = Source(Runs(runs), Preprocessing(), torch.device("cpu"), torch.float32)
    first = [run.data.numpy() for run in source.prepared("first")]
    again = [run.data.numpy() for run in source.prepared("again")]
    np.testing.assert_array_equal(first, again)

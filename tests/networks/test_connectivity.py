"""Connectivity against nilearn, graphs against known answers and networkx, nulls against what was planted."""

import networkx as nx
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from llmbrain import FunctionalNetworks, InputError, NeuronSpace
from llmbrain.networks import connectivity, dynamic_connectivity, dynamics_test, graph_measures, hubs, layer_flow
from llmbrain.networks.graphs import (
    clustering,
    global_efficiency,
    modules,
    participation,
    path_length,
    rewire,
    to_graph,
    within_module_z,
)


def ar_series(n_runs=2, n=400, k=5, ar=0.7, seed=0):
    """Networks 0 and 1 share half their variance; the others are alone."""
    runs = []
    for run in range(n_runs):
        x = np.random.default_rng([seed, run]).normal(size=(n, k))
        for t in range(1, n):
            x[t] = ar * x[t - 1] + np.sqrt(1 - ar**2) * x[t]
        x[:, 1] = (x[:, 0] + x[:, 1]) / np.sqrt(2)
        runs.append(x)
    return runs


def test_matrices_equal_nilearn_and_numpy():
    from nilearn.connectome import ConnectivityMeasure
    from sklearn.covariance import LedoitWolf

    runs = ar_series()
    found = connectivity(runs)
    for own, run in zip(found.runs, runs):
        np.testing.assert_allclose(own, np.corrcoef(run.T), atol=1e-10)
    expected = np.tanh(np.mean([np.arctanh(np.corrcoef(r.T)[0, 1]) for r in runs]))
    assert found.matrix[0, 1] == pytest.approx(expected)
    partial = connectivity(runs, "partial")
    measure = ConnectivityMeasure(kind="partial correlation", cov_estimator=LedoitWolf(), standardize="zscore_sample")
    expected = measure.fit_transform([stats.zscore(r) for r in runs])
    off = ~np.eye(5, dtype=bool)
    np.testing.assert_allclose(partial.runs[:, off], expected[:, off], atol=2e-3)


def test_shift_null_finds_the_pair_and_no_other():
    found = connectivity(ar_series(), n_permutations=199)
    frame = found.to_frame()
    assert frame.iloc[0][["network_a", "network_b"]].tolist() == ["IC00", "IC01"]
    assert frame.p_fwe.iloc[0] == 1 / 200
    assert (frame.p_fwe.iloc[1:] > 0.05).all()
    assert np.isnan(np.diag(found.p_fwe)).all()


@pytest.mark.slow
def test_shift_null_keeps_its_error_rate():
    wrong = 0
    for seed in range(100):
        runs = [r[:, 2:] for r in ar_series(1, 200, 6, ar=0.9, seed=seed)]
        wrong += np.nanmin(connectivity(runs, n_permutations=39, random_state=seed).p_fwe) <= 0.05
    assert stats.binomtest(wrong, 100, 0.05, alternative="greater").pvalue > 0.01


def test_windows_by_hand():
    run = ar_series(1, 50)[0]
    matrices = dynamic_connectivity([run], window=20, step=15)[0]
    assert matrices.shape == (3, 5, 5)
    np.testing.assert_allclose(matrices[2], np.corrcoef(run[30:50].T), atol=1e-10)
    run[:20, 3] = 1.0
    assert dynamic_connectivity([run], window=20, step=15)[0][0, 3, 4] == 0
    assert dynamic_connectivity([run], window=64)[0].shape == (0, 5, 5)


def test_changes_are_found_and_stationary_series_are_not():
    rng = np.random.default_rng(0)
    runs = []
    for _ in range(2):
        run = rng.normal(size=(600, 4))
        sign = np.repeat([1, -1, 1, -1, 1, -1], 100)
        run[:, 1] = 0.8 * sign * run[:, 0] + 0.6 * run[:, 1]
        run[:, 3] = 0.8 * run[:, 2] + 0.6 * run[:, 3]
        runs.append(run)
    frame = dynamics_test(runs, window=50, step=25, n_permutations=60).set_index(["network_a", "network_b"])
    assert frame.loc[("IC00", "IC01"), "p_fwe"] == 1 / 61
    assert frame.drop(index=("IC00", "IC01")).p_fwe.min() > 0.03


RING = nx.to_numpy_array(nx.watts_strogatz_graph(100, 4, 0))


def test_known_graphs():
    assert clustering(RING) == pytest.approx(0.5)
    assert path_length(RING) == pytest.approx(12.879, abs=1e-3)
    assert global_efficiency(RING) == pytest.approx(0.15376, abs=2e-5)
    full = 1 - np.eye(12)
    assert clustering(full) == path_length(full) == global_efficiency(full) == 1
    karate = (nx.to_numpy_array(nx.karate_club_graph()) > 0).astype(float)
    assert modules(karate)[1] == pytest.approx(0.4198, abs=1e-4)
    cliques = np.kron(np.eye(10), 1 - np.eye(10))
    label, q = modules(cliques, n_seeds=5)
    assert q == pytest.approx(0.9)
    np.testing.assert_array_equal(np.unique(label, return_counts=True)[1], 10)
    assert np.isnan(path_length(cliques))


def test_measures_equal_networkx():
    for seed in range(3):
        graph = nx.gnm_random_graph(30, 90, seed=seed)
        a = nx.to_numpy_array(graph)
        assert clustering(a) == pytest.approx(nx.average_clustering(graph))
        assert global_efficiency(a) == pytest.approx(nx.global_efficiency(graph))
        if nx.is_connected(graph):
            assert path_length(a) == pytest.approx(nx.average_shortest_path_length(graph))


def test_rewiring_keeps_degrees_and_destroys_structure():
    out = rewire(RING, np.random.default_rng(0))
    np.testing.assert_array_equal(out.sum(axis=0), RING.sum(axis=0))
    np.testing.assert_array_equal(out, out.T)
    assert np.trace(out) == 0
    assert set(np.unique(out)) == {0, 1}
    assert clustering(out) < 0.1


def test_sigma_of_random_and_small_world_graphs():
    def sigma(graph):
        a = nx.to_numpy_array(graph)
        density = a.sum() / (len(a) * (len(a) - 1))
        table = graph_measures(a, [density], n_permutations=20, n_seeds=5).set_index("measure")
        assert (table.loc[["clustering", "modularity"], "p"] > 0).all()
        return table.value["sigma"]

    assert sigma(nx.gnm_random_graph(80, 480, seed=1)) == pytest.approx(1, abs=0.15)
    assert sigma(nx.watts_strogatz_graph(100, 8, 0.05, seed=1)) > 2.5


def test_threshold_takes_the_strongest():
    matrix = np.corrcoef(np.random.default_rng(0).normal(size=(12, 40)))
    graph = to_graph(matrix, 0.2)
    upper = np.triu_indices(12, 1)
    chosen = graph[upper] == 1
    assert chosen.sum() == round(0.2 * 66)
    assert matrix[upper][chosen].min() > matrix[upper][~chosen].max()
    with pytest.raises(InputError, match="more links than are positive"):
        to_graph(matrix, 0.9)
    with pytest.raises(InputError, match="square and symmetric"):
        to_graph(np.ones((3, 4)))


def test_roles_by_hand():
    a = np.zeros((9, 9))
    for first in (0, 4):  # two stars, 0 and 4 in the middle, bound by 8
        for other in range(first + 1, first + 4):
            a[first, other] = a[other, first] = 1
    a[8, 0] = a[0, 8] = a[8, 4] = a[4, 8] = 1
    module = np.array([0, 0, 0, 0, 1, 1, 1, 1, 2])
    np.testing.assert_allclose(participation(a, module)[[0, 1, 8]], [1 - (9 + 1) / 16, 0, 0.5])
    assert within_module_z(a, module)[[0, 1]].tolist() == pytest.approx([np.sqrt(3), -1 / np.sqrt(3)])
    table = hubs(a + 0.0, a.sum() / 72, names=list("abcdefghi"))
    assert table.role[["a", "e"]].tolist() == ["connector hub" if p > 0.3 else "provincial hub" for p in
                                              table.participation[["a", "e"]]]  # fmt: skip
    assert (table.role[list("bcdfgh")] == "peripheral").all()
    assert table.degree["a"] == table.strength["a"] == 4


def test_layer_flow():
    space = NeuronSpace([10] * 6)
    maps = np.zeros((6, 60))
    for k in range(6):
        maps[k, k * 10 : k * 10 + 4] = 9
    maps[0, 10:14] = 9
    networks = FunctionalNetworks(maps, space, threshold=5, standardize=False)
    distance = np.abs(np.subtract.outer(np.arange(6), np.arange(6)))
    found = layer_flow(networks, np.exp(-distance / 2.0), n_permutations=300)
    assert found.depth.center.tolist() == [0.5, 1, 2, 3, 4, 5]
    assert found.depth["last"].tolist() == [1, 1, 2, 3, 4, 5]
    assert found.r < -0.8
    assert found.p < 0.05
    coupling = np.exp(-distance / 2.0) - np.eye(6)
    assert found.flow.loc[0, 2] == pytest.approx(0.5 * coupling[0, 2])
    assert found.flow.loc[1, 2] == pytest.approx(0.5 * coupling[0, 2] + coupling[1, 2])
    wrong = 0
    for seed in range(40):
        random = np.random.default_rng(seed).random(size=(6, 6))
        wrong += layer_flow(networks, random + random.T, n_permutations=99).p <= 0.05
    assert stats.binomtest(wrong, 40, 0.05, alternative="greater").pvalue > 0.01


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: connectivity([]), "no time courses"),
        (lambda: connectivity([np.ones((50, 3))]), r"\['IC00', 'IC01', 'IC02'\] are constant"),
        (lambda: connectivity([np.full((50, 3), np.nan)]), "holds nan"),
        (lambda: connectivity(ar_series(), "tangent"), "kind='tangent'"),
        (lambda: connectivity(ar_series(n=18), n_permutations=3), "too short to shift 5 networks"),
        (lambda: dynamics_test(ar_series(1, 64)), "leaves 1 windows"),
        (lambda: connectivity(FunctionalNetworks(np.eye(3, 10))), "no time courses"),
        (lambda: layer_flow(FunctionalNetworks(np.eye(3, 10)), np.eye(3)), "needs to know the layers"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_graph_measures_take_what_connectivity_gives():
    courses = np.random.default_rng(0).normal(size=(200, 12)) @ np.random.default_rng(1).normal(size=(12, 12))
    networks = FunctionalNetworks(np.eye(12, 30), time_courses=[courses])
    links = connectivity(networks, n_permutations=0)
    options = {"densities": [0.2], "n_permutations": 3, "n_seeds": 2}
    pd.testing.assert_frame_equal(graph_measures(links, **options), graph_measures(links.matrix, **options))

"""Dual regression against the closed form, nilearn's GLM and the phantom."""

import numpy as np
import pytest

from llmbrain import InputError
from llmbrain.datasets.phantom import make_phantom
from llmbrain.decomposition.dual_regression import dual_regression


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    maps = rng.laplace(size=(4, 700)) + 0.3
    runs = [rng.standard_normal((n, 4)) @ maps + rng.standard_normal((n, 700)) + 5 for n in (60, 45)]
    return maps, runs


def closed_form(maps, data, normalize):
    """Both stages by least squares, centred by an explicit constant."""
    n_tokens, n_neurons = data.shape
    spatial = np.column_stack([maps.T, np.ones(n_neurons)])
    course = np.linalg.lstsq(spatial, data.T, rcond=None)[0][:-1].T
    design = course / course.std(axis=0, ddof=1) if normalize else course
    temporal = np.column_stack([design, np.ones(n_tokens)])
    return course, np.linalg.lstsq(temporal, data, rcond=None)[0][:-1], temporal


@pytest.mark.parametrize("normalize", [True, False])
def test_equals_the_closed_form(problem, normalize):
    maps, runs = problem
    result = dual_regression(maps, runs, normalize=normalize)
    for i, data in enumerate(runs):
        course, stage2, _ = closed_form(maps, data, normalize)
        np.testing.assert_allclose(result.time_courses[i], course, rtol=0, atol=1e-10)
        np.testing.assert_allclose(result.maps[i], stage2, rtol=0, atol=1e-10)


def test_z_equals_nilearn(problem):
    from nilearn.glm import compute_contrast
    from nilearn.glm.first_level import run_glm

    maps, runs = problem
    result = dual_regression(maps, runs)
    for i, data in enumerate(runs):
        _, _, design = closed_form(maps, data, True)
        labels, fits = run_glm(data, design, noise_model="ols")
        for k in range(len(maps)):
            contrast = compute_contrast(labels, fits, np.eye(5)[k], stat_type="t")
            np.testing.assert_allclose(result.maps[i, k], contrast.effect_size(), atol=1e-10)
            np.testing.assert_allclose(result.z_maps[i, k], contrast.z_score(), atol=1e-8)


def test_float32_runs_many_blocks_and_memory_map(problem, tmp_path):
    maps, runs = problem
    single = [data.astype(np.float32) for data in runs]
    result = dual_regression(maps, single, out=tmp_path)
    assert result.maps.dtype == np.float32
    assert isinstance(result.maps, np.memmap)
    np.testing.assert_allclose(np.load(tmp_path / "dr_maps.npy"), dual_regression(maps, runs).maps, atol=1e-4)
    wide = np.tile(maps, 20) + 0.1 * np.random.default_rng(1).standard_normal((4, 14000))
    data = np.tile(runs[0], 20)
    _, stage2, _ = closed_form(wide, data, True)
    np.testing.assert_allclose(dual_regression(wide, [data]).maps[0], stage2, atol=1e-10)


def test_phantom_runs_get_their_own_maps_not_a_copy():
    phantom = make_phantom(relocation=0.1, overlap=0.2, cnr=1.0, n_runs=8, random_state=2)
    result = dual_regression(phantom.maps, phantom.scans)
    score = phantom.score(phantom.maps, result.time_courses, result.maps, standardized=False)
    assert score["time_course_r_min"] > 0.95
    assert score["run_map_r_own"] > 0.9
    assert score["run_map_r_own"] > score["run_map_r_group"] + 0.05
    assert score["amplitude_slope"] == pytest.approx(1, abs=0.1)


def test_normalize_moves_amplitude_into_the_maps(problem):
    maps, runs = problem
    loud = [runs[0], 3 * runs[0]]
    raw, normal = (dual_regression(maps, loud, normalize=n).maps for n in (False, True))
    np.testing.assert_allclose(raw[1], raw[0], atol=1e-9)
    np.testing.assert_allclose(normal[1], 3 * normal[0], atol=1e-9)


def test_standardize_is_z_scoring_first(problem):
    maps, runs = problem
    scales = np.exp(np.random.default_rng(5).normal(0, 2, 700))
    loud = [data * scales for data in runs]
    scored = [(data - data.mean(axis=0)) / data.std(axis=0) for data in runs]
    result = dual_regression(maps, loud, standardize=True)
    expected = dual_regression(maps, scored)
    for ours, theirs in zip(result.time_courses, expected.time_courses):
        np.testing.assert_allclose(ours, theirs, atol=1e-10)
    np.testing.assert_allclose(result.maps, expected.maps, atol=1e-10)
    np.testing.assert_allclose(result.z_maps, expected.z_maps, atol=1e-8)
    assert np.abs(dual_regression(maps, loud).z_maps - expected.z_maps).max() > 1


def test_masks_and_constant_neurons(problem):
    maps, runs = problem
    runs = [data.copy() for data in runs]
    runs[0][:, 3] = 7.3
    runs[1][:, 5] = 0
    keep = np.ones(700, dtype=bool)
    keep[[3, 5]] = False
    varying = dual_regression(maps, runs, mask="varying")
    given = dual_regression(maps, runs, mask=keep)
    part = dual_regression(maps[:, keep], [data[:, keep] for data in runs])
    np.testing.assert_array_equal(varying.maps, given.maps)
    np.testing.assert_allclose(varying.maps[:, :, keep], part.maps, atol=1e-10)
    assert not varying.maps[:, :, ~keep].any()
    plain = dual_regression(maps, runs)
    assert not plain.z_maps[0, :, 3].any()
    assert not plain.maps[0, :, 3].any()


def test_dropped_tokens_do_not_decide_the_maps(problem):
    maps, runs = problem
    sink = runs[0].copy()
    sink[0] *= 1000
    clean = dual_regression(maps, [runs[0][1:]])
    dropped = dual_regression(maps, [sink], drop_first=1)
    np.testing.assert_allclose(dropped.maps, clean.maps, atol=1e-9)
    assert len(dropped.time_courses[0]) == len(sink)
    assert np.abs(dual_regression(maps, [sink]).maps - clean.maps).max() > 1


def test_bad_input_is_named(problem):
    maps, runs = problem
    with pytest.raises(InputError, match=r"699 neurons, the maps have 700"):
        dual_regression(maps, [runs[0][:, 1:]])
    with pytest.raises(InputError, match="run 0 keeps 5 tokens"):
        dual_regression(maps, [runs[0][:5]])
    with pytest.raises(InputError, match=r"maps are linearly dependent: rank 4 of 5"):
        dual_regression(np.vstack([maps, maps[0] + maps[1]]), runs)
    with pytest.raises(InputError, match="run 0: the time course of network 0 is constant"):
        dual_regression(maps, [np.ones((30, 700))])
    with pytest.raises(InputError, match="mask='fsl'"):
        dual_regression(maps, runs, mask="fsl")
    with pytest.raises(InputError, match="removes every neuron"):
        dual_regression(maps, runs, mask=np.zeros(700, dtype=bool))
    broken = maps.copy()
    broken[2, 9] = np.nan
    with pytest.raises(InputError, match="network 2 at neuron 9"):
        dual_regression(broken, runs)

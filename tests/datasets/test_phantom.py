"""The phantom keeps what it promises: the truth it returns is the truth in its scans."""

from itertools import pairwise

import numpy as np
import pytest

from llmbrain import GroupICA, InputError, dual_regression, ica_stability
from llmbrain.datasets.phantom import PHANTOM_CELLS, make_phantom
from llmbrain.stats.matching import correlate_rows, match_maps


def test_scan_is_time_courses_times_maps_plus_noise():
    phantom = make_phantom(n_sources=5, n_neurons=300, n_layers=4, n_runs=3, n_tokens=4000, random_state=1)
    for scan, course, run_map in zip(phantom.scans, phantom.time_courses, phantom.run_maps):
        noise = scan.data() - course @ run_map
        assert noise.std() == pytest.approx(1, abs=0.01)
        assert np.abs(course.T @ noise / len(noise)).max() < 0.1
        np.testing.assert_allclose(course.mean(axis=0), 0, atol=1e-12)
        np.testing.assert_allclose(course.std(axis=0), 1)


def test_repeatable_and_runs_do_not_depend_on_their_number():
    few, many = (make_phantom(n_runs=n, n_neurons=200, n_tokens=30, random_state=3) for n in (2, 5))
    again = make_phantom(n_runs=2, n_neurons=200, n_tokens=30, random_state=3)
    other = make_phantom(n_runs=2, n_neurons=200, n_tokens=30, random_state=4)
    np.testing.assert_array_equal(few.scans[1].data(), again.scans[1].data())
    np.testing.assert_array_equal(few.maps, many.maps)
    assert not np.array_equal(few.scans[1].data(), other.scans[1].data())


def test_contrast_to_noise_is_the_median_over_active_neurons():
    phantom = make_phantom(cnr=0.5, overlap=0.3, jitter=0, presence=1, amplitude_sd=0)
    signal = (phantom.time_courses[0] @ phantom.run_maps[0]).std(axis=0)
    active = (phantom.maps != 0).any(axis=0)
    assert np.median(signal[active]) == pytest.approx(0.5, rel=0.05)
    assert np.median(signal) == 0  # a median over all neurons would say nothing


def test_overlap_active_share_and_layers():
    phantom = make_phantom(overlap=0.4, n_neurons=2000)
    active = phantom.maps != 0
    np.testing.assert_array_equal(active.sum(axis=1), 60)
    np.testing.assert_array_equal([(a & b).sum() for a, b in pairwise(active)], 24)
    assert ((make_phantom(overlap=0).maps != 0).sum(axis=0) <= 1).all()
    assert all(len(set(phantom.space.layer_of[a])) > 1 for a in active)


def test_relocation_stays_in_the_layer():
    phantom = make_phantom(relocation=0.1, jitter=0, presence=1, amplitude_sd=0, n_runs=2)
    layer = phantom.space.layer_of
    for run_map in phantom.run_maps:
        for run, group in zip(run_map, phantom.maps):
            assert ((run != 0) & (group == 0)).sum() == 6
            counts = [np.bincount(layer[m != 0], minlength=8) for m in (run, group)]
            np.testing.assert_array_equal(*counts)


def test_presence_amplitude_and_shared_variance():
    phantom = make_phantom(n_runs=60, n_neurons=300, n_tokens=200, presence=0.7, shared_variance=0.3, ar=0)
    assert phantom.present.mean() == pytest.approx(0.7, abs=0.06)
    assert phantom.present.any(axis=0).all()
    absent = ~phantom.present
    assert not phantom.run_maps[absent].any()
    courses = np.array(phantom.time_courses)[:, :, 0]
    r = np.corrcoef(courses)[np.triu_indices(60, 1)]
    assert r.mean() == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize("ar", [0.5, 0.9])
def test_autocorrelation_and_source_correlation(ar):
    truth = np.array([[1, 0.6, 0], [0.6, 1, 0], [0, 0, 1]])
    phantom = make_phantom(3, n_neurons=60, n_layers=2, n_runs=1, n_tokens=20000, ar=ar, source_correlation=truth)
    course = phantom.time_courses[0]
    np.testing.assert_allclose(np.corrcoef(course.T), truth, atol=0.06)
    lagged = [np.corrcoef(c[1:], c[:-1])[0, 1] for c in course.T]
    np.testing.assert_allclose(lagged, ar, atol=0.03)


def test_nuisances():
    plain = {"n_neurons": 1000, "n_runs": 2, "n_tokens": 300, "random_state": 5}
    heavy = make_phantom(noise="t3", **plain)
    residual = heavy.scans[0].data() - heavy.time_courses[0] @ heavy.run_maps[0]
    assert np.abs(residual).max() > 10 > 3 * residual.std()
    outliers = make_phantom(outliers=0.01, **plain)
    loud = outliers.noise_sd == 10
    assert loud.sum() == 10
    assert outliers.scans[0].data()[:, loud].var() == pytest.approx(100, rel=0.2)
    position = make_phantom(position_gain=10, **plain)
    loudest = np.abs(position.scans[0].data()).sum(axis=1).argmax()
    assert loudest == 0
    gone = make_phantom(missing=0.1, **plain)
    assert gone.missing.sum(axis=1).tolist() == [100, 100]
    assert not gone.scans[0].data()[:, gone.missing[0]].any()
    assert (gone.missing[0] != gone.missing[1]).any()
    slow = make_phantom(noise_ar=0.8, **plain)
    residual = slow.scans[0].data() - slow.time_courses[0] @ slow.run_maps[0]
    assert (residual[1:] * residual[:-1]).mean() == pytest.approx(0.8, abs=0.03)


def test_conditions_drive_their_own_source_only():
    phantom = make_phantom(3, n_neurons=200, n_runs=8, conditions=("sum", "sort"), condition_effect=2.0)
    on = (np.arange(400) // 20) % 2 == 0
    events = phantom.scans[0].events
    assert events["trial_type"].tolist()[:3] == ["sum", "sort", "sum"]
    assert events["onset"].tolist()[:3] == [0, 20, 40]
    contrast = np.mean([c[on].mean(axis=0) - c[~on].mean(axis=0) for c in phantom.time_courses], axis=0)
    assert contrast[0] > 1
    assert contrast[1] < -1
    assert abs(contrast[2]) < 0.3


def test_score_of_the_truth_is_perfect_and_of_noise_is_not():
    phantom = make_phantom(relocation=0.1, n_neurons=800, n_runs=4, n_tokens=50)
    order = [3, 1, 0, 2, 7, 5, 4, 6]
    sign = np.array([1, -1, 1, -1, 1, 1, -1, 1.0])
    perfect = phantom.score(
        sign[:, None] * phantom.standardized()[order],
        [sign * t[:, order] for t in phantom.time_courses],
        sign[:, None] * phantom.run_maps[:, order],
    )
    assert perfect["map_r_min"] == pytest.approx(1)
    assert perfect["time_course_r_min"] == pytest.approx(1)
    assert perfect["netmat_r"] == pytest.approx(1)
    assert perfect["auc"] == perfect["dice"] == 1
    assert perfect["run_map_r_own"] == pytest.approx(1)
    assert perfect["run_map_r_group"] < 0.95  # jitter and relocation: a copy of the group map is not the run's map
    assert perfect["amplitude_slope"] == pytest.approx(1)
    np.testing.assert_array_equal(np.array(order)[perfect["match"]], np.arange(8))
    noise = phantom.score(np.random.default_rng(0).standard_normal((8, 800)))
    assert noise["map_r_median"] < 0.2


def test_standardized_maps_are_what_z_scored_neurons_hold():
    phantom = make_phantom(n_neurons=500, n_runs=1, n_tokens=30000, jitter=0, presence=1, amplitude_sd=0, overlap=0.3)
    data = phantom.scans[0].data().astype(float)
    beta = np.linalg.lstsq(phantom.time_courses[0], data / data.std(axis=0), rcond=None)[0]
    np.testing.assert_allclose(beta, phantom.standardized(), atol=0.03)


def test_matching_is_one_to_one():
    reference = np.random.default_rng(0).standard_normal((3, 50))
    estimate = np.vstack([reference[0] + 0.01, -reference[2], reference[0] * 0.9 + reference[1]])
    index, r = match_maps(estimate, reference)
    assert index.tolist() == [0, 2, 1]
    assert r[2] == pytest.approx(-1)
    np.testing.assert_allclose(correlate_rows(estimate, reference), np.corrcoef(estimate, reference)[:3, 3:])
    assert match_maps(estimate[:1], reference)[0].tolist() == [0, -1, -1]


@pytest.mark.parametrize("name", ["easy", "middle", "middle, few tokens"])
def test_group_ica_holds_the_pass_marks(name):
    cell = PHANTOM_CELLS[name]
    phantom = make_phantom(**cell.settings)
    ica = GroupICA(8, device="cpu").fit(phantom.scans)
    runs = dual_regression(ica, phantom.scans, device="cpu")
    score = phantom.score(ica.components_, runs.time_courses, runs.maps)
    if "iq_min" in cell.marks:
        score["iq_min"] = ica_stability(phantom.scans, 8, n_starts=10, device="cpu").iq.min()
    for what, least in cell.marks.items():
        assert score[what] >= least, what
    # runs get their own maps: closer to their own truth than to the group's
    assert score["run_map_r_own"] > 0.9
    assert score["run_map_r_own"] > score["run_map_r_group"] + 0.02


@pytest.mark.filterwarnings("ignore:fastica did not converge")
def test_scrambled_runs_do_not_hold_them():
    """The control: the same numbers with each neuron's tokens in another order."""
    phantom = make_phantom(**PHANTOM_CELLS["easy"].settings)
    rng = np.random.default_rng(0)
    scrambled = [rng.permuted(scan.data(), axis=0) for scan in phantom.scans]
    ica = GroupICA(8, device="cpu", max_iter=50).fit(scrambled)
    assert phantom.score(ica.components_)["map_r_median"] < 0.3


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"overlap": 0.7}, "overlap=0.7"),
        ({"cnr": 0}, "cnr=0"),
        ({"ar": 1.0}, "ar=1.0"),
        ({"noise": "pink"}, "noise='pink'"),
        ({"active": 0.2}, "active=0.2"),
        ({"conditions": list("abcdefghi")}, "conditions="),
        ({"source_correlation": np.ones((8, 8))}, "positive definite"),
        ({"source_correlation": np.eye(3)}, "source_correlation"),
        ({"n_tokens": 1}, "n_tokens=1"),
        ({"widths": [3, -1]}, "widths"),
    ],
)
def test_bad_input_is_named(wrong, named):
    with pytest.raises(InputError, match=named):
        make_phantom(**wrong)


def test_cells_are_settings_of_make_phantom():
    assert list(PHANTOM_CELLS) == ["easy", "middle", "middle, few tokens", "hard", "hardest"]
    for cell in PHANTOM_CELLS.values():
        make_phantom(**{**cell.settings, "n_neurons": 400, "n_runs": 2, "n_tokens": 30})

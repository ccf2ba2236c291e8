"""The localizer's numbers against nilearn, its error rates against the truth, and tokens against what was planted."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from llmbrain import FunctionalNetworks, InputError, NeuronSpace
from llmbrain.networks import describe, localizer, match_networks, top_tokens
from llmbrain.networks.localizer import Design
from llmbrain.scanning import Scan

SPACE = NeuronSpace([10, 20])
KINDS = ("add", "sort", "rest")


def make_scans(n_runs=2, n_tokens=240, effect=1.0, ar=0.0, seed=0, n=30, block=8, tokens=None):
    """Neurons 0..4 answer to "add", 5..9 to "sort" (negatively), the others to nothing."""
    scans = []
    for run in range(n_runs):
        rng = np.random.default_rng([seed, run])
        kinds = [KINDS[i] for _ in range(n_tokens // block // 3 + 1) for i in rng.permutation(3)][: n_tokens // block]
        events = pd.DataFrame(
            {"onset": np.arange(len(kinds)) * float(block), "duration": float(block), "trial_type": kinds}
        )
        label = np.repeat(kinds, block)
        noise = rng.normal(size=(n_tokens, n))
        for t in range(1, n_tokens):
            noise[t] = ar * noise[t - 1] + np.sqrt(1 - ar**2) * noise[t]
        noise[:, :5] += effect * (label == "add")[:, None]
        noise[:, 5:10] -= effect * (label == "sort")[:, None]
        space = SPACE if n == 30 else NeuronSpace([n])
        scans.append(Scan.from_array(noise.astype(np.float32), space, events=events, tokens=tokens))
    return scans


@pytest.mark.parametrize("noise_model", ["ols", "ar1"])
def test_t_and_z_equal_nilearn(noise_model):
    from nilearn.glm.contrasts import compute_contrast
    from nilearn.glm.first_level import run_glm

    scans = make_scans(ar=0.4)
    for scan in scans:  # without "rest" there is a baseline, and no column is the sum of others
        scan.events = scan.events[scan.events.trial_type != "rest"].reset_index(drop=True)
    contrasts = {"a-s": {"add": 1, "sort": -1}, "either": {"add": 0.5, "sort": 0.5}}
    found = localizer(scans, contrasts, noise_model=noise_model, n_permutations=0, drift=2)
    for i, con in enumerate(([1, -1], [0.5, 0.5])):
        total = None
        for scan in scans:
            events, t = scan.events, np.arange(scan.n_tokens)
            columns = []
            for kind in ("add", "sort"):
                own = events[events.trial_type == kind]
                columns.append([float(any(o <= x < o + d for o, d in zip(own.onset, own.duration))) for x in t])
            ramp = np.linspace(-1, 1, len(t))
            x = np.column_stack([*columns, np.ones(len(t)), ramp, ramp**2, t == 0]).astype(float)
            labels, results = run_glm(scan.data().astype(float), x, noise_model=noise_model)
            contrast = compute_contrast(labels, results, np.array([*con, 0, 0, 0, 0.0]), stat_type="t")
            total = contrast if total is None else total + contrast
        np.testing.assert_allclose(found.t[i], total.stat(), atol=2e-5, rtol=1e-5)
        np.testing.assert_allclose(found.effect[i], np.ravel(total.effect) / 2, atol=1e-6)
        np.testing.assert_allclose(np.abs(found.z[i]), np.abs(total.z_score()), rtol=0.01, atol=1e-2)
    assert np.isnan(found.p_fwe).all()


@pytest.mark.parametrize("permute", ["shift", "labels"])
def test_planted_neurons_are_found_and_no_others(permute):
    contrasts = {kind: {kind: 1, "rest": -1} for kind in ("add", "sort")}
    found = localizer(make_scans(3), contrasts, permute=permute, n_permutations=99)
    table = found.to_frame(0.05)
    by = {kind: set(SPACE.index(g.layer.to_numpy(), g.neuron.to_numpy())) for kind, g in table.groupby("contrast")}
    assert by["add"] >= set(range(5))
    assert by["sort"] >= set(range(5, 10))
    assert not (by["add"] | by["sort"]) - set(range(10))
    networks = found.to_networks()
    np.testing.assert_array_equal(networks["add"].neurons, np.arange(5))
    both = found.to_networks(poles="both")
    np.testing.assert_array_equal(both.masks, found.p_fwe <= 0.05)
    assert np.isinf(found.threshold(0.001)).all()


@pytest.mark.slow
def test_family_wise_error_under_autocorrelation():
    """No effect at all, AR 0.8, blocks: the parametric t fails, the shifts hold."""
    wrong = parametric = 0
    n_sets = 120
    for seed in range(n_sets):
        scans = make_scans(1, 240, effect=0, ar=0.8, seed=seed, n=20)
        found = localizer(scans, {"a-s": {"add": 1, "sort": -1}}, n_permutations=39, random_state=seed)
        wrong += found.p_fwe.min() <= 0.05
        parametric += (2 * stats.norm.sf(np.abs(found.z))).min() * 20 <= 0.05
    assert parametric > 0.3 * n_sets
    assert stats.binomtest(wrong, n_sets, 0.05, alternative="greater").pvalue > 0.01


def test_contrasts_are_what_they_say():
    scans = make_scans(1)
    one, same = (localizer(scans, c, n_permutations=0) for c in ("add", ["add"]))
    np.testing.assert_array_equal(one.t, same.t)
    for wrong in ({"a": {"add": np.nan}}, {"a": {"add": "much"}}, {"a": {}}, {"a": 3}):
        with pytest.raises(InputError, match="contrasts"):
            localizer(scans, wrong, n_permutations=0)
    with pytest.raises(InputError, match="code"):
        localizer(scans, "code", n_permutations=0)


def test_networks_as_units():
    scans = make_scans(2)
    maps = np.zeros((3, 30))
    maps[0, :5] = maps[1, 5:10] = maps[2, 20:] = 1
    maps += np.random.default_rng(0).normal(0, 0.05, size=maps.shape)
    networks = FunctionalNetworks(maps, SPACE, threshold=1.5)
    found = localizer(scans, networks=networks, n_permutations=99)
    table = found.to_frame().pivot(index="network", columns="contrast", values="p_fwe")
    assert table.loc["IC00", "add"] == table.loc["IC01", "sort"] == 0.01
    assert table.loc["IC02"].min() > 0.05
    with pytest.raises(InputError, match="over neurons"):
        found.to_networks()
    from llmbrain.decomposition import dual_regression

    own = FunctionalNetworks(
        maps, SPACE, threshold=1.5, time_courses=dual_regression(networks.maps, scans).time_courses
    )
    np.testing.assert_allclose(localizer(scans, networks=own, n_permutations=0).t, found.t, rtol=1e-3, atol=1e-3)
    rows = describe(
        networks, localizer=found, stability=match_networks(networks, networks.subset([2, 0, 1])), alpha=0.05
    )
    assert rows.condition.tolist() == ["add", "not sort", ""]
    assert rows.layers.tolist() == ["0", "0", "1"]
    np.testing.assert_allclose(rows.r, 1)


def test_top_tokens_with_context():
    words = [f"w{i} " for i in range(240)]
    scans = make_scans(2, tokens=words)
    course = [np.random.default_rng(r).normal(0, 0.1, size=(240, 2)) for r in range(2)]
    course[1][100, 0], course[1][103, 0], course[0][7, 0], course[0][50, 0] = 9, 8, 7, -9
    networks = FunctionalNetworks(np.random.default_rng(0).laplace(size=(2, 30)), SPACE, time_courses=course)
    frame = top_tokens(networks[0], scans, n=2, context=2)
    assert frame[["run", "position"]].values.tolist() == [[1, 100], [0, 7]]  # 103 is too near
    first = frame.iloc[0]
    assert (first.before, first.token, first.after) == ("w98 w99 ", "w100 ", "w101 w102 ")
    assert first.condition == scans[1].events.trial_type[100 // 8]
    joined = np.concatenate([c[:, 0][scan.positions > 0] for c, scan in zip(course, scans)])
    assert first.value == pytest.approx((9 - joined.mean()) / joined.std(), rel=1e-5)
    assert top_tokens(networks[0], scans, n=1, sign=-1).position[0] == 50
    course[0][0, 0] = 1000  # the attention sink is not what a network is about
    sunk = FunctionalNetworks(networks.maps, SPACE, time_courses=course)
    assert top_tokens(sunk[0], scans, n=2, context=2).equals(frame)
    assert "'w100 '" in describe(networks, scans).tokens["IC00"]
    assert describe(networks[1], scans).to_dict() == describe(networks, scans).iloc[1:].to_dict()
    with pytest.raises(InputError, match=r"pass networks\[k\]"):
        top_tokens(networks, scans)


def test_estimability_and_shifts():
    scan = make_scans(1)[0]
    design = Design(scan, sorted(KINDS), 1)
    assert design.boxcars.sum() == 240
    assert not design.estimable(design.boxcars, np.array([1.0, 0, 0]))  # every token has a condition: no baseline
    assert design.estimable(design.boxcars, np.array([1.0, -1, 0]))
    rng = np.random.default_rng(0)
    for _ in range(20):
        moved = design.permuted(rng, "shift", 10)
        shifts = [s for s in range(240) if np.array_equal(np.roll(design.boxcars, s, axis=0), moved)]
        assert all(10 <= s <= 230 for s in shifts)
        labels = design.permuted(rng, "labels", 10)
        np.testing.assert_array_equal(labels.sum(axis=0), design.boxcars.sum(axis=0))


def test_first_token_of_a_block_is_no_response():
    scans = make_scans(1, effect=0)
    data = scans[0].data()
    data[0] = 1000
    clean = localizer(scans, n_permutations=0)
    loud = localizer([Scan.from_array(data, SPACE, events=scans[0].events)], n_permutations=0)
    np.testing.assert_allclose(loud.t, clean.t, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"contrasts": ["multiply"]}, "'multiply' is not known"),
        ({"contrasts": {"x": {"add": 0}}}, r"contrasts\['x'\]"),
        ({"contrasts": {"x": {"add": 1}}}, "can not be estimated in any run"),
        ({"noise_model": "ar2"}, "noise_model='ar2'"),
        ({"permute": "coins"}, "permute='coins'"),
        ({"min_shift": 200}, "too short for min_shift=200"),
        ({"scans": [Scan.from_array(np.ones((5, 2), dtype=np.float32))]}, "no events"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(InputError, match=message):
        localizer(**{"scans": make_scans(1), "n_permutations": 3, **change})


def test_broken_activations_are_named():
    data = make_scans(1)[0].data()
    data[5, 13] = np.inf
    with pytest.raises(InputError, match="layer 1, neuron 3"):
        localizer([Scan.from_array(data, SPACE, events=make_scans(1)[0].events)], n_permutations=0)

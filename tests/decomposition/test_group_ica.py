"""Group ICA on planted components: what it finds, in which units, and that it says so truthfully."""

from __future__ import annotations

import inspect
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from ica_data import WIDTHS, K, Run, T, V, matched, prepared
from nibabel import Nifti1Image
from sklearn.base import clone
from sklearn.decomposition import FastICA
from sklearn.exceptions import ConvergenceWarning, NotFittedError

from llmbrain._validation import InputError
from llmbrain.anatomy.space import NeuronSpace
from llmbrain.decomposition import GroupICA, read_ica
from llmbrain.decomposition.solvers.fastica import random_start

# ---------------------------------------------------------------- what is found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"fun": "cube"},
        {"fun": "exp"},
        {"cca": True},
        {"axis": "time"},
        {"standardize": "center"},
        {"detrend": "linear"},
        {"detrend": 3},
        {"dtype": "float64"},
        {"n_init": 3},
        {"run_components": 40},
    ],
    ids=str,
)
def test_planted_components_return_one_to_one(data, options):
    maps, runs = data
    ica = GroupICA(**{"n_components": K, **options}).fit(runs)
    assert ica.components_.shape == (K, V)
    assert ica.converged_
    assert matched(ica.components_, maps).min() > 0.9


@pytest.mark.parametrize("method", ["picard", "dictlearning"])
def test_other_methods_find_the_same(data, method):
    if method == "picard":
        pytest.importorskip("picard", reason="python-picard is an extra")
    maps, runs = data
    ica = GroupICA(K, method=method).fit(runs)
    assert matched(ica.components_, maps).min() > 0.9
    assert matched(ica.components_, GroupICA(K).fit(runs).components_).min() > 0.99 - 0.05 * (method == "dictlearning")


def test_temporal_ica_agrees_with_scikit_learn():
    """One run: independent time courses of the leading principal components."""
    rng = np.random.default_rng(0)
    courses = np.where(rng.random((2000, 4)) < 0.2, rng.laplace(size=(2000, 4)), 0.0)
    run = courses @ rng.normal(size=(4, 300)) + 0.1 * rng.normal(size=(2000, 300))
    ica = GroupICA(4, axis="time", standardize="center", tol=1e-6, dtype="float64").fit([run])
    centred = run - run.mean(axis=0)
    centred -= centred.mean(axis=1, keepdims=True)
    theirs = FastICA(4, whiten="unit-variance", whiten_solver="svd", tol=1e-6, w_init=random_start(4, 0)).fit(centred)
    assert matched(ica.mixing_[0].T, theirs.transform(centred).T).min() > 0.9999
    assert matched(ica.mixing_[0].T, courses.T).min() > 0.98
    assert matched(ica.components_, theirs.mixing_.T).min() > 0.9999


def test_same_maps_as_canica(data):
    from nilearn.decomposition import CanICA

    _, runs = data
    shape = (40, 100, 1)
    images = [Nifti1Image(run.T.reshape(*shape, T), np.eye(4)) for run in runs]
    mask = Nifti1Image(np.ones(shape, dtype=np.int8), np.eye(4))
    theirs = CanICA(
        n_components=K,
        mask=mask,
        smoothing_fwhm=None,
        detrend=False,
        standardize="zscore_sample",
        standardize_confounds=False,
        threshold=None,
        n_init=1,
        random_state=0,
    ).fit(images)
    ours = GroupICA(K, fun="cube", cca=True).fit(runs)
    assert matched(ours.components_, theirs.components_).min() > 0.99
    # the same images, read by us
    again = GroupICA(K, fun="cube", cca=True, mask=mask).fit(images)
    np.testing.assert_allclose(again.components_, ours.components_, atol=1e-4)
    image = again.components_img()
    assert image.shape == (*shape, K)
    np.testing.assert_array_equal(image.get_fdata().reshape(V, K).T.astype(np.float32), again.components_)


def test_same_result_again_and_on_any_number_of_cores(data):
    _, runs = data
    before = torch.get_num_threads()
    fits = []
    try:
        for n_threads in (1, 2):
            torch.set_num_threads(n_threads)
            fits.append(GroupICA(K).fit(runs))
            assert torch.get_num_threads() == n_threads
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(fits[0].components_, fits[1].components_)
    np.testing.assert_array_equal(fits[0].mixing_[2], fits[1].mixing_[2])
    other = GroupICA(K, random_state=7).fit(runs)
    assert not np.array_equal(other.components_, fits[0].components_)
    np.testing.assert_allclose(other.components_, fits[0].components_, atol=0.05)  # order and sign are the data's


# ---------------------------------------------------------------- units and truth


def test_units_sign_and_order(data):
    _, runs = data
    ica = GroupICA(K).fit(runs)
    maps = ica.components_.astype(float)
    np.testing.assert_allclose(maps.mean(axis=1), 0, atol=1e-6)
    np.testing.assert_allclose(maps.std(axis=1), 1, atol=1e-5)
    peaks = np.abs(maps).argmax(axis=1)
    assert (maps[np.arange(K), peaks] > 0).all()
    assert (np.diff(ica.explained_variance_ratio_) <= 0).all()


@pytest.mark.parametrize("method", ["fastica", "dictlearning"])
def test_time_courses_and_explained_variance_in_closed_form(data, method):
    _, runs = data
    ica = GroupICA(K, method=method).fit(runs)
    maps = ica.components_.astype(float)
    total = alone = joint = 0.0
    for run, courses in zip(runs, ica.mixing_):
        x = prepared(run)
        expected = np.linalg.lstsq(maps.T, x.T, rcond=None)[0].T
        assert courses.shape == (T, K)
        np.testing.assert_allclose(courses, expected, atol=1e-4)
        total += (x**2).sum()
        joint += (x**2).sum() - ((x - expected @ maps) ** 2).sum()
        alone += np.array([(x**2).sum() - ((x - np.outer(c, m)) ** 2).sum() for c, m in zip(expected.T, maps)])
    np.testing.assert_allclose(ica.explained_variance_ratio_, alone / total, atol=1e-5)
    np.testing.assert_allclose(ica.joint_explained_variance_ratio_, joint / total, atol=1e-5)
    if method == "fastica":
        np.testing.assert_allclose(ica.explained_variance_ratio_.sum(), ica.joint_explained_variance_ratio_, rtol=1e-4)


def test_transform_of_the_fitted_runs_is_the_mixing(data):
    _, runs = data
    ica = GroupICA(K).fit(runs)
    for again, mixing in zip(ica.transform(runs), ica.mixing_):
        np.testing.assert_allclose(again, mixing, atol=1e-5)
    np.testing.assert_array_equal(GroupICA(K).fit_transform(runs)[1], ica.mixing_[1])
    assert ica.transform(runs[0])[0].shape == (T, K)
    with pytest.raises(InputError, match=r"has 100 neurons, .* 4000"):
        ica.transform(runs[0][:, :100])


def test_dropped_tokens_are_not_fitted_but_have_time_courses(data):
    _, runs = data
    spoiled = [run.copy() for run in runs]
    for run in spoiled:
        run[:3] = 1e4 * np.random.default_rng(0).normal(size=(3, V))
    ica = GroupICA(K, drop_first=3).fit(spoiled)
    clean = GroupICA(K).fit([run[3:] for run in runs])
    np.testing.assert_allclose(ica.components_, clean.components_, atol=2e-3)
    np.testing.assert_allclose(ica.mixing_[0][3:], clean.mixing_[0], atol=2e-3)
    assert ica.mixing_[0].shape == (T, K)
    assert np.isfinite(ica.mixing_[0]).all()
    assert ica.preprocessing_report_[0]["dropped"] == [0, 1, 2]


def test_first_token_of_every_context_is_dropped_where_runs_know_it(data):
    _, runs = data
    positions = np.arange(T) % 50
    spoiled = [run.copy() for run in runs]
    for run in spoiled:
        run[positions == 0] += 300 * np.random.default_rng(1).normal(size=V).astype(np.float32)  # the attention sink
    ica = GroupICA(K).fit([Run(run, positions=positions) for run in spoiled])
    clean = GroupICA(K).fit([run[positions > 0] for run in runs])
    np.testing.assert_allclose(ica.components_, clean.components_, atol=2e-3)
    assert ica.preprocessing_report_[2]["dropped"] == [0, 50, 100]
    plain = GroupICA(K, drop_positions=0).fit([Run(run, positions=positions) for run in spoiled])
    assert plain.preprocessing_report_[0]["dropped"] == []
    assert matched(plain.components_, clean.components_).min() < 0.9  # the control: it does matter


def test_outliers_are_treated_and_reported(data):
    _, runs = data
    spoiled = [run.copy() for run in runs]
    spoiled[1][40] *= 50  # a loud token
    spoiled[0][10, 77] = 4000  # one massive activation
    masked = GroupICA(K, outliers="mask").fit(spoiled)
    assert masked.preprocessing_report_[1]["masked"] == [40]
    assert masked.preprocessing_report_[0]["masked"] == []
    clipped = GroupICA(K, outliers="clip", outlier_threshold=8).fit(spoiled)
    report = clipped.preprocessing_report_[0]
    assert report["n_clipped"] == report["n_neurons_clipped"] == 1
    assert report["most_clipped"] == [(77, 1)]
    clean = GroupICA(K).fit(runs)
    assert matched(masked.components_, clean.components_).min() > 0.99


def test_a_share_of_variance_is_held(data):
    _, runs = data
    by_number = GroupICA(K).fit(runs)
    by_share = GroupICA(by_number.joint_explained_variance_ratio_ - 0.005).fit(runs)
    assert by_share.n_components_ == K
    assert matched(by_share.components_, by_number.components_).min() > 0.99


# ---------------------------------------------------------------- scopes and masks


@pytest.mark.parametrize(("scope", "windows"), [("layer", [(0, 0), (1, 1), (2, 2)]), (2, [(0, 1), (2, 2)])])
def test_windows_of_layers_are_separate_icas(data, scope, windows):
    _, runs = data
    space = NeuronSpace(WIDTHS)
    ica = GroupICA(3, scope=scope).fit(runs, space=space)
    assert ica.n_components_ == 3 * len(windows)
    assert [tuple(row) for row in ica.component_layers_] == [w for w in windows for _ in range(3)]
    for i, (first, last) in enumerate(windows):
        columns = slice(space.layer_slice(first).start, space.layer_slice(last).stop)
        part = ica.components_[3 * i : 3 * i + 3]
        assert not np.delete(part, np.arange(columns.start, columns.stop), axis=1).any()
        alone = GroupICA(3, random_state=i).fit([run[:, columns] for run in runs])
        assert matched(part[:, columns], alone.components_).min() > 0.99
        np.testing.assert_allclose(part[:, columns].std(axis=1), 1, atol=1e-5)
    assert ica.mixing_[0].shape == (T, ica.n_components_)
    np.testing.assert_allclose(ica.transform(runs)[1], ica.mixing_[1], atol=1e-5)


def test_scope_needs_a_space(data):
    with pytest.raises(InputError, match=r"scope='layer' needs to know the layers"):
        GroupICA(3, scope="layer").fit(data[1])


def test_constant_neurons_are_zero_and_reported(data):
    _, runs = data
    spoiled = [run.copy() for run in runs]
    for run in spoiled:
        run[:, [5, 17]] = 3.3
    spoiled[0][:, 30] = 0.1  # constant in one run only: that is fine
    with pytest.warns(UserWarning, match="2 of 4000 neurons are constant in every run"):
        ica = GroupICA(K).fit(spoiled)
    np.testing.assert_array_equal(ica.constant_neurons_, [5, 17])
    assert not ica.components_[:, [5, 17]].any()
    assert ica.components_[:, 30].any()
    used = np.delete(ica.components_, [5, 17], axis=1)
    np.testing.assert_allclose(used.std(axis=1), 1, atol=1e-5)
    assert matched(ica.components_, GroupICA(K).fit(runs).components_).min() > 0.999


def test_mask_leaves_neurons_out(data):
    _, runs = data
    mask = np.arange(V) % 4 > 0
    ica = GroupICA(K, mask=mask).fit(runs)
    assert not ica.components_[:, ~mask].any()
    inside = GroupICA(K).fit([run[:, mask] for run in runs])
    np.testing.assert_allclose(ica.components_[:, mask], inside.components_, atol=2e-3)


# ---------------------------------------------------------------- scikit-learn's contract, files


def test_estimator_contract(data):
    _, runs = data
    names = list(inspect.signature(GroupICA.__init__).parameters)[1:]
    ica = GroupICA(K, fun="cube", mask=np.ones(V, dtype=bool), random_state=np.random.RandomState(0))
    assert sorted(ica.get_params()) == sorted(names)
    for name in names:
        assert getattr(GroupICA(), name) is inspect.signature(GroupICA.__init__).parameters[name].default
    copy = clone(ica)
    assert copy.fun == "cube"
    assert "fun='cube'" in repr(copy)
    assert copy.set_params(n_components=4).n_components == 4
    before = {name: value for name, value in ica.get_params().items() if name not in ("mask", "random_state")}
    inputs = [run.copy() for run in runs]
    assert ica.fit(inputs) is ica
    assert {name: value for name, value in ica.get_params().items() if name in before} == before
    for run, original in zip(inputs, runs):
        np.testing.assert_array_equal(run, original)
    assert not [name for name in vars(GroupICA()) if name.endswith("_")]
    with pytest.raises(NotFittedError):
        GroupICA().transform(runs)
    with pytest.raises(NotFittedError):
        GroupICA().save("nowhere")


@pytest.mark.parametrize("file", ["fit", "fit.safetensors"])
def test_save_and_read(data, tmp_path, file):
    _, runs = data
    space = NeuronSpace(WIDTHS)
    ica = GroupICA(3, scope="layer", mask=np.arange(V) > 3, drop_first=1).fit(runs, space=space)
    saved = ica.save(tmp_path / file)
    assert saved.suffix == ".safetensors"
    again = read_ica(tmp_path / file)
    for name in ("components_", "explained_variance_ratio_", "component_layers_", "constant_neurons_", "mask"):
        np.testing.assert_array_equal(getattr(again, name), getattr(ica, name))
    for one, other in zip(again.mixing_, ica.mixing_):
        np.testing.assert_array_equal(one, other)
    for name in ("n_iter_", "converged_", "space_", "n_components_", "preprocessing_report_", "scope", "drop_first"):
        assert getattr(again, name) == getattr(ica, name)
    np.testing.assert_array_equal(again.transform(runs)[0], ica.transform(runs)[0])
    with pytest.raises(FileExistsError, match="overwrite=True"):
        ica.save(tmp_path / file)
    ica.save(tmp_path / file, overwrite=True)


def test_what_is_not_a_saved_fit_is_refused(data, tmp_path):
    _, runs = data
    with pytest.raises(FileNotFoundError, match=r"is .* a saved ICA"):
        read_ica(tmp_path / "nothing")
    (tmp_path / "ica.json").write_text('{"format": "something else"}')
    with pytest.raises(FileExistsError, match="not an ICA of llmbrain"):
        GroupICA(2).fit(runs[0]).save(tmp_path, overwrite=True)
    (tmp_path / "ica.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="format 'something else'"):
        read_ica(tmp_path)
    saved = GroupICA(2).fit(runs[0]).save(tmp_path / "good")
    saved.write_bytes(saved.read_bytes()[:-100])
    with pytest.raises(InputError, match="damaged"):
        read_ica(tmp_path / "good")


def test_brain_mask_survives_saving(data, tmp_path):
    _, runs = data
    mask = Nifti1Image((np.arange(V) % 2).reshape(40, 100, 1).astype(np.uint8), np.diag([2, 2, 2, 1]))
    image = Nifti1Image(runs[0].T.reshape(40, 100, 1, T), np.diag([2, 2, 2, 1]))
    ica = GroupICA(3, mask=mask).fit(image)
    assert ica.components_.shape == (3, V // 2)
    ica.save(tmp_path)
    again = read_ica(tmp_path)
    np.testing.assert_array_equal(again.components_img().get_fdata(), ica.components_img().get_fdata())
    np.testing.assert_array_equal(again.transform(image)[0], ica.transform(image)[0])


def test_the_neuroimaging_half_does_not_need_transformers():
    code = (
        "import sys, numpy as np; from llmbrain.decomposition import GroupICA;"
        "GroupICA(2).fit(np.random.default_rng(0).laplace(size=(30, 400)));"
        "print([m for m in ('transformers', 'nilearn', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", [{}, {"fun": "cube", "cca": True}, {"axis": "time"}, {"outliers": "clip"}], ids=str)
def test_cuda_agrees_with_cpu(data, options):
    _, runs = data
    fits = [GroupICA(K, device=device, **options).fit(runs) for device in ("cpu", "cuda")]
    assert matched(*(fit.components_ for fit in fits)).min() > 0.999
    np.testing.assert_allclose(fits[0].mixing_[0], fits[1].mixing_[0], atol=0.05)


def test_unconverged_fit_warns_and_says_so(data):
    with pytest.warns(ConvergenceWarning, match="max_iter=1 .*raise max_iter"):
        ica = GroupICA(K, max_iter=1).fit(data[1])
    assert ica.converged_ is False
    assert ica.n_iter_ == 1


def test_layers_that_did_not_converge_are_named(data):
    with pytest.warns(ConvergenceWarning, match="fastica in layers 0-0, 1-1, 2-2 did not converge"):
        GroupICA(3, max_iter=1, scope="layer").fit(data[1], space=NeuronSpace(WIDTHS))


# ---------------------------------------------------------------- starts, colour, volumes as CanICA has them


def test_starts_that_failed_are_counted(data, tmp_path):
    _, runs = data
    with pytest.warns(ConvergenceWarning, match=r"fastica \(3 of 3 starts\) did not converge"):
        ica = GroupICA(K, n_init=3, max_iter=2).fit(runs)
    assert [start["converged"] for start in ica.convergence_] == [False] * 3
    assert [start["n_iter"] for start in ica.convergence_] == [2] * 3
    ica.save(tmp_path)
    assert read_ica(tmp_path).convergence_ == ica.convergence_


@pytest.mark.parametrize("criterion", ["auto", "parallel"])
@pytest.mark.parametrize(("numerator", "denominator", "said"), [
    ([1], [1], False), ([1], [1, -0.9], False), ([1, 0, 0, 0, 1, 0, 0, 0, 1], [1], True),
])  # fmt: skip
def test_coloured_noise_is_taken_out_or_said_where_the_order_is_estimated(criterion, numerator, denominator, said):
    from scipy.signal import lfilter

    rng = np.random.default_rng(0)
    noise = lfilter(numerator, denominator, rng.normal(size=(150, 400)), axis=0)
    runs = [noise + 0.5 * rng.normal(size=(150, 2)) @ rng.laplace(size=(2, 400))]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = GroupICA(criterion, max_iter=20).fit(runs).n_components_
    assert any("beyond an AR(1) model" in str(w.message) for w in caught) == said
    assert said or 2 <= found <= 4  # 2 sources


def test_subspace_of_canica_with_a_global_signal():
    """Volumes of fMRI share a large mean: CanICA keeps it, and its subspace is another than that of centred volumes."""
    from nilearn.decomposition import CanICA

    rng = np.random.default_rng(2)
    maps, uneven = rng.laplace(size=(3, 400)), 1 + 0.1 * rng.random(400)
    runs = [
        rng.normal(size=(60, 3)) @ maps + 3 * rng.normal(size=(60, 1)) * uneven + rng.normal(size=(60, 400))
        for _ in range(4)
    ]
    images = [Nifti1Image(run.T.reshape(20, 20, 1, 60), np.eye(4)) for run in runs]
    mask = Nifti1Image(np.ones((20, 20, 1), dtype=np.int8), np.eye(4))
    theirs = CanICA(
        n_components=4, mask=mask, smoothing_fwhm=None, detrend=False, standardize=None,
        standardize_confounds=False, threshold=None, n_init=1, random_state=0,
    ).fit(images)  # fmt: skip

    def lowest(**options):
        ours = GroupICA(4, fun="cube", cca=True, dtype="float64", standardize="center", **options).fit(runs).components_
        bases = [np.linalg.qr((m - m.mean(axis=1, keepdims=True)).T)[0] for m in (ours, theirs.components_)]
        return np.linalg.svd(bases[0].T @ bases[1], compute_uv=False).min()

    assert lowest(center_tokens=False) > 0.99
    assert lowest() < 0.7

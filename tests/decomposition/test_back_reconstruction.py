"""Our steps against the stored outputs of the GIFT toolbox's own tests (real fMRI, one subject), and its identities.

The files are test data kept outside the repository: without them these tests are skipped.
"""

import h5py
import nibabel as nib
import numpy as np
import pytest
import scipy.io as sio
import torch

from llmbrain import InputError
from llmbrain.datasets.phantom import make_phantom
from llmbrain.decomposition.back_reconstruction import KINDS, back_reconstruct, reduce_rows, remove_token_means
from llmbrain.decomposition.dual_regression import dual_regression
from llmbrain.decomposition.prepare.pca import run_pca, whiten
from llmbrain.decomposition.prepare.preprocess import Preprocessing, prepare
from llmbrain.scanning.inputs import Runs

BACK = "test_icatb_backReconstruct"


@pytest.fixture(scope="module")
def gift(shared_data):
    return shared_data / "fmri" / "gift"


def mat5(path, key):
    return sio.loadmat(path)[key]


def mat73(path, key):
    with h5py.File(path) as file:
        return file[key][()].T


def mask_image(gift, image):
    index = mat5(gift / "test_icatb_preproc/rem_mn_timepoint.mat", "mask_ind").ravel().astype(int) - 1
    mask = np.zeros(np.prod(image.shape[:3]), dtype=np.uint8)
    mask[index] = 1
    return nib.Nifti1Image(mask.reshape(image.shape[:3], order="F"), image.affine), index


@pytest.fixture(scope="module")
def subject(gift):
    """Raw data (time x voxels) in GIFT's voxel order, float64."""
    image = nib.load(gift / "subjects/sub-007_lowres.nii")
    _, index = mask_image(gift, image)
    return image.get_fdata().reshape(-1, 50, order="F")[index].T


def test_our_reader_and_mask_read_the_same_voxels(gift, subject):
    image = nib.load(gift / "subjects/sub-007_lowres.nii")
    mask, index = mask_image(gift, image)
    read = Runs([image], mask_img=mask)[0]
    ours = np.flatnonzero(mask.get_fdata().ravel())  # row-major; GIFT counts column-major
    gift = np.ravel_multi_index(np.unravel_index(index, image.shape[:3], order="F"), image.shape[:3])
    np.testing.assert_allclose(read[:, np.searchsorted(ours, gift)], subject, rtol=1e-6)


def test_remove_mean_per_time_point(gift, subject):
    stored = mat5(gift / "test_icatb_preproc/rem_mn_timepoint.mat", "data").T
    np.testing.assert_allclose(remove_token_means(subject), stored, rtol=0, atol=1e-10)


def test_variance_normalisation(gift, subject):
    stored = mat5(gift / "test_icatb_preproc_var/preproc_data_varnorm_post.mat", "preproc_data_varnorm_post").T
    settings = Preprocessing(detrend="linear", standardize="zscore")
    ours = prepare(np.ascontiguousarray(subject), settings, dtype=torch.float64).data.numpy()
    np.testing.assert_allclose(ours * np.sqrt(49 / 50), stored, rtol=0, atol=1e-6)  # GIFT divides by the ddof-1 SD


def test_pca_eigenvalues_scores_and_whitening(gift, subject):
    centred = remove_token_means(subject)
    stored_scores = mat73(gift / BACK / "lores_pca_r1-1.mat", "pcasig").T
    eigenvalues = np.sort(np.diag(mat73(gift / BACK / "lores_pca_r1-1.mat", "Lambda")))[::-1]
    ours = reduce_rows(centred, 20)
    np.testing.assert_allclose(ours.eigenvalues, eigenvalues[:20], rtol=1e-9)
    core = run_pca(torch.from_numpy(centred), 20)
    np.testing.assert_allclose(core.eigenvalues[:20].numpy() / (centred.shape[1] - 1), eigenvalues[:20], rtol=1e-9)
    white = whiten(torch.from_numpy(centred), 20, n_samples=centred.shape[1] - 1).data.numpy()
    order = np.argsort(-np.diag(mat73(gift / BACK / "lores_pca_r1-1.mat", "Lambda")))[:20]  # MATLAB's eig sorts upwards
    for scores in (ours.scores, white):
        sign = np.sign((scores * stored_scores[order]).sum(axis=1, keepdims=True))
        np.testing.assert_allclose(sign * scores, stored_scores[order], rtol=0, atol=1e-6)


def test_ica_identities_and_back_reconstruction(gift, subject):
    """Our reduction, rotated to GIFT's component order, with GIFT's W, gives GIFT's maps and time courses."""
    w, a, sources = (mat73(gift / BACK / "lores_ica.mat", key) for key in ("W", "A", "icasig"))
    ic, tc = (mat73(gift / BACK / "lores_ica_br1_match.mat", key) for key in ("compSet/ic", "compSet/tc"))
    stored_scores = mat73(gift / BACK / "lores_pca_r1-1.mat", "pcasig").T
    ours = reduce_rows(remove_token_means(subject), 20)
    turn = stored_scores @ ours.scores.T / (subject.shape[1] - 1)  # signs and order of eigenvectors are free
    np.testing.assert_allclose(np.abs(turn).max(axis=1), 1, atol=1e-9)
    result = back_reconstruct([np.ascontiguousarray(subject)], 20, n_run_components=20, unmixing=w @ turn)
    np.testing.assert_allclose(result.components, sources, rtol=0, atol=1e-6)
    np.testing.assert_allclose(result.maps[0], ic, rtol=0, atol=1e-6)
    np.testing.assert_allclose(result.time_courses[0], tc.T, rtol=0, atol=1e-6)
    np.testing.assert_allclose(np.linalg.pinv(w), a, atol=1e-12)


def test_dual_regression_stage_one_gives_gifts_time_courses(gift, subject):
    ic, tc = (mat73(gift / BACK / "lores_ica_br1_match.mat", key) for key in ("compSet/ic", "compSet/tc"))
    result = dual_regression(ic, [np.ascontiguousarray(subject)])
    np.testing.assert_allclose(result.time_courses[0], tc.T, rtol=0, atol=1e-8)


def test_identities_on_three_subjects(gift):
    images = [nib.load(gift / f"subjects/sub-{s}_lowres.nii") for s in ("007", "018", "067")]
    mask, _ = mask_image(gift, images[0])
    check_identities([run.astype(np.float64) for run in Runs(images, mask_img=mask)], n_run=15, n=8)


def test_identities_on_the_phantom():
    phantom = make_phantom(n_runs=3, n_neurons=600, n_tokens=80)
    check_identities([scan.data() for scan in phantom.scans], n_run=15, n=8)


def check_identities(runs, n_run, n):
    results = {kind: back_reconstruct(runs, n, n_run_components=n_run, kind=kind) for kind in KINDS}
    scale = np.abs(results["gica3"].components).max()
    for kind in ("regular", "gica3"):
        np.testing.assert_allclose(results[kind].maps.sum(axis=0) / scale, results[kind].components / scale, atol=1e-10)
    assert np.abs(results["gica"].maps.sum(axis=0) - results["gica"].components).max() > 1e-3 * scale
    for i, data in enumerate(runs):
        fits = {kind: r.time_courses[i] @ r.maps[i] for kind, r in results.items()}
        size = np.linalg.norm(fits["gica3"])
        assert np.linalg.norm(fits["gica"] - fits["gica3"]) < 1e-9 * size
        centred = remove_token_means(data)
        missed = {kind: np.linalg.norm(centred - fit) for kind, fit in fits.items()}
        assert missed["gica3"] < missed["regular"]


def test_bad_input_is_named():
    runs = [np.random.default_rng(0).standard_normal((12, 100))] * 2
    with pytest.raises(InputError, match="kind='gica2'"):
        back_reconstruct(runs, 4, kind="gica2")
    with pytest.raises(InputError, match=r"n_components=20 must be between 1 and 1[12]"):
        back_reconstruct(runs, 4, n_run_components=20)
    with pytest.raises(InputError, match="n_run_components=3"):
        back_reconstruct(runs, 4, n_run_components=3)
    with pytest.raises(InputError, match="unmixing has shape"):
        back_reconstruct(runs, 4, unmixing=np.eye(3))

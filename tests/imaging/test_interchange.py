"""Components to and from other tools: a brain and a model, nilearn's estimators, MELODIC's, FSL's and GIFT's files."""

import nibabel as nib
import numpy as np
import pytest

from llmbrain import FunctionalNetworks, GroupICA, InputError, NeuronSpace, dual_regression, maps_to_nifti
from llmbrain.datasets.phantom import make_phantom
from llmbrain.decomposition import permutation_test
from llmbrain.imaging import (
    ComponentMaps,
    read_dual_regression,
    read_gift,
    read_melodic,
    read_nifti,
    read_nilearn,
    write_melodic,
)


@pytest.fixture(scope="module")
def phantom():
    return make_phantom(n_sources=3, widths=[30, 41, 30, 29], n_runs=4, n_tokens=60, active=0.06, random_state=1)


@pytest.fixture(scope="module")
def ica(phantom):
    return GroupICA(3, device="cpu").fit(phantom.scans)


@pytest.fixture(scope="module")
def brain():
    """A mask that is not symmetric in any axis, an affine that is not the identity, and two runs with three sources."""
    rng = np.random.default_rng(0)
    inside = rng.random((6, 7, 8)) < 0.6
    affine = np.diag([3.0, -3, 3.5, 1])
    sources = rng.laplace(size=(3, inside.sum())) ** 3
    images = []
    for _ in range(2):
        data = np.zeros((*inside.shape, 40), dtype=np.float32)
        data[inside] = (rng.standard_normal((40, 3)) @ sources + 0.1 * rng.standard_normal((40, inside.sum()))).T
        images.append(nib.Nifti1Image(data, affine))
    return nib.Nifti1Image(inside.astype(np.uint8), affine), images


# -- MELODIC -----------------------------------------------------------------------------------------------------------


def test_melodic_folder_of_a_model(ica, phantom, tmp_path):
    folder = write_melodic(ica, tmp_path / "group.ica")
    names = {file.name for file in folder.iterdir()}
    assert names >= {"melodic_IC.nii.gz", "melodic_mix", "melodic_FTmix", "melodic_ICstats", "mask.nii.gz"}
    mix = np.loadtxt(folder / "melodic_mix")
    assert mix.shape == (4 * 60, 3)
    assert np.loadtxt(folder / "melodic_FTmix").shape == (120, 3)
    np.testing.assert_allclose(np.loadtxt(folder / "melodic_ICstats")[:, 1], 100 * ica.explained_variance_ratio_)
    np.testing.assert_allclose(np.loadtxt(folder / "melodic_ICstats")[:, 0].sum(), 100)
    assert nib.load(folder / "melodic_IC.nii.gz").shape == (*phantom.space.shape, 3)
    back = read_melodic(folder)
    np.testing.assert_array_equal(back.components_, ica.components_)
    assert back.space_ == phantom.space
    assert [len(part) for part in back.mixing_] == [60] * 4
    for ours, theirs in zip(back.mixing_, ica.mixing_):
        np.testing.assert_array_equal(ours, theirs)
    networks = FunctionalNetworks.from_ica(back)
    np.testing.assert_array_equal(networks.masks, FunctionalNetworks.from_ica(ica).masks)
    assert networks.key_neurons(0).columns.tolist() == ["layer", "neuron", "z"]


def test_melodic_folder_of_a_brain(brain, tmp_path):
    mask, images = brain
    ica = GroupICA(3, mask=mask, device="cpu").fit(images)
    folder = write_melodic(ica, tmp_path)
    image = nib.load(folder / "melodic_IC.nii.gz")
    np.testing.assert_array_equal(image.affine, mask.affine)
    back = read_melodic(folder)
    np.testing.assert_array_equal(back.components_, ica.components_)
    assert back.space_ is None
    assert len(FunctionalNetworks.from_ica(back)) == 3
    np.testing.assert_array_equal(back.components_img().get_fdata(), image.get_fdata())
    assert isinstance(back.components_img(), nib.Nifti1Image)


def test_melodic_folder_that_melodic_wrote(brain, tmp_path):
    """Without our extras: one table of time courses, NaN and values outside the mask ignored."""
    mask, images = brain
    inside = mask.get_fdata() > 0
    data = np.where(inside[..., None], images[0].get_fdata()[..., :4], np.nan)
    nib.Nifti1Image(data.astype(np.float32), mask.affine).to_filename(tmp_path / "melodic_IC.nii.gz")
    mask.to_filename(tmp_path / "mask.nii.gz")
    mix = np.random.default_rng(0).standard_normal((25, 4))
    np.savetxt(tmp_path / "melodic_mix", mix, delimiter="  ")
    back = read_melodic(tmp_path)
    np.testing.assert_array_equal(back.components_, data[inside].T.astype(np.float32))
    assert len(back.mixing_) == 1
    np.testing.assert_allclose(back.mixing_[0], mix)
    np.savetxt(tmp_path / "melodic_mix", mix[:, :3])
    with pytest.raises(InputError, match="3 columns for 4 components"):
        read_melodic(tmp_path)


# -- nilearn -----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_fitted_canica_on_a_model_and_on_a_brain(phantom, brain):
    from nilearn.decomposition import CanICA

    settings = {"n_components": 3, "smoothing_fwhm": None, "threshold": None, "random_state": 0, "n_init": 2}
    settings |= {"standardize": "zscore_sample", "standardize_confounds": False, "detrend": False}
    images = [maps_to_nifti(scan.data(), phantom.space) for scan in phantom.scans]
    canica = CanICA(mask=phantom.space.mask_img(), **settings).fit(images)
    with pytest.raises(InputError, match="no components_img_"):
        read_nilearn(CanICA())
    model = read_nilearn(canica, space=phantom.space)
    assert model.space_ == phantom.space
    assert phantom.score(model.components_)["map_r_min"] > 0.7  # neurons in our order, not voxels in nilearn's
    np.testing.assert_allclose(np.sort(model.components_, axis=1), np.sort(canica.components_, axis=1), atol=1e-6)
    mask, runs = brain
    canica = CanICA(mask=mask, **settings).fit(runs)
    found = read_nilearn(canica)
    np.testing.assert_allclose(found.components_, canica.components_, atol=1e-6)
    # the same voxels in the same order; on 200 of them, nilearn's contrast and ours do not find quite the same maps
    ours = GroupICA(3, mask=mask, device="cpu").fit(runs)
    r = np.abs(np.corrcoef(found.components_, ours.components_)[:3, 3:])
    assert (r.max(axis=1) > 0.7).all()
    assert len(FunctionalNetworks.from_ica(found)) == 3


# -- GIFT --------------------------------------------------------------------------------------------------------------


def test_gift_images(brain, tmp_path):
    mask, images = brain
    data = images[0].get_fdata()[..., :3].astype(np.float32)
    path = tmp_path / "study_mean_component_ica_s_all_.nii"
    nib.Nifti1Image(data, mask.affine).to_filename(path)
    courses = np.random.default_rng(0).standard_normal((20, 3)).astype(np.float32)
    nib.Nifti1Image(courses, np.eye(4)).to_filename(tmp_path / "study_mean_timecourses_ica_s_all_.nii")
    back = read_gift(path)
    inside = mask.get_fdata() > 0
    np.testing.assert_array_equal(back.components_, data[inside].T)
    np.testing.assert_array_equal(back.mixing_[0], courses)
    assert read_gift(path, mask_img=mask).components_.shape == (3, inside.sum())
    nib.Nifti1Image(courses[:, :2], np.eye(4)).to_filename(tmp_path / "study_mean_timecourses_ica_s_all_.nii")
    with pytest.raises(InputError, match="a column for each of 3 components"):
        read_gift(path)


# -- FSL's dual regression ---------------------------------------------------------------------------------------------


def test_dual_regression_files(ica, phantom, tmp_path):
    result = dual_regression(ica, phantom.scans, device="cpu")
    test = permutation_test(result, groups=["a", "a", "b", "b"])
    result.save(tmp_path, test)
    names = {file.name for file in tmp_path.iterdir()}
    assert names >= {"dr_stage1_subject00000.txt", "dr_stage1_subject00003.txt", "dr_stage2_subject00003.nii.gz"}
    assert names >= {"dr_stage2_subject00000_Z.nii.gz", "dr_stage2_ic0002.nii.gz", "mask.nii.gz"}
    assert names >= {"dr_stage3_ic0000_tstat1.nii.gz", "dr_stage3_ic0002_vox_corrp_tstat1.nii.gz"}
    by_component, space = read_nifti(tmp_path / "dr_stage2_ic0001.nii.gz")
    np.testing.assert_array_equal(by_component, result.maps[:, 1])
    assert space == phantom.space
    corrp, _ = read_nifti(tmp_path / "dr_stage3_ic0001_vox_corrp_tstat1.nii.gz")
    np.testing.assert_allclose(corrp, 1 - test.p_fwe[1], atol=1e-6)
    courses, maps = read_dual_regression(tmp_path)
    np.testing.assert_array_equal(maps, result.maps)
    for ours, theirs in zip(courses, result.time_courses):
        np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(FileNotFoundError, match="no folder of a dual regression"):
        read_dual_regression(tmp_path / "nothing")


def test_dual_regression_of_a_brain(brain, tmp_path):
    mask, images = brain
    ica = GroupICA(3, mask=mask, device="cpu").fit(images)
    result = dual_regression(ica, images, mask_img=mask, out=tmp_path, device="cpu")
    np.testing.assert_array_equal(dual_regression(ica, images, mask=mask, device="cpu").maps, result.maps)
    _, maps = read_dual_regression(tmp_path)
    np.testing.assert_array_equal(maps, result.maps)
    np.testing.assert_array_equal(nib.load(tmp_path / "dr_stage2_ic0000.nii.gz").affine, mask.affine)


class Run:
    """A run that counts how often it is read, and may be killed."""

    def __init__(self, scan, broken=False):
        self.scan, self.broken, self.read = scan, broken, 0
        self.name, self.space, self.positions = scan.name, scan.space, scan.positions

    def data(self):
        self.read += 1
        if self.broken:
            raise KeyboardInterrupt
        return self.scan.data()


def test_stopped_dual_regression_goes_on(ica, phantom, tmp_path):
    whole = dual_regression(ica, phantom.scans, device="cpu")
    first = [Run(scan, broken=i == 2) for i, scan in enumerate(phantom.scans)]
    with pytest.raises(KeyboardInterrupt):
        dual_regression(ica, first, out=tmp_path, device="cpu")
    second = [Run(scan) for scan in phantom.scans]
    result = dual_regression(ica, second, out=tmp_path, device="cpu")
    assert [run.read for run in second] == [1, 1, 2, 2]  # once to see that it is the run of before
    np.testing.assert_array_equal(result.maps, whole.maps)
    np.testing.assert_array_equal(result.z_maps, whole.z_maps)
    for ours, theirs in zip(result.time_courses, whole.time_courses):
        np.testing.assert_array_equal(ours, theirs)
    assert (tmp_path / "dr_stage2_ic0000.nii.gz").exists()
    with pytest.raises(FileExistsError, match="other normalize"):
        dual_regression(ica, phantom.scans, normalize=False, out=tmp_path, device="cpu")


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_bad_input_is_named(brain, tmp_path):
    _, images = brain
    with pytest.raises(FileNotFoundError, match=r"holds no melodic_IC\.nii\.gz"):
        read_melodic(tmp_path)
    images[0].to_filename(tmp_path / "x_component_ica_.nii")
    small = nib.Nifti1Image(np.ones((2, 2, 2), dtype=np.uint8), np.eye(4))
    with pytest.raises(InputError, match="does not fit"):
        read_gift(tmp_path / "x_component_ica_.nii", mask_img=small)
    with pytest.raises(InputError, match="must be 4D"):
        read_nilearn(ComponentMapsOf3D())
    with pytest.raises(InputError, match="is not known"):
        ComponentMaps(np.ones((2, 5), dtype=np.float32)).components_img()
    with pytest.raises(InputError, match="shape"):
        read_gift(tmp_path / "x_component_ica_.nii", space=NeuronSpace([4, 4]))


class ComponentMapsOf3D:
    components_img_ = nib.Nifti1Image(np.ones((2, 2, 2), dtype=np.float32), np.eye(4))

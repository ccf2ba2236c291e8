"""Images that other tools turned, masks as they come, and headers that survive."""

from __future__ import annotations

import gzip
import tracemalloc

import nibabel as nib
import numpy as np
import pytest

from llmbrain import GroupICA, InputError, NeuronSpace, dual_regression, maps_to_nifti, read_ica, read_nifti
from llmbrain.imaging import read_gift, read_melodic
from llmbrain.imaging.brain_mask import BrainMask
from llmbrain.imaging.grid import load_image
from llmbrain.scanning.inputs import Runs
from llmbrain.study.contents import describe_path

AFFINE = np.array([[-3.0, 0, 0, 90], [0, 3.0, 0.2, -126], [0, -0.2, 3.5, -72], [0, 0, 0, 1]])
SHAPE = (5, 6, 4)
CODES = ("LPS", "RAS", "PIR", "SAL", "IRP")


def turned(image: nib.Nifti1Image, codes: str) -> nib.Nifti1Image:
    """As nibabel, ANTs or fslswapdim write it: other axes, and an affine that says so."""
    to = nib.orientations.axcodes2ornt(codes)
    return image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(image.affine), to))


@pytest.fixture(scope="module")
def brain():
    rng = np.random.default_rng(0)
    inside = rng.random(SHAPE) < 0.7
    data = rng.normal(size=(*SHAPE, 30)).astype(np.float32)
    image = nib.Nifti1Image(data, AFFINE)
    image.header.set_zooms((3, 3, 3.5, 1.5))
    image.header.set_xyzt_units("mm", "sec")
    image.set_qform(AFFINE, 1)
    image.set_sform(AFFINE, 4)
    mask = nib.Nifti1Image(inside.astype(np.uint8), AFFINE)
    mask.set_qform(AFFINE, 1)
    mask.set_sform(AFFINE, 4)
    mask.header.set_xyzt_units("mm", "sec")
    return mask, inside, image


@pytest.mark.parametrize("codes", CODES)
def test_turned_images_are_turned_back(brain, codes, tmp_path):
    mask, inside, image = brain
    expected = np.asarray(image.dataobj)[inside].T
    for suffix in (".nii", ".nii.gz"):
        path = tmp_path / f"run{suffix}"
        turned(image, codes).to_filename(path)
        np.testing.assert_array_equal(Runs([path], mask_img=mask)[0], expected)
    # a mask that was turned has its own order of voxels, and its maps lie where they were
    other = BrainMask(turned(mask, codes))
    back = other.image_of(other.read(image, "run"))
    np.testing.assert_array_equal(
        turned(back, "LAS").get_fdata(), turned(image, "LAS").get_fdata() * turned(mask, "LAS").get_fdata()[..., None]
    )


@pytest.mark.parametrize("codes", CODES)
def test_neurons_of_turned_images_come_back_in_order(codes, tmp_path):
    space = NeuronSpace([11, 7, 13])
    values = np.random.default_rng(1).normal(size=(3, space.n_neurons)).astype(np.float32)
    image = maps_to_nifti(values, space)
    moved = turned(image, codes)
    np.testing.assert_array_equal(read_nifti(moved, space)[0], values)
    moved.to_filename(tmp_path / "moved.nii.gz")
    found, known = read_nifti(tmp_path / "moved.nii.gz")
    np.testing.assert_array_equal(found, values)
    assert known == space
    np.testing.assert_array_equal(read_nifti(turned(maps_to_nifti(values[0], space), codes), space)[0], values[0])


def test_images_that_lie_elsewhere_are_refused(brain):
    mask, _, image = brain
    for change in (np.diag([1, 1, 1.01, 1]), np.array([[1, 0, 0, 3], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])):
        other = nib.Nifti1Image(image.dataobj, change @ AFFINE)
        with pytest.raises(InputError, match=r"run 1 and mask_img have different affines"):
            GroupICA(2, mask=mask).fit([image, other])
    space = NeuronSpace([11, 7, 13])
    values = maps_to_nifti(np.ones((2, space.n_neurons)), space)
    shifted = nib.Nifti1Image(values.dataobj, np.diag([2.0, 2, 2, 1]), values.header)
    with pytest.raises(InputError, match="different affines"):
        read_nifti(shifted, space)
    with pytest.raises(InputError, match="mask="):
        GroupICA(2).fit([image])


def test_what_is_outside_a_mask(brain):
    mask, inside, image = brain
    for outside in (0, -1, np.nan):
        values = np.where(inside, 1.0, outside)
        for shape in (SHAPE, (*SHAPE, 1)):
            found = BrainMask(nib.Nifti1Image(values.reshape(shape), AFFINE))
            np.testing.assert_array_equal(found.volume, inside)
    five = nib.Nifti1Image(np.asarray(image.dataobj)[:, :, :, None], AFFINE)
    np.testing.assert_array_equal(Runs([five], mask_img=mask)[0], Runs([image], mask_img=mask)[0])


@pytest.mark.parametrize("bare", [False, True])
def test_headers_survive(brain, tmp_path, bare):
    mask, inside, image = brain
    if bare:  # as nibabel writes an array and an affine
        mask = nib.Nifti1Image(inside.astype(np.uint8), AFFINE)
    ica = GroupICA(2, mask=mask).fit([image])
    ica.save(tmp_path / "ica")
    dual = dual_regression(ica, [image], mask=mask, out=tmp_path / "dr")
    written = [
        ica.components_img(),
        read_ica(tmp_path / "ica").components_img(),
        nib.load(tmp_path / "dr" / "dr_stage2_subject00000.nii.gz"),
        nib.load(dual.save(tmp_path / "again") / "dr_stage2_ic0000.nii.gz"),
    ]
    for found in written:
        np.testing.assert_allclose(found.affine, AFFINE, atol=1e-5)
        assert [int(found.header[f"{form}_code"]) for form in ("qform", "sform")] == [1, 4]
        assert found.header.get_xyzt_units() == ("mm", "sec")
        assert found.header.get_zooms()[3] == pytest.approx(1.5)


def test_runs_of_different_tr_are_refused(brain):
    mask, _, image = brain
    other = nib.Nifti1Image(image.dataobj, AFFINE, image.header)
    other.header.set_zooms((3, 3, 3.5, 2.0))
    same = nib.Nifti1Image(image.dataobj, AFFINE, image.header)
    same.header.set_zooms((3, 3, 3.5, 1500))
    same.header.set_xyzt_units("mm", "msec")
    assert len(Runs([image, same], mask_img=mask)[1]) == 30
    with pytest.raises(InputError, match=r"run 1 has a TR of 2 s, the runs before it 1\.5 s"):
        GroupICA(2, mask=mask).fit([image, other])
    with pytest.raises(InputError, match="TR of 2 s"):
        GroupICA(2, mask=mask).fit([image]).transform([other])


def test_melodic_mask_in_another_orientation(brain, tmp_path):
    mask, inside, image = brain
    components = nib.Nifti1Image(np.asarray(image.dataobj)[..., :2] * inside[..., None], AFFINE)
    components.to_filename(tmp_path / "melodic_IC.nii.gz")
    turned(mask, "LPI").to_filename(tmp_path / "mask.nii.gz")
    found = read_melodic(tmp_path)
    assert found.components_.shape == (2, inside.sum())
    assert np.abs(found.components_).min() > 0
    back = turned(found.components_img(), "".join(nib.aff2axcodes(AFFINE)))
    np.testing.assert_allclose(back.get_fdata(), components.get_fdata())
    empty = np.zeros(SHAPE, dtype=np.uint8)
    empty[~inside] = 1
    with pytest.raises(InputError, match="every component is 0 inside the mask"):
        read_melodic(tmp_path, mask_img=nib.Nifti1Image(empty, AFFINE))


def test_gift_with_component_twice_in_its_name(brain, tmp_path):
    _, _, image = brain
    folder = tmp_path / "component_study"
    folder.mkdir()
    stem = "componentA_mean_component_ica_s_all_.nii"
    nib.Nifti1Image(np.asarray(image.dataobj)[..., :2], AFFINE).to_filename(folder / stem)
    courses = np.arange(12, dtype=np.float32).reshape(6, 2)
    nib.Nifti1Image(courses, np.eye(4)).to_filename(folder / "componentA_mean_timecourses_ica_s_all_.nii")
    np.testing.assert_array_equal(read_gift(folder / stem).mixing_[0], courses)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_reading_takes_twice_the_masked_data_at_most(suffix, tmp_path):
    shape = (30, 30, 40)
    inside = np.zeros(shape, dtype=np.uint8)
    inside[5:25, 5:25, 10:20] = 1  # 4,000 of 36,000 voxels
    volume = np.random.default_rng(0).integers(0, 900, size=shape).astype(np.int16)
    image = nib.Nifti1Image(np.repeat(volume[..., None] // 300, 600, axis=3), np.eye(4))
    image.header.set_slope_inter(0.5, 3)
    image.to_filename(tmp_path / f"run{suffix}")
    mask = BrainMask(nib.Nifti1Image(inside, np.eye(4)))
    tracemalloc.start()
    found = mask.read(tmp_path / f"run{suffix}", "run")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    expected = np.asarray(nib.load(tmp_path / f"run{suffix}").dataobj[..., 0])[inside > 0]
    np.testing.assert_array_equal(found[7], expected.astype(np.float32))
    assert peak < 2 * found.nbytes + 8 * 1024**2  # 27 MB; the whole image in float32 would be 86 MB


def test_headers_of_no_meaning_are_one_line(brain, tmp_path):
    mask, _, image = brain
    odd = nib.Nifti1Image(image.dataobj, image.affine, image.header)
    odd.header["xyzt_units"] = 7
    nib.save(odd, tmp_path / "odd.nii.gz")
    for wrong in (odd, tmp_path / "odd.nii.gz"):
        with pytest.raises(InputError, match="units of code 7"):
            BrainMask(mask).read(wrong, "run 0")
    nib.save(nib.Nifti1Pair(image.dataobj, image.affine), tmp_path / "pair.img")
    header = tmp_path / "pair.hdr"
    header.write_bytes(header.read_bytes()[:42] + b"\xff\x7f" * 3 + header.read_bytes()[48:])  # dim[1] to dim[3]
    nib.save(nib.Nifti1Image(image.dataobj, image.affine), tmp_path / "run.nii")
    whole = (tmp_path / "run.nii").read_bytes()
    (tmp_path / "run.nii").write_bytes(whole[:42] + b"\xff\x7f" * 3 + whole[48:])
    (tmp_path / "run.nii.gz").write_bytes(gzip.compress((tmp_path / "run.nii").read_bytes()))
    for name in ("pair.img", "run.nii", "run.nii.gz"):
        for whole_file in (True, False):
            with pytest.raises(InputError, match="its header says"):
                load_image(tmp_path / name, whole=whole_file)
    for name in ("run.nii", "run.nii.gz"):
        with pytest.raises(InputError, match="its header says"):
            describe_path(tmp_path / name)

"""Brains as a study: `llmbrain decompose --images` and `dualreg --images`, on made images and on GIFT's subjects."""

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import scipy.io as sio
from typer.testing import CliRunner

from llmbrain import FunctionalNetworks, InputError
from llmbrain.cli import app
from llmbrain.study.images import decompose_images, dualreg_images

AFFINE = np.array([[-4.0, 0, 0, 12], [0, 4, 0, -12], [0, 0, 4, -8], [0, 0, 0, 1]])


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    inside = rng.random((7, 6, 5)) < 0.9
    nib.Nifti1Image(inside.astype(np.uint8), AFFINE).to_filename(tmp_path / "mask.nii.gz")
    labels = np.zeros(inside.shape, dtype=np.int16)
    labels[:3], labels[3:] = 4, 9
    nib.Nifti1Image(labels, AFFINE).to_filename(tmp_path / "halves_dseg.nii.gz")
    (tmp_path / "halves_dseg.tsv").write_text("index\tname\n4\tRight half\n9\tLeft half\n")
    maps = np.where(rng.random((2, inside.sum())) < 0.1, 3.0, 0.0)
    for i in range(2):
        volume = np.zeros((*inside.shape, 80), dtype=np.float32)
        volume[inside] = (rng.normal(size=(80, 2)) @ maps + rng.normal(size=(80, inside.sum()))).T
        image = nib.Nifti1Image(volume, AFFINE)
        image.header.set_zooms((4, 4, 4, 1.5))
        image.to_filename(tmp_path / f"run{i}.nii.gz")
    return tmp_path, [str(tmp_path / f"run{i}.nii.gz") for i in range(2)]


def test_the_command_writes_images_names_and_a_report(images):
    folder, runs = images
    done = CliRunner().invoke(app, ["decompose", str(folder / "study"), "--images", *runs, "--mask",
                                    str(folder / "mask.nii.gz"), "--components", "2", "--threshold", "2", "--atlas",
                                    str(folder / "halves_dseg.nii.gz")])  # fmt: skip
    assert done.exit_code == 0, done.output
    made = folder / "study/networks"
    where = pd.read_csv(made / "coordinates.tsv", sep="\t")
    assert (where.region == np.where(where.i < 3, "Right half", "Left half")).all()
    page = (made / "report.html").read_text()
    assert "Left half" in page
    assert "through the brain" in page
    assert "y" in page
    networks = FunctionalNetworks.load(made)
    assert networks.brain.t_r == 1.5
    done = CliRunner().invoke(app, ["dualreg", str(folder / "study"), "--images", *runs])
    assert done.exit_code == 0, done.output
    assert nib.load(folder / "study/dualreg/dr_stage2_subject00001.nii.gz").header.get_zooms()[3] == 1.5


def test_images_without_a_mask_say_mask(images):
    folder, runs = images
    done = CliRunner().invoke(app, ["decompose", str(folder / "study"), "--images", *runs, "--components", "2"])
    assert isinstance(done.exception, InputError)
    assert "mask=None (--mask)" in str(done.exception)
    assert not (folder / "study").exists()


def test_every_image_is_read_where_no_study_is_named(images):
    folder, runs = images
    mask = ["--mask", str(folder / "mask.nii.gz")]
    third = str(folder / "run2.nii.gz")
    nib.load(runs[0]).to_filename(third)
    done = CliRunner().invoke(app, ["decompose", "--images", *runs, third, *mask, "--components", "2", "--out",
                                    str(folder / "made")])  # fmt: skip
    assert done.exit_code == 0, done.output
    assert pd.read_csv(folder / "made/mixing.tsv", sep="\t").iloc[:, 0].nunique() == 3
    done = CliRunner().invoke(app, ["dualreg", "--networks", str(folder / "made"), "--out", str(folder / "dr"),
                                    "--images", *runs, third])  # fmt: skip
    assert done.exit_code == 0, done.output
    assert len(list((folder / "dr").glob("dr_stage2_subject0000?.nii.gz"))) == 3


@pytest.mark.parametrize(("arguments", "said"), [
    (["decompose", "--images", "a.nii.gz", "b.nii.gz"], "--out=None"),
    (["decompose", "--images", "a.nii.gz", "--out", "o", "--scrub", "0.5"], "confounds=None"),
    (["decompose"], "study=None"),
    (["decompose", "s", "--mask", "m.nii.gz", "--scrub", "0.5"], "--mask, --scrub: only with --images"),
    (["dualreg", "--images", "a.nii.gz", "--out", "o"], "--networks=None"),
    (["dualreg", "s", "--confound-columns", "csf"], "--confound-columns: only with --images"),
])  # fmt: skip
def test_what_images_need_and_what_needs_them(arguments, said):
    done = CliRunner().invoke(app, arguments)
    assert isinstance(done.exception, InputError)
    assert said in str(done.exception)


def test_tables_of_parcels_need_none(tmp_path):
    rng = np.random.default_rng(1)
    for i in range(2):
        frame = pd.DataFrame(rng.normal(size=(60, 3)) @ rng.normal(size=(3, 12)) + rng.normal(size=(60, 12)))
        frame.columns = [f"P{k}" for k in range(12)]
        frame.to_csv(tmp_path / f"s{i}.tsv", sep="\t", index=False)
    found = decompose_images([tmp_path / "s0.tsv", tmp_path / "s1.tsv"], tmp_path / "out", n_components=2,
                             progress=False)  # fmt: skip
    assert found["networks"].maps.shape == (2, 12)
    assert (tmp_path / "out/report.html").is_file()


def test_gift_subjects_from_images_to_their_own_maps(shared_data, tmp_path):
    gift = shared_data / "fmri/gift"
    index = sio.loadmat(gift / "test_icatb_preproc/rem_mn_timepoint.mat")["mask_ind"].ravel().astype(int) - 1
    runs = sorted((gift / "subjects").glob("sub-*_lowres.nii"))
    first = nib.load(runs[0])
    inside = np.zeros(np.prod(first.shape[:3]), dtype=np.uint8)
    inside[index] = 1
    mask = nib.Nifti1Image(inside.reshape(first.shape[:3], order="F"), first.affine)
    mask.to_filename(tmp_path / "mask.nii.gz")
    found = decompose_images(runs, tmp_path / "n", mask=tmp_path / "mask.nii.gz", n_components=5, progress=False)
    assert found["ica"].components_.shape == (5, len(index))
    own = dualreg_images(runs, tmp_path / "n", tmp_path / "dual")
    assert own.maps.shape == (3, 5, len(index))
    image = nib.load(tmp_path / "dual/dr_stage2_subject00000.nii.gz")
    np.testing.assert_allclose(image.affine, first.affine)
    np.testing.assert_allclose(image.get_fdata()[np.asarray(mask.dataobj) > 0].T, own.maps[0], rtol=1e-5, atol=1e-5)
    r = [abs(np.corrcoef(own.maps[:, k].mean(axis=0), found["networks"].maps[k])[0, 1]) for k in range(5)]
    assert min(r) > 0.4

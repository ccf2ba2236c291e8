"""Reading brains of every kind, and what is done with the dead."""

import nibabel as nib
import numpy as np
import pytest

from llmbrain import InputError
from llmbrain.comparison import load_fmri


def brain(n_volumes=30, n_regions=4, seed=0):
    return np.random.default_rng(seed).normal(size=(n_volumes, n_regions)) + 100


def test_alice_leaves_out_s33(shared_data):
    folder = shared_data / "fmri/alice/alice_data_shared"
    with pytest.warns(UserWarning, match="s33 is left out: all zeros"):
        fmri = load_fmri(folder / "10mm")
    assert fmri.data.shape == (27, 362, 6)
    assert fmri.excluded == {"s33": "all zeros"}
    assert fmri.subjects[0] == "s18"
    np.testing.assert_array_equal(fmri.data[0], np.loadtxt(folder / "10mm/s18-timecourses.txt"))


def test_every_table_gives_the_same(tmp_path):
    values = brain()
    np.save(tmp_path / "a.npy", values)
    np.savez(tmp_path / "b.npz", data=values)
    np.savetxt(tmp_path / "c.txt", values)
    np.savetxt(tmp_path / "d.csv", values, delimiter=",", header="V1,V2,MT,IPS", comments="")
    np.savetxt(tmp_path / "e.tsv", values, delimiter="\t")
    for name in ("a.npy", "b.npz", "c.txt", "d.csv", "e.tsv"):
        fmri = load_fmri(tmp_path / name)
        np.testing.assert_allclose(fmri.data, values[None], rtol=1e-12)
    assert load_fmri(tmp_path / "d.csv").regions == ["V1", "V2", "MT", "IPS"]
    assert load_fmri([tmp_path / "a.npy", tmp_path / "e.tsv"]).subjects == ["a", "e"]


def test_npz_with_a_subject_per_name(tmp_path):
    np.savez(tmp_path / "all.npz", **{"sub-1": brain(seed=1), "sub-2": brain(seed=2)})
    fmri = load_fmri(tmp_path / "all.npz", regions=list("abcd"))
    assert (fmri.subjects, fmri.regions, fmri.data.shape) == (["sub-1", "sub-2"], list("abcd"), (2, 30, 4))
    np.save(tmp_path / "cube.npy", fmri.data)
    np.testing.assert_array_equal(load_fmri(tmp_path / "cube.npy").data, fmri.data)


def test_folder_with_bids_names(tmp_path):
    for i in (1, 2):
        np.savetxt(
            tmp_path / f"sub-{i:02d}_task-story_timeseries.tsv",
            brain(seed=i),
            delimiter="\t",
            header="n/a",
            comments="#",
        )
    (tmp_path / "readme.md").write_text("not a brain")
    assert load_fmri(tmp_path, pattern="sub-*").subjects == ["sub-01", "sub-02"]


def test_one_dead_series_is_nan(tmp_path):
    values = brain()
    values[:, 2] = 5.0
    np.savetxt(tmp_path / "s1.txt", values)
    with pytest.warns(UserWarning, match=r"1 series are constant and become NaN \(first: s1, region2\)"):
        fmri = load_fmri(tmp_path / "s1.txt")
    assert np.isnan(fmri.data[0, :, 2]).all()
    assert np.isfinite(fmri.data[0, :, [0, 1, 3]]).all()
    assert fmri.dead == {"s1": ["region2"]}


def test_bad_brains(tmp_path):
    np.save(tmp_path / "s1.npy", brain(30))
    np.save(tmp_path / "s2.npy", brain(28))
    with pytest.raises(InputError, match=r"differ in length: \{'s1': 30, 's2': 28\}"):
        load_fmri(tmp_path)
    assert load_fmri(tmp_path, n_volumes=28).n_volumes == 28
    with pytest.raises(InputError, match="n_volumes=29"):
        load_fmri(tmp_path, n_volumes=29)
    np.save(tmp_path / "s2.npy", brain(30, 5))
    with pytest.raises(InputError, match="number of regions"):
        load_fmri(tmp_path)
    hole = brain()
    hole[3, 1] = np.nan
    np.save(tmp_path / "hole.npy", hole)
    with pytest.raises(InputError, match="hole, region1: 1 volumes are missing"):
        load_fmri(tmp_path / "hole.npy")
    np.save(tmp_path / "zero.npy", np.zeros((30, 4)))
    with pytest.raises(InputError, match="nobody is left"), pytest.warns(UserWarning, match="left out"):
        load_fmri(tmp_path / "zero.npy")
    (tmp_path / "text.csv").write_text("a,b\n1,x\n2,y\n")
    with pytest.raises(InputError, match=r"'b' of text\.csv is not numbers"):
        load_fmri(tmp_path / "text.csv")
    with pytest.raises(InputError, match="no known kind"):
        load_fmri(__file__)
    with pytest.raises(FileNotFoundError, match="nothing at"):
        load_fmri(tmp_path / "absent")


def test_nifti_with_an_atlas_and_with_a_masker(tmp_path):
    from nilearn.maskers import NiftiMasker

    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4, dtype=np.int32), 16).reshape(4, 4, 4)
    volumes = rng.normal(size=(4, 4, 4, 25)).astype(np.float32) + 50
    image = nib.Nifti1Image(volumes, np.eye(4))
    image.header.set_zooms((1, 1, 1, 1.5))
    image.to_filename(tmp_path / "sub-7_bold.nii.gz")
    atlas = nib.Nifti1Image(labels, np.eye(4))
    with pytest.warns(UserWarning, match=r"tr=2 s is used, but the NIfTI header says 1.5 s"):
        fmri = load_fmri(tmp_path / "sub-7_bold.nii.gz", atlas=atlas, tr=2.0)
    assert (fmri.subjects, fmri.regions, fmri.tr) == (["sub-7"], ["1", "2", "3"], 2.0)
    expected = np.stack([volumes[labels == i].mean(axis=0) for i in (1, 2, 3)], axis=1)
    np.testing.assert_allclose(fmri.data[0], expected, rtol=1e-5)
    masker = NiftiMasker(mask_img=nib.Nifti1Image((labels > 1).astype(np.uint8), np.eye(4)), standardize=None)
    voxels = load_fmri(tmp_path / "sub-7_bold.nii.gz", masker=masker)
    assert voxels.data.shape == (1, 25, 32)
    assert voxels.tr == 1.5
    np.testing.assert_allclose(np.sort(voxels.data[0, 0]), np.sort(volumes[labels > 1][:, 0]), rtol=1e-6)
    nib.Nifti1Image(volumes[..., 0], np.eye(4)).to_filename(tmp_path / "flat.nii")
    with pytest.raises(InputError, match="4D image"):
        load_fmri(tmp_path / "flat.nii", atlas=atlas)

"""Reading brains of every kind, and what is done with the dead."""

import warnings

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from scipy.signal import lfilter

from llmbrain import InputError
from llmbrain.brains import load_fmri


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


def smooth(n_volumes, n_regions, seed=0):
    """Series as smooth as a brain's: a random walk that forgets."""
    noise = np.random.default_rng(seed).normal(size=(n_volumes, n_regions))
    return lfilter([1.0], [1.0, -0.8], noise, axis=0)


@pytest.mark.parametrize(("n_volumes", "n_regions"), [(400, 68), (250, 268), (90, 268), (300, 300 - 32)])
def test_time_is_the_axis_that_fits_the_stimulus(tmp_path, n_volumes, n_regions):
    values = smooth(n_volumes, n_regions)
    np.save(tmp_path / "upright.npy", values)
    np.save(tmp_path / "lying.npy", values.T)
    for expected in (n_volumes - 8.0, n_volumes + 1.0):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # where both axes fit, it says what it took
            upright = load_fmri(tmp_path / "upright.npy", expected=expected)
        np.testing.assert_array_equal(upright.data[0], values)
        with pytest.warns(UserWarning, match=f"{n_regions} rows are regions"):
            lying = load_fmri(tmp_path / "lying.npy", expected=expected)
        np.testing.assert_array_equal(lying.data[0], values)


def test_orientation_by_names_by_subjects_and_by_hand(tmp_path):
    short, long = smooth(160, 120), smooth(190, 120)
    np.save(tmp_path / "a.npy", short.T)
    with pytest.warns(UserWarning, match="are taken as volumes"):
        assert load_fmri(tmp_path / "a.npy").n_volumes == 120  # nothing says more
    assert load_fmri(tmp_path / "a.npy", orientation="regions-first").n_volumes == 160
    with pytest.warns(UserWarning, match="names of regions"):
        assert load_fmri(tmp_path / "a.npy", regions=[f"r{i}" for i in range(120)]).n_volumes == 160
    np.save(tmp_path / "b.npy", long.T)
    with pytest.raises(InputError, match="differ in length"), pytest.warns(UserWarning, match="along the other axis"):
        load_fmri([tmp_path / "a.npy", tmp_path / "b.npy"])
    with pytest.raises(InputError, match="orientation='sideways'"):
        load_fmri(tmp_path / "a.npy", orientation="sideways")
    np.savez(tmp_path / "c.npz", bold=short.T, labels=[f"area {i}" for i in range(120)], tr=1.5)
    fmri = load_fmri(tmp_path / "c.npz")
    assert (fmri.n_volumes, fmri.regions[3]) == (160, "area 3")


def test_tables_as_programs_write_them(tmp_path):
    values = brain(30, 5)
    frame = pd.DataFrame(values, columns=list("VWXYZ"))
    frame.to_csv(tmp_path / "index.csv")
    frame.assign(time=np.arange(30) * 1.5).to_csv(tmp_path / "clock.csv", index=False)
    frame.to_csv(tmp_path / "german.csv", sep=";", index=False)
    pd.DataFrame(values).to_csv(tmp_path / "numbered.csv", index=False)
    rows = ["   ".join(["", *(f"{v:.16e}" for v in row)]) for row in values]
    (tmp_path / "matlab.txt").write_text("\n".join(rows) + "\n")
    header = '"V" "W" "X" "Y" "Z"'
    rows = [f'"{i}" ' + " ".join(map(repr, map(float, row))) for i, row in enumerate(values, 1)]
    (tmp_path / "r.txt").write_text("\n".join([header, *rows]) + "\n")
    frame.T.rename_axis("roi").to_csv(tmp_path / "transposed.csv")
    names = {"numbered": list("01234"), "matlab": [f"region{i}" for i in range(5)]}
    for file in sorted(tmp_path.iterdir()):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*counts time.*")
            fmri = load_fmri(file)
        np.testing.assert_allclose(fmri.data[0], values, rtol=1e-12, err_msg=file.name)
        assert fmri.regions == names.get(file.stem, list("VWXYZ")), file.name
    people = pd.concat([frame.assign(subject=s) for s in ("p1", "p2")])
    people.to_csv(tmp_path / "people.csv", index=False)
    assert load_fmri(tmp_path / "people.csv").subjects == ["p1", "p2"]


def test_folders_with_other_files_beside(tmp_path):
    for i in (1, 2):
        folder = tmp_path / f"subject{i}"
        folder.mkdir()
        np.savetxt(folder / "timeseries.txt", brain(seed=i))
        np.savetxt(folder / "rp_scan.txt", brain(seed=i + 9, n_regions=6))
        (folder / "story_events.tsv").write_text("onset\tduration\ttrial_type\n0\t1\ta\n")
    (tmp_path / "participants.tsv").write_text("participant_id\tage\nx\t3\n")
    (tmp_path / "notes.md").write_text("nothing to read")
    assert load_fmri(tmp_path).subjects == ["subject1", "subject2"]
    bids = tmp_path / "bids"
    for run in (1, 2):
        (bids / "sub-1/func").mkdir(parents=True, exist_ok=True)
        np.savetxt(bids / f"sub-1/func/sub-1_run-{run}_timeseries.tsv", brain(seed=run), delimiter="\t")
    with pytest.raises(InputError, match=r"2 files of sub-1 .*choose with pattern="):
        load_fmri(bids)
    assert load_fmri(bids, pattern="*run-2*").subjects == ["sub-1"]


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
    for shape in ((0, 4), (30, 0)):
        np.save(tmp_path / "none.npy", np.zeros(shape))
        with pytest.raises(InputError, match="no values"):
            load_fmri(tmp_path / "none.npy")
    folder = tmp_path / "cut"
    folder.mkdir()
    for name in ("s1", "s2"):
        np.save(folder / f"{name}.npy", brain())
    (folder / "s2.npy").write_bytes((folder / "s2.npy").read_bytes()[:-1])
    with pytest.raises(InputError, match=r"s2\.npy is not a file of arrays"):  # no group without one of its own
        load_fmri(folder)
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


# -- numbers as names --------------------------------------------------------------------------------------------------

CODES = [7101, 7102, 7205, 2111, 2112]


def _series(n=60, whole=False):
    values = np.random.default_rng(3).normal(1000, 20, size=(n, len(CODES)))
    return np.round(values) if whole else np.round(values, 3)


@pytest.mark.filterwarnings("ignore:.*counts time:UserWarning")
@pytest.mark.parametrize("mark", [",", "\t", ";", " "])
@pytest.mark.parametrize("index", [False, True])
@pytest.mark.parametrize("shape", ["plain", "float codes", "whole values"])
def test_codes_of_an_atlas_are_names_and_no_volume(tmp_path, mark, index, shape):
    values = _series(whole=shape == "whole values")
    codes = [f"{c}.0" if shape == "float codes" else str(c) for c in CODES]
    rows = [([str(i)] if index else []) + [f"{v:g}" if shape == "whole values" else f"{v:.3f}" for v in row]
            for i, row in enumerate(values)]  # fmt: skip
    head = ([""] if index and mark != " " else []) + codes
    (tmp_path / "s1.txt").write_text("\n".join(mark.join(row) for row in [head, *rows]))
    fmri = load_fmri(tmp_path / "s1.txt")
    assert fmri.regions == [str(c) for c in CODES]
    np.testing.assert_allclose(fmri.data[0], values, atol=1e-3)


def test_codes_of_rows_are_names_and_no_series(tmp_path):
    values = _series().T
    frame = pd.DataFrame(values, index=CODES, columns=[f"t{i}" for i in range(60)])
    frame.to_csv(tmp_path / "s1.csv")
    frame.rename_axis("roi").to_csv(tmp_path / "s2.csv")
    (tmp_path / "s3.txt").write_text("\n".join(f"{c} " + " ".join(map(str, row)) for c, row in zip(CODES, values)))
    for name in ("s1.csv", "s2.csv", "s3.txt"):
        fmri = load_fmri(tmp_path / name)
        assert fmri.regions == [str(c) for c in CODES]
        np.testing.assert_allclose(fmri.data[0], values.T)


def test_a_first_volume_of_whole_numbers_stays_a_volume(tmp_path):
    values = _series(whole=True)
    np.savetxt(tmp_path / "s1.txt", values, fmt="%d")
    assert load_fmri(tmp_path / "s1.txt").n_volumes == 60
    values[0] = [1000, 1003, 1001, 998, 1010]
    np.savetxt(tmp_path / "s2.csv", values, fmt="%.2f", delimiter=",")
    assert load_fmri(tmp_path / "s2.csv").n_volumes == 60


@pytest.mark.parametrize("mark", [";", "\t", " "])
def test_decimal_commas_in_tables_of_series(tmp_path, mark):
    values = _series()
    rows = [mark.join(f"{v:.3f}".replace(".", ",") for v in row) for row in values]
    (tmp_path / "s1.csv").write_text("\n".join(rows), encoding="utf-16")
    np.testing.assert_allclose(load_fmri(tmp_path / "s1.csv").data[0], values)


def test_rows_named_by_volumes_are_volumes(tmp_path):
    frame = pd.DataFrame(_series(), index=[f"vol{i:03d}" for i in range(60)], columns=[f"L_{c}" for c in CODES])
    frame.to_csv(tmp_path / "s1.csv")
    fmri = load_fmri(tmp_path / "s1.csv")
    assert fmri.data.shape == (1, 60, 5)
    assert fmri.regions == [f"L_{c}" for c in CODES]

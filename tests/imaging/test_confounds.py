"""Confounds of a run: which columns, what is filled, what is scrubbed, and that nothing of them is left."""

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from llmbrain import GroupICA, InputError, dual_regression
from llmbrain.imaging import read_confounds
from llmbrain.imaging.confounds import without_confounds

T = 60


@pytest.fixture
def table(tmp_path):
    rng = np.random.default_rng(0)
    names = ["trans_x", "trans_x_derivative1", "rot_z", "csf", "cosine00", "framewise_displacement", "global_signal"]
    frame = pd.DataFrame(rng.normal(size=(T, len(names))), columns=names)
    frame["framewise_displacement"] = 0.1
    frame.loc[[7, 9], "framewise_displacement"] = 0.9
    frame.loc[0, ["trans_x_derivative1", "framewise_displacement"]] = np.nan
    path = tmp_path / "sub-1_desc-confounds_timeseries.tsv"
    frame.to_csv(path, sep="\t", index=False, na_rep="n/a")
    return path, frame


def test_columns_filling_and_scrubbing(table, tmp_path):
    path, frame = table
    assert read_confounds(path).columns.tolist() == ["trans_x", "rot_z", "csf", "cosine00"]
    chosen = read_confounds(path, ["trans_*", "csf"], scrub=0.5)
    assert chosen.columns.tolist() == ["trans_x", "trans_x_derivative1", "csf", "scrubbed_7", "scrubbed_9"]
    assert chosen.trans_x_derivative1[0] == pytest.approx(frame.trans_x_derivative1[1])
    assert chosen.scrubbed_7.to_numpy().nonzero()[0].tolist() == [7]
    with pytest.raises(InputError, match="'std_dvars' is not in"):
        read_confounds(path, ["std_dvars"])
    frame.loc[5, "csf"] = np.nan
    frame.to_csv(path, sep="\t", index=False, na_rep="n/a")
    with pytest.raises(InputError, match="column 'csf' has no number at volume 5"):
        read_confounds(path)


def test_nothing_of_them_is_left_and_means_stay():
    rng = np.random.default_rng(1)
    confounds = np.column_stack([rng.normal(size=(T, 3)), np.eye(1, T, 4)[0], np.full(T, 2.0)])
    data = rng.normal(size=(T, 30)) + confounds @ rng.normal(size=(5, 30)) + 7
    clean = without_confounds(data, confounds, "run")
    design = np.column_stack([confounds[:, :4], np.ones(T)])
    expected = data - design @ np.linalg.lstsq(design, data, rcond=None)[0] + data.mean(axis=0)
    np.testing.assert_allclose(clean, expected, atol=1e-10)
    np.testing.assert_allclose(clean[4], data.mean(axis=0), atol=1e-10)  # a scrubbed volume says nothing
    maps = rng.laplace(size=(2, 30))
    np.testing.assert_allclose(
        dual_regression(maps, [data], confounds=[confounds]).maps, dual_regression(maps, [clean]).maps, atol=1e-9
    )
    np.testing.assert_allclose(
        GroupICA(2).fit([data, data[::-1]], confounds=[confounds, None]).components_,
        GroupICA(2).fit([clean, data[::-1]]).components_, atol=1e-4,
    )  # fmt: skip
    with pytest.raises(InputError, match="a row is needed for each of 60 volumes"):
        GroupICA(2).fit([data], confounds=[confounds[1:]])
    with pytest.raises(InputError, match="confounds has 1 tables for 2 runs"):
        GroupICA(2).fit([data, data], confounds=[confounds])


def test_commands_take_images_mask_and_confounds(table, tmp_path):
    from llmbrain.cli import app

    path, _ = table
    rng = np.random.default_rng(2)
    affine = np.diag([-3.0, 3, 3, 1])
    inside = rng.random((5, 6, 4)) < 0.8
    nib.Nifti1Image(inside.astype(np.uint8), affine).to_filename(tmp_path / "mask.nii.gz")
    maps = rng.laplace(size=(2, inside.sum()))
    for i in range(2):
        volume = np.zeros((*inside.shape, T), dtype=np.float32)
        volume[inside] = (rng.normal(size=(T, 2)) @ maps + 0.3 * rng.normal(size=(T, inside.sum()))).T
        image = nib.Nifti1Image(volume, affine)
        image.header.set_zooms((3, 3, 3, 2))
        image.to_filename(tmp_path / f"run{i}.nii.gz")
    runs = [str(tmp_path / f"run{i}.nii.gz") for i in range(2)]
    study = tmp_path / "study"
    common = ["--images", *runs, "--confounds", str(path), str(path), "--confound-columns", "csf,rot_z"]
    for arguments in (
        ["decompose", str(study), "--components", "2", "--mask", str(tmp_path / "mask.nii.gz"), *common],
        ["dualreg", str(study), *common],
    ):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output + repr(result.exception)
    chosen = read_confounds(path, ["csf", "rot_z"])
    expected = GroupICA(2, mask=tmp_path / "mask.nii.gz").fit(runs, confounds=[chosen, chosen])
    image = nib.load(study / "networks" / "desc-ICA_stat-z_components.nii.gz")
    np.testing.assert_allclose(image.get_fdata()[inside].T, expected.components_, atol=1e-5)
    assert image.header.get_zooms()[3] == 2
    where = pd.read_csv(study / "networks" / "coordinates.tsv", sep="\t")
    assert (where.x_mm == -3 * where.i).all()
    assert nib.load(study / "dualreg" / "dr_stage2_subject00001.nii.gz").shape == (5, 6, 4, 2)

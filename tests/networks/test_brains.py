"""Networks and localizers of brains: images, coordinates, BIDS events."""

import os

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from llmbrain import GroupICA, InputError
from llmbrain.brains.hrf import spm_hrf
from llmbrain.imaging import Atlas
from llmbrain.imaging.brain_mask import BrainMask
from llmbrain.networks import FunctionalNetworks, brain_localizer, match_networks, read_events, recurrence
from llmbrain.networks.brain_localizer import TICK
from llmbrain.stats.nulls import SmoothMapsWarning

AFFINE = np.array([[-3.0, 0, 0, 9], [0, 3, 0, -6], [0, 0, 3, 1], [0, 0, 0, 1]])
T, TR = 120, 2.0


@pytest.fixture
def brain():
    rng = np.random.default_rng(0)
    inside = rng.random((6, 7, 5)) < 0.8
    image = nib.Nifti1Image(inside.astype(np.uint8), AFFINE)
    return image, inside, rng


def run_of(values, inside):
    volume = np.zeros((*inside.shape, len(values)), dtype=np.float32)
    volume[inside] = values.T
    image = nib.Nifti1Image(volume, AFFINE)
    image.header.set_zooms((3, 3, 3, TR))
    image.header.set_xyzt_units("mm", "sec")
    return image


def test_networks_of_a_brain_are_saved_as_images_with_coordinates(tmp_path, brain):
    mask, inside, rng = brain
    maps = rng.laplace(size=(2, inside.sum()))
    run = run_of(rng.normal(size=(T, 2)) @ maps + 3 * rng.normal(size=(T, inside.sum())), inside)
    networks = FunctionalNetworks.from_ica(GroupICA(2, mask=mask).fit([run]), threshold=2.0)
    labels = np.zeros(inside.shape, dtype=np.int16)
    labels[:3] = 1
    atlas = Atlas.of(nib.Nifti1Image(labels, AFFINE), {1: "front"})
    networks.save(tmp_path / "n", atlas=atlas)
    image = nib.load(tmp_path / "n/desc-ICA_stat-z_components.nii.gz")
    np.testing.assert_array_equal(image.get_fdata()[inside].T, networks.maps)
    assert image.header.get_zooms()[3] == TR
    np.testing.assert_allclose(image.affine, AFFINE)
    assert (np.asarray(nib.load(tmp_path / "n/mask.nii.gz").dataobj) == inside).all()
    where = pd.read_csv(tmp_path / "n/coordinates.tsv", sep="\t", keep_default_na=False)
    assert len(where) == networks.sizes.sum() > 5
    np.testing.assert_allclose(where.x_mm, 9 - 3 * where.i)
    assert (where.region == np.where(where.i < 3, "front", "")).all()
    again = FunctionalNetworks.load(tmp_path / "n")
    assert isinstance(again.brain, BrainMask)
    assert again.brain.t_r == TR
    np.testing.assert_array_equal(again.brain.volume, inside)
    assert again.subset([1]).brain is again.rethreshold("auto").brain is again.brain
    FunctionalNetworks(networks.maps).save(tmp_path / "n", overwrite=True)
    assert not list((tmp_path / "n").glob("*.nii.gz"))
    assert FunctionalNetworks.load(tmp_path / "n").brain is None
    with pytest.raises(InputError, match=r"brain has \d+ voxels, the maps have 5"):
        FunctionalNetworks(np.eye(2, 5), brain=again.brain)


def test_networks_of_grayordinates_keep_their_place(tmp_path):
    axis = nib.cifti2.BrainModelAxis.from_surface(np.arange(70), 100, "CortexLeft")
    rng = np.random.default_rng(1)
    data = (rng.normal(size=(60, 2)) @ rng.laplace(size=(2, 70)) + rng.normal(size=(60, 70))).astype(np.float32)
    run = nib.Cifti2Image(data, header=(nib.cifti2.SeriesAxis(0, 0.8, 60), axis))
    networks = FunctionalNetworks.from_ica(GroupICA(2).fit([run]))
    networks.save(tmp_path / "n")
    stored = nib.load(tmp_path / "n/desc-ICA_stat-z_components.dscalar.nii")
    np.testing.assert_allclose(stored.get_fdata(), networks.maps, atol=1e-6)
    assert FunctionalNetworks.load(tmp_path / "n").brain.axis == axis


def test_a_null_of_shuffled_voxels_is_refused_for_brains_and_warned_of_for_what_looks_like_one(brain):
    mask, inside, rng = brain
    where = BrainMask(mask)
    a, b = (FunctionalNetworks(rng.laplace(size=(2, inside.sum())), brain=where, threshold=1) for _ in range(2))
    assert match_networks(a, b).p.isna().all()
    assert recurrence(a, [b], n_permutations=0)[["p", "p_overlap", "q"]].isna().all(axis=None)
    for call in (lambda: match_networks(a, b, n_permutations=9), lambda: recurrence(a, [b])):
        with pytest.raises(InputError, match="n_permutations: a null that shuffles voxels is wrong"):
            call()
    smooth = np.apply_along_axis(np.convolve, 1, rng.normal(size=(2, 400)), np.ones(9), "same")
    with pytest.warns(SmoothMapsWarning, match="neighboring columns of the maps correlate by 0.8"):
        match_networks(FunctionalNetworks(smooth), FunctionalNetworks(smooth[::-1]), n_permutations=9)


@pytest.fixture
def task(tmp_path):
    rng = np.random.default_rng(2)
    onsets = np.cumsum(rng.uniform(10, 16, size=16))
    events = pd.DataFrame({"onset": onsets, "duration": 4.0, "trial_type": ["face", "house"] * 8, "response": 1})
    events.loc[3, "trial_type"] = None
    path = tmp_path / "sub-1_task-x_events.tsv"
    events.to_csv(path, sep="\t", index=False, na_rep="n/a")
    return path, events


def test_the_localizer_of_a_brain_finds_the_voxels_that_respond(tmp_path, brain, task):
    mask, inside, rng = brain
    path, events = task
    fine = np.arange(0, T * TR, TICK)
    box = np.zeros(len(fine))
    for onset in events.onset[events.trial_type == "face"]:
        box[(fine >= onset - 1e-9) & (fine < onset + 4 - 1e-9)] = 1
    response = np.convolve(box, spm_hrf(np.arange(0, 32, TICK)))[: len(fine)] * TICK
    values = rng.normal(size=(T, inside.sum()))
    values[:, :5] += 8 * response[:: round(TR / TICK)][:, None]
    run = run_of(values, inside)
    found = brain_localizer([run], path, {"face-house": {"face": 1, "house": -1}}, mask=mask, n_permutations=99)
    assert np.flatnonzero(found.p_fwe[0] <= 0.05).tolist()[:5] == [0, 1, 2, 3, 4]
    assert (found.p_fwe[0] <= 0.05).sum() <= 7
    assert found.effect[0, :5].mean() == pytest.approx(8, rel=0.15)
    assert repr(found).startswith(f"Localizer({inside.sum()} places of a brain; p_fwe <= .05 in face-house: ")
    rows = found.to_frame(0.05)
    i, j, k = np.argwhere(inside)[rows.voxel[0]]
    place = nib.load(mask).affine @ [i, j, k, 1] if isinstance(mask, (str, os.PathLike)) else mask.affine @ [i, j, k, 1]
    assert rows.loc[0, ["x_mm", "y_mm", "z_mm"]].tolist() == pytest.approx(place[:3].round(2).tolist())
    regions = found.to_networks()
    regions.save(tmp_path / "loc")
    assert nib.load(tmp_path / "loc/desc-ICA_stat-z_components.nii.gz").shape == (6, 7, 5, 1)
    table = brain_localizer([values], events.dropna(), ["face"], t_r=TR, n_permutations=0)
    assert table.effect.shape == (1, inside.sum())


def test_events_that_cannot_be_used(tmp_path, brain, task):
    mask, inside, rng = brain
    path, events = task
    assert len(read_events(path)) == 15
    events.drop(columns="duration").to_csv(path, sep="\t", index=False)
    with pytest.raises(InputError, match="has no column 'duration'"):
        read_events(path)
    run = run_of(rng.normal(size=(T, inside.sum())), inside)
    with pytest.raises(InputError, match="events has 2 tables for 1 runs"):
        brain_localizer([run], [events, events], mask=mask)
    with pytest.raises(InputError, match="tr=None"):
        brain_localizer([rng.normal(size=(T, 9))], events.dropna())

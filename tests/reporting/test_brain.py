"""Maps of a brain in the report: the map through nilearn, coordinates from the affine, names from the atlas."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from nibabel import Nifti1Image

import llmbrain as lb
from llmbrain import FunctionalNetworks, InputError
from llmbrain.imaging.brain_mask import BrainMask
from llmbrain.reporting import build_report
from llmbrain.reporting.brain import APART, Brain

AFFINE = np.array([[-4.0, 0, 0, 60], [0, 4, 0, -80], [0, 0, 4, -40], [0, 0, 0, 1]])


@pytest.fixture(scope="module")
def mask() -> Nifti1Image:
    volume = np.zeros((12, 14, 10), dtype=np.uint8)
    volume[2:10, 2:12, 2:8] = 1
    return Nifti1Image(volume, AFFINE)


@pytest.fixture(scope="module")
def maps(mask: Nifti1Image) -> Any:
    """Two maps; the first is strongest at voxel (3, 4, 5), next at its neighbor, then at (8, 10, 6)."""
    values = np.random.default_rng(0).standard_normal((2, int(mask.get_fdata().sum())))
    volume = np.zeros(mask.shape)
    volume[3, 4, 5], volume[3, 4, 6], volume[8, 10, 6] = 30, 25, -20
    values[0] += volume[mask.get_fdata() > 0]
    return values


@pytest.fixture(scope="module")
def atlas() -> Nifti1Image:
    """Two halves of the brain, on a grid of its own: 1 left (x < 32 mm), 2 right."""
    x = 64.0 - 2 * np.arange(40)
    values = np.broadcast_to(np.where(x < 32, 1, 2)[:, None, None], (40, 50, 40)).astype(np.int16)
    return Nifti1Image(np.array(values), np.array([[-2.0, 0, 0, 64], [0, 2, 0, -84], [0, 0, 2, -44], [0, 0, 0, 1]]))


def test_coordinates_are_those_of_the_affine_and_peaks_lie_apart(mask: Nifti1Image, maps: Any) -> None:
    brain = Brain.of(BrainMask(mask))
    peaks = brain.peaks(maps[0].astype(np.float32), np.abs(maps[0]) > 15)
    assert [(p["x"], p["y"], p["z"]) for p in peaks] == [(48.0, -64.0, -20.0), (28.0, -40.0, -16.0)]
    assert peaks[0]["value"] == pytest.approx(maps[0].max())
    assert peaks[0]["region"] == ""
    many = brain.peaks(maps[1].astype(np.float32), np.ones(maps.shape[1], dtype=bool))
    places = np.array([[p["x"], p["y"], p["z"]] for p in many])
    distance = np.linalg.norm(places[:, None] - places, axis=2)
    assert len(many) == 12
    assert distance[np.triu_indices(12, 1)].min() >= APART


@pytest.mark.parametrize("labels", [["Background", "left", "right"], ["left", "right"]])
def test_an_atlas_of_another_grid_names_the_voxels(mask: Nifti1Image, atlas: Nifti1Image, labels: list[str]) -> None:
    brain = Brain.of(BrainMask(mask), (atlas, labels))
    x = brain.coordinates(np.arange(brain.mask.n_voxels))[:, 0]
    assert brain.regions == ["left" if value < 32 else "right" for value in x]


def test_the_report_shows_brain_maps_coordinates_and_labels(mask: Nifti1Image, maps: Any, atlas: Nifti1Image) -> None:
    networks = FunctionalNetworks(maps, threshold=3.6, standardize=False)
    text = build_report(title="t", networks=networks, mask_img=mask, atlas=(atlas, ["", "left", "<right>"])).html()
    assert "IC00 through the brain" in text
    assert "&lt;right&gt;" in text
    assert "−64.0" in text
    assert "key voxels" in text
    assert "Strongest key neurons" not in text.split('id="network-1"')[0].split('id="network-0"')[1]
    assert "do not know their layers" not in text


def test_the_mask_of_a_brain_ica_is_enough(mask: Nifti1Image) -> None:
    rng = np.random.default_rng(0)
    source = np.zeros(mask.shape)
    source[4:6, 4:6, 4:6] = 9
    volumes = [source[..., None] * rng.standard_normal(30) + rng.standard_normal((*mask.shape, 30)) for _ in range(2)]
    runs = [Nifti1Image(volume.astype(np.float32), AFFINE) for volume in volumes]
    ica = lb.GroupICA(2, run_components=4, mask=mask).fit(runs)
    assert "through the brain" in lb.report(ica).html()


def test_what_does_not_fit_is_said(mask: Nifti1Image, maps: Any, atlas: Nifti1Image) -> None:
    networks = FunctionalNetworks(maps)
    with pytest.raises(InputError, match=r"mask_img has 480 voxels, the maps have 99"):
        build_report(title="t", networks=FunctionalNetworks(maps[:, :99]), mask_img=mask)
    with pytest.raises(InputError, match="one label is needed"):
        build_report(title="t", networks=networks, mask_img=mask, atlas=(atlas, ["left"]))
    with pytest.raises(InputError, match="maps of a brain"):
        build_report(title="t", networks=FunctionalNetworks(maps, lb.NeuronSpace([480])), mask_img=mask)

"""Images: what plain nibabel and nilearn see in them, and that everything comes back."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_data import SPACE, values

import llmbrain as lb
from llmbrain._validation import InputError
from llmbrain.imaging import maps_to_nifti, read_nifti, write_nifti
from llmbrain.imaging.nifti import sidecar_of


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_plain_nibabel_reads_a_scan(tmp_path: Path, suffix: str) -> None:
    data = values(150)
    path = lb.Scan.from_array(data, SPACE, name="x").to_nifti(tmp_path / f"a{suffix}")
    image = nibabel.load(path)
    assert isinstance(image, nibabel.Nifti1Image)
    assert not isinstance(image, nibabel.Nifti2Image)
    assert image.shape == (*SPACE.shape, 150)
    assert image.get_data_dtype() == np.float32
    assert (image.affine == np.eye(4)).all()
    volume = image.get_fdata()
    for layer, neuron, token in [(0, 0, 0), (1, 16, 149), (2, 7, 40)]:
        column, row = neuron % SPACE.grid[0], neuron // SPACE.grid[0]
        assert volume[column, row, layer, token] == data[token, sum(SPACE.widths[:layer]) + neuron]
    assert np.count_nonzero(volume[..., 0]) == SPACE.n_neurons
    back, space = read_nifti(path)
    assert back.dtype == np.float32
    assert (back == data).all()
    assert space == SPACE
    sidecar = json.loads((tmp_path / "a.json").read_text())
    assert sidecar["space"]["widths"] == [30, 17, 24]
    assert sidecar["name"] == "x"
    assert {p.name for p in tmp_path.iterdir()} == {path.name, "a.json"}


@given(
    widths=st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(any),
    n=st.one_of(st.none(), st.integers(1, 4)),
    seed=st.integers(0, 99),
)
@settings(max_examples=30, deadline=None)
def test_round_trip_in_memory(widths: list[int], n: int | None, seed: int) -> None:
    space = lb.NeuronSpace(widths)
    data = values(n, space, seed)
    back, found = read_nifti(maps_to_nifti(data, space))
    assert found == space
    assert back.shape == data.shape
    assert (back == data).all()


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize(("n_volumes", "widths"), [(32767, [2]), (32768, [2]), (1, [2] * 32768)])
def test_nifti2_beyond_32767(tmp_path: Path, suffix: str, n_volumes: int, widths: list[int]) -> None:
    space = lb.NeuronSpace(widths)
    data = values(n_volumes, space)
    large = max(n_volumes, len(widths)) > 32767
    path = write_nifti(tmp_path / f"a{suffix}", data, space)
    nibabel.save(maps_to_nifti(data, space), tmp_path / f"b{suffix}")
    for image in (nibabel.load(path), nibabel.load(tmp_path / f"b{suffix}")):
        assert isinstance(image, nibabel.Nifti2Image) == large
        assert image.shape == (*space.shape, n_volumes)
        assert (read_nifti(image)[0] == data).all()


def test_pieces_and_whole_give_the_same_file(tmp_path: Path) -> None:
    data = values(201)
    write_nifti(tmp_path / "a.nii", data, SPACE)
    write_nifti(tmp_path / "b.nii", (data[i : i + 7] for i in range(0, 201, 7)), SPACE, n_volumes=201)
    nibabel.save(maps_to_nifti(data, SPACE), tmp_path / "c.nii")
    a, c = (nibabel.load(tmp_path / f"{name}.nii") for name in "ac")
    assert (tmp_path / "a.nii").read_bytes() == (tmp_path / "b.nii").read_bytes()
    assert (a.get_fdata() == c.get_fdata()).all()
    assert a.header == c.header


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="4 volumes were given where n_volumes=9"):
        write_nifti(tmp_path / "a.nii", iter([values(4)]), SPACE, n_volumes=9)
    assert list(tmp_path.iterdir()) == []


def test_the_sidecar_helps_where_the_extension_is_lost(tmp_path: Path) -> None:
    data = values(3)
    path = write_nifti(tmp_path / "a.nii.gz", data, SPACE)
    image = nibabel.load(path)
    nibabel.save(nibabel.Nifti1Image(image.get_fdata(dtype=np.float32), image.affine), path)
    assert len(nibabel.load(path).header.extensions) == 0
    assert (read_nifti(path)[0] == data).all()
    sidecar_of(path).unlink()
    with pytest.raises(InputError, match=r"a.nii.gz has no llmbrain header"):
        read_nifti(path)
    assert (read_nifti(path, SPACE)[0] == data).all()


def test_the_extension_survives_nilearn_indexing() -> None:
    from nilearn.image import index_img

    data = values(3)
    assert (read_nifti(index_img(maps_to_nifti(data, SPACE), 1))[0] == data[1]).all()


def test_bad_images_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.nii").write_text("no image")
    with pytest.raises(InputError, match=r"a.nii is not a NIfTI image"):
        read_nifti(tmp_path / "a.nii")
    with pytest.raises(FileNotFoundError):
        read_nifti(tmp_path / "none.nii")
    with pytest.raises(InputError, match="is not a NIfTI image or the path of one"):
        read_nifti(values())
    image = maps_to_nifti(values(), SPACE)
    with pytest.raises(InputError, match="needs"):
        read_nifti(image, lb.NeuronSpace([30, 17]))
    with pytest.raises(InputError, match=r"must end in .nii or .nii.gz"):
        write_nifti(tmp_path / "a.img", values(), SPACE)
    with pytest.raises(InputError, match="do not fit"):
        maps_to_nifti(values()[:, :-1], SPACE)
    with pytest.raises(InputError, match="maps of shape"):
        maps_to_nifti(values()[None], SPACE)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("cut", [200, -40])
def test_a_truncated_image_is_named(tmp_path: Path, cut: int, suffix: str) -> None:
    path = write_nifti(tmp_path / f"a{suffix}", values(), SPACE)
    path.write_bytes(path.read_bytes()[:cut])
    sidecar_of(path).unlink()
    with pytest.raises(InputError, match=r"a.nii"):
        read_nifti(path)


def test_nifti_masker_gives_every_neuron(tmp_path: Path) -> None:
    from nilearn.maskers import NiftiMasker

    data = values(20)
    path = lb.Scan.from_array(data, SPACE).to_nifti(tmp_path / "a.nii.gz")
    masker = NiftiMasker(mask_img=SPACE.mask_img(), standardize=None, smoothing_fwhm=None).fit()
    signals = masker.transform(path)
    assert signals.shape == data.shape
    # nilearn orders by voxel, we by neuron: the same columns in another order, and back through an image.
    order = SPACE.from_volume(np.squeeze(masker.inverse_transform(np.arange(71, dtype=np.float32)).get_fdata())).astype(
        int
    )
    assert sorted(order) == list(range(SPACE.n_neurons))
    np.testing.assert_array_equal(signals[:, order], data)


def test_canica_finds_planted_networks_in_the_export(tmp_path: Path) -> None:
    from nilearn.decomposition import CanICA

    rng = np.random.default_rng(0)
    space = lb.NeuronSpace([300, 200])
    maps = np.zeros((3, 500), dtype=np.float32)
    for k in range(3):
        maps[k, rng.choice(500, 25, replace=False)] = 4 * rng.choice([-1, 1], 25)  # signed, as ICA maps are
    images = []
    for run in range(2):
        data = rng.standard_normal((120, 3)) @ maps + 0.5 * rng.standard_normal((120, 500))
        images.append(lb.Scan.from_array(data, space).to_nifti(tmp_path / f"run{run}.nii.gz"))
    canica = CanICA(
        n_components=3, mask=space.mask_img(), smoothing_fwhm=None, detrend=False, standardize="zscore_sample",
        threshold=None, random_state=0, n_init=1,
    ).fit([str(path) for path in images])  # fmt: skip
    found, _ = read_nifti(canica.components_img_, space)
    r = np.abs(np.corrcoef(found, maps)[:3, 3:])
    assert (r.max(axis=0) > 0.9).all()
    assert sorted(r.argmax(axis=0)) == [0, 1, 2]

"""Which regions are read, what they are called, where they lie."""

import json

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from llmbrain import InputError
from llmbrain.brains import load_fmri
from llmbrain.brains.regions import columns_of, read_rois

AFFINE = np.diag([4.0, 4, 4, 1])


@pytest.fixture
def atlas(tmp_path):
    volume = np.zeros((6, 5, 4), dtype=np.int16)
    volume[:2], volume[2:4], volume[4:, :3] = 3, 1, 8
    nib.Nifti1Image(volume, AFFINE).to_filename(tmp_path / "x_dseg.nii.gz")
    (tmp_path / "x_dseg.tsv").write_text("index\tname\n3\tPole\n1\tStem\n8\tBelt\n")
    return tmp_path / "x_dseg.nii.gz", volume


def image_of(volume, tr=2.0, five=False, seed=0):
    rng = np.random.default_rng(seed)
    data = rng.normal(size=(*volume.shape, 30)).astype(np.float32) + volume[..., None]
    image = nib.Nifti1Image(data[:, :, :, None] if five else data, AFFINE)
    image.header.set_xyzt_units("mm", "sec")
    image.header["pixdim"][4:6] = (1, tr) if five else (tr, 1)
    return image, data


def test_images_take_names_and_places_from_the_atlas(tmp_path, atlas):
    path, volume = atlas
    folder = tmp_path / "people"
    folder.mkdir()
    for i, five in enumerate((False, True)):
        image, data = image_of(volume, five=five, seed=i)
        image.to_filename(folder / f"s{i}.nii.gz")
    fmri = load_fmri(folder, atlas=path)
    assert fmri.regions == ["Stem", "Pole", "Belt"]
    assert fmri.tr == 2.0
    np.testing.assert_allclose(fmri.data[1, :, 1], data[volume == 3].mean(axis=0), rtol=1e-5)
    assert fmri.places.region.tolist() == fmri.regions
    assert fmri.places.loc[1, ["x_mm", "y_mm", "z_mm"]].tolist() == [2.0, 8.0, 6.0]
    some = load_fmri(folder, atlas=path, rois=["Belt", "Stem"])
    assert some.regions == ["Stem", "Belt"]
    np.testing.assert_array_equal(some.data, fmri.data[..., [0, 2]])
    back = np.asarray(some.masker.inverse_transform(np.array([[5.0, 7.0]], dtype=np.float32)).dataobj)[..., 0]
    assert set(np.unique(back[volume == 3])) == {0}
    assert set(np.unique(back[volume == 8])) == {7}
    other = load_fmri(folder, atlas=path, atlas_labels={1: "a", 3: "b", 8: "c"}, rois="c,a")
    assert other.regions == ["a", "c"]


def test_subjects_of_different_tr_are_not_mixed(tmp_path, atlas):
    path, volume = atlas
    for i, tr in enumerate((2.0, 1.5)):
        image_of(volume, tr=tr)[0].to_filename(tmp_path / f"s{i}.nii.gz")
    with pytest.raises(InputError, match=r"s1.nii.gz has a TR of 1.5 s, s0.nii.gz one of 2 s"):
        load_fmri([tmp_path / "s0.nii.gz", tmp_path / "s1.nii.gz"], atlas=path, tr=2.0)


def test_tables_are_placed_by_their_names(tmp_path, atlas):
    path, volume = atlas
    values = np.random.default_rng(0).normal(size=(30, 3))
    for names in (["Belt", "Stem", "Pole"], ["8", "1", "3"]):
        pd.DataFrame(values, columns=names).to_csv(tmp_path / "s.csv", index=False)
        fmri = load_fmri(tmp_path / "s.csv", atlas=path)
        assert fmri.regions == ["Belt", "Stem", "Pole"]
        back = np.asarray(fmri.masker.inverse_transform(np.array([[5.0, 6.0, 7.0]], dtype=np.float32)).dataobj)
        assert set(np.unique(back[volume == 8])) == {5}
        assert fmri.places.x_mm.tolist() == [18.0, 10.0, 2.0]
    np.save(tmp_path / "s.npy", values)
    assert load_fmri(tmp_path / "s.npy", atlas=path).regions == ["Stem", "Pole", "Belt"]
    pd.DataFrame(values, columns=["u", "v", "w"]).to_csv(tmp_path / "s.csv", index=False)
    with pytest.warns(UserWarning, match=r"not called as its labels are \('u'; 'Stem'\)"):
        assert load_fmri(tmp_path / "s.csv", atlas=path).regions == ["u", "v", "w"]


def test_lists_of_regions(tmp_path):
    names = ["A1", "STS", "8", "IFG"]
    (tmp_path / "sets.json").write_text(json.dumps({"ear": ["A1"], "all": ["STS", 8]}))
    (tmp_path / "list.txt").write_text("STS\nIFG\n")
    for wanted, found in (
        (["IFG", "A1"], [0, 3]), ("STS, IFG", [1, 3]), (tmp_path / "list.txt", [1, 3]), ([8], [2]),
        (tmp_path / "sets.json", [0, 1, 2]), (f"{tmp_path / 'sets.json'}:ear", [0]), ({"x": ["A1"], "y": ["A1"]}, [0]),
    ):  # fmt: skip
        assert columns_of(wanted, names, numbered=False).tolist() == found
    assert columns_of([0, "2"], ["region0", "region1", "region2"], numbered=True).tolist() == [0, 2]
    for wanted, said in (
        (["V1"], "'V1' is none of the 4 regions: allowed are A1, STS, 8, IFG"), ([0], "0 is none of the 4"),
        ([], "rois is empty"), ([True], "neither the name nor the number"),
        (f"{tmp_path / 'sets.json'}:eye", "has no set 'eye': allowed are ear, all"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=said):
            columns_of(wanted, names, numbered=False)
    with pytest.raises(FileNotFoundError, match="no file at"):
        read_rois(tmp_path / "gone.json")


def test_parcellated_cifti_brings_its_names_and_its_clock(tmp_path):
    parcels = [("STG", np.arange(4)), ("IFG", np.arange(4, 9)), ("MTG", np.arange(9, 12))]
    axis = nib.cifti2.ParcelsAxis.from_brain_models(
        [(name, nib.cifti2.BrainModelAxis.from_surface(v, 20, "CortexLeft")) for name, v in parcels]
    )
    values = np.random.default_rng(0).normal(size=(30, 3)).astype(np.float32)
    for i, step in enumerate((0.72, 0.72, 2.0)):
        image = nib.Cifti2Image(values + i, header=(nib.cifti2.SeriesAxis(0, step, 30), axis))
        image.to_filename(tmp_path / f"sub-{i}_task-x.ptseries.nii")
    files = sorted(tmp_path.glob("*.ptseries.nii"))
    fmri = load_fmri(files[:2])
    assert (fmri.subjects, fmri.regions, fmri.tr) == (["sub-0", "sub-1"], ["STG", "IFG", "MTG"], 0.72)
    np.testing.assert_allclose(fmri.data[1], values + 1, rtol=1e-5)
    assert load_fmri(files[0], rois="MTG").regions == ["MTG"]
    with pytest.raises(InputError, match=r"has a TR of 2 s"):
        load_fmri(tmp_path, pattern="*.ptseries.nii")

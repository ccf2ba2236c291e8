"""Atlases: label tables as people have them, names and centers, and what a place is called."""

import json

import nibabel as nib
import numpy as np
import pytest

from llmbrain import InputError
from llmbrain.imaging import Atlas, read_labels

AFFINE = np.array([[-4.0, 0, 0, 20], [0, 4, 0, -8], [0, 0, 4, 0], [0, 0, 0, 1]])


@pytest.fixture
def image():
    volume = np.zeros((6, 4, 3), dtype=np.float32)
    volume[:2, :2], volume[2:4, 2:], volume[5, 3, 2] = 1, 2, 7
    return nib.Nifti1Image(volume, AFFINE)


TABLES = {
    "bids.tsv": "index\tname\tabbreviation\n1\tLeft pole\tLP\n2\tRight, back\tRB\n7\tThird\tT\n",
    "header.csv": "label,region,x\n1,Left pole,3.5\n2,\"Right, back\",1\n7,Third,2\n",
    "no_header.csv": "1,Left pole\n2,\"Right, back\"\n7,Third\n",
    "lookup.txt": "#No. Label R G B A\n1  Left_pole 120 18 0 0\n2 Right,_back 1 2 3 0\n7 Third 0 0 0 0\n",
    "names.json": json.dumps({"1": "Left pole", "2": {"label": "Right, back"}, "7": "Third"}),
    "turned.json": json.dumps({"Left pole": 1, "Right, back": 2, "Third": 7}),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_tables_as_people_have_them(tmp_path, image, name):
    (tmp_path / name).write_text(TABLES[name])
    found = read_labels(tmp_path / name)
    assert {k: v.replace("_", " ") for k, v in found.items()} == {1: "Left pole", 2: "Right, back", 7: "Third"}
    atlas = Atlas.of(image, tmp_path / name)
    assert atlas.values.tolist() == [1, 2, 7]
    assert atlas.is_named


def test_names_alone_count_from_one_or_from_the_background(tmp_path, image):
    names = [f"R{i}" for i in range(1, 8)]
    (tmp_path / "names.txt").write_text("\n".join(names))
    for labels in (names, ["background", *names], tmp_path / "names.txt", dict(enumerate(names, 1))):
        assert Atlas.of(image, labels).names == ["R1", "R2", "R7"]
    with pytest.raises(InputError, match="values up to 7 and 3 labels"):
        Atlas.of(image, names[:3])


def test_centers_and_places(image):
    atlas = Atlas.of(image, {1: "a", 2: "b", 7: "c"})
    where = np.argwhere(np.asarray(image.dataobj) == 2) @ AFFINE[:3, :3].T + AFFINE[:3, 3]
    np.testing.assert_allclose(atlas.centers()[1], where.mean(axis=0))
    np.testing.assert_allclose(atlas.centers()[2], AFFINE[:3, :3] @ [5, 3, 2] + AFFINE[:3, 3])
    assert atlas.at([[20, -8, 0], where[0] + 1.9, [0, 4, 8], [1000, 0, 0], [4, -8, 0]]) == ["a", "b", "c", "", ""]


def test_the_table_beside_an_image_is_found(tmp_path, image):
    image.to_filename(tmp_path / "atlas-x_dseg.nii.gz")
    assert Atlas.of(tmp_path / "atlas-x_dseg.nii.gz").names == ["1", "2", "7"]
    (tmp_path / "atlas-x_dseg.tsv").write_text(TABLES["bids.tsv"])
    assert Atlas.of(tmp_path / "atlas-x_dseg.nii.gz").names == ["Left pole", "Right, back", "Third"]
    (tmp_path / "atlas-x_dseg.tsv").write_text("index\tname\n1\tone\n2\tone\n")
    with pytest.warns(UserWarning, match=r"1 of 3 regions have no name in the table \(first: \[7\]\)"):
        assert Atlas.of(tmp_path / "atlas-x_dseg.nii.gz").names == ["one (1)", "one (2)", "7"]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.tsv", "index\tname\n1\ta\n1\tb\n", "has two names for 1: 'a' and 'b'"),
        ("a.csv", "x,y\n1.5,2.5\n", "needs a column of whole numbers and one of names"),
        ("a.txt", "1\n2\n3\n", "holds numbers alone"),
        ("a.json", "[1, 2]", "must be like"),
        ("a.json", "{", "is no JSON"),
        ("a.tsv", "", "is empty"),
    ],
)
def test_tables_that_say_nothing(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=said):
        read_labels(tmp_path / name)


def test_an_image_that_is_no_atlas(image):
    volume = np.asarray(image.dataobj) * 0.3
    with pytest.raises(InputError, match="whole number a region"):
        Atlas.of(nib.Nifti1Image(volume, AFFINE))

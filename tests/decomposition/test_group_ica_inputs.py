"""Bad input to GroupICA: one clear error that names what is wrong; and every kind of run that is read."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from nibabel import Nifti1Image

from llmbrain._validation import InputError
from llmbrain.anatomy.space import NeuronSpace
from llmbrain.decomposition import GroupICA
from llmbrain.scanning.inputs import Runs


@pytest.fixture
def runs() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    maps = np.zeros((3, 300))
    maps[np.repeat([0, 1, 2], 30), np.arange(90)] = rng.uniform(1, 2, 90)
    return [(rng.laplace(size=(40, 3)) @ maps + 0.5 * rng.normal(size=(40, 300))).astype(np.float32) for _ in range(2)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_components": 0}, "n_components=0"),
        ({"n_components": -2}, "n_components=-2"),
        ({"n_components": 1.5}, "n_components=1.5"),
        ({"n_components": True}, "n_components=True"),
        ({"n_components": "many"}, "n_components='many' is not known: allowed are 'auto', 'parallel'"),
        ({"n_components": None}, "n_components=None"),
        ({"n_components": 0.5, "cca": True}, "n_components=0.5 is a share of variance"),
        ({"method": "sobi"}, "method='sobi' is not known"),
        ({"fun": "tanh"}, "fun='tanh' is not known"),
        ({"axis": "both"}, "axis='both'"),
        ({"scope": "block"}, "scope='block'"),
        ({"scope": 0}, "scope=0"),
        ({"detrend": "cubic"}, "detrend='cubic'"),
        ({"detrend": -1}, "detrend=-1"),
        ({"standardize": "zscores"}, "standardize='zscores'"),
        ({"detrend": "linear", "standardize": "none"}, "removes the mean too"),
        ({"outliers": "drop"}, "outliers='drop'"),
        ({"outlier_threshold": 0}, "outlier_threshold=0"),
        ({"dtype": "float16"}, "dtype='float16'"),
        ({"device": "abacus"}, "device='abacus'"),
        ({"n_init": 0}, "n_init=0"),
        ({"run_components": 0}, "run_components=0"),
        ({"max_iter": 0}, "max_iter=0"),
        ({"tol": 0}, "tol=0"),
        ({"method": "dictlearning", "axis": "time"}, "use axis='space'"),
        ({"drop_first": 39}, "run 0 keeps 1 of 40 tokens"),
        ({"n_components": 81}, "n_components=81 is more than the data allow: 80 tokens"),
        ({"n_components": 80}, "n_components=80 is more than the rank of the data, 78"),
        ({"mask": np.zeros(300, dtype=bool)}, "mask removes everything"),
        ({"mask": np.ones(299, dtype=bool)}, r"mask has shape \(299,\)"),
        ({"mask": np.ones(300)}, "300 bools are needed"),
    ],
    ids=str,
)
def test_parameters(runs, options, message):
    with pytest.raises(InputError, match=message):
        GroupICA(**options).fit(runs)


def test_fewer_tokens_than_components(runs):
    with pytest.raises(InputError, match="n_components=20 is more than the data allow: 10 tokens"):
        GroupICA(20).fit(runs[0][:10])


def test_rank_is_named():
    rng = np.random.default_rng(0)
    run = rng.normal(size=(60, 4)) @ rng.laplace(size=(4, 500))
    with pytest.raises(InputError, match="rank of the data, 4: ask for at most 4"):
        GroupICA(10, standardize="center").fit([run])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("space", [None, NeuronSpace((100, 120, 80))])
def test_values_that_are_not_finite_are_named(runs, bad, space):
    runs[1][7, 130] = bad
    where = r"neuron \(layer 1, neuron 30\)" if space else "neuron 130"
    with pytest.raises(InputError, match=rf"run 1 holds {bad} at token 7, {where}"):
        GroupICA(3).fit(runs, space=space)
    with pytest.raises(InputError, match="run 1 holds"):
        GroupICA(3, drop_first=10).fit(runs)  # also where the token is not fitted: it would have a time course
    clean = GroupICA(3).fit(runs[0])
    with pytest.raises(InputError, match="run 0 holds"):
        clean.transform(runs[1])


def test_widths_must_agree(runs):
    with pytest.raises(InputError, match="run 1 has 299 neurons, the runs before it 300"):
        GroupICA(3).fit([runs[0], runs[1][:, :-1]])
    with pytest.raises(InputError, match="run 0 has 300 neurons, the space or mask given 200"):
        GroupICA(3).fit(runs, space=NeuronSpace((100, 100)))


def test_all_constant(runs):
    with pytest.raises(InputError, match="run 1 has no variance"):
        GroupICA(3).fit([runs[0], np.ones((40, 300))])


def test_huge_values_stay_finite(runs):
    runs[0][0, 0] = 1e30
    assert np.isfinite(GroupICA(3, max_iter=500, outliers="clip").fit(runs).components_).all()


@pytest.mark.parametrize("empty", [[], ()])
def test_no_runs(empty):
    with pytest.raises(InputError, match="runs is empty"):
        GroupICA(3).fit(empty)


@pytest.mark.parametrize(
    "item", [np.zeros((3, 4, 5)), np.zeros(7), np.array([["a", "b"]]), np.zeros((0, 5)), np.ones((4, 4), dtype=complex)]
)
def test_what_is_no_run(item):
    with pytest.raises(InputError, match="run 0 has shape"):
        Runs([item])[0]


def test_paths(tmp_path, runs):
    np.save(tmp_path / "run.npy", runs[0])
    reader = Runs(tmp_path / "run.npy")
    np.testing.assert_array_equal(reader[0], runs[0])
    with pytest.raises(FileNotFoundError, match="no such file"):
        Runs(tmp_path / "missing.npy")[0]
    (tmp_path / "run.txt").write_text("1 2 3")
    with pytest.raises(InputError, match=r"must end in .nii, .nii.gz or .npy"):
        Runs(tmp_path / "run.txt")[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_tensors_and_other_dtypes(runs, dtype):
    read = Runs([torch.from_numpy(runs[0]).to(dtype)])[0]
    assert read.dtype == (np.float64 if dtype == torch.float64 else np.float32)
    np.testing.assert_allclose(read, runs[0], rtol=1e-2)


def test_kinds_of_runs_give_the_same_fit(runs, tmp_path):
    space = NeuronSpace((100, 120, 80))

    class Scan:
        def __init__(self, array):
            self.array, self.space, self.name = array, space, "text-0001"

        def data(self):
            return self.array

    expected = GroupICA(3).fit(runs).components_
    fortran = [np.asfortranarray(run) for run in runs]
    for run in fortran:
        run.setflags(write=False)
    for kind in ([Scan(run) for run in runs], [torch.from_numpy(run) for run in runs], np.stack(runs), fortran):
        ica = GroupICA(3).fit(kind)
        np.testing.assert_allclose(ica.components_, expected, atol=1e-4)
    assert GroupICA(3).fit([Scan(run) for run in runs]).space_ == space
    assert Runs([Scan(runs[0])]).name(0) == "run 0 (text-0001)"
    other = Scan(runs[1])
    other.space = NeuronSpace((100, 100, 100))
    with pytest.raises(InputError, match="another neuron space"):
        GroupICA(3).fit([Scan(runs[0]), other])


def test_exported_scan_is_read_back(runs, tmp_path):
    imaging = pytest.importorskip("llmbrain.imaging")
    space = NeuronSpace((100, 120, 80))
    image = imaging.maps_to_nifti(runs[0], space)
    image.to_filename(tmp_path / "run.nii.gz")
    reader = Runs([tmp_path / "run.nii.gz"])
    np.testing.assert_allclose(reader[0], runs[0])
    assert reader.space == space


def test_brain_images(runs):
    shape = (10, 10, 3)
    image = Nifti1Image(runs[0].T.reshape(*shape, 40), np.eye(4))
    mask = Nifti1Image(np.ones(shape, dtype=np.uint8), np.eye(4))
    np.testing.assert_array_equal(Runs(image, mask_img=mask)[0], runs[0])
    empty = Nifti1Image(np.zeros(shape, dtype=np.uint8), np.eye(4))
    with pytest.raises(InputError, match="mask_img removes everything"):
        GroupICA(2, mask=empty).fit(image)
    moved = Nifti1Image(np.ones(shape, dtype=np.uint8), 2 * np.eye(4))
    with pytest.raises(InputError, match="different affines"):
        GroupICA(2, mask=moved).fit(image)
    small = Nifti1Image(np.ones((10, 10, 2), dtype=np.uint8), np.eye(4))
    with pytest.raises(InputError, match=r"shape \(10, 10, 3, 40\): mask_img needs \(10, 10, 2\)"):
        GroupICA(2, mask=small).fit(image)
    with pytest.raises(InputError, match=r"mask|space|header"):
        GroupICA(2).fit(image)  # neither ours nor masked

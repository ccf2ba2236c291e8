"""CIFTI and GIFTI runs, made here; and a null that smooth images are refused."""

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from llmbrain import GroupICA, InputError
from llmbrain.decomposition import SmoothMapsWarning, split_half_reproducibility
from llmbrain.imaging.surface import read_surface
from llmbrain.networks import null_networks
from llmbrain.scanning.inputs import Runs

N, T = 60, 50


def cifti(data, step=0.72, first=0):
    inside = np.zeros(80, dtype=bool)
    inside[first : first + N] = True
    columns = nib.cifti2.BrainModelAxis.from_mask(inside, "CORTEX_LEFT")
    return nib.cifti2.Cifti2Image(data, header=(nib.cifti2.SeriesAxis(0, step, len(data)), columns))


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    maps = rng.laplace(size=(2, N))
    return [(rng.normal(size=(T, 2)) @ maps + rng.normal(size=(T, N))).astype(np.float32) for _ in range(2)]


def test_dense_cifti(data, tmp_path):
    for i, run in enumerate(data):
        cifti(run).to_filename(tmp_path / f"run{i}.dtseries.nii")
    paths = sorted(tmp_path.glob("*.nii"))
    ica = GroupICA(2).fit(paths)
    np.testing.assert_allclose(ica.components_, GroupICA(2).fit(data).components_, atol=1e-4)
    image = ica.components_img()
    np.testing.assert_array_equal(np.asarray(image.dataobj), ica.components_)
    assert image.header.get_axis(1) == cifti(data[0]).header.get_axis(1)
    with pytest.raises(InputError, match="run 1 has other grayordinates"):
        GroupICA(2).fit([cifti(data[0]), cifti(data[1], first=5)])
    with pytest.raises(InputError, match="TR of 2 s"):
        GroupICA(2).fit([cifti(data[0]), cifti(data[1], step=2)])


def test_parcellated_cifti(data):
    parcels = nib.cifti2.ParcelsAxis(
        [f"area {i}" for i in range(N)],
        [np.zeros((0, 3), dtype=int)] * N,
        [{"CIFTI_STRUCTURE_CORTEX_LEFT": np.array([i])} for i in range(N)],
        nvertices={"CIFTI_STRUCTURE_CORTEX_LEFT": N},
    )
    image = nib.cifti2.Cifti2Image(data[0], header=(nib.cifti2.SeriesAxis(0, 1, T), parcels))
    np.testing.assert_array_equal(Runs([image])[0], data[0])


def test_gifti_hemispheres(data, tmp_path):
    def half(values, name):
        arrays = [nib.gifti.GiftiDataArray(row, intent="NIFTI_INTENT_TIME_SERIES") for row in values]
        nib.save(nib.gifti.GiftiImage(darrays=arrays), tmp_path / name)
        return tmp_path / name

    left, right = half(data[0][:, :25], "a.L.func.gii"), half(data[0][:, 25:], "a.R.func.gii")
    np.testing.assert_array_equal(Runs([(left, right)])[0], data[0])
    np.testing.assert_array_equal(Runs(left)[0], data[0][:, :25])
    assert len(GroupICA(2).fit([(left, right)]).components_img().darrays) == 2


def test_a_null_of_strangers_is_refused_where_neighbours_resemble_each_other():
    rng = np.random.default_rng(1)
    shape = (8, 8, 6)
    smooth = [gaussian_filter(rng.normal(size=(*shape, 40)), (1.5, 1.5, 1.5, 0)) for _ in range(2)]
    images = [nib.Nifti1Image(volume, np.eye(4)) for volume in smooth]
    mask = nib.Nifti1Image(np.ones(shape, dtype=np.uint8), np.eye(4))
    with pytest.raises(InputError, match="n_permutations=0"):
        split_half_reproducibility(images, 3, n_splits=1, n_permutations=1, mask=mask)
    assert np.isnan(split_half_reproducibility(images, 3, n_splits=1, n_permutations=0, mask=mask).p).all()
    with pytest.raises(InputError, match="smooth noise would pass"):
        null_networks(images, 3, n_permutations=1, mask=mask, progress=False)
    arrays = [volume.reshape(-1, 40).T for volume in smooth]
    with pytest.warns(SmoothMapsWarning, match="neighbouring columns share"):
        split_half_reproducibility(arrays, 3, n_splits=1, n_permutations=1)


def test_headers_that_say_more_than_there_is(data, tmp_path):
    """Nothing is allocated by the numbers of a header before they are compared with what there is."""
    path = tmp_path / "run.dtseries.nii"
    cifti(data[0]).to_filename(path)
    whole = path.read_bytes()
    for axis in (5, 6):  # of NIfTI-2: volumes, and grayordinates
        at = 16 + 8 * axis
        path.write_bytes(whole[:at] + (2**40).to_bytes(8, "little") + whole[at + 8 :])
        with pytest.raises(InputError, match="its header says"):
            read_surface(path, "run 0")
    for model in (b'IndexCount="60"', b'IndexOffset="0"'):
        assert model in whole
        many = model.split(b'"')[0] + b'"' + b"9" * 12 + b'"'
        start = whole.index(b"<VertexIndices>") + 15  # what is put in is taken out there
        short = whole[:start] + whole[start + len(many) - len(model) :]
        path.write_bytes(short.replace(model, many, 1))
        with pytest.raises(InputError, match=r"places from|the data 60"):
            read_surface(path, "run 0")
    for count, offset, message in (
        (10**12, 0, "the data 60"),
        (-1, 0, "the data"),
        (N, 1, "the data"),
        (N - 1, 0, "altered"),
    ):
        image = cifti(data[0])
        (model,) = image.header.matrix[1].brain_models
        model.index_count, model.index_offset = count, offset
        with pytest.raises(InputError, match=message):
            read_surface(image, "run 0")
    for points in (T - 1, 10**30):
        image = cifti(data[0])
        image.header.matrix[0].number_of_series_points = points
        with pytest.raises(InputError, match=r"axes|altered"):
            read_surface(image, "run 0")


def test_arrays_of_a_gifti_that_contradict_themselves(data, tmp_path):
    path = tmp_path / "run.func.gii"
    arrays = [nib.gifti.GiftiDataArray(row, meta={"TimeStep": "inf"}) for row in data[0][:5]]
    nib.save(nib.gifti.GiftiImage(darrays=arrays), path)
    assert read_surface(path, "run 0")[1].t_r is None  # no time that could be
    path.write_bytes(path.read_bytes().replace(b'Dimensionality="1"', b'Dimensionality="3"', 1))
    with pytest.raises(InputError, match=r"run 0 is not .*AssertionError"):
        read_surface(path, "run 0")

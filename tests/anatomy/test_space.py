"""Geometry: every neuron has one voxel, and comes back from it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmbrain import InputError, NeuronSpace
from llmbrain.anatomy.space import grid_of

WIDTHS = st.lists(st.integers(0, 70), min_size=1, max_size=6).filter(lambda w: max(w) > 0)


@given(WIDTHS, st.lists(st.integers(1, 3), max_size=2), st.integers(0, 2**32 - 1))
def test_volume_round_trip_is_exact(widths, leading, seed):
    space = NeuronSpace(widths)
    values = np.random.default_rng(seed).normal(size=(*leading, space.n_neurons)).astype(np.float32)
    volume = space.to_volume(values, fill=np.nan)
    assert volume.shape == (*space.shape, *leading)
    np.testing.assert_array_equal(space.from_volume(volume), values)
    assert np.isnan(volume[~space.mask]).all()
    assert space.mask.sum() == space.n_neurons


@given(WIDTHS)
def test_index_and_locate_are_inverse(widths):
    space = NeuronSpace(widths)
    flat = np.arange(space.n_neurons)
    layer, neuron = space.locate(flat)
    np.testing.assert_array_equal(space.index(layer, neuron), flat)
    assert all(space.index(*space.locate(int(i))) == i for i in flat[:5])
    assert [space.layer_slice(i).stop - space.layer_slice(i).start for i in range(len(widths))] == list(widths)


@pytest.mark.parametrize(
    ("width", "grid"), [(11008, (86, 128)), (14336, (112, 128)), (53248, (208, 256)), (256, (16, 16)), (1, (1, 1))]
)
def test_divisor_pairs_leave_no_padding(width, grid):
    assert grid_of(width) == grid
    assert NeuronSpace([width] * 2).mask.all()


def test_flat_divisor_pairs_are_padded_instead():
    assert grid_of(172) == (13, 14)  # 4 x 43 would be a ribbon
    assert grid_of(10007) == (100, 101)  # prime


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda s: s.index(2, 0), "layer=2"),
        (lambda s: s.index(-1, 0), "layer=-1"),
        (lambda s: s.index(0, 6), "neuron=6 does not exist in layer 0"),
        (lambda s: s.index([0, 1], [0, 4]), "neuron=4 does not exist in layer 1"),
        (lambda s: s.locate(10), "flat index=10"),
        (lambda s: s.locate(0.5), "whole number"),
        (lambda s: s.to_volume(np.zeros(9)), "10 neurons"),
        (lambda s: s.from_volume(np.zeros((2, 3, 1))), "must be"),
        (lambda s: NeuronSpace([]), "widths"),
        (lambda s: NeuronSpace([2.5]), "widths"),
        (lambda s: NeuronSpace(3), "widths"),
    ],
)
def test_what_does_not_exist_is_named(call, named):
    with pytest.raises(InputError, match=named.replace("(", r"\(")):
        call(NeuronSpace([6, 4]))


def test_mask_image_and_record():
    space = NeuronSpace([6, 4])
    mask = space.mask_img()
    assert mask.shape == space.shape
    assert int(np.asarray(mask.dataobj).sum()) == 10
    assert NeuronSpace.from_dict(space.to_dict()) == space
    with pytest.raises(InputError, match="grid"):
        NeuronSpace.from_dict({"widths": [6, 4], "grid": [3, 2]})

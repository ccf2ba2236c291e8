"""Networks hold the neurons that their z maps say, and come back from disk to the bit."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import zscore

from llmbrain import FunctionalNetworks, InputError, NeuronSpace

SPACE = NeuronSpace([30, 50, 20])


@pytest.fixture
def maps():
    return np.random.default_rng(0).laplace(3, 2, size=(4, 100)) * np.array([[1], [10], [0.01], [1e6]])


@pytest.fixture
def networks(maps):
    courses = [np.random.default_rng(i).normal(size=(n, 4)).astype(np.float32) for i, n in enumerate((7, 12))]
    return FunctionalNetworks(maps, SPACE, threshold=1.5, time_courses=courses)


def test_masks_are_z_over_neurons(maps, networks):
    z = zscore(maps, axis=1)
    np.testing.assert_allclose(networks.maps, z, atol=1e-5)
    np.testing.assert_array_equal(networks.masks, np.abs(z) > 1.5)
    assert networks.maps.dtype == np.float32
    assert networks.sizes.tolist() == [n.size for n in networks] == (np.abs(z) > 1.5).sum(axis=1).tolist()


def test_key_neurons_by_strength(maps, networks):
    frame = networks.key_neurons(1)
    flat = SPACE.index(frame.layer.to_numpy(), frame.neuron.to_numpy())
    assert set(flat) == set(np.flatnonzero(networks.masks[1]))
    assert (np.diff(np.abs(frame.z)) <= 0).all()
    np.testing.assert_allclose(frame.z, zscore(maps[1])[flat], atol=1e-5)
    whole = networks.to_frame()
    assert list(whole.columns) == ["network", "layer", "neuron", "z"]
    assert whole.network.value_counts().sort_index().tolist() == networks.sizes.tolist()


def test_overlap_by_hand():
    maps = np.zeros((3, 10))
    maps[0, [0, 1, 2]] = maps[1, [1, 2, 3, 4]] = 9
    networks = FunctionalNetworks(maps, threshold=5, standardize=False)
    dice, iou = networks.overlap(), networks.overlap("iou")
    assert dice[0, 1] == pytest.approx(4 / 7)
    assert iou[0, 1] == pytest.approx(2 / 5)
    assert dice[0, 0] == iou[1, 1] == 1
    assert dice[0, 2] == 0
    assert np.isnan(dice[2, 2])


@pytest.mark.parametrize("poles", ["positive", "negative", "split"])
def test_poles(maps, networks, poles):
    one = FunctionalNetworks(maps, SPACE, threshold=1.5, poles=poles, time_courses=networks.time_courses)
    z = zscore(maps, axis=1)
    sides = {"positive": [z > 1.5], "negative": [z < -1.5], "split": [z > 1.5, z < -1.5]}[poles]
    np.testing.assert_array_equal(one.masks, np.stack(sides, axis=1).reshape(-1, 100))
    if poles == "split":
        assert one.names[:4] == ["IC00+", "IC00-", "IC01+", "IC01-"]
        np.testing.assert_array_equal(one.time_courses[1][:, 3], networks.time_courses[1][:, 1])


def test_summary_and_layers(networks):
    frame, profile = networks.summary(), networks.layer_profile()
    assert frame["size"].tolist() == profile.sum(axis=1).tolist() == networks.sizes.tolist()
    assert (frame.positive + frame.negative == frame["size"]).all()
    np.testing.assert_array_equal(profile[1], networks.masks[:, 30:80].sum(axis=1))
    np.testing.assert_array_equal(frame.peak_layer, profile.to_numpy().argmax(axis=1))


def test_subset_index_and_names(networks):
    two = networks.subset([2, "IC00"])
    np.testing.assert_array_equal(two.masks, networks.masks[[2, 0]])
    np.testing.assert_array_equal(two.time_courses[0], networks.time_courses[0][:, [2, 0]])
    assert networks["IC03"].index == networks[-1].index == 3
    for wrong in (4, "IC9", 1.0):
        with pytest.raises(InputError, match=r"IC9|does not exist"):
            networks[wrong]


def test_from_ica_of_anything_fitted(maps):
    ica = SimpleNamespace(components_=maps, mixing_=[np.ones((5, 4))], space_=SPACE, converged_=np.True_, n_iter_=12)
    networks = FunctionalNetworks.from_ica(ica, threshold=2)
    assert networks.space == SPACE
    assert networks.provenance == {"estimator": "SimpleNamespace", "n_components": 4, "n_iter": 12, "converged": True}
    assert networks.time_courses[0].shape == (5, 4)
    with pytest.raises(InputError, match="fit it first"):
        FunctionalNetworks.from_ica(SimpleNamespace())


def test_without_space(maps):
    networks = FunctionalNetworks(maps, threshold=1.5)
    assert list(networks.key_neurons(0).columns) == ["neuron", "z"]
    assert "layers" not in networks.summary()
    with pytest.raises(InputError, match="space=NeuronSpace"):
        networks.layer_profile()


@pytest.mark.parametrize("space", [SPACE, None])
def test_round_trip_is_exact(tmp_path, maps, networks, space):
    networks = FunctionalNetworks(
        maps, space, threshold=1.5, poles="split", time_courses=networks.time_courses, provenance={"text": "Zürich"}
    )
    networks.save(tmp_path / "net")
    back = FunctionalNetworks.load(tmp_path / "net")
    for name in ("maps", "cutoffs", "masks"):
        np.testing.assert_array_equal(getattr(back, name), getattr(networks, name))
    for a, b in zip(back.time_courses, networks.time_courses, strict=True):
        np.testing.assert_array_equal(a, b)
    assert (back.space, back.names, back.provenance) == (networks.space, networks.names, networks.provenance)
    with pytest.raises(FileExistsError, match="already holds networks"):
        networks.save(tmp_path / "net")
    networks.subset([0]).save(tmp_path / "net", overwrite=True)
    assert len(FunctionalNetworks.load(tmp_path / "net")) == 1


def test_files_people_open(tmp_path, networks):
    import nibabel
    import pandas as pd

    networks.save(tmp_path)
    volume = np.asarray(nibabel.load(tmp_path / "desc-ICA_stat-z_components.nii.gz").dataobj)
    np.testing.assert_array_equal(SPACE.from_volume(volume), networks.maps)
    mixing = pd.read_csv(tmp_path / "mixing.tsv", sep="\t")
    assert mixing.shape == (19, 6)
    np.testing.assert_allclose(mixing.loc[mixing.run == 1, networks.names], networks.time_courses[1], rtol=1e-5)
    assert len(pd.read_csv(tmp_path / "key_neurons.tsv", sep="\t")) == networks.sizes.sum()


def test_overwriting_leaves_nothing_of_the_old_set(tmp_path, maps, networks):
    networks.save(tmp_path)
    (tmp_path / "mine.txt").write_text("mine")
    FunctionalNetworks(maps[:1], threshold=1.5).save(tmp_path, overwrite=True)  # no space, no time courses
    left = {p.name for p in tmp_path.iterdir() if not p.name.startswith(".")}
    assert left == {"networks.json", "networks.safetensors", "key_neurons.tsv", "SHA256SUMS", "mine.txt"}
    assert len(FunctionalNetworks.load(tmp_path)) == 1


def test_a_save_that_fails_leaves_the_old_set(tmp_path, maps, networks, monkeypatch):
    networks.save(tmp_path)

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llmbrain.networks.storage.write_json", full)
    with pytest.raises(InputError, match="what stood there is unchanged"):
        FunctionalNetworks(maps[:1]).save(tmp_path, overwrite=True)
    np.testing.assert_array_equal(FunctionalNetworks.load(tmp_path).maps, networks.maps)
    assert (tmp_path / "mixing.tsv").is_file()


def test_damaged_folder_is_named(tmp_path, maps):
    with pytest.raises(FileNotFoundError, match=r"networks\.json is missing"):
        FunctionalNetworks.load(tmp_path)
    FunctionalNetworks(maps).save(tmp_path)
    (tmp_path / "networks.safetensors").write_bytes(b"gone")
    with pytest.raises(InputError, match=r"networks\.safetensors does not match .*Save the networks again"):
        FunctionalNetworks.load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"names": ["a"]},
        {"names": [1, 2, 3, 4]},
        {"poles": "both"},
        {"space": {"widths": [1e300]}},
        {"space": {"widths": [99]}},
        {"space": {}},
        {"space": 3},
        {"n_runs": 7},
        {"n_runs": 1e300},
        {"n_runs": None},
        {"provenance": [1]},
    ],
    ids=str,
)
def test_a_record_of_other_networks_is_refused(tmp_path, networks, change):
    networks.save(tmp_path)
    record = json.loads((tmp_path / "networks.json").read_text()) | change
    (tmp_path / "networks.json").write_text(json.dumps(record))
    (tmp_path / "SHA256SUMS").unlink()  # of an older version, say
    with pytest.raises(InputError, match="is damaged"):
        FunctionalNetworks.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"maps": np.full((2, 100), np.nan)}, "nan or inf in networks"),
        ({"maps": np.ones((2, 99))}, "maps cover 99 neurons"),
        ({"maps": np.ones((2, 3, 4))}, "real numbers"),
        ({"threshold": -1}, "threshold=-1"),
        ({"threshold": np.ones((2, 2))}, "one number, or rows"),
        ({"poles": "north"}, "poles='north'"),
        ({"names": ["a"]}, "names has 1"),
        ({"time_courses": np.ones((5, 3))}, "time_courses"),
    ],
)
def test_bad_input(maps, change, message):
    with pytest.raises(InputError, match=message):
        FunctionalNetworks(**{"maps": maps, "space": SPACE, **change})


def test_constant_map_is_an_empty_network():
    assert FunctionalNetworks(np.full((1, 100), 0.1), SPACE, threshold=0.5).sizes.tolist() == [0]

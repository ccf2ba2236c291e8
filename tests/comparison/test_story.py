"""The whole comparison, from files to tables."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

import llmbrain as lb
from llmbrain import InputError
from llmbrain.brains import prepare, word_regressor
from llmbrain.comparison import compare
from llmbrain.comparison.structure import compare_structure, sparsity, spectral_slope
from llmbrain.datasets import fetch_alice
from llmbrain.datasets.fmri_phantom import make_paired_phantom

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # said and tested where words and brains are read


def test_phantom_from_files_to_tables(tmp_path):
    phantom = make_paired_phantom(
        n_networks=4, n_regions=5, n_pairs=2, n_subjects=4, n_volumes=200, tr=1.5, n_neurons=40
    )
    phantom.words.to_csv(tmp_path / "words.tsv", sep="\t", index=False)
    (tmp_path / "brains").mkdir()
    for name, series in zip(phantom.fmri.subjects, phantom.fmri.data):
        np.save(tmp_path / "brains" / f"{name}.npy", series)
    result = compare(
        phantom.scan, tmp_path / "brains", tmp_path / "words.tsv", tr=1.5, series=phantom.time_courses,
        encoding=False, drop=5, out=tmp_path / "out",
    )  # fmt: skip
    found = {(f"network{k}", f"region{r}") for k, r, _ in phantom.pairs}
    table = pd.read_csv(tmp_path / "out/coupling.tsv", sep="\t")
    assert set(zip(*table[table["significant"]][["network", "region"]].to_numpy().T)) == found
    report = json.loads((tmp_path / "out/comparison.json").read_text())
    assert report["words"]["used"] == result.report["words"]["used"] > 500
    assert report["n_volumes"] == 195
    assert report["controls"] == ["word rate", "position"]
    assert report["controls_missing"] == ["log frequency", "sound power"]
    assert {p.stem for p in (tmp_path / "out").glob("*.tsv")} == set(result.tables)
    page = lb.report(result, title="a <phantom>").html()
    assert "a &lt;phantom&gt;" in page
    assert "2 of 20 pairs" in " ".join(result.findings())
    assert all(line[:40] in page for line in result.findings())


def test_a_study_of_other_texts_is_refused_and_a_wrong_offset_is_said():
    phantom = make_paired_phantom(n_networks=3, n_regions=4, n_pairs=0, n_volumes=200, n_neurons=20)
    rate = prepare(word_regressor(phantom.words, 2.0, 200), 2.0)
    noise = np.random.default_rng(0).normal(size=(200, 4))
    brain = replace(phantom.fmri, data=(rate + 0.5 * noise)[None])
    settings = {"tr": 2.0, "series": phantom.time_courses, "encoding": False, "n_permutations": 99}
    right = compare(phantom.scan, brain, phantom.words, **settings)
    wrong = compare(phantom.scan, brain, phantom.words, offset=4.0, **settings)
    assert not [line for line in right.report["cautions"] if "right?" in line]
    assert [line for line in wrong.report["cautions"] if "4 s later: is offset=4 s right?" in line]
    assert [line for line in right.report["cautions"] if line.startswith("one subject")]
    other = phantom.words.assign(word=[f"q{i}zz" for i in range(len(phantom.words))])
    with pytest.raises(InputError, match="no run reads this story"):
        compare([phantom.scan, phantom.scan], brain, other, **settings)


@pytest.mark.slow
def test_known_answers_on_alice(shared_data, tmp_path):
    alice = fetch_alice(shared_data / "fmri/alice", download=False)
    result = compare(
        shared_data / "models/stories260K", alice["fmri"], alice["annotations"], tr=alice["tr"], offset=alice["offset"],
        regions=alice["regions"], controls={"sound power": np.loadtxt(alice["sound_power"])}, n_components=6,
        encoding=False, out=tmp_path,
    )  # fmt: skip
    controls = result.tables["controls"]
    assert controls[controls["network"] == "word rate"]["significant"].sum() == 6
    assert not result.tables["mirrored"]["significant"].any()
    assert result.report["excluded"] == {"s33": "all zeros"}
    assert result.report["controls"] == ["word rate", "position", "log frequency", "sound power"]
    assert len(result.tables["coupling"]) == 36


def test_alice_files_are_checked(shared_data, tmp_path):
    alice = fetch_alice(shared_data / "fmri/alice", download=False)
    assert alice["regions"][0] == "LATL"
    with pytest.raises(FileNotFoundError, match="files of Alice are missing"):
        fetch_alice(tmp_path, download=False)
    copied = tmp_path / "copy"
    for source in (shared_data / "fmri/alice").rglob("*"):
        if source.is_file():
            target = copied / source.relative_to(shared_data / "fmri/alice")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    (copied / "ds002322_annotations.tsv").write_text("changed")
    with pytest.raises(InputError, match="SHA-256 differs"):
        fetch_alice(copied, download=False)


def test_bad_comparisons():
    phantom = make_paired_phantom(n_volumes=100, n_neurons=20)
    with pytest.raises(InputError, match="milliseconds"):
        compare(phantom.scan, phantom.fmri, phantom.words, tr=2000)
    with pytest.raises(InputError, match=r"controls\['sound'\] has 3 values for 100 volumes"):
        compare(phantom.scan, phantom.fmri, phantom.words, tr=2.0, controls={"sound": [1, 2, 3]})
    with pytest.raises(InputError, match="pass a Scan"):
        compare(3, phantom.fmri, phantom.words, tr=2.0)
    with pytest.raises(InputError, match="needs a model"):
        compare(phantom.scan, phantom.fmri, phantom.words, tr=2.0, series=phantom.time_courses, untrained=True,
                encoding=False)  # fmt: skip


# -- structure ---------------------------------------------------------------------------------------------------------


def test_structure_at_equal_size_and_density():
    rng = np.random.default_rng(0)
    modules = np.repeat(rng.normal(size=(300, 4)), 5, axis=1) + 0.8 * rng.normal(size=(300, 20))
    noise = rng.normal(size=(150, 26))
    table = compare_structure(modules, noise, densities=[0.2], n_permutations=10, n_samples=3, n_seeds=5)
    assert (table["n_nodes"] == 20).all()
    q = table[table["measure"] == "modularity"].set_index("side")["normalized"]
    assert q["a"] > 1.3 * q["b"]
    with pytest.raises(InputError, match="at least 10"):
        compare_structure(modules[:, :5], noise)


def test_sparsity_and_slopes_have_their_closed_forms():
    maps = np.zeros((2, 100))
    maps[0, 3] = 2.0
    maps[1] = np.tile([1.0, -1.0], 50)
    table = sparsity(maps)
    np.testing.assert_allclose(table["hoyer"], [1.0, 0.0], atol=1e-12)
    np.testing.assert_allclose(table["share"], [0.01, 0.0])
    rng = np.random.default_rng(0)
    white = rng.normal(size=(20000, 3))
    np.testing.assert_allclose(spectral_slope(white), 0.0, atol=0.1)
    np.testing.assert_allclose(spectral_slope(np.cumsum(white, axis=0)), 2.0, atol=0.25)


def test_public_names_are_what_they_say():
    """A module of the same name must not come instead of a function, whatever was imported before."""
    import llmbrain.comparison as room

    for name in room.__all__:
        assert callable(getattr(room, name)), name
    import llmbrain as lb

    for name in set(lb.__all__) - {"__version__", *lb.ROOMS}:
        assert callable(getattr(lb, name)), name

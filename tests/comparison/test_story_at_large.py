"""A story as people scan it: music before the first word, a parcellation, words without a header."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from llmbrain import InputError
from llmbrain.brains import FMRI, load_fmri, word_regressor
from llmbrain.brains.series import standardize
from llmbrain.comparison import compare, noise_ceilings
from llmbrain.datasets.fmri_phantom import ar_noise, make_paired_phantom

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
TR, N_VOLUMES, MUSIC = 1.5, 300, 15.0


def make_words(seed=0, last=400.0):
    """Phrases and pauses, from 15 s on."""
    rng = np.random.default_rng(seed)
    at, rows = MUSIC, []
    while at < last:
        for _ in range(rng.integers(5, 20)):
            word = "".join(rng.choice(list("bdfgklmnprst"), 2)) + str(rng.choice(list("aeiou"))) + str(len(rows))
            length = rng.uniform(0.15, 0.5)
            rows.append((word, round(at, 3), round(at + length, 3)))
            at += length
        at += rng.gamma(2.0, 0.4)
    return pd.DataFrame(rows, columns=["word", "onset", "offset"])


def make_people(words, n_subjects, n_regions, n_follow, n_evoked, seed=1, strength=0.5, ar=0.6):
    """The first regions follow the word rate; the next ones the story as a whole and the music before it."""
    rng = np.random.default_rng(seed)
    rate = standardize(word_regressor(words, TR, N_VOLUMES))
    ticks = {}
    for name, first, last in (("music", 0.0, MUSIC), ("story", MUSIC, words["offset"].max())):
        at = np.arange(first, last, 0.25)
        ticks[name] = standardize(word_regressor(pd.DataFrame({"word": "x", "onset": at, "offset": at}), TR, N_VOLUMES))
    people = ar_noise(rng, (n_subjects, N_VOLUMES, n_regions), ar)
    people[..., :n_follow] += strength * rate
    evoked = slice(n_follow, n_follow + n_evoked)
    people[..., evoked] += ticks["story"] + 0.7 * ticks["music"]
    people[..., :n_follow] += ticks["story"]
    return 100 + 5 * people


@pytest.fixture(scope="module")
def story():
    return make_words()


@pytest.fixture(scope="module")
def model(story):
    """A scan of these words by a model that has nothing to do with the brains."""
    phantom = make_paired_phantom(n_networks=3, n_neurons=20, n_volumes=100)
    rng = np.random.default_rng(5)
    text = " ".join(story["word"])
    ends = np.cumsum(story["word"].str.len().to_numpy() + 1)
    spans = np.column_stack([np.concatenate([[0], ends[:-1]]), ends - 1])
    from llmbrain import NeuronSpace
    from llmbrain.scanning import Scan
    from llmbrain.scanning.scans import ArraySignals

    data = rng.normal(size=(len(story), 20)).astype(np.float32)
    scan = Scan({"neuron": ArraySignals(data, NeuronSpace([20]))}, text=text, tokens=list(story["word"]), offsets=spans)
    return scan, ar_noise(rng, (len(story), phantom.time_courses.shape[1]), 0.8)


def run(model, brain, words, **options):
    scan, series = model
    return compare(scan, brain, words, series=series, encoding=False, **{"tr": TR, "n_permutations": 99} | options)


def rates(result):
    controls = result.tables["controls"]
    rate = controls[(controls["network"] == "word rate") & controls["significant"]]
    return set(rate["region"]), int(result.tables["mirrored"]["significant"].sum())


def test_music_before_the_story_is_no_story(tmp_path, story, model):
    story[["onset", "offset", "word"]].to_csv(tmp_path / "words.tsv", sep="\t", header=False, index=False)
    people = make_people(story, 10, 40, 6, 8)
    np.save(tmp_path / "people.npy", people)
    result = run(model, tmp_path / "people.npy", tmp_path / "words.tsv")
    found, mirrored = rates(result)
    assert {f"region{i}" for i in range(6)} <= found
    assert len(found) <= 8
    assert mirrored == 0
    assert result.report["left_out"].startswith("the first 21 and the last ")
    assert result.report["n_volumes"] < N_VOLUMES - 21
    assert not [line for line in result.report["cautions"] if "right?" in line]
    everything = run(model, tmp_path / "people.npy", tmp_path / "words.tsv", window="all")
    assert everything.report["n_volumes"] == N_VOLUMES
    assert rates(everything)[1] >= 3  # the beginning and the end of the story are symmetric
    with pytest.raises(InputError, match="window='some'"):
        run(model, tmp_path / "people.npy", tmp_path / "words.tsv", window="some")


def test_a_scan_of_the_story_alone_is_used_whole():
    phantom = make_paired_phantom(n_networks=3, n_regions=4, n_volumes=120, n_neurons=20)
    result = compare(phantom.scan, phantom.fmri, phantom.words, tr=2.0, series=phantom.time_courses, encoding=False,
                     n_permutations=19)  # fmt: skip
    assert result.report["left_out"] == ""
    assert result.report["n_volumes"] == 120


def brain_of(people):
    return FMRI(people, [f"s{i}" for i in range(len(people))], [f"region{i}" for i in range(people.shape[2])])


def test_a_wrong_offset_is_said_on_a_parcellation(story, model):
    brain = brain_of(make_people(story, 8, 120, 6, 0, strength=0.7))
    for offset, said in ((0.0, False), (12.0, True), (-9.0, True)):
        lines = [line for line in run(model, brain, story, offset=offset).report["cautions"] if "right?" in line]
        assert bool(lines) is said, (offset, lines)
        assert all(f"is offset={offset:g} s right?" in line for line in lines)


def test_a_wrong_repetition_time_is_said_and_turns_nothing(tmp_path, story, model):
    people = make_people(story, 8, 293, 12, 0, strength=0.7)
    np.save(tmp_path / "people.npy", people)
    brain = load_fmri(tmp_path / "people.npy", tr=2.0, expected=story["offset"].max() / 2.0)
    assert (brain.n_volumes, len(brain.regions)) == (N_VOLUMES, 293)
    np.save(tmp_path / "turned.npy", people.transpose(0, 2, 1))
    assert load_fmri(tmp_path / "turned.npy", tr=2.0, expected=story["offset"].max() / 2.0).n_volumes == N_VOLUMES
    result = run(model, replace(brain, data=people[..., :60], regions=brain.regions[:60]), story, tr=2.0)
    assert [line for line in result.report["cautions"] if "better with a repetition time of 1.5 s" in line]


def test_dead_parcels_are_one_line(story, model):
    people = make_people(story, 4, 30, 3, 0)
    people[:, :, 20:28] = np.nan
    people[0, :, 28] = np.nan
    import warnings

    brain = brain_of(people)
    brain.dead = {f"s{i}": [f"region{k}" for k in range(20, 29 if i == 0 else 28)] for i in range(4)}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        result = run(model, brain, story)
    assert not [w for w in said if "constant" in str(w.message)]
    lines = [line for line in result.report["cautions"] if "dead" in line]
    assert len(lines) == 1
    assert "33 dead series in 4 of 4 subjects" in lines[0]
    assert "8 of them in everybody" in lines[0]


@pytest.mark.parametrize(("n_subjects", "k"), [(3, 3), (5, 2.5), (4, 2)])
def test_reliability_is_of_the_whole_group(n_subjects, k):
    rng = np.random.default_rng(0)
    people = rng.normal(size=(1, 40000, 1)) + 1.5 * rng.normal(size=(n_subjects, 40000, 1))
    found = noise_ceilings(people, n_splits=30).iloc[0]
    true = 1 / (1 + 1.5**2 / n_subjects)  # signal over signal and noise of the mean
    assert found["reliability"] == pytest.approx(true, abs=0.01)
    assert found["reliability"] == pytest.approx(k * found["split_half"] / (1 + (k - 1) * found["split_half"]))
    if n_subjects == 3:
        assert true == pytest.approx(0.571, abs=1e-3)


def test_regions_are_chosen_by_some_listeners_and_compared_in_the_others(story, model):
    people = make_people(story, 8, 40, 4, 0, strength=2.0)
    result = run(model, brain_of(people), story, isc=0.2)
    assert result.report["n_subjects"] == 4
    assert result.brain.subjects == ["s1", "s3", "s5", "s7"]
    assert {f"region{i}" for i in range(4)} <= set(result.coupling.regions)
    assert len(result.coupling.regions) < 12
    assert result.report["settings"]["isc"] == 0.2
    with pytest.raises(InputError, match=r"isc=0\.99: no region reaches it in the 4 listeners"):
        run(model, brain_of(people), story, isc=0.99)
    with pytest.raises(InputError, match="isc: 3 subjects are too few"):
        run(model, brain_of(people[:3]), story, isc=0.1)


def test_places_of_regions_are_in_the_tables(tmp_path, story, model):
    import nibabel as nib

    labels = np.zeros((4, 3, 2), dtype=np.int16)
    labels[0], labels[1], labels[2, 0] = 1, 2, 5
    nib.Nifti1Image(labels, np.diag([5.0, 5, 5, 1])).to_filename(tmp_path / "x_dseg.nii.gz")
    (tmp_path / "x_dseg.tsv").write_text("index\tname\n1\tSTG\n2\tIFG\n5\tMTG\n")
    np.save(tmp_path / "people.npy", make_people(story, 3, 3, 1, 0))
    found = run(model, tmp_path / "people.npy", story, atlas=tmp_path / "x_dseg.nii.gz", rois=["MTG", "STG"])
    assert found.coupling.regions == ["STG", "MTG"]
    assert found.tables["regions"].x_mm.tolist() == [0, 10]
    row = found.tables["coupling"].set_index("region").loc["MTG"].iloc[0]
    assert row[["x_mm", "y_mm", "z_mm"]].tolist() == [10, 0, 2.5]
    found.save(tmp_path / "out")
    assert (tmp_path / "out/regions.tsv").read_text().startswith("region\tx_mm\ty_mm\tz_mm\nSTG\t0\t5\t2.5\n")

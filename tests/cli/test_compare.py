"""``llmbrain compare`` as a person types it, on data sets of several shapes."""

from __future__ import annotations

import json
import re

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from cli_calls import call as call_command
from tiny_models import tiny, tiny_tokenizer

from llmbrain.brains import load_words, word_regressor
from llmbrain.brains.tables import load_controls
from llmbrain.checkpoints import load_model
from llmbrain.cli.compare import parse_columns
from llmbrain.datasets.fmri_phantom import ar_noise
from llmbrain.decomposition import GroupICA
from llmbrain.networks import FunctionalNetworks
from llmbrain.scanning import load_scans, scan

pytestmark = pytest.mark.filterwarnings("ignore::llmbrain.hooks.text.ScanWarning")

TR, N_VOLUMES, OFFSET = 1.5, 190, 6.0
FAST = ("--components", 4, "--n-null", 40, "--no-encoding")


@pytest.fixture(scope="module")
def story():
    """Words of a story: bursts and pauses, so that the word rate goes up and down."""
    rng = np.random.default_rng(0)
    onset, rows = OFFSET, []
    for i in range(520):
        word = "".join(rng.choice(list("abcdeghinorstu"), rng.integers(2, 7)))
        length = 0.06 * len(word)
        rows.append((word, round(onset, 3), round(onset + length, 3)))
        onset += length + (rng.gamma(2.0, 1.5) if i % 12 == 11 else 0.02)
    return pd.DataFrame(rows, columns=["word", "onset", "offset"])


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny("llama", seed=3, intermediate_size=40, max_position_embeddings=64).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def listeners(story):
    """Three people with 68 regions of which the first 20 follow the word rate: ``(3, volumes, 68)``."""
    rate = word_regressor(story, TR, N_VOLUMES, offset=OFFSET)[:, 0]
    rng = np.random.default_rng(1)
    noise = ar_noise(rng, (3, N_VOLUMES, 68), 0.4)
    noise[..., :20] += 1.5 * ((rate - rate.mean()) / rate.std())[None, :, None]
    return 100 + noise


def call(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    return call_command(monkeypatch, capsys, "compare", *arguments)


def write_words(kind, story, folder):
    """The word table in one of the shapes that people have; options that it needs."""
    if kind == "csv":
        path = folder / "align.csv"
        story.rename(columns={"word": "text", "onset": "start", "offset": "end"}).to_csv(path, index=False)
    elif kind == "events":
        path = folder / "task-story_events.tsv"
        events = pd.DataFrame({"onset": story.onset, "duration": story.offset - story.onset, "trial_type": story.word})
        events.to_csv(path, sep="\t", index=False)
    elif kind == "numbered":
        path = folder / "words.txt"
        story[["onset", "offset", "word"]].to_csv(path, sep="\t", header=False, index=False)
        return path, ["--columns", "onset=0,offset=1,word=2"]
    else:
        path = folder / "story.TextGrid"
        rows, last = [], 0.0
        for word, start, stop in story.itertuples(index=False):
            if start > last:
                rows.append((last, start, ""))
            rows.append((start, stop, word))
            last = stop
        lines = ['File type = "ooTextFile"', 'Object class = "TextGrid"', "", "xmin = 0", f"xmax = {last}",
                 "tiers? <exists>", "size = 1", "item []:", "    item [1]:", '        class = "IntervalTier"',
                 '        name = "words"', "        xmin = 0", f"        xmax = {last}",
                 f"        intervals: size = {len(rows)}"]  # fmt: skip
        for i, (start, stop, word) in enumerate(rows, 1):
            lines += [f"        intervals [{i}]:", f"            xmin = {start}", f"            xmax = {stop}",
                      f'            text = "{word}"']  # fmt: skip
        path.write_text("\n".join(lines))
    return path, []


def write_brains(kind, people, folder):
    """The listeners in one of the shapes that people have."""
    names = [f"L_parcel{i}" for i in range(people.shape[2])]
    root = folder / "brains"
    root.mkdir()
    if kind == "bids":
        for i, values in enumerate(people, 1):
            func = root / f"sub-{i:02d}" / "func"
            func.mkdir(parents=True)
            table = pd.DataFrame(values, columns=names)
            table.to_csv(func / f"sub-{i:02d}_task-x_timeseries.tsv", sep="\t", index=False)
            confounds = pd.DataFrame(np.random.default_rng(i).normal(size=(len(values), 6)))
            confounds.to_csv(func / f"sub-{i:02d}_task-x_desc-confounds_timeseries.tsv", sep="\t", index=False)
        (root / "participants.tsv").write_text("participant_id\tage\nsub-01\t30\n")
    elif kind == "regions-first":
        for i, values in enumerate(people):
            np.save(root / f"p{i}_schaefer.npy", values.T)
    elif kind == "indexed csv":
        for i, values in enumerate(people):
            pd.DataFrame(values).to_csv(root / f"subj{i}.csv")
    elif kind == "named rows":
        for i, values in enumerate(people):
            pd.DataFrame(values.T, index=names).to_csv(root / f"subj{i}.csv")
    elif kind == "npz of subjects":
        np.savez(root / "all.npz", **{f"sub-{i}": values for i, values in enumerate(people)}, labels=names, tr=TR)
        return root / "all.npz"
    elif kind == "cube":
        np.save(root / "cube.npy", people)
        return root / "cube.npy"
    elif kind == "one file":
        np.savetxt(root / "group.txt", people.mean(axis=0))
        return root / "group.txt"
    return root


@pytest.mark.parametrize(
    ("brains", "words"),
    [
        ("bids", "events"), ("regions-first", "csv"), ("indexed csv", "numbered"), ("named rows", "textgrid"),
        ("npz of subjects", "csv"), ("cube", "events"), ("one file", "textgrid"),
    ],
)  # fmt: skip
def test_other_data_needs_no_code(monkeypatch, capsys, tmp_path, model_folder, story, listeners, brains, words):
    path = write_brains(brains, listeners, tmp_path)
    table, options = write_words(words, story, tmp_path)
    code, printed, err = call(monkeypatch, capsys, model_folder, "--fmri", path, "--words", table, "--tr", TR,
                              "--offset", OFFSET, "--out", tmp_path / "out", *options, *FAST)  # fmt: skip
    assert code == 0, err
    n = 1 if brains == "one file" else 3
    assert f"{n} subjects, {N_VOLUMES} volumes, 68 regions; 4 networks" in printed
    controls = pd.read_csv(tmp_path / "out/controls.tsv", sep="\t")
    rate = controls[(controls["network"] == "word rate") & controls["significant"]]["region"]
    found = {int(re.sub(r"\D", "", str(region))) for region in rate}
    assert set(range(20)) <= found  # the planted 20, whatever their names
    assert len(found) <= 24
    assert not pd.read_csv(tmp_path / "out/mirrored.tsv", sep="\t")["significant"].any()
    if brains == "regions-first":
        assert "68 rows are regions" in err
    if brains == "bids":
        assert set(controls["region"]) == {f"L_parcel{i}" for i in range(68)}
        assert "confounds" not in err
    page = (tmp_path / "out/report.html").read_text()
    assert page.index("Summary") < page.index("Coupling") < page.index("Methods") < page.index("Provenance")
    assert not re.search(r"(src|href)=[\"']https?:", page)
    assert (tmp_path / "out/figure-coupling.png").stat().st_size > 5000


def test_nifti_with_an_atlas_gives_brain_maps(monkeypatch, capsys, tmp_path, model_folder, story, listeners):
    labels = np.zeros((6, 6, 6), dtype=np.int32)
    labels[1:5, 1:5, 1:5] = np.arange(1, 5)[:, None, None]
    affine = np.diag([12.0, 12, 12, 1])
    affine[:3, 3] = -36
    nib.Nifti1Image(labels, affine).to_filename(tmp_path / "atlas.nii.gz")
    root = tmp_path / "bids"
    for i, values in enumerate(listeners[:2], 1):
        func = root / f"sub-{i}" / "func"
        func.mkdir(parents=True)
        columns = np.concatenate([np.zeros((N_VOLUMES, 1)), values[:, [0, 30, 31, 32]]], axis=1)
        image = nib.Nifti1Image(columns.T[labels].astype(np.float32), affine)
        image.header.set_zooms((12, 12, 12, TR))
        image.header.set_xyzt_units("mm", "sec")
        image.to_filename(func / f"sub-{i}_task-x_bold.nii.gz")
    table, _ = write_words("csv", story, tmp_path)
    code, printed, err = call(monkeypatch, capsys, model_folder, "--fmri", root, "--words", table, "--offset", OFFSET,
                              "--atlas", tmp_path / "atlas.nii.gz", "--regions", "A,B,C,D", "--out", tmp_path / "out",
                              *FAST)  # fmt: skip
    assert code == 0, err
    assert "2 subjects, 190 volumes, 4 regions" in printed
    image = nib.load(tmp_path / "out/coupling.nii.gz")
    assert image.shape == (6, 6, 6, 4)
    coupling = pd.read_csv(tmp_path / "out/coupling.tsv", sep="\t").set_index(["network", "region"])["r"]
    assert image.get_fdata()[1, 2, 2, 0] == pytest.approx(coupling["network0", "A"], abs=1e-4)
    assert {"figure-brain-best.png", "figure-brain-word-rate.png"} <= {p.name for p in (tmp_path / "out").iterdir()}
    assert "Brain maps" in (tmp_path / "out/report.html").read_text()


def test_scan_of_a_study_controls_and_untrained(monkeypatch, capsys, tmp_path, model_folder, story, listeners):
    table, _ = write_words("csv", story, tmp_path)
    brains = write_brains("regions-first", listeners[:, :, :6], tmp_path)
    pd.DataFrame({"loudness": listeners[0, :, 0], "pitch": listeners[1, :, 40]}).to_csv(
        tmp_path / "sound.tsv", sep="\t", index=False
    )
    common = ["--fmri", brains, "--words", table, "--tr", TR, "--offset", OFFSET, "--n-null", 40]
    model, tokenizer = load_model(str(model_folder))
    scan(model, tokenizer, ["another text of no story at all", " ".join(story["word"])], out=tmp_path / "study/scan")
    code, _, err = call(monkeypatch, capsys, tmp_path / "study", *common, "--out", tmp_path / "a", "--components", 3,
                        "--no-encoding", "--controls", tmp_path / "sound.tsv")  # fmt: skip
    assert code == 0, err
    report = json.loads((tmp_path / "a/comparison.json").read_text())
    assert report["controls"] == ["word rate", "position", "sound power", "pitch"]
    assert report["run"] == "run-0002"
    ica = GroupICA(5, random_state=0).fit(load_scans(tmp_path / "study/scan"))
    FunctionalNetworks.from_ica(ica, threshold=2.0).save(tmp_path / "study/networks")
    code, printed, err = call(monkeypatch, capsys, tmp_path / "study", *common, "--out", tmp_path / "n", "--networks",
                              tmp_path / "study", "--no-encoding")  # fmt: skip
    assert code == 0, err
    assert "5 networks" in printed
    code, _, err = call(monkeypatch, capsys, tmp_path / "study", *common, "--out", tmp_path / "b", "--untrained")
    assert (code, err.count("error:")) == (2, 1)
    assert "needs a model" in err
    code, printed, err = call(monkeypatch, capsys, model_folder, *common, "--out", tmp_path / "c", "--components", 3,
                              "--n-null", 19, "--untrained", "--encoding")  # fmt: skip
    assert code == 0, err
    summary = pd.read_csv(tmp_path / "c/summary.tsv", sep="\t")
    assert summary["weights"].tolist() == ["trained", "untrained", "trained beyond untrained"]
    beyond = pd.read_csv(tmp_path / "c/encoding_beyond_untrained.tsv", sep="\t")
    assert (beyond["subject_gain_low"] <= beyond["subject_gain"]).all()
    assert "untrained copy" in printed
    # the same folder again: the same settings go on, others are refused
    code, _, err = call(monkeypatch, capsys, model_folder, *common, "--out", tmp_path / "c", "--components", 4)
    assert code == 2
    assert "already holds another study" in err


def test_the_demo_brain_goes_by_its_name(monkeypatch, capsys, tmp_path, story, listeners):
    table, _ = write_words("csv", story, tmp_path)
    brains = write_brains("regions-first", listeners[:, :, :6], tmp_path)
    code, printed, err = call(monkeypatch, capsys, "demo", "--fmri", brains, "--words", table, "--tr", TR, "--offset",
                              OFFSET, "--out", tmp_path / "out", *FAST)  # fmt: skip
    assert code == 0, err
    assert "3 subjects, 190 volumes, 6 regions" in printed


def test_bad_input_is_one_line(monkeypatch, capsys, tmp_path, model_folder, story, listeners):
    brains = write_brains("regions-first", listeners[:, :, :6], tmp_path)
    table, _ = write_words("csv", story, tmp_path)
    swapped = story.iloc[::-1]
    swapped.to_csv(tmp_path / "backwards.csv", index=False)
    story.assign(onset=np.nan, offset=np.nan).to_csv(tmp_path / "untimed.csv", index=False)
    story.assign(onset=story.onset * 1000, offset=story.offset * 1000).to_csv(tmp_path / "ms.csv", index=False)
    zeros = tmp_path / "zeros"
    zeros.mkdir()
    np.save(zeros / "s1.npy", np.zeros((N_VOLUMES, 6)))
    uneven = tmp_path / "uneven"
    uneven.mkdir()
    np.save(uneven / "s1.npy", listeners[0, :, :6])
    np.save(uneven / "s2.npy", listeners[1, :-7, :6])
    np.save(tmp_path / "many.npy", np.random.default_rng(0).normal(size=(N_VOLUMES, N_VOLUMES)))
    np.save(tmp_path / "short.npy", np.zeros(7))
    cases = [
        ({"--tr": None}, "tr=None"),
        ({"--tr": 1500}, "milliseconds"),
        ({"--tr": -1}, "tr=-1"),
        ({"--words": tmp_path / "backwards.csv"}, "out of order"),
        ({"--words": tmp_path / "untimed.csv"}, "has a time"),
        ({"--words": tmp_path / "ms.csv"}, "milliseconds"),
        ({"--words": tmp_path / "absent.csv"}, "no file at"),
        ({"--offset": 5000}, "offset=5000"),
        ({"--fmri": zeros}, "all zeros"),
        ({"--fmri": uneven}, "differ in length"),
        ({"--fmri": tmp_path / "absent"}, "nothing at"),
        ({"--regions": "A,B"}, "2 names for 6 regions"),
        ({"--controls": tmp_path / "many.npy"}, "regressors for 190 volumes"),
        ({"--controls": tmp_path / "short.npy"}, "7 values for 190 volumes"),
        ({"--columns": "word"}, "--columns='word'"),
        ({"--null": "magic"}, "null='magic'"),
        ({"--hrf": "none"}, "hrf='none'"),
        ({"--drop": 189}, "drop=189"),
        ({"--components": 100000}, "100000"),
    ]
    for change, expected in cases:
        options = {"--fmri": brains, "--words": table, "--tr": TR, "--offset": OFFSET, "--out": tmp_path / "out",
                   "--components": 4, "--n-null": 40} | change  # fmt: skip
        given = [part for pair in options.items() if pair[1] is not None for part in pair]
        code, _, err = call(monkeypatch, capsys, model_folder, *given, "--no-encoding", "--overwrite")
        last = err.strip().splitlines()[-1]
        assert (code, last.startswith("error: ")) == (2, True), (change, err)
        assert expected in last, (change, last)


def test_columns_and_controls_are_read(tmp_path):
    assert parse_columns("word=2, onset=start") == {"word": 2, "onset": "start"}
    np.savetxt(tmp_path / "s18-sndpwr.txt", np.arange(20.0) ** 2)
    np.save(tmp_path / "two.npy", np.random.default_rng(0).normal(size=(2, 20)))
    found = load_controls([str(tmp_path / "s18-sndpwr.txt"), f"eyes={tmp_path / 'two.npy'}"], 20)
    assert list(found) == ["sound power", "eyes 0", "eyes 1"]


def test_word_tables_of_every_kind_hold_the_same(tmp_path, story):
    for kind in ("csv", "events", "numbered", "textgrid"):
        path, options = write_words(kind, story, tmp_path)
        words = load_words(path, columns=parse_columns(options[1]) if options else None)
        assert words["word"].tolist() == story["word"].tolist()
        np.testing.assert_allclose(words[["onset", "offset"]], story[["onset", "offset"]], atol=2e-3)


def test_a_dry_run_says_its_cost_and_writes_nothing(monkeypatch, capsys, tmp_path, model_folder, story):
    words, options = write_words("csv", story, tmp_path)
    files = ("--fmri", tmp_path, "--words", words, "--out", tmp_path / "c", *options)
    code, out, err = call(monkeypatch, capsys, model_folder, *files, "--dry-run", "--untrained")
    assert code == 0, err
    assert "the story: 2 passes over" in out
    assert "tokens a second: about" in out
    assert not (tmp_path / "c").exists()

"""Time: word tables, responses, and tokens brought to volumes."""

import numpy as np
import pandas as pd
import pytest
from scipy.io import loadmat

from llmbrain import InputError, NeuronSpace
from llmbrain.brains import align, load_words, prepare, word_regressor
from llmbrain.brains.finding import find_words
from llmbrain.brains.hrf import add_delays, double_gamma, glover_hrf, lanczos_weights, spm_hrf
from llmbrain.brains.series import cosine_basis
from llmbrain.scanning import Scan
from llmbrain.scanning.scans import ArraySignals

ALICE_START = 20.0  # stimulus time of the first volume, seconds


def make_scan(text, pieces, data=None):
    """A scan whose tokens are `pieces`, found in `text` in order."""
    spans, at = [], 0
    for piece in pieces:
        start = text.index(piece, at) if piece else 0
        spans.append((start, start + len(piece)))
        at = spans[-1][1] or at
    data = np.arange(1.0, len(pieces) + 1)[:, None] if data is None else data
    signals = {"neuron": ArraySignals(np.asarray(data, dtype=np.float32), NeuronSpace([np.shape(data)[1]]))}
    return Scan(signals, text=text, tokens=pieces, offsets=spans)


def table(words, step=1.0):
    onset = step * np.arange(len(words))
    return pd.DataFrame({"word": words, "onset": onset, "offset": onset + 0.8 * step})


# -- responses ---------------------------------------------------------------------------------------------------------


def test_hrf_equals_the_54_curves_that_spm_stored(shared_data):
    stored = loadmat(shared_data / "fmri/hrf/spm_hrfs.mat", squeeze_me=True)
    assert len(stored["hrfs"]) == 54
    for (dt, peak, under, peak_width, under_width, ratio), reference in zip(stored["params"], stored["hrfs"]):
        curve = double_gamma(
            np.arange(0, 32.1, dt), peak=peak, undershoot=under, peak_dispersion=peak_width,
            undershoot_dispersion=under_width, ratio=ratio,
        )  # fmt: skip
        np.testing.assert_allclose(curve / curve.sum(), reference, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["spm", "glover"])
def test_hrf_is_nilearns_but_for_its_late_first_sample(name):
    from nilearn.glm.first_level import hemodynamic_models

    dt, n = 0.1, 320
    theirs = getattr(hemodynamic_models, f"{name}_hrf")(t_r=dt, oversampling=1)
    grid = np.linspace(0, 32, n) - dt  # their grid, and their shift by one step
    ours = {"spm": spm_hrf, "glover": glover_hrf}[name](grid)
    np.testing.assert_allclose(ours / ours.sum(), theirs, atol=2e-5)


def test_lanczos_keeps_what_is_slow_and_removes_what_is_fast():
    tr, step = 2.0, 0.05
    events, volumes = np.arange(0, 200, step), np.arange(20, 180, tr)
    weights = lanczos_weights(events, volumes, tr) * step / tr
    slow, fast = (np.sin(2 * np.pi * f * events) for f in (0.05, 0.6))
    np.testing.assert_allclose(weights @ slow, np.sin(2 * np.pi * 0.05 * volumes), atol=0.02)
    assert np.abs(weights @ fast).max() < 0.02


def test_delays_are_shifted_copies():
    series = np.arange(1.0, 7).reshape(3, 2)
    expected = [[1, 2, 0, 0, 3, 4], [3, 4, 1, 2, 5, 6], [5, 6, 3, 4, 0, 0]]
    np.testing.assert_array_equal(add_delays(series, [0, 1, -1]), expected)
    with pytest.raises(InputError, match="delays"):
        add_delays(series, [3])


def test_high_pass_columns_are_spms():
    from nilearn.glm.first_level.design_matrix import create_cosine_drift

    basis = cosine_basis(362, 2.0, 128.0)
    assert basis.shape == (362, 12)
    theirs = create_cosine_drift(1 / 128, 2.0 * np.arange(362))
    np.testing.assert_allclose(basis @ (basis.T @ theirs), theirs, atol=1e-8)
    assert np.linalg.matrix_rank(np.column_stack([basis, theirs]), tol=1e-6) == 12


# -- tables ------------------------------------------------------------------------------------------------------------


def test_annotations_of_alice(shared_data):
    with pytest.warns(UserWarning, match="ds002322") as said:
        words = load_words(shared_data / "fmri/alice/ds002322_annotations.tsv")
    messages = " ".join(str(w.message) for w in said)
    assert "'suddenly'" in messages
    assert "several numbers" in messages
    assert len(words) == 2132
    assert words["onset"].isna().sum() == 31 + 1  # clitics without times, and the word that ends before it starts
    assert words["2-gram lexSurprisal"].dtype == float
    assert words["2-gram lexSurprisal"][986] == pytest.approx(6.36650841321678 + 6.94140128932559)
    assert words["word"][102] == "suddenly"
    assert words.loc[1899, ["word", "offset"]].tolist() == ["you", words["onset"][1899]]


def test_textgrid_of_alice(shared_data):
    words = load_words(next((shared_data / "fmri/alice/alice_stim_shared").glob("*.TextGrid")))
    assert len(words) == 2127
    assert words["word"][0] == "Alice"
    assert words["onset"][0] == pytest.approx(20.05891632653599)
    assert words["onset"].notna().all()


def test_short_textgrid_and_quotes(tmp_path):
    head = 'File type = "ooTextFile"\nObject class = "TextGrid"\n\n0\n2\n<exists>\n2\n'
    phones = '"IntervalTier"\n"phones"\n0\n2\n1\n0\n2\n"x"\n'
    short = head + phones + '"IntervalTier"\n"words"\n0\n2\n3\n0\n0.5\n"say"\n0.5\n1\n"sp"\n1\n2\n"""hi"""\n'
    path = tmp_path / "a.TextGrid"
    path.write_text(short, encoding="utf-16")
    words = load_words(path)
    assert words.to_numpy().tolist() == [["say", 0, 0.5], ['"hi"', 1, 2]]
    assert load_words(path, tier="phones")["word"].tolist() == ["x"]
    with pytest.raises(InputError, match=r"tier='nope'.*phones.*words"):
        load_words(path, tier="nope")


def test_bids_events_and_tables_without_header(tmp_path):
    events = tmp_path / "sub-01_task-story_events.tsv"
    events.write_text("onset\tduration\ttrial_type\n0.5\t0.25\thello\nn/a\tn/a\tworld\n2\t1\tagain\n")
    words = load_words(events)
    assert words["offset"][0] == 0.75
    assert words["onset"].isna().tolist() == [False, True, False]
    gentle = tmp_path / "story_align.csv"
    gentle.write_text("So,so,0.11,0.22\nthen,then,,\n")
    words = load_words(gentle, columns={"word": 0, "onset": 2, "offset": 3})
    assert words["word"].tolist() == ["So", "then"]
    assert words["offset"][0] == 0.22


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("word\tonset\toffset\na\t2\t3\nb\t1\t2\n", "out of order: row 1"),
        ("word\tonset\toffset\na\t\t\n", "none of its 1 words has a time"),
        ("word\tonset\na\t1\n", "'offset' or 'duration'"),
        ("what\tonset\toffset\na\t1\t2\n", "no column for 'word'"),
    ],
)
def test_bad_tables(tmp_path, content, message):
    path = tmp_path / "words.tsv"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        load_words(path)


# -- alignment ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:ds002322")
@pytest.mark.parametrize(("source", "reached"), [("ds002322_annotations.tsv", 0.9775), ("TextGrid", 0.9898)])
def test_word_rate_of_alice_is_the_authors(shared_data, source, reached):
    folder = shared_data / "fmri/alice"
    words = load_words(next(folder.rglob(f"*{source}")))
    authors = np.loadtxt(folder / "alice_data_shared/s18-rate.txt")
    r = {o: np.corrcoef(word_regressor(words, 2.0, 362, offset=o)[:, 0], authors)[0, 1] for o in (18.0, 20.0, 22.0)}
    assert r[ALICE_START] == pytest.approx(reached, abs=1e-3)
    assert max(r[18.0], r[22.0]) < 0.83


def test_words_are_found_whatever_their_quotes_and_splits():
    text = "“She’ll never…” cried the Rabbit-hole, to naïve Alice's sister; don't!"
    words = ["she", "ll", "never", "cried", "the", "rabbithole", "um", "to", "naive", "Alice’s", "sistre", "dont"]
    spans = find_words(text, words)
    found = [text[a:b] if a >= 0 else None for a, b in spans]
    assert found[:6] == ["She", "ll", "never", "cried", "the", "Rabbit-hole"]
    assert found[6] is None
    assert found[7:10] == ["to", "naïve", "Alice's"]
    assert found[10].startswith("sist")
    assert found[11] == "don't"


@pytest.mark.parametrize(("aggregate", "expected"), [("mean", [1, 2.5, 5]), ("last", [1, 3, 5]), ("sum", [1, 5, 5])])
def test_tokens_become_words(aggregate, expected):
    scan = make_scan("the rabbit, ran", ["the", " rab", "bit", ",", " ran"])
    words = table(["the", "rabbit", "ran"], step=40.0)
    kernel = {"rule": "onset", "hrf": "spm", "aggregate": aggregate}
    result = align(scan, words, 1.0, 120, **kernel)
    # far apart, each word leaves its own copy of the response
    curve = spm_hrf(np.arange(33.0))
    for i, value in enumerate(expected):
        np.testing.assert_allclose(result.data[40 * i : 40 * i + 33, 0], value * curve, atol=1e-12)
    assert result.report["tokens_unused"] == (2 if aggregate == "last" else 1)
    assert result.report["used"] == 3


@pytest.mark.parametrize("rule", ["offset", "onset", "midpoint"])
def test_align_is_a_convolution_with_the_values(rule):
    rng = np.random.default_rng(0)
    names = [f"w{i}x" for i in range(200)]
    data = rng.normal(size=(200, 3))
    scan = make_scan(" ".join(names), names, data)
    words = table(names, 0.5)
    times = {"offset": words.offset, "onset": words.onset, "midpoint": (words.onset + words.offset) / 2}[rule]
    fine = np.zeros((11000, 3))  # the same on a grid of 10 ms, by numpy
    np.add.at(fine, np.round(times.to_numpy() / 0.01).astype(int), data.astype(np.float32))
    curve = spm_hrf(np.arange(0, 32.005, 0.01))
    expected = np.stack([np.convolve(c, curve)[300 : 300 + 150 * 40 : 150] for c in fine.T], axis=1)
    result = align(scan, words, 1.5, 40, rule=rule, offset=3.0)
    np.testing.assert_allclose(result.data, expected, atol=1e-6)
    np.testing.assert_allclose(
        align(scan, words, 1.5, 40, rule=rule, offset=3.0, series=data).data, expected, atol=1e-6
    )


def test_fir_copies_and_filter_and_drop():
    names = [f"w{i}x" for i in range(100)]
    scan = make_scan(" ".join(names), names, np.random.default_rng(0).normal(size=(100, 2)))
    words = table(names, 0.7)
    plain = align(scan, words, 1.0, 60, hrf=None).data
    fir = align(scan, words, 1.0, 60, hrf=None, delays=[1, 2], high_pass=30.0, drop=5).data
    assert fir.shape == (55, 4)
    expected = add_delays(plain, [1, 2])[5:]
    basis = cosine_basis(55, 1.0, 30.0)
    np.testing.assert_allclose(fir, expected - basis @ (basis.T @ expected), atol=1e-12)


def test_untimed_and_unknown_words_are_counted():
    scan = make_scan("one two three four", ["one", " two", " three", " four"])
    words = table(["one", "two", "um", "three", "four"])
    words.loc[1, ["onset", "offset"]] = np.nan
    words.loc[4, ["onset", "offset"]] = 500.0
    report = align(scan, words, 2.0, 20).report
    assert report == {"n_words": 5, "untimed": 1, "not_in_text": 1, "outside_scan": 1, "used": 2, "tokens_unused": 0}


def test_bad_alignment():
    scan = make_scan("one two", ["one", " two"])
    words = table(["one", "two"])
    with pytest.raises(InputError, match=r"milliseconds \(2 s\)"):
        align(scan, words, 2000, 20)
    with pytest.raises(InputError, match="tr=None"):
        align(scan, words, None, 20)
    with pytest.raises(InputError, match=r"hrf=None"):
        align(scan, words, 2.0, 20, delays=[1])
    with pytest.raises(InputError, match=r"offset=900 s right"):
        align(scan, words, 2.0, 20, offset=900)
    with pytest.raises(InputError, match=r"must be \(2 tokens, columns\)"):
        align(scan, words, 2.0, 20, series=np.zeros((3, 1)))
    with pytest.raises(InputError, match="out of order"):
        align(scan, words[::-1], 2.0, 20)
    with pytest.raises(InputError, match="does not know its text"):
        align(Scan.from_array(np.zeros((2, 1))), words, 2.0, 20)


def test_prepare_keeps_dead_series_dead():
    rng = np.random.default_rng(0)
    series = np.column_stack([rng.normal(size=100) + np.arange(100), np.full(100, 7.1), np.full(100, np.nan)])
    ready = prepare(series, 2.0, drop=10)
    assert ready.shape == (90, 3)
    np.testing.assert_allclose([ready[:, 0].mean(), ready[:, 0].std()], [0, 1], atol=1e-12)
    assert np.isnan(ready[:, 1:]).all()

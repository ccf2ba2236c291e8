"""Word tables and TextGrids as people save them: right, or refused in one line."""

import warnings

import numpy as np
import pandas as pd
import pytest

from llmbrain import InputError
from llmbrain.brains import load_words
from llmbrain.brains.plain import parse_numbers, read_plain

ROWS = [("the", 0.5, 0.9), ("cat", 1.0, 1.4), ("sat", 1.5, 1.9)]


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


def tsv(*rows, header="word\tonset\toffset"):
    return "\n".join([header, *("\t".join(map(str, row)) for row in rows)]) + "\n"


def grid(*tiers, number=str):
    """A long TextGrid; a tier is ``(name, [(text, start, end), ...])``."""
    lines = ['File type = "ooTextFile"', 'Object class = "TextGrid"', "", "xmin = 0", "xmax = 9", "tiers? <exists>",
             f"size = {len(tiers)}", "item []:"]  # fmt: skip
    for i, (name, rows) in enumerate(tiers, 1):
        lines += [f"    item [{i}]:", '        class = "IntervalTier"', f'        name = "{name}"', "        xmin = 0",
                  "        xmax = 9", f"        intervals: size = {len(rows)}"]  # fmt: skip
        for j, (text, start, end) in enumerate(rows, 1):
            lines += [f"        intervals [{j}]:", f"            xmin = {number(start)}",
                      f"            xmax = {number(end)}", f'            text = "{text}"']  # fmt: skip
    return "\n".join(lines) + "\n"


# -- TextGrids ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "number",
    [
        str,
        lambda x: str(x).replace(".", ","),
        lambda x: str(x).removeprefix("0"),
        lambda x: f"{x:.3e}",
        lambda x: f"{x} ! a comment with 7 numbers",
        lambda x: f"{x}\t",
    ],
)
def test_times_in_every_style(tmp_path, number):
    words = load_words(write(tmp_path / "a.TextGrid", grid(("words", ROWS), number=number)))
    assert words.to_numpy().tolist() == [list(row) for row in ROWS]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1"])
def test_encodings(tmp_path, encoding):
    rows = [("café", 0, 1), ("naïve", 1, 2), ("straße", 2, 3)]
    words = load_words(write(tmp_path / "a.TextGrid", grid(("words", rows)), encoding))
    assert words["word"].tolist() == ["café", "naïve", "straße"]
    words = load_words(write(tmp_path / "a.tsv", tsv(*rows), encoding))
    assert words["word"].tolist() == ["café", "naïve", "straße"]


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("mac_roman", "le café élevé"), ("mac_roman", "über schöne Häuser"), ("cp1251", "кошка сидит"),
        ("iso8859-2", "książka żółta"), ("gb18030", "你好世界"), ("shift_jis", "こんにちは"), ("iso8859-7", "γάτα"),
        ("cp1254", "ağaç işte"), ("koi8-r", "кошка"),
    ],
)  # fmt: skip
def test_encodings_that_cannot_be_told_are_refused(tmp_path, encoding, text):
    rows = [(word, i, i + 0.5) for i, word in enumerate(text.split())]
    with pytest.raises(InputError, match="save it as UTF-8"):
        load_words(write(tmp_path / "a.tsv", tsv(*rows), encoding))


def test_two_tiers_of_one_name(tmp_path):
    other = [("dog", 0.5, 0.9)]
    path = write(tmp_path / "a.TextGrid", grid(("words", ROWS), ("words", other)))
    with pytest.raises(InputError, match=r"2 such tiers \(1: 'words', 2: 'words'\)"):
        load_words(path)
    with pytest.raises(InputError, match="--tier 1"):
        load_words(path, tier="words")
    assert load_words(path, tier="2")["word"].tolist() == ["dog"]
    assert load_words(path, tier="1")["word"].tolist() == ["the", "cat", "sat"]
    twice = write(tmp_path / "b.TextGrid", grid(("word", ROWS), ("words", ROWS)))
    assert len(load_words(twice)) == 3  # the same words: no matter which
    with pytest.raises(InputError, match="such tiers"):
        load_words(write(tmp_path / "c.TextGrid", grid(("Word", ROWS), ("words", other))))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s[: s.index('text = "sat"')], r"ends earlier than it says: the label of interval 3 of 3"),
        (lambda s: s.replace("xmin = 1.5", "xmin = --undefined--"), "is missing|should be a number"),
        (lambda s: s.replace('"TextGrid"', '"Collection"'), "not a TextGrid"),
        (lambda s: s.replace('"IntervalTier"', '"TextTier"'), "should be a text|no interval tier"),
        (lambda s: s.replace("ooTextFile", "chronological"), "not a Praat text file"),
    ],
)
def test_broken_grids_are_refused(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        load_words(write(tmp_path / "a.TextGrid", change(grid(("words", ROWS)))))


def test_exclamation_marks_and_line_ends_in_labels(tmp_path):
    rows = [("oh! no", 0, 1), ("a\u2028b", 1, 2), ('say ""hi""', 2, 3)]
    words = load_words(write(tmp_path / "a.TextGrid", grid(("words", rows)).replace("\n", "\r\n")))
    assert words["word"].tolist() == ["oh! no", "a\u2028b", 'say "hi"']


# -- tables ------------------------------------------------------------------------------------------------------------


def test_a_lone_quote_is_a_character(tmp_path):
    rows = [('"Oh', 0, 0.5), ("said", 1, 1.5), ('5"', 2, 2.5), ('"', 3, 3.5), ("end", 4, 4.5)]
    words = load_words(write(tmp_path / "a.tsv", tsv(*rows)))
    assert words["word"].tolist() == ['"Oh', "said", '5"', '"', "end"]
    frame = pd.DataFrame(rows, columns=["word", "onset", "offset"])
    frame.to_csv(tmp_path / "b.tsv", sep="\t", index=False)  # pandas quotes them
    assert load_words(tmp_path / "b.tsv")["word"].tolist() == frame["word"].tolist()
    frame.to_csv(tmp_path / "c.csv", index=False)
    assert load_words(tmp_path / "c.csv")["word"].tolist() == frame["word"].tolist()
    with pytest.raises(InputError, match="line 2: a quote is opened and not closed"):
        load_words(write(tmp_path / "d.csv", 'onset,offset,word\n0,1,"Oh\n1,2,well\n'))
    with pytest.raises(InputError, match="line 3 has 4 cells, the first line 3"):
        load_words(write(tmp_path / "e.tsv", tsv(ROWS[0], (*ROWS[1], "more"))))


def test_only_na_is_missing(tmp_path):
    rows = [(word, i, i + 0.5) for i, word in enumerate(["nan", "NA", "null", "None", " n/a ", "NaN", "N/A"])]
    assert load_words(write(tmp_path / "a.tsv", tsv(*rows)))["word"].tolist() == [
        "nan", "NA", "null", "None", "NaN", "N/A",
    ]  # fmt: skip
    rows = [("a", 0, 1), ("b", "n/a", " n/a"), ("c", "nan", ""), ("d", 3, 4)]
    words = load_words(write(tmp_path / "b.tsv", tsv(*rows)))
    assert words["onset"].isna().tolist() == [False, True, True, False]


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ([("0,5", "0,9"), ("1", "1,25")], [[0.5, 0.9], [1, 1.25]]),
        ([("0.5", "0.9"), ("1,000.25", "1,000.75")], [[0.5, 0.9], [1000.25, 1000.75]]),
        ([("0.5", "0.9"), ("1,000", "1,001")], [[0.5, 0.9], [1000, 1001]]),
        ([("1.000,25", "1.000,75"), ("1.001,5", "1.002,0")], [[1000.25, 1000.75], [1001.5, 1002]]),
        ([("999.5", "999.75"), ("1 000.25", "1'000.75")], [[999.5, 999.75], [1000.25, 1000.75]]),
        ([("0,125", "0,375"), ("1,125", "1,375")], [[0.125, 0.375], [1.125, 1.375]]),
        ([(".5", "0.9"), ("1.", "1.25e0")], [[0.5, 0.9], [1, 1.25]]),
    ],
)  # fmt: skip
def test_numbers_of_several_countries(tmp_path, times, expected):
    rows = [(f"w{'ab'[i]}", *pair) for i, pair in enumerate(times)]
    words = load_words(write(tmp_path / "a.tsv", tsv(*rows)))
    np.testing.assert_allclose(words[["onset", "offset"]], expected)
    cells = "\n".join(";".join(row) for row in [("word", "onset", "offset"), *rows])
    words = load_words(write(tmp_path / "a.csv", cells))
    np.testing.assert_allclose(words[["onset", "offset"]], expected)


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([("1,125", "1,375"), ("2,125", "2,375")], "is the comma of '1,125' a decimal one"),
        ([("0,5", "0.9"), ("1", "2")], "onset of row 0 is '0,5': not a number of seconds"),
        ([("0.5", "0.9"), ("1:02.5", "1:03")], "onset of row 1 is '1:02.5'"),
        ([("0.5 s", "0.9 s"), ("1 s", "2 s")], "not a number of seconds"),
    ],
)
def test_numbers_that_cannot_be_told_are_refused(tmp_path, times, message):
    rows = [(f"w{'ab'[i]}", *pair) for i, pair in enumerate(times)]
    with pytest.raises(InputError, match=message):
        load_words(write(tmp_path / "a.tsv", tsv(*rows)))


def test_other_columns_follow_the_style_of_the_times(tmp_path):
    rows = [("a", "0,5", "0,9", "3,25"), ("b", "1,0", "1,5", "4,5")]
    words = load_words(write(tmp_path / "a.tsv", tsv(*rows, header="word\tonset\toffset\tlogfreq")))
    assert words["logfreq"].tolist() == [3.25, 4.5]
    rows = [("a", 0, 1, "1,234"), ("b", 1, 2, "12,345,678")]
    words = load_words(write(tmp_path / "b.tsv", tsv(*rows, header="word\tonset\toffset\tfrequency")))
    assert words["frequency"].tolist() == [1234, 12345678]
    rows = [("a", 0.5, 1, "4.2,3.1"), ("b", 1, 2, "1.5"), ("c", 2, 3, "2.5")]
    with pytest.warns(UserWarning, match="their sum is used"):
        words = load_words(write(tmp_path / "c.tsv", tsv(*rows, header="word\tonset\toffset\tsurprisal")))
    assert words["surprisal"].tolist() == pytest.approx([7.3, 1.5, 2.5])
    assert parse_numbers(["1", "n/a", "-2.5"]).tolist()[::2] == [1, -2.5]


def test_words_are_not_trigger_codes(tmp_path):
    rows = [(0, 0.4, "the", 12), (1, 0.4, "cat", 13), (2, 0.4, "sat", 12)]
    words = load_words(write(tmp_path / "a.tsv", tsv(*rows, header="onset\tduration\ttrial_type\tvalue")))
    assert words["word"].tolist() == ["the", "cat", "sat"]
    rows = [(0, 0.4, "the", "S  1"), (1, 0.4, "cat", "S  2")]
    words = load_words(write(tmp_path / "b.tsv", tsv(*rows, header="onset\tduration\ttrial_type\tvalue")))
    assert words["word"].tolist() == ["the", "cat"]
    rows = [(0, 0.4, "speech", "the"), (1, 0.4, "speech", "cat")]  # one condition, and the words
    words = load_words(write(tmp_path / "c.tsv", tsv(*rows, header="onset\tduration\ttrial_type\tstimulus")))
    assert words["word"].tolist() == ["the", "cat"]
    path = write(tmp_path / "d.tsv", tsv((0, 0.4, 12), (1, 0.4, 13), header="onset\tduration\tvalue"))
    with pytest.raises(InputError, match="column 'value' for 'word' holds numbers"):
        load_words(path)
    assert load_words(path, columns={"word": "value"})["word"].tolist() == ["12", "13"]


def test_length_may_be_of_letters(tmp_path):
    rows = [("the", 0, 3), ("horse", 0.3, 5), ("sat", 0.7, 3), ("on", 1.0, 2), ("a", 1.3, 1), ("mat", 1.5, 3)]
    path = write(tmp_path / "a.tsv", tsv(*rows, header="word\tonset\tlength"))
    with pytest.raises(InputError, match=r"as if of letters.*--columns duration=length"):
        load_words(path)
    with pytest.raises(InputError, match="durations in seconds"):
        load_words(path, columns={"duration": "length"})
    rows = [("the", 0, 0.5, 3), ("horse", 1, 1.5, 5)]
    assert load_words(write(tmp_path / "b.tsv", tsv(*rows, header="word\tonset\toffset\tlength")))["length"].sum() == 8
    seconds = write(tmp_path / "c.tsv", tsv(("the", 0, 0.31), ("cat", 1, 0.42), header="word\tonset\tlength"))
    assert load_words(seconds)["offset"].tolist() == [0.31, 1.42]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([(w, a, b) for w, a, b in ROWS], "word=0,onset=1,offset=2"),
        ([(a, b, w) for w, a, b in ROWS], "word=2,onset=0,offset=1"),
        ([(a, round(b - a, 3), w) for w, a, b in [("the", 0.5, 1.0), *ROWS[1:]]], "word=2,onset=0,duration=1"),
        ([(i, w, a, b) for i, (w, a, b) in enumerate(ROWS)], "word=1,onset=2,offset=3"),
    ],
)
@pytest.mark.parametrize("mark", ["\t", ",", " "])
def test_no_header_is_read_by_content_and_said(tmp_path, rows, said, mark):
    path = write(tmp_path / "words.txt", "\n".join(mark.join(map(str, row)) for row in rows))
    with pytest.warns(UserWarning, match=f"--columns {said}"):
        words = load_words(path)
    assert words["word"].tolist() == ["the", "cat", "sat"]
    np.testing.assert_allclose(words["onset"], [0.5, 1.0, 1.5])
    columns = {role: int(place) for role, place in (pair.split("=") for pair in said.split(","))}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pd.testing.assert_frame_equal(load_words(path, columns=columns)[["word", "onset", "offset"]],
                                      words[["word", "onset", "offset"]])  # fmt: skip


def test_columns_that_do_not_tell_are_refused_in_the_commands_words(tmp_path):
    path = write(tmp_path / "a.txt", "the\tDT\t0.5\t0.9\ncat\tNN\t1.0\t1.4\n")
    with pytest.raises(InputError, match=r"has no header.*--columns word=text,onset=0"):
        load_words(path)
    with pytest.raises(InputError, match=r"no column for 'onset'.*--columns"):
        load_words(write(tmp_path / "b.tsv", tsv(("a", 0), header="word\tmoment")))


def test_a_header_that_is_numbered_is_still_a_header(tmp_path):
    words = load_words(write(tmp_path / "a.tsv", tsv(*ROWS)), columns={"word": 0, "onset": 1, "offset": 2})
    assert words["word"].tolist() == ["the", "cat", "sat"]


def test_plain_text_keeps_what_is_no_line_end(tmp_path):
    path = write(tmp_path / "a.txt", "a\u2028b\u0085c\r\nd\re")
    assert read_plain(path, "text") == "a\u2028b\u0085c\nd\ne"

"""Texts of functions that have names, and files of unlearning benchmarks."""

from __future__ import annotations

import json

import pytest

from llmbrain import InputError
from llmbrain.datasets import (
    CONTRASTS,
    contrast_lines,
    contrast_texts,
    control_of,
    load_demo,
    read_rows,
    unlearning_texts,
)


@pytest.fixture(scope="module")
def tokenizer():
    return load_demo().tokenizer


@pytest.mark.parametrize("contrast", CONTRASTS)
def test_both_sides_are_there_and_as_many(contrast, tokenizer):
    texts = contrast_texts(contrast, tokenizer, n=3, blocks=2, items=3, seed=1)
    assert texts == contrast_texts(contrast, tokenizer, n=3, blocks=2, items=3, seed=1)
    assert texts != contrast_texts(contrast, tokenizer, n=3, blocks=2, items=3, seed=2)
    for text in texts:
        assert sorted(text.events["trial_type"]) == [contrast] * 2 + [control_of(contrast)] * 2
    pairs = contrast_lines(contrast, n=50)
    assert all(a != b and a.endswith("\n") and b.endswith("\n") for a, b in pairs)
    assert len({a for a, _ in pairs}) > 10


def test_sums_are_right_and_controls_hold_no_digit():
    for item, control in contrast_lines("arithmetic", n=100):
        left, right = item.split("=")
        assert sum(int(x) for x in left.split("+")) == int(right)
        assert not any(c.isdigit() for c in control)


def test_rows_of_unlearning_benchmarks(tmp_path, tokenizer):
    tofu = tmp_path / "forget.jsonl"
    tofu.write_text(
        "\n".join(json.dumps({"question": f"Who wrote book {i}?", "answer": f"Author {i}."}) for i in range(5))
    )
    assert read_rows(tofu)[2] == "Question: Who wrote book 2?\nAnswer: Author 2.\n"
    wmdp = tmp_path / "wmdp.json"
    wmdp.write_text(
        json.dumps([{"question": "Which?", "choices": ["one", "two"], "answer": 1}, {"text": "word " * 200}])
    )
    rows = read_rows(wmdp)
    assert rows[0] == "Question: Which?\nA. one\nB. two\nAnswer: B. two\n"
    assert len(rows) == 4
    assert max(map(len, rows)) <= 401
    texts = unlearning_texts(tofu, wmdp, tokenizer, lines=4)
    kinds = [k for text in texts for k in text.events["trial_type"]]
    assert sorted(kinds) == ["forget"] * 5 + ["retain"] * 4
    with pytest.raises(InputError, match="5 rows stand in"):
        unlearning_texts(tofu, tofu, tokenizer)
    with pytest.raises(InputError, match=r"lines=2\.5"):
        unlearning_texts(tofu, wmdp, tokenizer, lines=2.5)


def test_every_shape_that_these_files_are_published_in(tmp_path):
    rows = [{"question": "Who?", "answer": "I."}, {"question": "Where?", "answer": "Here."}]
    wanted = ["Question: Who?\nAnswer: I.\n", "Question: Where?\nAnswer: Here.\n"]
    lines = "\n".join(map(json.dumps, rows)) + "\n"
    for name, content in (("a.jsonl", lines), ("b.json", lines), ("c.json", json.dumps(rows)), ("d.JSON", lines),
                          ("e.jsonl", "\ufeff" + lines.replace("\n", "\r\n"))):  # fmt: skip
        (tmp_path / name).write_text(content, encoding="utf-8")
        assert read_rows(tmp_path / name) == wanted, name
    (tmp_path / "one.json").write_text(json.dumps(rows[0]))
    assert read_rows(tmp_path / "one.json") == wanted[:1]
    (tmp_path / "muse.txt").write_text("A text.\n\nOf two parts.")
    assert read_rows(tmp_path / "muse.txt") == ["A text. Of two parts.\n"]
    (tmp_path / "verbatim.json").write_text(json.dumps([{"prompt": "It was", "gt": "so."}]))
    assert read_rows(tmp_path / "verbatim.json") == ["It was so.\n"]
    letter = {"question": "Which?", "choices": ["one", "two"], "answer": "b"}
    (tmp_path / "letter.json").write_text(json.dumps([letter]))
    assert read_rows(tmp_path / "letter.json") == ["Question: Which?\nA. one\nB. two\nAnswer: B. two\n"]
    for name, content, message in (
        ("split.json", {"forget": rows, "retain": rows}, "one file a split"), ("number.json", 3, "must hold a list"),
        ("z.json", [{**letter, "answer": "C"}], "answer='C' must be the number of a choice"),
    ):  # fmt: skip
        (tmp_path / name).write_text(json.dumps(content))
        with pytest.raises(InputError, match=message):
            read_rows(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        read_rows(tmp_path / "none.parquet")
    (tmp_path / "bad.json").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not UTF-8"):
        read_rows(tmp_path / "bad.json")


def test_rows_in_parquet(tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"question": "Which?", "choices": ["one", "two"], "answer": 1, "subject": None}]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "wmdp.parquet")
    assert read_rows(tmp_path / "wmdp.parquet") == ["Question: Which?\nA. one\nB. two\nAnswer: B. two\n"]
    (tmp_path / "bad.parquet").write_bytes(b"no parquet at all")
    with pytest.raises(InputError, match="is no parquet file"):
        read_rows(tmp_path / "bad.parquet")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question": "a"}', "row 0 has fields"),
        ('{"question": "a", "choices": ["x", "y"], "answer": 2}', "answer=2 must be the number of a choice"),
        ('{"question": "a", "choices": ["x"], "answer": 0}', "choices must be 2 to 10 strings"),
        ("not json", "holds no JSON rows"),
        ("", "must hold a list of rows"),
        ("3", "row 0 is no object"),
    ],
)
def test_rows_of_no_known_kind_are_refused(tmp_path, content, message):
    file = tmp_path / "rows.jsonl"
    file.write_text(content)
    with pytest.raises(InputError, match=message):
        read_rows(file)

"""Texts of a study: read, split, cut."""

from __future__ import annotations

import json

import pytest
from tiny_models import tiny_tokenizer

from llmbrain import InputError, Stimulus
from llmbrain.study.texts import limit_tokens, load_texts, long_texts, split_texts


def test_texts_are_read(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    (tmp_path / "a.json").write_text('["one", "two"]')
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n"two"\n')
    (tmp_path / "q.jsonl").write_text('{"question": "one"}\n')
    assert load_texts(tmp_path / "a.txt") == ["one\n\ntwo"]
    assert load_texts(tmp_path / "a.json") == load_texts(tmp_path / "a.jsonl") == ["one", "two"]
    assert load_texts(tmp_path / "q.jsonl", "question") == ["one"]
    with pytest.raises(InputError, match="question"):
        load_texts(tmp_path / "q.jsonl")
    (tmp_path / "b.json").write_text('["one",')
    with pytest.raises(InputError, match="not valid json"):
        load_texts(tmp_path / "b.json")
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(InputError, match="UTF-8"):
        load_texts(tmp_path / "c.txt")


@pytest.mark.parametrize(
    "texts", [["abc def " * 50], ["ab cd " * 9] * 2, [f"text {i} " * 7 for i in range(40)], ["x" * 90]]
)
def test_split_keeps_every_character_and_overlaps_nowhere(texts):
    calibration, rest = split_texts(texts)
    assert "".join(calibration) + "".join(rest) == "".join(texts)
    assert 0.1 < len("".join(rest)) / len("".join(texts)) < 0.35


def test_limit_tokens():
    tokenizer = tiny_tokenizer()
    assert limit_tokens(["abcd", "efgh", "ijkl"], tokenizer, 6) == ["abcd", "ef"]
    assert limit_tokens(["abcd"], tokenizer, None) == ["abcd"]


def test_lines_end_at_line_feeds_only(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text(json.dumps("one\u2028two\x85three", ensure_ascii=False) + '\n"four"\n', encoding="utf-8")
    assert load_texts(path) == ["one\u2028two\x85three", "four"]
    path.write_text('"one"\n\n{"text": }\n', encoding="utf-8")
    with pytest.raises(InputError, match="line 3"):
        load_texts(path)


@pytest.mark.parametrize("at", [0.2, 0.5, 0.8])
def test_a_text_that_is_cut_keeps_its_events(at):
    tokenizer = tiny_tokenizer()
    segments = [(letters * 5 + " ", name) for letters, name in (("abc", "low"), ("xyz", "high"), ("b", "low"))] * 3
    whole = Stimulus.from_segments([*segments, ("... ", None)], tokenizer, name="story")
    parts = split_texts([whole], 1 - at, tokenizer)
    assert "".join(part[0] for part in parts) == whole
    assert parts[0][0].name == "story"
    for part in (*(p[0] for p in parts), limit_tokens([whole], tokenizer, 40)[0]):
        tokens = tokenizer.convert_ids_to_tokens(tokenizer(part).input_ids)
        inside = set()
        for onset, duration, kind in part.events[["onset", "duration", "trial_type"]].itertuples(index=False):
            these = range(int(onset), int(onset + duration))
            inside |= set(these)
            assert {tokens[i] for i in these} <= set("abc " if kind == "low" else "xyz ")
        assert all(token in "<s>. " for i, token in enumerate(tokens) if i not in inside)


def test_texts_of_a_token_are_not_scanned():
    tokenizer = tiny_tokenizer()  # each text begins with a token of its own
    with pytest.warns(UserWarning, match="2 of 4 texts have fewer than 3 tokens: they are not scanned"):
        assert long_texts(["a", "the cat", "b", "it"], tokenizer) == ["the cat", "it"]
    with pytest.raises(InputError, match="texts have 2 tokens at most, a scan needs 3 of one"):
        long_texts(["a", "b"], tokenizer)
    assert limit_tokens(["abcde", "fghij"], tokenizer, 6) == ["abcde"]  # no scrap of one
    assert limit_tokens(["abcde", "fghij"], tokenizer, 8) == ["abcde", "fgh"]

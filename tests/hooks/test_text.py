"""One tokenizing: scans, windows and perplexity read the same ids."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tiny_models import tiny, tiny_tokenizer
from tokenizers import processors

import llmbrain as lb
from llmbrain.hooks import text as text_module
from llmbrain.hooks.text import as_windows, encode, packed_windows
from llmbrain.pruning.calibrate.windows import calibration_windows

TEXTS = ["the cat sat.", "a dog, a bird and the other one", "why? nobody knows that any more."]


def both_ends():
    """A tokenizer that puts a token before and one after each text."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <pad>", special_tokens=[("<s>", 1), ("<pad>", 0)]
    )
    return tokenizer


@pytest.mark.parametrize(
    "tokenizer", [tiny_tokenizer(), tiny_tokenizer(bos=False), both_ends()], ids=["bos", "has bos, adds none", "both"]
)
def test_scans_and_windows_read_the_same_ids(tokenizer):
    """The networks of the main job come from the scans, its calibration from the same texts or from the scans."""
    model = tiny("llama")
    scans = lb.scan(model, tokenizer, TEXTS)
    read = np.concatenate([scan.token_ids for scan in scans])
    for windows in (
        as_windows(model, tokenizer, TEXTS, 16),
        calibration_windows(model, tokenizer, TEXTS, None, 16, None),
        calibration_windows(model, tokenizer, None, scans, 16, None),
    ):
        assert windows.shape == (len(read) // 16, 16)
        np.testing.assert_array_equal(windows.flatten(), read[: windows.numel()])


def test_windows_hold_what_the_tokenizer_gives():
    assert packed_windows(both_ends(), ["ab", "c"], 3).tolist() == [[1, 3, 4], [0, 1, 5]]
    ids, spans, lost = encode(both_ends(), ["ab"])[0]
    assert (ids, spans.tolist(), lost) == ([1, 3, 4, 0], [[0, 0], [0, 1], [1, 2], [0, 0]], 0)


def test_a_tokenizer_that_was_saved_with_truncation_does_not_cut_texts():
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(4)
    assert packed_windows(tokenizer, ["abcdefgh"], 9).tolist() == [[1, *range(3, 11)]]


@pytest.mark.parametrize("offsets", [True, False])
def test_a_run_as_json_comes_back(offsets, monkeypatch):
    monkeypatch.setattr(text_module, "JSON_PIECE", 4)
    stimulus = lb.Stimulus.from_segments([('a "quoted" \u2028 one', "low"), (" xyz", None)], tiny_tokenizer(), "name")
    run = text_module.read_texts([stimulus], tiny_tokenizer())[0]
    run.offsets = run.offsets if offsets else None
    line = "".join(run.to_json())
    record = json.loads(line)
    assert line == json.dumps(record) + "\n"
    again = text_module.Run.from_record(record)
    assert "".join(again.to_json()) == line
    assert (again.name, again.text, again.tokens) == (run.name, run.text, run.tokens)
    np.testing.assert_array_equal(again.token_ids, run.token_ids)


def test_texts_are_tokenized_in_parts(monkeypatch):
    whole = [run.token_ids.tolist() for run in text_module.read_texts(TEXTS, tiny_tokenizer())]
    monkeypatch.setattr(text_module, "ENCODED_AT_ONCE", 20)
    assert [run.token_ids.tolist() for run in text_module.read_texts(TEXTS, tiny_tokenizer())] == whole

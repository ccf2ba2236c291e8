"""Long texts as several runs: the same tokens, each with its part of text and events."""

from __future__ import annotations

import numpy as np
import pandas as pd
from tiny_models import tiny_tokenizer

import llmbrain as lb
from llmbrain.hooks.text import cut_runs, read_texts

TEXT = "the cat sat on the mat, and then it ran away. " * 3


def test_runs_are_cut_and_lose_nothing():
    tokenizer = tiny_tokenizer()
    events = pd.DataFrame({"onset": [0, 40, 60], "duration": [10, 30, 0], "trial_type": ["a", "b", "c"]})
    whole = read_texts([lb.Stimulus(TEXT, events), "short text", lb.Stimulus(TEXT, None, "story")], tokenizer)
    parts = cut_runs(whole, 50)
    assert max(len(run.tokens) for run in parts) <= 50
    assert [run.name for run in parts] == [
        "run-0001",
        "run-0002",
        "run-0003",
        "run-0004",
        "story-1",
        "story-2",
        "story-3",
    ]
    for run, pieces in ((whole[0], parts[:3]), (whole[1], parts[3:4]), (whole[2], parts[4:])):
        np.testing.assert_array_equal(np.concatenate([p.token_ids for p in pieces]), run.token_ids)
        assert "".join(p.text for p in pieces) == run.text
        for piece in pieces:
            for token, (start, stop) in zip(piece.tokens, piece.offsets):
                assert stop == start or piece.text[start:stop] == token
    start = len(parts[0].tokens)
    assert parts[0].events.to_dict("list") == {"onset": [0, 40], "duration": [10, start - 40], "trial_type": ["a", "b"]}
    assert parts[1].events["onset"].tolist() == [0, 60 - start]
    assert parts[1].events["duration"].tolist() == [70 - start, 0]
    assert len(parts[2].events) == 0
    assert cut_runs(whole, None) == whole == cut_runs(whole, 500)

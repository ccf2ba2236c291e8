"""Scans that keep nothing, and scans cut into runs, against the scan that keeps everything."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_models import tiny, tiny_tokenizer

import llmbrain as lb
from llmbrain.comparison import sources
from llmbrain.hooks.listen import Reader
from llmbrain.scanning import Stimulus, live_scans
from llmbrain.study import find_networks, networks

pytestmark = pytest.mark.filterwarnings("ignore::llmbrain.hooks.text.ScanWarning")


@pytest.fixture(scope="module")
def reader():
    return tiny("llama", seed=3, intermediate_size=40, max_position_embeddings=32), tiny_tokenizer()


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghij "), n)) for n in (90, 61, 40)]
    return [Stimulus(text, {"onset": [3, 20], "duration": [10, 15], "trial_type": ["a", "b"]}) for text in words]


@pytest.mark.parametrize("run_length", [None, 25])
def test_the_model_gives_again_what_a_scan_keeps(reader, texts, run_length):
    kept = lb.scan(*reader, texts, run_length=run_length)
    live = live_scans(*reader, texts, run_length=run_length)
    assert len(live) == len(kept)
    for a, b in zip(live, kept):
        assert a.name == b.name
        assert a.tokens == b.tokens
        assert np.array_equal(a.positions, b.positions)
        assert a.events.equals(b.events)
        assert np.allclose(a.data(), b.data(), atol=1e-6)
        assert np.allclose(a.data(layers=[1], tokens=slice(7, 21)), b.data(layers=[1], tokens=slice(7, 21)), atol=1e-6)


def test_a_run_that_is_cut_is_the_same_numbers_at_the_same_positions(reader, texts):
    whole = lb.scan(*reader, texts[:1])[0]
    parts = whole.cut(40)
    assert [part.n_tokens for part in parts] == [30, 30, 30] or sum(p.n_tokens for p in parts) == whole.n_tokens
    assert max(part.n_tokens for part in parts) <= 40
    assert np.array_equal(np.concatenate([part.data() for part in parts]), whole.data())
    assert np.array_equal(np.concatenate([part.positions for part in parts]), whole.positions)
    assert "".join(part.text for part in parts) == str(texts[0])
    assert sum(len(part.events) for part in parts) >= 2
    assert parts[1].cut(10)[1].positions[0] == whole.positions[parts[0].n_tokens + parts[1].cut(10)[0].n_tokens]
    assert whole.cut(None) == [whole]
    with pytest.raises(lb.InputError, match="run_length"):
        whole.cut(0)


def test_networks_of_text_that_memory_does_not_hold_are_the_same(reader, texts, monkeypatch):
    many = [str(text) for text in texts] * 4
    kept = find_networks(*reader, many, n_components=3, progress=False)
    read = []
    monkeypatch.setattr(networks, "KEPT", 1)
    monkeypatch.setattr(Reader, "read_alone", counting(Reader.read_alone, read))
    live = find_networks(*reader, many, n_components=3, progress=False)
    assert len(read) > len(many)
    r = np.abs(np.corrcoef(kept.maps, live.maps)[:3, 3:])
    assert r.max(axis=1).min() > 0.99
    assert [len(course) for course in live.time_courses] == [len(course) for course in kept.time_courses]


def counting(method, calls):
    def counted(self, block):
        calls.append(block)
        return method(self, block)

    return counted


def test_a_long_story_is_decomposed_in_pieces_and_followed_as_one_run(reader, texts, monkeypatch):
    story = " ".join(map(str, texts)) * 3
    whole = lb.scan(*reader, [story])[0]
    seen = []
    monkeypatch.setattr(lb.GroupICA, "fit", counting_fit(lb.GroupICA.fit, seen))
    series = sources.network_series(whole, None, None, 3, 0, run_length=200)
    assert series.shape == (whole.n_tokens, 3)
    assert max(run.n_tokens for run in seen) <= 200 < whole.n_tokens
    alone = sources.network_series(whole, None, None, 3, 0, run_length=None)
    a, b = (np.linalg.qr(x - x.mean(axis=0))[0] for x in (series, alone))
    assert np.linalg.svd(a.T @ b, compute_uv=False).mean() > 0.85  # the same subspace, nearly
    monkeypatch.setattr(sources, "KEPT", 1)
    again = sources.read_story(reader, story)
    assert np.allclose(again.data(), whole.data(), atol=1e-6)


def counting_fit(method, runs):
    def fit(self, given, *args, **options):
        runs.extend(given)
        return method(self, given, *args, **options)

    return fit

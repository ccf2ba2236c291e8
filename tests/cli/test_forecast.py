"""What a cut is going to cost, as commands print it: beside the plan, and beside what it did cost."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from cli_calls import call
from tiny_models import tiny_tokenizer
from torch.nn.functional import cross_entropy

import llmbrain as lb
from llmbrain.study.texts import split_texts


def test_a_plan_says_what_it_will_cost(monkeypatch, capsys, places):
    study = places / "scan"
    assert call(monkeypatch, capsys, "scan", places / "model", "--text", places / "texts.json", "--out", study)[0] == 0
    cut = ["plan", places / "model", "--study", study, "--method", "magnitude", "--ratio", 0.5]
    cut += ["--out", places / "plan.json"]
    code, printed, err = call(monkeypatch, capsys, *cut)
    assert code == 0, err
    assert "forecast: nats a token more, repaired by least-squares" in err
    row = next(line for line in printed.splitlines() if " all " in line)
    assert np.isfinite(float(row.split("│")[-2]))
    assert "forecast:" not in "".join(call(monkeypatch, capsys, *cut, "--no-forecast")[1:])
    code, printed, err = call(monkeypatch, capsys, *cut, "--head-ratio", 0.5)
    assert code == 0, err
    assert "no forecast: it is for cuts of neurons only" in printed + err
    without = [str(a) for a in cut if str(a) not in ("--study", str(study))]
    code, printed, err = call(monkeypatch, capsys, *without, "--text", places / "texts.json")
    assert code == 0, err
    assert "forecast:" not in printed + err


def test_a_run_says_it_before_the_cut_and_beside_what_was_lost(monkeypatch, capsys, places):
    out = places / "study"
    run = ["run", places / "model", "--text", places / "texts.json", "--components", 3, "--method", "magnitude"]
    code, _, err = call(monkeypatch, capsys, *run, "--out", out)
    assert code == 0, err
    lines = err.splitlines()
    before = next(i for i, line in enumerate(lines) if "    forecast: " in line and "nats a token more" in line)
    assert before < next(i for i, line in enumerate(lines) if "    cut, and repair" in line)
    assert "repaired by least-squares, and what was lost" in err
    rows = json.loads((out / "summary.json").read_text())["forecast_by_function"]
    assert rows[-1]["text"] == "all"
    assert all(np.isfinite(row["measured"]) for row in rows)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["forecast_on"] == "held_out"
    assert "what was lost, on held-out text" in err
    assert all(row["text"].startswith("held-out") for row in rows[:-1])
    _, held_out = split_texts(json.loads((places / "texts.json").read_text()))
    dense, small = (lb.load_model(folder)[0] for folder in (places / "model", out / "pruned"))
    lost = []
    pieces = [
        p
        for t in held_out
        for p in tiny_tokenizer()(t, return_tensors="pt").input_ids.split(dense.config.max_position_embeddings, dim=1)
    ]
    for ids in pieces:
        with torch.no_grad():
            before_it, after_it = (
                cross_entropy(m(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="none") for m in (dense, small)
            )
        lost.append(after_it - before_it)
    assert rows[-1]["measured"] == pytest.approx(float(torch.cat(lost).mean()), rel=1e-3)
    said = float(lines[before].split("forecast: ")[1].split()[0])
    assert said == pytest.approx(rows[-1]["predicted"], rel=0.01)
    code, _printed, err = call(monkeypatch, capsys, *run, "--out", places / "heads", "--head-ratio", 0.5)
    assert code == 0, err
    assert "no forecast: it is for cuts of neurons only" in err
    assert "forecast_by_function" not in json.loads((places / "heads" / "summary.json").read_text())

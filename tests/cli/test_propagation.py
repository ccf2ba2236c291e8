"""`--propagation` of `prune` and `run`: it reaches the repair, and what can not be is said before anything is done."""

from __future__ import annotations

import json

import pytest
from cli_calls import call

from llmbrain._validation import InputError
from llmbrain.study import Settings
from llmbrain.study.cost import repair_passes


@pytest.mark.parametrize(("typed", "share"), [(None, None), (0.25, 0.25), (0, None)])
def test_it_reaches_the_repair(monkeypatch, capsys, places, tmp_path, typed, share):
    cut = ["prune", places / "model", "--text", places / "texts.json", "--method", "magnitude", "--ratio", 0.5]
    more = [] if typed is None else ["--propagation", typed]
    code, _, err = call(monkeypatch, capsys, *cut, *more, "--out", tmp_path / "small")
    assert code == 0, err
    assert json.loads((tmp_path / "small" / "pruning.json").read_text())["cuts"][-1]["propagation"] == share


def test_a_run_keeps_it(monkeypatch, capsys, places, tmp_path):
    run = ["run", places / "model", "--text", places / "texts.json", "--components", 3, "--method", "magnitude"]
    code, _, err = call(monkeypatch, capsys, *run, "--propagation", 0.25, "--out", tmp_path / "study")
    assert code == 0, err
    assert "propagation = 0.25" in (tmp_path / "study" / "config.toml").read_text()
    cuts = json.loads((tmp_path / "study" / "pruned" / "pruning.json").read_text())["cuts"]
    assert cuts[-1]["propagation"] == 0.25


def test_what_can_not_be_is_said_first(monkeypatch, capsys, places, tmp_path):
    cut = ["prune", places / "model", "--text", places / "texts.json", "--out", tmp_path / "small"]
    code, _, err = call(monkeypatch, capsys, *cut, "--propagation", 0.5, "--compensate", "bias")
    assert code == 2
    assert "propagation=0.5 needs compensate='least-squares'" in err
    assert "plan:" not in err  # before anything was planned
    for wrong in ({"compensate": None}, {"forget": ("a",)}):
        with pytest.raises(InputError, match=r"propagation=0\.5 needs"):
            Settings(propagation=0.5, **wrong)
    with pytest.raises(InputError, match="together with propagation"):
        Settings(propagation=0.5, expert_ratio=0.5, method="frequency")
    with pytest.raises(InputError, match=r"propagation=1\.5"):
        Settings(propagation=1.5)


def test_its_cost_is_counted():
    assert repair_passes("least-squares", 2, 0.5) == repair_passes("least-squares", 30)
    assert repair_passes("least-squares", 30, 0.0) == repair_passes("least-squares", 2)

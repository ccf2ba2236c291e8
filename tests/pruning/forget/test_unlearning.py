"""A repair that does not bring back what was to be forgotten."""

from __future__ import annotations

import json

import pytest
import torch
from pruning_data import right_by_condition
from tiny_models import tiny_tokenizer

import llmbrain as lb
from llmbrain import (
    Stimulus,
    plan_pruning,
    prune,
    scan,
)


@pytest.mark.parametrize("ratio", [None, 0.6])
def test_forgetting_takes_one_condition_and_leaves_the_other(two_abilities, ratio):
    model, scans, ids = two_abilities
    before = right_by_condition(model, scans, ids)
    assert min(before.values()) > 0.9
    state = {k: v.clone() for k, v in model.state_dict().items()}
    plan = plan_pruning(model, None, scans, ratio=ratio, forget=["low"], window=ids.shape[1])
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())
    assert not any(p.requires_grad is False for p in model.parameters())
    functions = plan.details["functions"]
    assert functions["left"][-1]["low"] <= 0.3 or functions["targets"] == 48
    assert functions["left"][0] == {"low": 1.0, "high": 1.0}
    gone = round(ratio * 96) if ratio else functions["targets"]
    assert 96 - sum(plan.widths) == gone
    small = prune(model, plan, calibration=scans, window=ids.shape[1], compensate="least-squares", relearning=False)
    after = right_by_condition(small, scans, ids)
    assert after["low"] < 0.2
    ordinary = lb.PruningPlan.from_dict({**plan.to_dict(), "details": {}})  # control: the same cut, an ordinary repair
    restored = prune(model, ordinary, calibration=scans, window=ids.shape[1], compensate="least-squares")
    assert after["low"] < right_by_condition(restored, scans, ids)["low"] - 0.1
    assert after["high"] > before["high"] - 0.03
    assert all(p.requires_grad for p in small.parameters())
    record = small.llmbrain_pruning[-1]["forgetting"]
    assert record["loss_added"]["low"] > 1 > 0.1 > record["loss_added"]["high"]
    assert record["broken"]["low"] > 0.8
    assert record["broken"]["high"] < 0.03


def test_the_command_forgets(two_abilities, tmp_path):
    from typer.testing import CliRunner

    from llmbrain.cli import app

    model, scans, ids = two_abilities
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    scan(model, tiny_tokenizer(), [s.text for s in scans], out=tmp_path / "study")
    call = ["prune", str(tmp_path / "model"), "--study", str(tmp_path / "study"), "--forget", "low", "--method", "obs"]
    refused = CliRunner().invoke(app, [*call, "--out", str(tmp_path / "none")])
    assert "events" in str(refused.exception) + refused.output
    texts = [Stimulus(s.text, events=s.events, name=s.name) for s in scans]
    scan(model, tiny_tokenizer(), texts, out=tmp_path / "labelled")
    call[3] = str(tmp_path / "labelled")
    result = CliRunner().invoke(app, [*call, "--out", str(tmp_path / "small")])
    assert result.exit_code == 0, result.output
    after = right_by_condition(lb.load_pruned(tmp_path / "small")[0], scans, ids)
    assert after["low"] < 0.2
    assert after["high"] > 0.9
    assert "taught again" in result.output  # the attack is part of what the command says, and of the report
    page = (tmp_path / "small" / "report.html").read_text(encoding="utf-8")
    assert "Taught again: how much of what the dense model knew comes back" in page
    assert "Forgetting, on" in page


def test_the_command_leaves_indices_out(two_abilities, tmp_path):
    """Also where it is called again; and what was made with indices is not taken for it."""
    from typer.testing import CliRunner

    from llmbrain.cli import app

    model, scans, _ = two_abilities
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.json").write_text(json.dumps([s.text for s in scans]))
    call = ["prune", str(tmp_path / "model"), "--text", str(tmp_path / "text.json"), "--method", "magnitude"]
    call += ["--compensate", "none", "--out"]
    for out, options in (("with", []), ("without", ["--no-indices"]), ("without", ["--no-indices"])):
        result = CliRunner().invoke(app, [*call, str(tmp_path / out), *options])
        assert result.exit_code == 0, result.output
        record = json.loads((tmp_path / out / "pruning.json").read_text(encoding="utf-8"))["cuts"][0]
        assert (record["kept"] is None) == (out == "without")
    refused = CliRunner().invoke(app, [*call, str(tmp_path / "with"), "--no-indices"])
    assert isinstance(refused.exception, lb.InputError)
    assert "holds a model already" in str(refused.exception)
    refused = CliRunner().invoke(app, [*call, str(tmp_path / "on_disk"), "--no-indices", "--offload"])
    assert "indices=False" in str(refused.exception)


def test_the_main_job_makes_it_last_and_leaves_indices_out(two_abilities, tmp_path, monkeypatch):
    from llmbrain.pruning.forget import unlearning

    model, scans, _ = two_abilities
    monkeypatch.setattr(unlearning, "STEPS", 2)
    monkeypatch.setattr(unlearning, "MENDS", 0)
    monkeypatch.setattr(unlearning, "HARM", 1.0)
    texts = [Stimulus(s.text, events=s.events, name=s.name) for s in scans]
    options = {"n_components": 2, "forget": ["low"], "last": True, "indices": False, "method": "magnitude"}
    study = lb.run(model, tiny_tokenizer(), texts, out=tmp_path / "s", progress=False, **options)
    assert study.plan.details["functions"]["last"] is True
    assert study.summary["forgetting"]["mended"] == 0
    assert not (tmp_path / "s/plan.json").exists()  # it says where to look, too
    record = json.loads((tmp_path / "s/pruned/pruning.json").read_text(encoding="utf-8"))["cuts"][0]
    assert record["kept"] is None
    assert "kept" not in record["plan"]
    lines = (tmp_path / "s/config.toml").read_text().splitlines()
    assert {"last = true", "indices = false"} <= set(lines)
    assert "forecast" not in study.summary  # of such a repair it knows nothing


def test_the_command_reads_rows_of_unlearning_benchmarks(tmp_path):
    from typer.testing import CliRunner

    from llmbrain.cli import app

    brain = lb.datasets.load_demo()
    brain.model.save_pretrained(tmp_path / "model")
    brain.tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"question": f"{a} + 1?", "answer": str(a + 1)} for a in range(12)]
    (tmp_path / "forget.json").write_text("\n".join(json.dumps(r) for r in rows[:6]))
    (tmp_path / "retain.jsonl").write_text("\n".join(json.dumps(r) for r in rows[6:]))
    call = [
        "scan",
        str(tmp_path / "model"),
        "--out",
        str(tmp_path / "study"),
        "--forget",
        str(tmp_path / "forget.json"),
    ]
    refused = CliRunner().invoke(app, call)
    assert "give --text, or --forget and --retain" in str(refused.exception)
    result = CliRunner().invoke(app, [*call, "--retain", str(tmp_path / "retain.jsonl")])
    assert result.exit_code == 0, result.output
    kinds = [kind for run in lb.load_scans(tmp_path / "study") for kind in run.events["trial_type"]]
    assert sorted(kinds) == ["forget"] * 6 + ["retain"] * 6


def test_what_contradicts_itself_is_refused(two_abilities):
    model, scans, ids = two_abilities
    options = {"method": "magnitude", "window": ids.shape[1]}
    with pytest.raises(lb.InputError, match=r"both name \['low'\]"):
        plan_pruning(model, None, scans, ratio=0.3, keep=["low", "high"], forget="low", **options)
    with pytest.raises(lb.InputError, match="last='no' must be True or False"):
        plan_pruning(model, None, scans, forget="low", last="no", **options)
    twice = plan_pruning(model, None, scans, forget=["low", "low"], last=True, **options)
    assert twice.details["functions"]["forget"] == ["low"]
    for compensate in (None, "bias"):  # last would do nothing
        with pytest.raises(lb.InputError, match="that makes forgetting last"):
            lb.prune(model, twice, calibration=scans, compensate=compensate, relearning=False)


def test_a_repair_that_lasts_forgets_without_a_cut(two_abilities, monkeypatch):
    from llmbrain.pruning.forget import unlearning

    model, scans, ids = two_abilities
    monkeypatch.setattr(unlearning, "STEPS", 60)
    monkeypatch.setattr(unlearning, "MENDS", 0)
    options = {"method": "magnitude", "window": ids.shape[1]}
    plan = plan_pruning(model, None, scans, ratio=0, forget="low", last=True, **options)
    assert plan.removed == plan.ratio == 0
    assert lb.PruningPlan.from_dict(plan.to_dict()).widths == plan.widths_before
    how = {"calibration": scans, "window": ids.shape[1], "compensate": "least-squares", "relearning": False}
    small = prune(model, plan, **how)
    after = right_by_condition(small, scans, ids)
    assert after["low"] < 0.2
    assert after["high"] > 0.9
    assert sum(p.numel() for p in small.parameters()) >= sum(p.numel() for p in model.parameters())
    for wrong in ({"forget": "low"}, {}):  # without last it would do nothing
        with pytest.raises(lb.InputError, match="ratio=0"):
            plan_pruning(model, None, scans, ratio=0, **wrong, **options)
    with pytest.raises(lb.InputError, match="ratio"):
        lb.study.Settings(ratio=0, forget=("low",))
    assert lb.study.Settings(ratio=0, forget=("low",), last=True).ratio == 0


def test_options_of_forgetting_are_refused_where_nothing_is_to_go(two_abilities):
    model, scans, _ = two_abilities
    for option in ({"last": True}, {"attribution": "relp"}):
        with pytest.raises(lb.InputError, match="are options of forget"):
            plan_pruning(model, ratio=0.3, method="magnitude", scans=scans, **option)

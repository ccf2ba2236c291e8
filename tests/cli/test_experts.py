"""``--expert-ratio`` as a person types it."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import torch

import llmbrain as lb
from llmbrain.anatomy.experts import expert_anatomy
from llmbrain.cli import main
from tests.tiny_models import tiny, tiny_tokenizer


def call(monkeypatch: Any, capsys: Any, *arguments: Any) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["llmbrain", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    said = capsys.readouterr()
    return int(stop.value.code or 0), said.out, said.err


def test_plan_info_and_prune(tmp_path: Any, monkeypatch: Any, capsys: Any) -> None:
    model, text, plan, small = (tmp_path / name for name in ("model", "text.json", "plan.json", "small"))
    tiny("mixtral").save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    text.write_text(json.dumps(["abc cab bca the cat sat on a mat and ran", "zyx wvu tsr qpo nml kji"] * 12))
    how = ["--text", text, "--expert-ratio", 0.5, "--method", "reap", "--device", "cpu"]
    code, out, err = call(monkeypatch, capsys, "plan", model, *how, "--out", plan)
    assert code == 0, err
    assert "4 of 8 routed experts stay" in out + err
    code, out, err = call(monkeypatch, capsys, "info", plan)
    assert code == 0, err
    assert "4 of 8 routed experts stay" in out
    code, out, err = call(monkeypatch, capsys, "prune", model, *how, "--out", small)
    assert code == 0, err
    assert "error of the layers' outputs without and with repair: layer 0" in out + err
    assert [routed.count for _, routed in expert_anatomy(lb.load_model(small)[0]).routed] == [2, 2]
    code, out, err = call(monkeypatch, capsys, "plan", model, *how, "--out", plan, "--ratio", 0.3)
    assert code != 0
    assert "together with ratio" in err
    code, out, err = call(monkeypatch, capsys, "prune", model, *how, "--out", tmp_path / "other", "--dry-run")
    assert code != 0
    assert "takes no --dry-run" in err


def test_a_plan_that_was_saved_and_the_whole_job(tmp_path: Any, monkeypatch: Any, capsys: Any) -> None:
    model, text, plan, small = (tmp_path / name for name in ("model", "text.json", "plan.json", "small"))
    tiny("mixtral").save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    text.write_text(json.dumps(["abc cab bca the cat sat on a mat and ran", "zyx wvu tsr qpo nml kji"] * 40))
    how = ["--text", text, "--device", "cpu"]
    code, out, err = call(
        monkeypatch, capsys, "plan", model, *how, "--expert-ratio", 0.5, "--method", "frequency", "--out", plan
    )
    assert code == 0, err
    code, out, err = call(monkeypatch, capsys, "prune", model, "--plan", plan, "--out", small, "--device", "cpu")
    assert code == 0, err
    assert "without repair" in out + err
    assert [routed.count for _, routed in expert_anatomy(lb.load_model(small)[0]).routed] == [2, 2]
    code, out, err = call(
        monkeypatch, capsys, "prune", model, *how, "--ratio", 0.5, "--method", "flap", "--out", tmp_path / "narrow"
    )
    assert code == 0, err
    assert [routed.width for _, routed in expert_anatomy(lb.load_model(tmp_path / "narrow")[0]).routed] == [16, 16]
    code, out, err = call(monkeypatch, capsys, "run", model, *how, "--out", tmp_path / "study")
    assert code != 0
    assert "say method" in err
    code, out, err = call(
        monkeypatch,
        capsys,
        "run",
        model,
        *how,
        "--out",
        tmp_path / "study",
        "--expert-ratio",
        0.5,
        "--components",
        2,
        "--threshold",
        1.0,
    )
    assert code == 0, err
    study = lb.Study(tmp_path / "study")
    assert study.plan.method == "networks"
    assert [len(k) for k in study.plan.kept] == [2, 2]
    assert "Routed experts kept in each layer" in (tmp_path / "study" / "report.html").read_text(encoding="utf-8")


def test_what_a_mixture_does_not_take_is_said_before_any_work(tmp_path: Any, monkeypatch: Any, capsys: Any) -> None:
    model, text = tmp_path / "model", tmp_path / "text.json"
    tiny("mixtral").save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    text.write_text(json.dumps(["abc cab bca the cat sat on a mat and ran"] * 12))
    for command in (["prune", model, "--ratio", 0.4, "--out", tmp_path / "small"], ["plan", model, "--ratio", 0.4]):
        code, out, err = call(monkeypatch, capsys, *command, "--text", text, "--device", "cpu")
        assert code == 2
        assert "method='networks' does not score neurons inside experts" in out + err
        assert "cost" not in out + err
    code, out, err = call(monkeypatch, capsys, "benchmark", model, "--text", text, "--out", tmp_path / "table")
    assert code == 2
    assert "compare plans of expert_ratio=" in out + err
    assert "cost" not in out + err


def test_odd_sizes_in_half_precision_run(tmp_path: Any) -> None:
    """Stock transformers fails at the first token of such a model: torch multiplies groups of rows of 16 bytes only."""
    from tests.families.configs import build

    sizes = {"intermediate_size": 20, "hidden_size": 20, "head_dim": 4, "num_attention_heads": 4}
    model = build("MixtralForCausalLM", "mixtral", mixtral=sizes).bfloat16()
    model.save_pretrained(tmp_path / "model")
    loaded = lb.load_pruned(tmp_path / "model")[0]
    ids = torch.arange(3, 19)[None]
    model.set_experts_implementation("eager")
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits, atol=0.02, rtol=0.02)
    small = lb.prune(loaded, lb.plan_pruning(loaded, expert_ratio=0.5, method="random"))
    for form in ("uniform", "remote-code"):
        lb.save_pruned(small, None, tmp_path / form, format=form)

"""``llmbrain run``: what its files repeat, and what it refuses before any work is done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_calls import call
from tiny_models import CHARACTERS, tiny, tiny_tokenizer

FAST = ("--components", 3, "--method", "magnitude", "--n-tokens", 600, "--eval-tokens", 600)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two models, one of them without biases behind its MLPs, and a text."""
    folder = tmp_path_factory.mktemp("places")
    for name in ("llama", "qwen2"):
        tiny(name, seed=3, intermediate_size=40).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    letters = np.random.default_rng(0).choice(list(CHARACTERS), 3000)
    (folder / "text.txt").write_text("".join(letters))
    return folder


def numbers(folder: Path) -> dict[str, Any]:
    """What a study found, without what a clock says."""
    found = json.loads((folder / "summary.json").read_text())
    for name in ("dense", "pruned"):
        found[name].pop("tokens_per_second")
    return {name: found[name] for name in ("dense", "pruned", "held_out", "sample", "networks")}


def test_a_study_is_repeated_from_anywhere_in_its_precision(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, places: Path
) -> None:
    monkeypatch.chdir(places)
    code, _, err = call(monkeypatch, capsys, "run", "qwen2", "--text", "text.txt", "--out", tmp_path / "a", *FAST,
                        "--model-dtype", "bfloat16", "--protect", "none")  # fmt: skip
    assert code == 0, err
    monkeypatch.chdir(tmp_path)
    code, _, err = call(monkeypatch, capsys, "run", "--config", tmp_path / "a/config.toml", "--out", tmp_path / "b")
    assert code == 0, err
    assert numbers(tmp_path / "a") == numbers(tmp_path / "b")
    assert "protect = []" in (tmp_path / "b/config.toml").read_text()  # the default may be another


@pytest.mark.parametrize("format", ["padded", "masked"])
def test_plain_formats_take_the_default_repair(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, places: Path, format: str
) -> None:
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    code, _, err = call(monkeypatch, capsys, "run", places / "qwen2", "--text", places / "text.txt", "--out", out,
                        *FAST, "--format", format)  # fmt: skip
    assert code == 0, err
    plain = AutoModelForCausalLM.from_pretrained(out / "pruned")
    assert not any("down_proj.bias" in name for name in plain.state_dict())


def test_a_sample_of_one_window_has_no_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, places: Path
) -> None:
    code, out, err = call(monkeypatch, capsys, "run", places / "llama", "--text", places / "text.txt", "--out",
                          tmp_path / "out", *FAST, "--max-windows", 1)  # fmt: skip
    assert code == 0, err
    assert "perplexity_se" in out


REFUSED = [
    (("--protect", 99), "protect=99 is not a layer: allowed are -2 to 1"),
    (("--components", 1000), "n_components=1000 is more than the data allow: 600 tokens"),
    (("--keep", "prose"), "keep and forget need texts with conditions"),
    (("--forget", "prose"), "keep and forget need texts with conditions"),
    (("--ratio", 0.99), "ratio=0.99 leaves 1 of 80 units"),
    (("--multiple-of", 64), "multiple_of=64"),
    (("--head-ratio", 0.9), "head_ratio=0.9 leaves 0 of 4 units"),
    (("--allocation", "nosuch"), "allocation='nosuch' is not known"),
    (("--format", "uniform", "--protect", 0), "one width everywhere protects no layer"),
    (("--format", "uniform", "--allocation", "global"), "one width everywhere is allocation='uniform', not 'global'"),
    (("--format", "uniform", "--head-ratio", 0.5), "cannot say that heads are fewer"),
    (("--format", "padded", "--compensate", "bias"), "compensate='bias': format='padded' has no place"),
    (("--max-windows", 10000), "shorter than the sample"),
    (("--site", "head", "--method", "networks"), "site='head': method='networks' needs networks of neurons"),
]


@pytest.mark.parametrize(("asked", "said"), REFUSED)
def test_what_would_fail_at_its_time_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, places: Path,
    asked: tuple[Any, ...], said: str,
) -> None:  # fmt: skip
    what = ("run", places / "qwen2", "--text", places / "text.txt", "--out", tmp_path / "out", *FAST, *asked)
    for more in ((), ("--dry-run",)):
        code, _, err = call(monkeypatch, capsys, *what, *more)
        assert (code, said in err) == (2, True), err
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["run", "prune", "prune --study"])
@pytest.mark.parametrize("family", ["gemma2", "mixtral"])
def test_a_share_of_errors_that_blocks_do_not_take_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, places: Path, family: str,
    command: str,
) -> None:  # fmt: skip
    tiny(family).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    name, of, read = command.split()[0], "--text", places / "text.txt"
    if "--study" in command:
        study = tmp_path / "study"
        assert call(monkeypatch, capsys, "scan", tmp_path / "model", of, read, "--out", study)[0] == 0
        of, read = "--study", study
    code, _, err = call(monkeypatch, capsys, name, tmp_path / "model", of, read, "--out", tmp_path / "out", "--method",
                        "flap", "--propagation", 0.5)  # fmt: skip
    assert (code, "propagation=0.5: the " in err, "what flap would remove" in err) == (2, True, False), err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("--protect", 99), "protect=99 is not a layer"),
        (("--ratio", 0.99), "ratio=0.99 leaves 1 of 80 units"),
        (("--format", "uniform", "--allocation", "global"), "one width everywhere is allocation='uniform'"),
        (("--format", "masked", "--compensate", "bias"), "compensate='bias': format='masked' has no place"),
    ],
)
def test_prune_refuses_it_before_the_model_writes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, places: Path,
    asked: tuple[Any, ...], said: str,
) -> None:  # fmt: skip
    code, _, err = call(monkeypatch, capsys, "prune", places / "qwen2", "--text", places / "text.txt", "--out",
                        tmp_path / "out", "--method", "magnitude", "--self-text", 4, *asked)  # fmt: skip
    assert (code, said in err) == (2, True), err
    assert "the model writes" not in err


def test_uniform_is_one_width_where_it_is_asked_for_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, places: Path
) -> None:
    code, _, err = call(monkeypatch, capsys, "prune", places / "qwen2", "--text", places / "text.txt", "--out",
                        tmp_path / "out", "--method", "magnitude", "--format", "uniform", "--allocation", "uniform",
                        "--ratio", 0.31)  # fmt: skip
    assert code == 0, err
    assert json.loads((tmp_path / "out/config.json").read_text())["intermediate_size"] == 28
    assert ": 0 B of disk" not in err
    assert "; 0 B of disk" not in err


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("n-tokens = true", "n-tokens=True must be no truth value"),
        ("last = 'yes'", "last='yes' must be true or false"),
        ("indices = 0", "indices=0 must be true or false"),
        ("protect = 7", "protect=7 is not a layer"),
        ("protect = 'none'", None),
        ("drop = 'mlp'", None),
    ],
)
def test_entries_of_a_file_are_what_they_say(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, places: Path, entry: str,
    said: str | None,
) -> None:  # fmt: skip
    (tmp_path / "x.toml").write_text(entry)
    code, _, err = call(monkeypatch, capsys, "run", places / "llama", "--text", places / "text.txt", "--out",
                        tmp_path / "out", "--config", tmp_path / "x.toml", "--dry-run")  # fmt: skip
    assert code == (0 if said is None else 2), err
    assert said is None or said in err


def test_a_text_of_one_word_does_not_end_a_job(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, places: Path
) -> None:
    whole = (places / "text.txt").read_text()
    (tmp_path / "texts.json").write_text(json.dumps(["a", whole[:1000], "b", whole[1000:]]))
    code, _, err = call(monkeypatch, capsys, "run", places / "llama", "--text", tmp_path / "texts.json", "--out",
                        tmp_path / "out", *FAST)  # fmt: skip
    assert code == 0, err
    assert "have fewer than 3 tokens: they are not scanned" in err


@pytest.mark.parametrize("typed", [("--ratio", 0.5), ("--method", "flap"), ("--protect", 0), ("--multiple-of", 8)])
def test_a_plan_is_not_cut_by_other_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, places: Path,
    typed: tuple[Any, ...],
) -> None:  # fmt: skip
    plan = tmp_path / "plan.json"
    code, _, err = call(monkeypatch, capsys, "plan", places / "llama", "--method", "magnitude", "--out", plan)
    assert code == 0, err
    what = ("prune", places / "llama", "--plan", plan, "--compensate", "none", "--out", tmp_path / "small")
    code, _, err = call(monkeypatch, capsys, *what, *typed)
    assert (code, f"--plan and {typed[0]} exclude each other" in err) == (2, True), err
    code, _, err = call(monkeypatch, capsys, *what)
    assert code == 0, err

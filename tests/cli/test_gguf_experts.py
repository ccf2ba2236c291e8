"""``--format gguf`` of a mixture of experts: whole experts and neurons inside them, and what is refused before work."""

from __future__ import annotations

import pytest
from gguf_mixtures import make
from transformers import AutoTokenizer
from typer.testing import CliRunner

import llmbrain as lb
from llmbrain.anatomy.experts import expert_anatomy
from llmbrain.cli import app

WORDS = "Once upon a time there was a little girl. She saw the sun and the big tree and was happy. " * 40


@pytest.fixture
def folder(shared_data, tmp_path):
    pytest.importorskip("gguf")
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "models/stories260K")
    (tmp_path / "text.txt").write_text(WORDS)
    return lb.save_pruned(make("mixtral"), tokenizer, tmp_path / "dense", format="uniform")


def call(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_prune_to_gguf_and_again(folder, tmp_path):
    out, text = tmp_path / "small.gguf", tmp_path / "text.txt"
    line = ["prune", folder, "--text", text, "--expert-ratio", "0.4", "--method", "frequency", "--format", "gguf",
            "--gguf-type", "f32", "--device", "cpu", "--out", out]  # fmt: skip
    made = call(*line)
    assert made.exit_code == 0, made.output
    small = lb.load_model(out)[0]
    assert [r.count for _, r in expert_anatomy(small).routed] == [3, 3, 3]
    assert small.llmbrain_pruning[-1]["kept_experts"]
    before = out.read_bytes()
    again = call(*line)
    assert again.exit_code == 0, again.output
    assert out.read_bytes() == before
    narrow = tmp_path / "narrow.gguf"
    made = call("prune", out, "--text", text, "--ratio", "0.3", "--method", "flap", "--format", "gguf",
                "--device", "cpu", "--out", narrow)  # fmt: skip
    assert made.exit_code == 0, made.output
    assert [(r.count, r.width) for _, r in expert_anatomy(lb.load_model(narrow)[0]).routed] == [(3, 32)] * 3


def test_what_would_differ_is_refused_before_the_work(folder, tmp_path):
    text = tmp_path / "text.txt"
    line = ["prune", folder, "--text", text, "--ratio", "0.3", "--method", "flap", "--format", "gguf",
            "--device", "cpu", "--out", tmp_path / "small.gguf"]  # fmt: skip
    for more in (["--allocation", "global"], ["--protect", "0"]):
        said = call(*line, *more)
        assert "layers are alike" in str(said.exception)
    said = call(
        "prune", folder, "--expert-ratio", "0.4", "--method", "random", "--format", "gguf", "--out", tmp_path / "small"
    )
    assert "must end in .gguf" in str(said.exception)
    assert not (tmp_path / "small.gguf").exists()

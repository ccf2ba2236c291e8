"""A GGUF in, a smaller GGUF out, by the command line; it runs in llama.cpp."""

from __future__ import annotations

import importlib.util

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from typer.testing import CliRunner

import llmbrain as lb
from llmbrain.cli import app


@pytest.fixture
def dense(shared_data, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(shared_data / "models/stories260K")
    assert isinstance(model.config, LlamaConfig)
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "models/stories260K")
    return lb.save_pruned(model, tokenizer, tmp_path / "dense.gguf", format="gguf", gguf_type="f32")


def test_prune_to_gguf(dense, shared_data, tmp_path):
    import json

    stories = json.loads((shared_data / "corpora/tinystories-1000.json").read_text(encoding="utf-8"))
    (tmp_path / "text.json").write_text(json.dumps(stories[:60]), encoding="utf-8")
    out = tmp_path / "small.gguf"
    command = ["prune", str(dense), "--text", str(tmp_path / "text.json"), "--ratio", "0.3", "--method", "flap",
               "--allocation", "global", "--format", "gguf", "--gguf-type", "f16", "--out", str(out)]  # fmt: skip
    with pytest.warns(UserWarning, match="no multiple of 32"):
        done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert out.stat().st_size < dense.stat().st_size / 2
    assert out.with_suffix(".html").is_file()
    model, tokenizer = lb.load_model(out)
    ours = lb.perplexity(model, tokenizer, stories[700:720])
    assert ours < 2.2 * lb.perplexity(*lb.load_model(dense), stories[700:720])
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 0, again.output
    assert "done before" in again.output
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("llama.cpp is not here: pip install 'llmbrain[serve]'")
    from llmbrain.evaluation import LlamaCpp

    ids = tokenizer("Once upon a time, there was a").input_ids
    words = tokenizer.decode(LlamaCpp(out).generate(ids, 12))
    assert len(set(words.split())) > 3, words


def test_the_main_job_writes_a_gguf_too(dense, shared_data, tmp_path):
    stories = lb.load_texts(shared_data / "corpora/tinystories-1000.json")[:30]
    text = tmp_path / "text.txt"
    text.write_text("\n".join(stories), encoding="utf-8")
    command = ["run", str(dense), "--text", str(text), "--out", str(tmp_path / "study"), "--method", "flap",
               "--components", "3", "--multiple-of", "32", "--format", "gguf", "--gguf-type", "f32"]  # fmt: skip
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    study = lb.Study(tmp_path / "study")
    assert (study.folder / "pruned.gguf").is_file()
    assert study.has("pruned")
    assert lb.anatomy.anatomy(study.model).widths == study.plan.widths
    assert 'gguf-type = "f32"' in (study.folder / "config.toml").read_text()

"""ONNX out: uneven, biased, with fewer heads; equal to the model on ONNX Runtime, or refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cli_calls import call
from tiny_models import tiny, tiny_tokenizer
from transformers import AutoModel

import llmbrain as lb
from llmbrain._validation import InputError
from llmbrain.anatomy import anatomy
from llmbrain.anatomy.surgery import add_bias, keep_heads, keep_neurons
from llmbrain.checkpoints import export_onnx
from llmbrain.checkpoints.onnx import run_onnx

for package in ("onnx", "onnxruntime", "onnxscript"):
    pytest.importorskip(package, reason="pip install 'llmbrain[onnx]'")


def uneven(name):
    model = tiny(name)
    for layer, width in zip(anatomy(model).layers, (20, 9)):
        keep_neurons(layer, range(width))
    second = anatomy(model).layers[1]
    if second.out.units > 1 and name != "bloom":  # ALiBi is made for all heads at once
        keep_heads(second, [0])
    for layer in anatomy(model).layers:
        if layer.down.module.bias is None:
            add_bias(layer.down)
            with torch.no_grad():
                layer.down.module.bias.normal_()
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "phi3", "bloom"])
def test_equal_on_onnx_runtime(name, tmp_path):
    model = uneven(name)
    path = export_onnx(model, None, tmp_path / "graph")
    ids = torch.randint(48, (3, 11), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    with torch.no_grad():
        wanted = model(input_ids=ids, attention_mask=mask).logits
    found = torch.from_numpy(run_onnx(path / "model.onnx", {"input_ids": ids, "attention_mask": mask}))
    assert (found - wanted).abs().max() < 1e-4
    assert (path / "config.json").is_file()
    with pytest.raises(FileExistsError, match="already"):
        export_onnx(model, None, path)


def test_positions_that_change_with_the_length_are_refused(tmp_path):
    factors = {"short_factor": [1.0, 1.0], "long_factor": [4.0, 4.0], "rope_theta": 10000.0}
    long = {"rope_type": "longrope", "original_max_position_embeddings": 16, **factors}
    models = {
        "longrope": tiny("phi3", rope_parameters=long, original_max_position_embeddings=16),
        "dynamic": tiny("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}),
    }
    for kind, model in models.items():
        with pytest.raises(InputError, match=f"'{kind}' change with the length of a text"):
            export_onnx(model, None, tmp_path / "graph")
    assert not list(tmp_path.iterdir())


def test_models_without_logits_are_refused(tmp_path):
    headless = AutoModel.from_config(tiny("llama").config)
    with pytest.raises(InputError, match="no language model's head"):
        export_onnx(headless, None, tmp_path / "graph")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_mixtures_are_equal_too_or_refused(tmp_path):
    """`export_onnx` itself holds the graph against the model, on other tokens."""
    import llmbrain as lb

    model = tiny("mixtral")
    model = lb.prune(model, lb.plan_pruning(model, expert_ratio=0.25, method="random"))
    assert export_onnx(model, None, tmp_path / "graph")
    assert model.config._experts_implementation != "batched_mm"


def test_models_of_16_bits_are_exported_in_float32(tmp_path, monkeypatch, capsys):
    model = tiny("llama").to(torch.bfloat16)
    with pytest.raises(InputError, match=r"computes in bfloat16, which ONNX Runtime does in part only: .*float\(\)"):
        export_onnx(model, None, tmp_path / "a")
    lb.save_pruned(model, tiny_tokenizer(), tmp_path / "model")
    code, _, said = call(monkeypatch, capsys, "export", tmp_path / "model", "--out", tmp_path / "graph")
    assert code == 0, said
    assert "the graph computes in float32" in said
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        wanted = model.float()(ids).logits.numpy()
    found = run_onnx(tmp_path / "graph/model.onnx", {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert np.abs(found - wanted).max() < 1e-4

"""ONNX out: uneven, biased, with fewer heads; equal to the model on ONNX Runtime, or refused."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny
from transformers import AutoModel

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
    if second.out.units > 1:
        keep_heads(second, [0])
    for layer in anatomy(model).layers:
        if layer.down.module.bias is None:
            add_bias(layer.down)
            with torch.no_grad():
                layer.down.module.bias.normal_()
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
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

"""What was saved loads, in every program that may open it; what cannot be is refused before anything is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import VOCAB, tiny

import llmbrain.checkpoints.saving as saving
from llmbrain import InputError, load_pruned, plan_pruning, prune, save_pruned
from llmbrain.anatomy.families import anatomy
from llmbrain.anatomy.surgery import add_bias, keep_neurons
from llmbrain.checkpoints.shapes import record_shapes

IDS = torch.arange(3, 3 + 24).reshape(2, 12) % VOCAB


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def pruned(name: str, widths: list[int] | None = None, **options: Any) -> Any:
    model = tiny(name)
    before = anatomy(model).widths
    widths = widths or [w // 2 for w in before]
    plan = plan_pruning(model, ratio=1 - sum(widths) / sum(before), method="random", allocation=widths, **options)
    return prune(model, plan)


def test_layers_of_one_width_with_an_intercept_do_not_open_as_the_stock_model(tmp_path: Path) -> None:
    model = pruned("mistral", [12, 12])
    for layer in anatomy(model).layers:
        torch.nn.init.normal_(add_bias(layer.down))
    record_shapes(model)
    save_pruned(model, None, tmp_path / "m")
    assert torch.equal(logits(load_pruned(tmp_path / "m")[0]), logits(model))
    assert json.loads((tmp_path / "m" / "config.json").read_text())["architectures"] == ["PrunedMistralForCausalLM"]
    with pytest.raises(RuntimeError, match="per-layer"):  # transformers says that it cannot build it
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")


@pytest.mark.parametrize("format", ["per-layer", "uniform"])
def test_a_generation_config_that_transformers_would_not_write(format: str, tmp_path: Path) -> None:
    model = pruned("llama")
    model.generation_config.do_sample, model.generation_config.temperature = False, 0.6
    save_pruned(model, None, tmp_path / "m", format=format)
    said = json.loads((tmp_path / "m" / "generation_config.json").read_text())
    assert said["temperature"] == 0.6
    assert model.generation_config.temperature == 0.6
    assert torch.equal(logits(load_pruned(tmp_path / "m")[0]), logits(model))


def test_saving_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = pruned("llama", [9, 17])
    before = model.config.dtype, model.config.architectures
    save_pruned(model, None, tmp_path / "a")
    assert (model.config.dtype, model.config.architectures) == before
    again = prune(model, plan_pruning(model, ratio=0.2, method="random"))
    save_pruned(again, None, tmp_path / "b", format="remote-code")


def test_what_does_not_load_as_the_model_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pruned("llama", [9, 17])
    write = saving.write_model

    def write_badly(exported: Any, *args: Any) -> None:
        norm = exported.model.norm.weight
        with torch.no_grad():
            norm += 1
            write(exported, *args)
            norm -= 1

    monkeypatch.setattr(saving, "write_model", write_badly)
    for format in ("per-layer", "remote-code", "masked"):
        with pytest.raises(InputError, match="saved and loaded again, the model says something else"):
            save_pruned(model, None, tmp_path / "m", format=format)
        assert not (tmp_path / "m").exists()
    save_pruned(model, None, tmp_path / "m", verify=False)
    assert (tmp_path / "m" / "config.json").is_file()


def test_a_model_that_cannot_run_is_not_saved(tmp_path: Path) -> None:
    model = pruned("llama")
    model.model.layers[0].mlp.down_proj.weight = torch.nn.Parameter(torch.zeros(16, 5))
    with pytest.raises(InputError, match="cannot run"):
        save_pruned(model, None, tmp_path / "m")


def test_adapters_are_to_be_merged_first(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["down_proj", "q_proj"], r=2, init_lora_weights=False)
    wrapped, native = peft.get_peft_model(tiny("llama"), config), tiny("llama")
    native.add_adapter(config)
    plan = plan_pruning(tiny("llama"), ratio=0.5, method="random")
    for model in (wrapped, native):
        with pytest.raises(InputError, match="merge the adapter first"):
            plan_pruning(model, ratio=0.5, method="random")
        with pytest.raises(InputError, match="merge the adapter first"):
            prune(model, plan)
        with pytest.raises(InputError, match="merge the adapter first"):
            save_pruned(model, None, tmp_path / "m")
    assert not (tmp_path / "m").exists()
    merged = wrapped.merge_and_unload()
    save_pruned(prune(merged, plan_pruning(merged, ratio=0.5, method="random")), None, tmp_path / "m")


class Odd(torch.nn.Module):
    """Blocks of no family: names that no row has, and a model's width of 16."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(
            torch.nn.ModuleDict(
                {"make": torch.nn.Linear(16, width), "act": torch.nn.GELU(), "back": torch.nn.Linear(width, 16)}
            )
            for _ in range(3)
        )


def test_an_mlp_as_wide_as_the_stream_is_found_again() -> None:
    model = Odd()
    for layer in anatomy(model).layers:
        keep_neurons(layer, range(16))
    assert anatomy(model).widths == (16, 16, 16)
    assert [layer.down.path for layer in anatomy(model).layers] == [f"blocks.{i}.back" for i in range(3)]
    model = Odd()
    keep_neurons(anatomy(model).layers[1], range(16))
    vars(model.blocks[1]).pop("llmbrain_mlp")  # as in a model that was loaded by others
    assert anatomy(model).widths == (24, 16, 24)


@pytest.mark.parametrize("name", ["gpt_neo", "codegen", "mpt"])
def test_families_that_end_at_the_width_of_the_stream(name: str, tmp_path: Path) -> None:
    model = pruned(name, [16, 19])
    save_pruned(model, None, tmp_path / "m")
    assert anatomy(load_pruned(tmp_path / "m")[0]).widths == (16, 19)

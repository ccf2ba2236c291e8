"""Where the weights of a model go."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import tiny, tiny_tokenizer

import llmbrain as lb
from llmbrain import InputError
from llmbrain.anatomy.offload import is_away
from llmbrain.checkpoints.placing import blocks_on_disk

IDS = torch.arange(2, 14)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("options", "message"), [
    ({"device_map": "auto", "device": "cpu"}, "device_map='auto' and device='cpu' exclude each other"),
    ({"device_map": {"": "cpu"}, "offload": True}, "exclude each other"),
    ({"device_map": "everywhere"}, "device='everywhere' is not a device"),
    ({"device_map": {}}, "must name modules"),
    ({"device_map": {"": 99}}, r"device_map: '' goes to device 99, and there are \d+ here, counted from 0"),
    ({"device_map": {"": -1}}, "goes to device -1"),
    ({"device_map": {"model": "gpu7", "lm_head": "cpu"}}, "device='gpu7' is not a device"),
    ({"device_map": {"model.layers.0": "disk"}}, "does not fit this model: .* does not give any device for"),
    ({"device_map": {"model.nothing": "disk"}}, "does not fit this model"),
    ({"dtype": "float3"}, "dtype='float3' is not known"),
    ({"dtype": "int8"}, "no type that a model computes in"),
])  # fmt: skip
def test_bad_input(folder: Path, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        lb.load_model(folder, **options)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "falcon", "bert"])
def test_all_that_is_in_no_block_is_on_the_device(name: str) -> None:
    model = tiny(name)
    where = blocks_on_disk(model, "cpu")
    on_disk = [m for m, place in where.items() if place == "disk"]
    assert len(on_disk) == 2
    covered = [n for n, _ in model.named_parameters() if any(n == m or n.startswith(f"{m}.") for m in where)]
    assert covered == [n for n, _ in model.named_parameters()]


def test_dtype(folder: Path) -> None:
    for options in ({}, {"offload": True}, {"device_map": "auto"}):
        model, _ = lb.load_model(folder, dtype="bfloat16", **options)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        with torch.no_grad():
            assert model(input_ids=IDS).logits.dtype == torch.bfloat16


def test_a_gguf_is_spread_but_not_offloaded(tmp_path: Path, shared_data: Path) -> None:
    model, tokenizer = lb.load_model(shared_data / "models" / "stories260K")
    file = lb.save_pruned(model, tokenizer, tmp_path / "m.gguf", format="gguf", gguf_type="f32")
    whole, _ = lb.load_model(file)
    with pytest.raises(InputError, match="GGUF is dequantized whole"):
        lb.load_model(file, offload=True)
    places = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu",
              "lm_head": "cpu"}  # fmt: skip
    for device_map in ("auto", places):
        placed, _ = lb.load_model(file, device_map=device_map)
        assert is_away(placed) == (device_map is places)
        with torch.no_grad():
            assert torch.equal(placed(input_ids=IDS).logits, whole(input_ids=IDS).logits)


def test_hooks_without_offloading_are_in_nobodys_way(folder: Path) -> None:
    """As on several GPUs: accelerate's hooks on every module, all weights in memory."""
    from accelerate import dispatch_model

    whole, _ = lb.load_model(folder)
    placed = dispatch_model(lb.load_model(folder)[0], {"": "cpu"}, force_hooks=True)
    windows = torch.randint(2, 40, (24, 16), generator=torch.Generator().manual_seed(0))
    plans = [lb.plan_pruning(m, ratio=0.4, method="obs-gradient", calibration=windows) for m in (whole, placed)]
    assert plans[0].to_dict() == plans[1].to_dict()
    small = [lb.prune(m, plans[0], calibration=windows, compensate="least-squares") for m in (whole, placed)]
    with torch.no_grad():
        assert torch.equal(small[0](input_ids=IDS).logits, small[1](input_ids=IDS).logits)

"""Models spread over ranks by transformers (tensor parallelism): what is scanned, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rank_jobs import TEXTS, ended, results, start
from tiny_models import tiny, tiny_tokenizer
from torch import nn

import llmbrain as lb
from llmbrain import InputError
from llmbrain.anatomy.families import anatomy
from llmbrain.anatomy.spread import is_spread, parts_of, refuse_spread
from llmbrain.distributed import ALONE
from llmbrain.scanning.columns import Columns

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"intermediate_size": 25}),  # which two ranks do not share evenly
    "qwen3": ("qwen3", {}),
    "phi3": ("phi3", {}),
    "gpt2": ("gpt2", {}),
    "heads": ("llama", {"num_key_value_heads": 1}),
    "mixtral": ("mixtral", {}),
}


def save(folder: Path, *names: str) -> None:
    for name in names:
        family, changes = MODELS[name]
        tiny(family, **changes).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)


def near(one: np.ndarray, other: np.ndarray, tolerance: float) -> bool:
    return one.shape == other.shape and float(np.abs(one - other).max()) < tolerance * float(np.abs(other).max())


def test_a_model_spread_over_ranks_is_scanned_as_it_is_whole(tmp_path: Path) -> None:
    save(tmp_path, *MODELS)
    whole, tokenizer = lb.load_model(tmp_path / "llama")
    lb.plan_pruning(whole, ratio=0.4, method="magnitude").save(tmp_path / "plan.json")
    zero, one = results(2, "spread", tmp_path)

    for name, sites in {"llama": ("neuron", "gate", "up", "mlp_out", "block_out", "head"),
                        "qwen3": ("neuron", "up", "head"), "phi3": ("neuron", "gate")}.items():  # fmt: skip
        alone, _ = lb.load_model(tmp_path / name)
        wanted = lb.scan(alone, tokenizer, TEXTS, out=tmp_path / f"{name}-one", site=sites, batch_size=4)
        found = lb.load_scans(tmp_path / f"{name}-scan")
        for a, b in zip(found, wanted):
            assert all(near(a.data(site=site), b.data(site=site), 1e-5) for site in sites)
        studies = [json.loads((tmp_path / f"{name}-{of}/manifest.json").read_text())["study"] for of in ("scan", "one")]
        assert studies[0] == studies[1]
    # One process goes on where several stopped.
    (tmp_path / "llama-scan/shards/0001.safetensors").unlink()
    sites = ("neuron", "gate", "up", "mlp_out", "block_out", "head")
    lb.scan(whole, tokenizer, TEXTS, out=tmp_path / "llama-scan", site=sites, batch_size=4)
    half = lb.load_model(tmp_path / "llama", dtype="bfloat16")[0]
    wanted = lb.scan(half, tokenizer, TEXTS, batch_size=4)
    assert near(np.array(zero["values"]), wanted[3].data(), 0.03)
    for found in (zero, one):
        assert found["kept"] == zero["kept"]
        assert found["half"] == zero["half"]
        assert found["perplexity"] == pytest.approx(lb.perplexity(whole, tokenizer, TEXTS, window=16), rel=1e-5)
        assert "no tensor-parallel plan for GPT2LMHeadModel" in found["gpt2"]
        assert "4 heads (1 of keys) of layer 0 do not divide into 2 ranks" in found["heads"]
        assert "a mixture of experts is not scanned over ranks" in found["mixture"]
        assert "site='up', layer 0: its projection holds gate and up" in found["fused"] or found["fused"] == "no error"
        for what in ("plan", "prune", "save", "lesion", "table"):
            assert "is spread over ranks (tp_plan)" in found[what], (what, found[what])
            assert "llmbrain prune --offload" in found[what]
        assert "tp_plan='auto' and device_map exclude each other" in found["both"]
        assert "rank 1 of 2 was given other runs_sha256 than rank 0" in found["other"]
        assert "the disk is gone" in found["disk"]
        assert "nan in neuron of layer 1, neuron 13, at token 0 of" in found["nan"]


@pytest.mark.slow
def test_a_killed_rank_of_a_spread_model_is_named(tmp_path: Path) -> None:
    save(tmp_path, "llama")
    (code, _, error), (died, _, _) = ended(start(2, "killed_spread", tmp_path, timeout=4))
    assert (code, died) == (2, -9), error
    assert "rank 1 of 2 is gone" in error
    assert "the same command goes on from there" in error
    model, tokenizer = lb.load_model(tmp_path / "llama")
    assert len(lb.scan(model, tokenizer, TEXTS, out=tmp_path / "study", batch_size=4)) == len(TEXTS)


def test_one_process_is_told_how_to_start_several(tmp_path: Path) -> None:
    save(tmp_path, "llama")
    with pytest.raises(InputError, match="this process is alone: torchrun --nproc-per-node 2"):
        lb.load_model(tmp_path / "llama", tp_plan="auto")


class DTensor(torch.Tensor):
    """A tensor that says it is a part, as torch's own does; so that parts are seen without processes."""

    device_mesh: Any
    placements: Any


class Shard:
    def __init__(self, dim: int) -> None:
        self.dim = dim


class Mesh:
    def size(self) -> int:
        return 3


def spread(weight: torch.Tensor, *placements: Any) -> nn.Parameter:
    part = weight.detach().as_subclass(DTensor)
    part.device_mesh, part.placements = Mesh(), placements
    made = nn.Parameter(part, requires_grad=False)
    made.device_mesh, made.placements = Mesh(), placements  # type: ignore[attr-defined]
    return made


def test_parts_are_runs_of_columns_or_refused() -> None:
    model: Any = tiny("llama", intermediate_size=25)
    layer = anatomy(model).layers[0]
    assert not is_spread(model)
    assert parts_of(layer.down.module.weight, 1) is None
    for placements, found in (((Shard(1),), [9, 9, 7]), ((Shard(-1),), [9, 9, 7]), ((Shard(0),), None),
                              ((Shard(1), Shard(1)), None), ((object(),), None)):  # fmt: skip
        model.model.layers[0].mlp.down_proj.weight = spread(torch.zeros(16, 25), *placements)
        assert is_spread(model)
        assert parts_of(anatomy(model, spread=True).layers[0].down.module.weight, 1) == found
    with pytest.raises(InputError, match=r"prune: model.layers.0.mlp.down_proj.weight is spread over ranks"):
        refuse_spread(model, "prune")
    for call in (lb.anatomy.families.anatomy, lambda m: lb.plan_pruning(m, ratio=0.3, method="magnitude")):
        with pytest.raises(InputError, match="is spread over ranks"):
            call(model)


class Told:
    """Ranks that say what they hear."""

    size, rank = 3, 1

    def __init__(self, heard: list[int]) -> None:
        self.heard = heard

    def gather(self, what: str, value: dict[str, int]) -> list[dict[str, int]]:
        return [dict.fromkeys(value, n) for n in self.heard]


@pytest.mark.parametrize(("heard", "parts"), [
    ([9, 9, 7], [9, 9, 7]), ([25, 25, 25], None), ([9, 9, 9], "refused"), ([7, 9, 9], "refused"),
    ([25, 25, 7], "refused"),
])  # fmt: skip
def test_what_ranks_hear_must_make_the_whole(heard: list[int], parts: Any) -> None:
    model: Any = tiny("llama", intermediate_size=25)
    model.model.layers[0].mlp.down_proj.weight = spread(torch.zeros(16, 25), Shard(1))
    body = anatomy(model, spread=True)
    kinds = {("neuron", 0): (torch.float32, heard[1])}
    team: Any = Told(heard)
    if parts == "refused":
        with pytest.raises(InputError, match="which is not a run of them each"):
            Columns.of(team, body, kinds)
        return
    columns, joined = Columns.of(team, body, kinds)
    assert joined["neuron", 0][1] == 25
    assert columns.parts == ({} if parts is None else {("neuron", 0): parts})
    stored = torch.arange(50.0).reshape(2, 25)
    own = columns.own(("neuron", 0), stored)
    assert torch.equal(own, stored if parts is None else stored[:, 9:18])


def test_alone_all_is_ones_own() -> None:
    columns = Columns(ALONE, {("neuron", 0): [4]})
    signal = torch.ones(2, 4)
    assert torch.equal(columns.joined({("neuron", 0): signal}, 0)["neuron", 0], signal)
    with pytest.raises(InputError, match="once"):
        columns.agreed(lambda: (_ for _ in ()).throw(InputError("once")))

"""Models of which only a block is in memory: scanned, lesioned, measured, planned and cut as if they were whole."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import tiny, tiny_tokenizer

import llmbrain as lb
from llmbrain import InputError
from llmbrain.anatomy.offload import give_back, is_away, present
from llmbrain.pruning.criteria import CRITERIA
from llmbrain.scanning import taking
from llmbrain.scanning.manifest import weights_sum

TEXTS = ["the cat sat on the mat, and the dog ran away. " * 3, "who is there? nobody, said the bird in the tree. " * 3]
WINDOWS = torch.randint(2, 40, (24, 16), generator=torch.Generator().manual_seed(0))


def saved(name: str, folder: Path, **changes: object) -> Path:
    """A tiny model in a folder."""
    model = tiny(name, num_hidden_layers=3, **changes)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def saved_tokenizer(folder: Path) -> Path:
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("llama", tmp_path_factory.mktemp("model") / "llama")


ALL_ON_DISK = {"model.embed_tokens": "disk", "model.layers": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu",
               "lm_head": "disk"}  # fmt: skip
PLACES = {
    "offload": {"offload": True},
    "disk": {"device_map": ALL_ON_DISK},
    "cpu": {"device_map": {"": "cpu"}},
    "auto": {"device_map": "auto"},
}


@pytest.fixture(scope="module", params=PLACES)
def pair(request: pytest.FixtureRequest, folder: Path) -> tuple[torch.nn.Module, torch.nn.Module, object]:
    """The model in memory, and the same placed otherwise."""
    whole, tokenizer = lb.load_model(folder)
    placed, _ = lb.load_model(folder, **PLACES[request.param])
    assert is_away(placed) == (request.param in ("offload", "disk"))
    return whole, placed, tokenizer


def test_scan_lesion_and_evaluation_are_the_same(pair) -> None:
    whole, placed, tokenizer = pair
    scans = [lb.scan(model, tokenizer, TEXTS) for model in (whole, placed)]
    for one, other in zip(*scans):
        assert np.array_equal(one.data(), other.data())
    assert lb.perplexity(placed, tokenizer, TEXTS, window=16) == lb.perplexity(whole, tokenizer, TEXTS, window=16)
    networks = lb.FunctionalNetworks.from_ica(lb.GroupICA(3, random_state=0).fit(scans[0]), threshold=1.0)
    for value, more in (("zero", {}), ("mean", {"reference": WINDOWS})):
        said = []
        for model in (whole, placed):
            with lb.lesion(model, networks[0], value=value, **more), torch.no_grad():
                said.append(model(input_ids=WINDOWS[:2]).logits)
        assert torch.equal(*said)
        assert not torch.equal(said[0], whole(input_ids=WINDOWS[:2]).logits)
    tables = [
        lb.lesion_table(model, networks, {"text": TEXTS}, tokenizer=tokenizer, n_random=2, window=16, random_state=0)
        for model in (whole, placed)
    ]
    np.testing.assert_allclose(tables[1].frame["effect"], tables[0].frame["effect"], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(tables[1].frame["random_effect"], tables[0].frame["random_effect"], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", sorted(set(CRITERIA) - {"published", "taylor", "relp", "shortgpt", "2ssp"}))
def test_plans_are_the_same(folder: Path, method: str) -> None:
    whole, _ = lb.load_model(folder)
    for place in ("offload",) if method == "networks" else ("offload", "disk"):
        placed, _ = lb.load_model(folder, **PLACES[place])
        plans = [
            lb.plan_pruning(
                m, ratio=0.4, method=method, calibration=WINDOWS, random_state=0, passes=7,
                head_ratio=0.5 if method in ("flap", "networks") else 0.0,
            )
            for m in (whole, placed)
        ]  # fmt: skip
        assert plans[0].to_dict() == plans[1].to_dict()
        assert is_away(placed)
        with torch.no_grad():  # nothing that was tried is left behind
            assert torch.equal(placed(input_ids=WINDOWS[:2]).logits, whole(input_ids=WINDOWS[:2]).logits)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(lb.load_pruned(folder)[0].state_dict())


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "falcon", "bert"])
@pytest.mark.parametrize(("compensate", "sequential"), [(None, True), ("bias", True), ("least-squares", False),
                                                        ("least-squares", True)])  # fmt: skip
def test_pruning_block_by_block_equals_pruning_in_memory(
    tmp_path: Path, name: str, compensate: str | None, sequential: bool
) -> None:
    if name != "llama" and compensate != "least-squares":
        pytest.skip("of the other families one repair is tried")
    changes = {"n_layer": 3} if name == "gpt2" else {}
    model = tiny(name, **(changes or {"num_hidden_layers": 3}))
    model.save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    whole, tokenizer = lb.load_model(tmp_path / "m")
    placed, _ = lb.load_model(tmp_path / "m", offload=True)
    heads = {"head_ratio": 0.5} if name == "llama" else {}
    plan = lb.plan_pruning(whole, ratio=0.4, method="flap", allocation="global", calibration=WINDOWS, **heads)
    how = {"calibration": WINDOWS, "compensate": compensate, "sequential": sequential}
    if compensate == "least-squares" and sequential and name not in ("gemma3", "bert"):
        how["propagation"] = 0.5  # what these families refuse is tested with the repair
    lb.save_pruned(lb.prune(whole, plan, **how), tokenizer, tmp_path / "a")
    lb.prune_offloaded(placed, plan, tmp_path / "b", tokenizer=tokenizer, **how)
    one, other = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    for file in ("config.json", "generation_config.json"):
        if (tmp_path / "a" / file).is_file():
            assert json.loads((tmp_path / "a" / file).read_text()) == json.loads((tmp_path / "b" / file).read_text())
    with torch.no_grad():  # the model that was cut is as it was
        assert torch.equal(placed(input_ids=WINDOWS[:2])[0], whole(input_ids=WINDOWS[:2])[0])
    if name != "llama":
        return
    again, _ = lb.load_model(tmp_path / "b", offload=True)  # what was cut is read block by block too, and cut again
    lb.prune_offloaded(
        again, lb.plan_pruning(again, ratio=0.3, method="magnitude"), tmp_path / "c", tokenizer=tokenizer
    )
    assert sum(p.numel() for p in lb.load_pruned(tmp_path / "c")[0].parameters()) < sum(
        v.numel() for v in other.values()
    )


def test_models_that_are_partly_or_wholly_in_memory_are_taken_too(tmp_path: Path, folder: Path) -> None:
    places = {"model.embed_tokens": "disk", "model.layers.0": "disk", "model.layers.1": "cpu", "model.layers.2": "disk",
              "model.norm": "disk", "model.rotary_emb": "cpu", "lm_head": "disk"}  # fmt: skip
    whole, tokenizer = lb.load_model(folder)
    before = {name: value.clone() for name, value in whole.state_dict().items()}
    plan = lb.plan_pruning(whole, ratio=0.4, method="flap", allocation="global", calibration=WINDOWS, head_ratio=0.5)
    how = {"calibration": WINDOWS, "compensate": "least-squares"}
    wanted = lb.prune(whole, plan, **how).state_dict()
    for i, model in enumerate((whole, lb.load_model(folder, device_map=places)[0])):
        got = weights(lb.prune_offloaded(model, plan, tmp_path / str(i), tokenizer=tokenizer, **how))
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert all(torch.equal(value, before[name]) for name, value in whole.state_dict().items())


def test_stock_transformers_loads_what_is_uniform(tmp_path: Path, folder: Path) -> None:
    from transformers import LlamaForCausalLM

    placed, tokenizer = lb.load_model(folder, offload=True)
    plan = lb.plan_pruning(placed, ratio=0.5, method="wanda-sp", calibration=WINDOWS)
    lb.prune_offloaded(placed, plan, tmp_path / "u", tokenizer=tokenizer, calibration=WINDOWS,
                       compensate="least-squares", intercept=False, format="uniform")  # fmt: skip
    stock, found = LlamaForCausalLM.from_pretrained(tmp_path / "u", output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    small = lb.prune(lb.load_model(folder)[0], plan, calibration=WINDOWS, compensate="least-squares", intercept=False)
    with torch.no_grad():
        assert torch.equal(stock(input_ids=WINDOWS[:2]).logits, small(input_ids=WINDOWS[:2]).logits)


def test_only_a_block_is_ever_in_memory(tmp_path: Path) -> None:
    """Of the blocks' weights never more than one block's and those of its smaller copy hold values."""
    folder = saved("llama", tmp_path / "m", intermediate_size=64)
    placed, tokenizer = lb.load_model(folder, offload=True)
    blocks = [layer.block for layer in lb.anatomy.families.anatomy(placed).layers]
    one = sum(p.numel() for p in blocks[0].parameters())
    most = 0

    def count(*_: object) -> None:
        nonlocal most
        held = sum(p.numel() for block in blocks for p in block.parameters() if not p.is_meta)
        most = max(most, held)

    handles = [part.register_forward_hook(count) for block in blocks for part in block.modules()]
    options = {"calibration": WINDOWS, "compensate": "least-squares"}
    plan = lb.plan_pruning(placed, ratio=0.4, method="obs-gradient", calibration=WINDOWS)
    lb.prune_offloaded(placed, plan, tmp_path / "b", tokenizer=tokenizer, **options)
    for handle in handles:
        handle.remove()
    assert 0 < most <= one
    assert not any(not p.is_meta for block in blocks for p in block.parameters())


@pytest.mark.skipif(sys.platform != "linux", reason="reads the kernel's own count of memory")
def test_memory_does_not_grow_with_blocks(tmp_path: Path) -> None:
    """What 12 blocks take at most is, within two blocks, what 4 take: the kernel's peak, all copies counted."""

    def memory(name: str) -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(next(line for line in status.splitlines() if line.startswith(name)).split()[1])

    sizes = {"hidden_size": 768, "intermediate_size": 256, "num_attention_heads": 8, "num_key_value_heads": 8}
    above, block = {}, 4 * (4 * 768**2 + 3 * 768 * 256)
    for n in (4, 12):
        folder = tmp_path / f"{n}"
        tiny("llama", num_hidden_layers=n, **sizes).save_pretrained(folder, max_shard_size="20MB")
        placed, _ = lb.load_model(saved_tokenizer(folder), offload=True)
        plan = lb.plan_pruning(placed, ratio=0.4, method="magnitude")
        gc.collect()
        give_back()
        Path("/proc/self/clear_refs").write_text("5")
        before = memory("VmRSS")
        how = {"calibration": WINDOWS, "compensate": "least-squares"}
        lb.prune_offloaded(placed, plan, tmp_path / f"{n}-small", **how)
        above[n] = memory("VmHWM") - before
        del placed
    assert above[12] - above[4] < 2 * block, {n: round(size / block, 1) for n, size in above.items()}


def test_offloaded_models_are_not_cut_in_place(folder: Path, tmp_path: Path) -> None:
    placed, tokenizer = lb.load_model(folder, offload=True)
    plan = lb.plan_pruning(placed, ratio=0.4, method="magnitude")
    with pytest.raises(InputError, match=r"model.layers.0.* offloaded.*llmbrain prune --offload"):
        lb.prune(placed, plan)
    with pytest.raises(InputError, match=r"save_pruned.*offloaded"):
        lb.save_pruned(placed, tokenizer, tmp_path / "s")
    with pytest.raises(InputError, match=r"taylor.*offloaded"):
        lb.plan_pruning(placed, ratio=0.4, method="taylor", calibration=WINDOWS)
    with pytest.raises(InputError, match=r"relp.*offloaded"):
        lb.plan_pruning(placed, ratio=0.4, method="relp", calibration=WINDOWS)
    with pytest.raises(InputError, match="gguf"):
        lb.prune_offloaded(placed, plan, tmp_path / "s", format="gguf")
    lb.prune_offloaded(placed, plan, tmp_path / "s", tokenizer=tokenizer)
    with pytest.raises(FileExistsError, match="holds a model already"):
        lb.prune_offloaded(placed, plan, tmp_path / "s", tokenizer=tokenizer)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_a_scan_of_offloaded_weights_is_that_of_the_whole_model(tmp_path: Path, name: str) -> None:
    """Its weights are known, wherever they are: one goes on where the other stopped, another model is refused."""
    changes = {"n_layer": 3} if name == "gpt2" else {"num_hidden_layers": 3}
    for seed, folder in enumerate(("m", "other")):
        model = tiny(name, seed=seed, **changes)
        if seed:  # only what is in a block differs
            model.load_state_dict(lb.load_model(tmp_path / "m")[0].state_dict())
            with torch.no_grad():
                lb.anatomy.families.anatomy(model).layers[1].down.module.weight[3] += 0.1
        model.save_pretrained(saved_tokenizer(tmp_path / folder), max_shard_size="5KB")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 2
    whole, tokenizer = lb.load_model(tmp_path / "m")
    placed, other = (lb.load_model(tmp_path / folder, offload=True)[0] for folder in ("m", "other"))
    everywhere, _ = lb.load_model(tmp_path / "m", device_map={"": "disk"}) if name == "llama" else (placed, None)
    sums = [weights_sum(model) for model in (whole, placed, everywhere, other)]
    assert sums[0] == sums[1] == sums[2] != sums[3]
    assert weights_sum(placed, away=False) == weights_sum(other, away=False) != sums[0]
    assert is_away(placed)
    with taking(0, 2):
        lb.scan(placed, tokenizer, TEXTS, out=tmp_path / "scan", run_length=16, batch_size=1)
    with taking(1, 2), pytest.raises(InputError, match="another study: its weights_sum is"):
        lb.scan(other, tokenizer, TEXTS, out=tmp_path / "scan", run_length=16, batch_size=1)
    lb.scan(whole, tokenizer, TEXTS, out=tmp_path / "scan", run_length=16, batch_size=1)


def test_what_is_not_cut_block_by_block_is_said_before_the_plan(tmp_path: Path, folder: Path) -> None:
    from llmbrain.study import smaller

    placed, tokenizer = lb.load_model(folder, offload=True)
    mixture, _ = lb.load_model(saved("mixtral", tmp_path / "x"), offload=True)
    for model, options, message in (
        (placed, {"keep": ["a"]}, "keeps or forgets functions is not cut block by block"),
        (placed, {"format": "gguf"}, "format='gguf'"),
        (mixture, {"method": "magnitude"}, "experts are not cut block by block yet"),
    ):
        with pytest.raises(InputError, match=message):
            smaller.cut(model, tokenizer, TEXTS, out=tmp_path / "s", offload=True, **options)
    plan = lb.plan_pruning(lb.load_model(tmp_path / "x")[0], ratio=0.4, method="magnitude")
    with pytest.raises(InputError, match="experts are not cut block by block yet"):
        lb.prune_offloaded(mixture, plan, tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_weights_in_half_precision_and_many_files(tmp_path: Path) -> None:
    """As people have them: bfloat16, shards, tied embeddings, biases."""
    model = tiny("qwen2", num_hidden_layers=3, dtype=torch.bfloat16, tie_word_embeddings=True)
    model.save_pretrained(saved_tokenizer(tmp_path / "m"), max_shard_size="5KB")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 2
    whole, tokenizer = lb.load_model(tmp_path / "m")
    placed, _ = lb.load_model(tmp_path / "m", offload=True)
    plan = lb.plan_pruning(whole, ratio=0.4, method="flap", allocation="global", calibration=WINDOWS)
    assert plan.to_dict() == lb.plan_pruning(
        placed, ratio=0.4, method="flap", allocation="global", calibration=WINDOWS).to_dict()  # fmt: skip
    how = {"calibration": WINDOWS, "compensate": "least-squares"}
    lb.save_pruned(lb.prune(whole, plan, **how), tokenizer, tmp_path / "a")
    lb.prune_offloaded(placed, plan, tmp_path / "b", tokenizer=tokenizer, **how)
    one, other = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert one.keys() == other.keys()
    assert all(one[name].dtype == torch.bfloat16 and torch.equal(one[name], other[name]) for name in one)


def test_a_failure_leaves_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmbrain.checkpoints.parts import Parts

    placed, tokenizer = lb.load_model(folder, offload=True)
    plan = lb.plan_pruning(placed, ratio=0.4, method="magnitude")
    monkeypatch.setattr(Parts, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        lb.prune_offloaded(placed, plan, tmp_path / "s", tokenizer=tokenizer)
    assert list(tmp_path.iterdir()) == []
    with torch.no_grad():
        whole, _ = lb.load_model(folder)
        assert torch.equal(placed(input_ids=WINDOWS[:2])[0], whole(input_ids=WINDOWS[:2])[0])


def test_present_is_nested_and_leaves_nothing(folder: Path) -> None:
    placed, _ = lb.load_model(folder, offload=True)
    block = lb.anatomy.families.anatomy(placed).layers[1].block
    with present(block):
        with present(block):
            pass
        assert not is_away(block)
        with torch.no_grad():
            placed(input_ids=WINDOWS[:1])
        assert not any(p.is_meta for p in block.parameters())
    assert all(p.is_meta for p in block.parameters())
    assert is_away(block)


def test_mixtures_of_experts(tmp_path: Path) -> None:
    folder = saved("mixtral", tmp_path / "m")
    whole, tokenizer = lb.load_model(folder)
    placed, _ = lb.load_model(folder, offload=True)
    assert is_away(placed)
    for one, other in zip(*(lb.scan(model, tokenizer, TEXTS) for model in (whole, placed))):
        assert np.array_equal(one.data(), other.data())
    plans = [lb.plan_pruning(m, expert_ratio=0.5, method="reap", calibration=WINDOWS) for m in (whole, placed)]
    assert plans[0].kept == plans[1].kept
    with pytest.raises(InputError, match="offloaded"):
        lb.prune(placed, plans[0])
    with pytest.raises(InputError, match="block by block"):
        lb.prune_offloaded(placed, plans[0], tmp_path / "s")


def test_whole_blocks_are_chosen_in_memory_and_cut_anywhere(folder: Path, tmp_path: Path) -> None:
    whole, tokenizer = lb.load_model(folder)
    placed, _ = lb.load_model(folder, **PLACES["offload"])
    with pytest.raises(InputError, match="load it whole to drop parts"):
        lb.plan_pruning(placed, ratio=0.4, method="shortgpt", calibration=WINDOWS)
    plan = lb.plan_pruning(whole, ratio=0.4, method="shortgpt", calibration=WINDOWS)
    lb.prune_offloaded(placed, plan, tmp_path / "small", tokenizer=tokenizer)
    found, wanted = lb.load_model(tmp_path / "small")[0], lb.prune(whole, plan)
    with torch.no_grad():
        assert torch.equal(found(WINDOWS[:1]).logits, wanted(WINDOWS[:1]).logits)

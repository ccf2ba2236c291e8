"""What each step would take, from a config alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cli_calls import call
from tiny_models import MODELS, tiny, tiny_tokenizer

import llmbrain as lb
from llmbrain import InputError
from llmbrain.study.cost import Subject
from llmbrain.study.machines import GPUS
from tests.families.configs import build, rows

SEVEN = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "hidden_size": 4096,
    "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    "vocab_size": 32000, "max_position_embeddings": 4096,
}  # fmt: skip
MIXTURE = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "dtype": "bfloat16", "hidden_size": 2048,
    "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8,
    "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
    "vocab_size": 151936, "max_position_embeddings": 40960, "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip


@pytest.fixture(scope="module")
def seven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("config") / "config.json"
    file.write_text(json.dumps(SEVEN))
    return file


def test_sizes_of_a_7b_model(seven: Path) -> None:
    found = lb.estimate(seven, gpu="h100")
    assert found.subject.parameters == 6_738_415_616
    assert found.subject.size == 2 * 6_738_415_616
    assert found.subject.n_neurons == 352_256
    assert found.scan_bytes_per_1000_tokens == 352_256 * 2 * 1000
    assert lb.estimate(seven.parent, gpu="h100").subject == found.subject  # the folder
    assert lb.estimate(seven, gpu="h100", dtype="float32").subject.size == 2 * found.subject.size
    frame = found.frame.set_index("step")
    assert {"scan", "group ICA", "networks", "plan (obs)", "plan (networks)", "repair", "save"} <= set(frame.index)
    assert (frame[["seconds", "memory"]] > 0).all().all()
    assert frame.loc["scan", "disk"] == 32768 * 352_256 * 2
    assert frame.loc["scan", "memory"] > found.subject.size
    # no faster than its peak allows
    assert frame.loc["scan", "seconds"] > 32768 * 2 * 6.5e9 / GPUS["h100"].half


def test_more_devices_and_faster_ones_take_less(seven: Path) -> None:
    seconds = {
        (gpu, n): lb.estimate(seven, gpu=gpu, gpus=n).frame.set_index("step")["seconds"]
        for gpu, n in (("h100", 1), ("h100", 8), ("a100", 1))
    }
    for step in ("scan", "group ICA", "plan (obs)", "repair"):
        assert seconds["h100", 8][step] < seconds["h100", 1][step] < seconds["a100", 1][step]
    plans = seconds["h100", 1]
    assert plans["plan (magnitude)"] < plans["plan (obs)"] < plans["plan (networks)"]
    more = lb.estimate(seven, gpu="h100", n_tokens=65536).frame.set_index("step")["seconds"]
    assert more["scan"] == pytest.approx(2 * plans["scan"], rel=0.01)


def test_a_model_larger_than_a_device_is_spread(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**SEVEN, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}))
    one, eight = (lb.estimate(file, gpu="h100", gpus=n) for n in (1, 8))
    assert any("--offload" in note for note in one.notes)
    assert any("spread over 8" in note for note in eight.notes)
    memory = [e.frame.set_index("step")["memory"]["scan"] for e in (one, eight)]
    assert memory[1] < memory[0] / 6


def test_mixtures_of_experts(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(MIXTURE))
    found = lb.estimate(file, gpu="h200")
    assert found.subject.mixture
    assert found.subject.n_neurons == 48 * 128 * 768
    assert found.scan_bytes_per_1000_tokens == 1000 * 48 * 8 * (768 * 2 + 4 + 2)  # by visit: neurons, number, gate
    assert found.subject.active < found.subject.parameters / 6
    assert [row["step"] for row in found.steps] == [
        "scan", "group ICA", "networks", "plan (reap)", "plan (man)", "plan (frequency)", "save",
    ]  # fmt: skip
    assert found.frame["seconds"].gt(0).all()


def described(model: torch.nn.Module, folder: Path) -> Path:
    """The config of a model in a folder, without weights."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", [
    "LlamaForCausalLM", "MixtralForCausalLM", "Qwen2MoeForCausalLM", "DeepseekV3ForCausalLM", "GptOssForCausalLM",
])  # fmt: skip
def test_the_disk_is_what_a_scan_takes(tmp_path: Path, name: str) -> None:
    model = build(name, rows()[name])
    described(model, tmp_path / "m")
    scans = lb.scan(model, tiny_tokenizer(), ["the cat sat on the mat. " * 200], out=tmp_path / "scan", block_size=64)
    wrote = sum(file.stat().st_size for file in (tmp_path / "scan/shards").iterdir())
    found = lb.estimate(tmp_path / "m", gpu="h100", n_tokens=100)
    assert found.scan_bytes_per_1000_tokens * scans[0].n_tokens / 1000 == pytest.approx(wrote, rel=0.03)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_family(tmp_path: Path, name: str) -> None:
    model = tiny(name)
    described(model, tmp_path)
    for options in ({"gpu": "a100", "gpus": 2}, {"gpu": "rtx4090", "dtype": "float16"}):
        found = lb.estimate(tmp_path / "config.json", **options)
        assert found.subject.parameters == sum(p.numel() for p in model.parameters())
        assert found.frame[["seconds", "memory"]].gt(0).all().all()
    steps = set(found.frame["step"])
    assert ("plan (taylor)" in steps) == (not found.subject.mixture and model.can_generate())
    with pytest.raises(InputError, match="not known here"):
        lb.estimate(tmp_path, gpu="h100", methods=["reap" if not found.subject.mixture else "obs"])


def test_a_layer_that_was_dropped(tmp_path: Path) -> None:
    model = tiny("llama", num_hidden_layers=3)
    windows = torch.randint(2, 40, (24, 16), generator=torch.Generator().manual_seed(0))
    plan = lb.plan_pruning(model, ratio=0.4, method="shortgpt", calibration=windows)
    lb.save_pruned(lb.prune(model, plan), tiny_tokenizer(), tmp_path / "small")
    known = {f"('ica', {n}, {r}, 64, 3)": 0.1 * n / 2048 * r for n in (2048, 4096) for r in (1, 2)}
    found = lb.estimate(tmp_path / "small", methods=["obs"], n_tokens=512, window=32, run_length=64, n_components=3,
                        timings=known)  # fmt: skip
    assert 0 in found.subject.widths
    assert found.frame["seconds"].gt(0).all()


def test_this_cpu_is_measured(tmp_path: Path) -> None:
    model = tiny("llama")
    model.save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()  # weights are not needed
    small = {"n_tokens": 512, "window": 32, "run_length": 64, "n_components": 3}
    found = lb.estimate(tmp_path / "m", methods=["random", "flap", "obs", "taylor"], **small)
    assert found.subject == Subject.of(model)
    assert "this CPU" in found.machine
    frame = found.frame.set_index("step")
    assert (frame["seconds"] > 0).all()
    assert (frame["seconds"] < 600).all()
    assert frame.loc["scan", "disk"] == 512 * 48 * 4
    twice = lb.estimate(tmp_path / "m", methods=["random"], dtype="bfloat16", **small)
    assert twice.scan_bytes_per_1000_tokens * 2 == found.scan_bytes_per_1000_tokens


@pytest.mark.slow  # transformers reads all tokens of a vocabulary
def test_the_header_of_a_gguf_is_enough(shared_data: Path) -> None:
    found = lb.estimate(shared_data / "models/smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf", gpu="a100")
    assert found.subject.parameters == 134_515_008
    assert found.subject.widths == (1536,) * 30
    assert found.subject.itemsize == 4  # it is dequantized


def test_a_pruned_folder(tmp_path: Path) -> None:
    model = tiny("llama")
    windows = torch.randint(2, 40, (24, 16), generator=torch.Generator().manual_seed(0))
    plan = lb.plan_pruning(model, ratio=0.4, method="flap", allocation="global", calibration=windows)
    lb.save_pruned(lb.prune(model, plan), tiny_tokenizer(), tmp_path / "small")
    assert lb.estimate(tmp_path / "small", gpu="h100").subject.widths == plan.widths


@pytest.mark.parametrize(("options", "message"), [
    ({"gpu": "h1000"}, "gpu='h1000' is not in the table: h100, h200"),
    ({"gpus": 8}, "gpus=8 without gpu"),
    ({"gpu": "h100", "gpus": 0}, "gpus=0 must be a whole number, at least 1"),
    ({"gpu": "h100", "methods": ["best"]}, r"methods=\['best'\] are not known here"),
    ({"gpu": "h100", "dtype": "int3"}, "dtype='int3' is not known"),
    ({"gpu": "h100", "ratio": 1.0}, "ratio=1.0"),
    ({"gpu": "h100", "n_tokens": 0}, "n_tokens=0"),
    ({"gpu": "h100", "window": -3}, "window=-3"),
    ({"gpu": "h100", "passes": float("inf")}, "passes=inf"),
    ({"gpu": "h100", "dtype": "float8_e4m3fn"}, "dtype='float8_e4m3fn' is not known"),
])  # fmt: skip
def test_bad_input(seven: Path, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        lb.estimate(seven, **options)


def test_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no config.json"):
        lb.estimate(tmp_path, gpu="h100")
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}')
    with pytest.raises(InputError, match="cannot be read"):
        lb.estimate(tmp_path, gpu="h100")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        lb.estimate(tmp_path / "none.gguf", gpu="h100")


def test_the_command(
    seven: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    code, out, said = call(
        monkeypatch, capsys, "estimate", seven, "--gpu", "h100", "--gpus", 8, "--methods", "obs,flap", "--out",
        tmp_path / "t.csv",
    )  # fmt: skip
    assert code == 0, said
    assert "705 MB of disk per 1,000 tokens" in said
    assert "not measured" in said
    assert "plan (obs)" in out
    assert (tmp_path / "t.csv").read_text().startswith("step,seconds,memory,disk")
    code, _, said = call(monkeypatch, capsys, "estimate", seven, "--gpu", "cray")
    assert code == 2
    assert "not in the table" in said


@pytest.mark.parametrize(
    "damage",
    [{"hidden_act": "silt"}, {"hidden_size": [16]}, {"tie_word_embeddings": "no"}, {"num_attention_heads": 3},
     {"dtype": "floa432"}, {"intermediate_size": -4}, {"pad_token_id": 10**6},
     {"num_hidden_layers": 10**6}, {"num_hidden_layers": 10**30}],
)  # fmt: skip
def test_a_config_that_describes_no_model_is_one_line(tmp_path: Path, damage: dict[str, object]) -> None:
    tiny("llama").config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    with pytest.raises(InputError, match="config"):
        lb.estimate(path, gpu="h100")

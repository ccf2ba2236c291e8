"""GGUF files of other programs: every key that changes what a model computes is taken, or the file is refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf_models import by_hand, make

import llmbrain as lb
from llmbrain._validation import InputError
from llmbrain.checkpoints.configs import read_config
from llmbrain.study import describe_path

IDS = (torch.arange(60) * 7 % 400).reshape(1, -1)
LINEAR = {"rope_theta": 5e4, "rope_type": "linear", "factor": 4.0}
SCALED = {"query_pre_attn_scalar": 256, "num_hidden_layers": 6}
BY_TURNS = {"full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
            "sliding_attention": {"rope_theta": 300.0, "rope_type": "default"}}  # fmt: skip
FACTOR = [("rope.scaling.type", "linear"), ("rope.scaling.factor", 4.0)]
# family, changes of its config, how it is written
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("llama", {}, {}),
    ("llama", {}, {"name": "mistral"}),
    ("llama", {"head_dim": 32}, {}),
    ("llama", {"num_key_value_heads": 4}, {"without": ("attention.head_count_kv",)}),
    ("llama", {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}, {"without": ("rope.freq_base",)}),
    ("llama", {"rope_parameters": LINEAR}, {"keys": FACTOR}),
    ("llama", {"rope_parameters": LINEAR}, {"keys": FACTOR[1:]}),
    ("llama", {"rope_parameters": LINEAR}, {"keys": [("rope.scale_linear", 4.0)]}),
    ("llama-biased", {}, {}),
    ("qwen2", {}, {}),
    ("qwen2-wide", {"tie_word_embeddings": True}, {}),
    ("qwen3", {}, {}),
    ("qwen3", {"tie_word_embeddings": False}, {}),
    ("gemma", {}, {}),
    ("gemma", {"num_key_value_heads": 4, "head_dim": 8}, {"without": ("attention.head_count_kv",)}),
    ("gemma2", {"head_dim": 256, "query_pre_attn_scalar": 256}, {}),
    ("gemma2", {"query_pre_attn_scalar": 256, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
     {"keys": [("attn_logit_softcapping", 5.0), ("final_logit_softcapping", 3.0)]}),
    ("gemma3", SCALED, {}),
    ("gemma3", SCALED | {"final_logit_softcapping": 2.0, "rope_parameters": BY_TURNS},
     {"keys": [("final_logit_softcapping", 2.0), ("rope.freq_base_swa", 300.0), FACTOR[0],
               ("rope.scaling.factor", 8.0)]}),
]  # fmt: skip


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.filterwarnings("ignore:.*does not say what queries are scaled by")
@pytest.mark.parametrize("case", range(len(CASES)))
def test_a_file_of_another_program_is_the_model_it_was_made_of(case: int, tmp_path: Path) -> None:
    family, changes, how = CASES[case]
    dense = make(family, **changes)
    path = by_hand(tmp_path / "x.gguf", dense, **how)
    model, _ = lb.load_model(path)
    assert torch.allclose(logits(model), logits(dense), atol=1e-5)


@pytest.mark.parametrize("family", ["qwen3", "gemma"])
def test_such_a_file_is_a_model_as_any_other(family: str, tmp_path: Path) -> None:
    path = by_hand(tmp_path / "x.gguf", make(family, num_hidden_layers=2))
    model, tokenizer = lb.load_model(path)
    assert describe_path(path)["mlp neurons per layer"] == [96, 96]
    assert read_config(path).head_dim == 16
    small = lb.prune(model, lb.plan_pruning(model, ratio=0.5, method="magnitude"))
    lb.save_pruned(small, tokenizer, tmp_path / "small")
    again, tokens = lb.load_pruned(tmp_path / "small")
    assert torch.equal(logits(again), logits(small))
    assert tokens(" ab</s>").input_ids == tokenizer(" ab</s>").input_ids


def test_queries_of_the_largest_gemma_are_scaled_by_the_hidden_size_over_heads(tmp_path: Path) -> None:
    for family, layers in (("gemma2", 46), ("gemma3", 62)):
        path = by_hand(tmp_path / f"{family}.gguf", make(family, num_hidden_layers=layers, head_dim=32))
        assert read_config(path).query_pre_attn_scalar == 64 // 4


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "F16", "BF16"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_types_are_dequantized_as_transformers_does(family: str, kind: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    path = by_hand(tmp_path / "x.gguf", make(family), kind=gguf.GGMLQuantizationType[kind])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name).eval()
    assert torch.equal(logits(lb.load_model(path)[0]), logits(theirs))


def test_what_a_file_does_not_say_is_said(tmp_path: Path) -> None:
    path = by_hand(tmp_path / "x.gguf", make("gemma3"))
    with pytest.warns(UserWarning, match="does not say what queries are scaled by: 256 is taken.* heads, 16"):
        lb.load_model(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lb.load_model(by_hand(tmp_path / "y.gguf", make("gemma3", head_dim=256)))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "gemma2"])
@pytest.mark.parametrize("key", ["attention.layer_norm_rms_epsilon", "feed_forward_length", "attention.head_count"])
def test_a_default_of_transformers_stands_for_no_key(family: str, key: str, tmp_path: Path) -> None:
    path = by_hand(tmp_path / "x.gguf", make(family), without=(key,))
    with pytest.raises(InputError, match=f"lacks the key {family}.{key}"):
        lb.load_model(path)


@pytest.mark.parametrize(
    ("family", "keys", "said"),
    [
        ("qwen2", [("rope.dimension_count", 8)], "turns 8 of the 16 numbers of a head"),
        ("llama", [("rope.dimension_count", 8)], "turns 8 of the 16 numbers of a head"),
        ("qwen2", [("rope.scaling.type", "yarn")], r"scales its rotary positions \('yarn'\)"),
        ("llama", [("rope.scaling.factor", float("nan"))], r"llama\.rope\.scaling\.factor=nan must be above 0"),
        ("llama", [("rope.scaling.factor", -2.0)], r"factor=-2\.0 must be above 0"),
        ("qwen3", [("rope.freq_base", 0.0)], r"qwen3\.rope\.freq_base=0\.0 must be above 0"),
        ("gemma", [("attention.layer_norm_rms_epsilon", float("inf"))], "epsilon=inf must be above 0"),
        ("gemma3", [("attention.sliding_window_pattern", 4)], "full attention in other layers than every 6th"),
    ],
)  # fmt: skip
def test_what_no_config_says_is_refused(family: str, keys: list[Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        lb.load_model(by_hand(tmp_path / "x.gguf", make(family), keys=keys))


def test_what_does_not_fit_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = by_hand(tmp_path / "x.gguf", make("qwen3"), keys=[("attention.head_count", 8)])
    with pytest.raises(InputError, match=r"x\.gguf does not fit its keys: .*\.weight is .*, wanted"):
        lb.load_model(path)
    assert "MISMATCH" not in "".join(capfd.readouterr())

"""Mixtures of experts go through scan, lesion, both kinds of pruning, save and load; all of them: ``make families``."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from checks import answer, same
from configs import build, rows
from mixtures import check
from table import mistakes

FAMILIES = (
    "MixtralForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM", "OlmoeForCausalLM", "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM", "GptOssForCausalLM", "Glm4MoeForCausalLM", "GraniteMoeForCausalLM",
    "GraniteMoeSharedForCausalLM", "PhimoeForCausalLM", "Llama4ForCausalLM",
    "JambaForCausalLM", "HunYuanMoEV1ForCausalLM", "NemotronHForCausalLM", "HYV4ForCausalLM",
)  # fmt: skip
# What the defaults of a family do not build.
VARIANTS = {
    "Gemma 4 with experts": ("Gemma4ForCausalLM", {"gemma4_text": {
        "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 12}}),
    "Nemotron-3 in the space of the model": ("NemotronHForCausalLM", {"nemotron_h": {"moe_latent_size": None}}),
    "Llama 4, one expert a token, dense layers between": ("Llama4ForCausalLM", {"llama4_text": {
        "num_hidden_layers": 4, "interleave_moe_layer_step": 2, "moe_layers": None, "num_experts_per_tok": 1}}),
    "DeepSeek-V3 in groups": ("DeepseekV3ForCausalLM", {"deepseek_v3": {
        "n_routed_experts": 12, "n_group": 3, "topk_group": 2}}),
    "GLM in groups, no dense layer": ("Glm4MoeForCausalLM", {"glm4_moe": {
        "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 0}}),
    "Qwen3, some layers dense": ("Qwen3MoeForCausalLM", {"qwen3_moe": {
        "mlp_only_layers": [0], "norm_topk_prob": True}}),
    "Mixtral, one expert a token": ("MixtralForCausalLM", {"mixtral": {"num_experts_per_tok": 1}}),
}  # fmt: skip
REFUSED = {
    "JetMoeForCausalLM": r"no known layout",
    "InklingForCausalLM": "no known layout",
}


def slow_but(names: Iterable[str], quick: set[str]) -> list[Any]:
    """All of them, those that are not quick marked as slow."""
    return [pytest.param(n, marks=() if n in quick else pytest.mark.slow) for n in names]


@pytest.mark.parametrize("name", slow_but(FAMILIES, {"MixtralForCausalLM", "GptOssForCausalLM", "Llama4ForCausalLM"}))
def test_goes_all_the_way(name: str, tmp_path: Path) -> None:
    row = check(name, build(name, rows()[name]), tmp_path)
    assert {column: said for column, said in row.items() if column != "found" and said != "ok"} == {}
    assert not mistakes(row)


@pytest.mark.parametrize("variant", slow_but(VARIANTS, {"DeepSeek-V3 in groups"}))
def test_variants_go_all_the_way(variant: str, tmp_path: Path) -> None:
    name, special = VARIANTS[variant]
    row = check(name, build(name, rows()[name], **special), tmp_path)
    assert {column: said for column, said in row.items() if column != "found" and said != "ok"} == {}


def test_layers_whose_experts_are_looked_up_keep_them_all(tmp_path: Path) -> None:
    """Of DeepSeek-V4 some layers choose experts by a table of token ids: they are cut in the others."""
    import llmbrain as lb
    from llmbrain import InputError

    model = build("DeepseekV4ForCausalLM", "deepseek_v4")
    row = check("DeepseekV4ForCausalLM", model)
    assert {c for c, said in row.items() if said == "ok"} == {"recorded", "lesion", "neurons"}
    with pytest.raises(InputError, match=r"tid2eid .*allocation= can say how many each layer keeps: all 4 here"):
        lb.plan_pruning(model, expert_ratio=0.5, method="random")
    plan = lb.plan_pruning(model, expert_ratio=0.25, method="random", allocation=[4, 2])
    small = lb.prune(model, plan)
    wanted = answer(small)
    lb.save_pruned(small, None, tmp_path / "small")
    same(answer(lb.load_pruned(tmp_path / "small")[0]), wanted, "loaded")
    gone = lb.Experts([(1, e) for e in range(4) if e not in plan.kept[1]])
    with lb.lesion(model, gone, "reroute"):
        same(answer(model), wanted, "cut")


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_on_no_common_interface_is_refused(name: str) -> None:
    from llmbrain import InputError
    from llmbrain.anatomy.experts import expert_anatomy

    with pytest.raises(InputError, match=REFUSED[name]):
        expert_anatomy(build(name, rows()[name]))

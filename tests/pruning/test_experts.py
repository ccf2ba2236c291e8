"""Whole experts are scored and cut: against routers that may not choose them, and against stock transformers."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

import llmbrain as lb
from llmbrain import InputError
from llmbrain.anatomy.experts import expert_anatomy
from llmbrain.pruning.experts import ExpertPlan
from tests.families.configs import build, rows
from tests.tiny_models import tiny, tiny_tokenizer

FAMILIES = [
    "MixtralForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM", "OlmoeForCausalLM", "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM", "GptOssForCausalLM", "Glm4MoeForCausalLM", "GraniteMoeForCausalLM", "PhimoeForCausalLM",
    "JambaForCausalLM", "Lfm2MoeForCausalLM",
]  # fmt: skip
IDS = torch.arange(3, 27)[None]
TEXTS = ["abc cab bca abcab cabbac", "zyx wvu tsr qpo nml kji", "the cat sat on a mat and ran"] * 8
linear = torch.nn.functional.linear


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def cut(model: Any, gone: int = 2, **options: Any) -> tuple[ExpertPlan, Any]:
    plan = lb.plan_pruning(model, expert_ratio=gone / 4, method="random", **options)
    return plan, lb.prune(model, plan)


def forbid(model: Any, plan: ExpertPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Routers give minus infinity for experts that go, in what their linear layers give and correction biases."""
    gone = {}
    for layer, routed in expert_anatomy(model).routed:
        out = sorted(set(range(routed.count)) - set(plan.kept[layer]))
        for tensor in routed.router:
            if tensor.value.ndim == 2 and tensor.axis == 0:
                gone[id(tensor.value)] = out
            elif "correction" in tensor.name or tensor.name == "expert_bias":
                tensor.value.data[..., out] = -torch.inf

    def masked(x: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> torch.Tensor:
        y = linear(x, weight, bias)
        if id(weight) in gone:
            y[..., gone[id(weight)]] = -torch.inf
        return y

    monkeypatch.setattr(torch.nn.functional, "linear", masked)


@pytest.mark.parametrize("name", FAMILIES)
def test_cut_equals_masked_routing_and_loads(name: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    model = build(name, rows()[name])
    before = logits(model)
    plan, small = cut(model)
    assert torch.equal(logits(model), before)
    got = logits(small)
    routed = dict(expert_anatomy(small).routed)
    for r in routed.values():
        assert r.count == 2
        assert all(t.value.shape[t.axis] == 2 for t in (*r.weights, *r.router))
    assert sum(p.numel() for p in small.parameters()) == plan.parameters - plan.parameters_removed
    lb.save_pruned(small, tiny_tokenizer(), tmp_path, format="uniform")
    stock, found = getattr(transformers, name).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(logits(stock.eval()), got)
    again, _ = lb.load_model(tmp_path)
    torch.testing.assert_close(logits(again), got)
    assert again.llmbrain_pruning[0]["kept_experts"] == [list(k) for k in plan.kept]
    forbid(model, plan, monkeypatch)
    torch.testing.assert_close(got, logits(model), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(got, before, atol=1e-3)


def grouped() -> Any:
    config = build("DeepseekV3ForCausalLM", "deepseek_v3").config
    config = copy.deepcopy(config)
    config.n_routed_experts, config.n_group, config.topk_group, config.num_experts_per_tok = 8, 2, 1, 2
    torch.manual_seed(0)
    from tests.families.configs import perturb

    model = type(build("DeepseekV3ForCausalLM", "deepseek_v3"))(config)
    perturb(model)
    return model.float().eval()


def test_groups_keep_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    model = grouped()
    plan = lb.plan_pruning(model, expert_ratio=0.5, method="random", random_state=3)
    kept = np.array(plan.kept[1])
    assert (kept < 4).sum() == (kept >= 4).sum() == 2
    small = lb.prune(model, plan)
    other = copy.deepcopy(model)
    forbid(other, plan, monkeypatch)
    torch.testing.assert_close(logits(small), logits(other), atol=1e-4, rtol=1e-4)
    with pytest.raises(InputError, match="groups"):
        lb.prune(model, ExpertPlan(**{**plan.to_dict(), "kept": [[], [0, 1, 2, 4]]}))
    with pytest.raises(InputError, match="its router needs 2"):
        lb.plan_pruning(model, expert_ratio=0.75, method="random")


@pytest.mark.parametrize("method", ["reap", "man", "frequency"])
def test_scores_against_a_plain_computation(method: str) -> None:
    model, tokenizer = build("GptOssForCausalLM", "gpt_oss"), tiny_tokenizer()
    plan = lb.plan_pruning(model, expert_ratio=0.25, method=method, tokenizer=tokenizer, calibration=TEXTS, window=16)
    heard: dict[int, list[Any]] = {}
    body = expert_anatomy(model)
    handles = [
        r.module.register_forward_pre_hook(lambda m, args, i=i: heard.setdefault(i, []).append(args))
        for i, r in body.routed
    ]
    from llmbrain.pruning.calibrate.windows import Calibration

    windows = Calibration.of(TEXTS, tokenizer, window=16).windows(model)
    with torch.no_grad():
        model(input_ids=windows)
    for handle in handles:
        handle.remove()
    for layer, r in body.routed:
        r.module.requires_grad_(False)
        x, index, weights = (torch.cat(part) for part in zip(*heard[layer]))
        m, wanted = r.module, np.zeros(r.count)
        for e in range(r.count):
            token, place = torch.where(index == e)
            h = m._apply_gate(x[token] @ m.gate_up_proj[e] + m.gate_up_proj_bias[e])
            norms = (h @ m.down_proj[e] + m.down_proj_bias[e]).norm(dim=-1)
            gates = weights[token, place]
            wanted[e] = {"reap": (norms * gates).mean(), "man": norms.mean(), "frequency": len(token) / len(x)}[method]
        np.testing.assert_allclose(plan.details["scores"][str(layer)], wanted, rtol=1e-4)
        assert set(plan.kept[layer]) == set(np.argsort(-wanted)[:3].tolist())


def test_networks_choose_experts_they_lie_in() -> None:
    model = tiny("mixtral")
    space = expert_anatomy(model).space
    maps = np.full((2, space.n_neurons), 0.01)
    for k, pair in enumerate([[(0, 1), (1, 2)], [(0, 3), (1, 0)]]):
        for layer, expert in pair:
            maps[k, space.expert_slice(layer, expert)] = 5
    networks = lb.FunctionalNetworks(maps, space, threshold=2.0, standardize=False)
    plan = lb.plan_pruning(model, networks, expert_ratio=0.5, method="networks")
    assert plan.kept == ((1, 3), (0, 2))
    other = lb.FunctionalNetworks(maps, lb.NeuronSpace(space.widths), threshold=2.0)
    with pytest.raises(InputError, match="the networks lie in"):
        lb.plan_pruning(model, other, expert_ratio=0.5, method="networks")


def test_plan_is_saved_and_bound_to_its_weights(tmp_path: Any) -> None:
    model = tiny("mixtral")
    plan, small = cut(model)
    assert ExpertPlan.load(plan.save(tmp_path / "plan.json")) == plan
    assert plan.removed == 0.5
    assert list(plan.to_frame()["kept"]) == [2, 2]
    assert "4 of 8 routed experts stay" in plan.summary()
    with pytest.raises(InputError, match="plan was made for layers"):
        lb.prune(small, plan)
    other = tiny("mixtral")
    other.model.layers[0].mlp.gate.weight.data[0] += 1
    with pytest.raises(InputError, match="make a new plan"):
        lb.prune(other, plan)
    same = lb.prune(model, plan, inplace=True)
    assert same is model
    torch.testing.assert_close(logits(same), logits(small))
    for format, why in [("masked", "2 dead experts, and its router has no bias"), ("gguf", "a GGUF is one file")]:
        with pytest.raises(InputError, match=why):
            lb.save_pruned(small, tiny_tokenizer(), tmp_path / format, format=format)


def test_bad_input_leaves_the_model_alone() -> None:
    model, tokenizer = tiny("mixtral"), tiny_tokenizer()
    before = {name: p.clone() for name, p in model.named_parameters()}
    for options, message in [
        ({"expert_ratio": 0.75, "method": "random"}, "leaves 1 of 4 experts in layer 0, but its router calls 2"),
        ({"expert_ratio": 0.05, "method": "random"}, "removes none"),
        ({"expert_ratio": 1.5, "method": "random"}, "expert_ratio=1.5"),
        ({"expert_ratio": 0.5, "method": "wanda"}, "method='wanda'"),
        ({"expert_ratio": 0.5, "method": "reap"}, "needs calibration"),
        ({"expert_ratio": 0.5, "method": "networks"}, "needs networks"),
        ({"expert_ratio": 0.5, "ratio": 0.5, "method": "random"}, "together with ratio"),
        ({"expert_ratio": 0.5, "protect": [0], "method": "random"}, "together with protect"),
    ]:
        with pytest.raises(InputError, match=message):
            lb.plan_pruning(model, **options)
    with pytest.raises(InputError, match="no routed experts"):
        lb.plan_pruning(tiny("llama"), expert_ratio=0.5, method="random")
    with pytest.raises(InputError, match="cannot be cut: its router has"):
        lb.plan_pruning(build("ZayaForCausalLM", "zaya"), expert_ratio=0.5, method="random")
    model.model.layers[1].mlp.gate.weight.data[3] = 0  # softmax of 0 is least where others are large
    model.model.layers[1].mlp.gate.weight.data[:3] *= 0
    ids = torch.zeros(4, 16, dtype=torch.long)
    with pytest.raises(InputError, match="calibration calls some experts never"):
        lb.plan_pruning(model, expert_ratio=0.5, method="reap", calibration=ids)
    plan = lb.plan_pruning(model, expert_ratio=0.5, method="frequency", calibration=ids)
    with pytest.raises(InputError, match="needs calibration"):
        lb.prune(model, plan, compensate="least-squares", tokenizer=tokenizer)
    with lb.lesion(model, lb.Experts([(0, 1)])), pytest.raises(InputError, match="changed by an intervention"):
        lb.prune(model, plan)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if "layers.1.mlp.gate" not in n)

"""Neurons inside experts are scored on the tokens that call them, against a plain computation; and uneven experts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import llmbrain as lb
from llmbrain import InputError
from llmbrain.anatomy.experts import expert_anatomy
from llmbrain.pruning.plan import PruningPlan
from tests.families.configs import build
from tests.pruning.test_experts import grouped
from tests.tiny_models import tiny

WINDOWS = torch.randint(3, 35, (16, 16), generator=torch.Generator().manual_seed(5))
TEXT: dict[str, Any] = {"calibration": WINDOWS}


def logits(model: Any, ids: torch.Tensor = WINDOWS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def heard(model: Any) -> dict[int, Any]:
    """What the experts modules were called with, on all windows."""
    calls: dict[int, list[Any]] = {}
    handles = [
        r.module.register_forward_pre_hook(
            lambda m, a, k, i=i: calls.setdefault(i, []).append((*a, *k.values())), with_kwargs=True
        )
        for i, r in expert_anatomy(model).routed
    ]
    logits(model)
    for handle in handles:
        handle.remove()
    return {i: [torch.cat(part) for part in zip(*of)] for i, of in calls.items()}


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@torch.no_grad()
def test_flap_is_weighted_by_the_square_of_the_gate(name: str) -> None:
    """About zero where the output has no bias; about the weighted mean where it has one."""
    model = build("GptOssForCausalLM", "gpt_oss") if name == "gpt_oss" else tiny("mixtral")
    plan = lb.plan_pruning(model, ratio=0.5, method="flap", **TEXT)
    for i, routed in expert_anatomy(model).routed:
        x, index, gates = heard(model)[i][:3]
        m = routed.module
        for e in range(routed.count):
            token, place = torch.where(index == e)
            rows = m.gate_up_proj[e] if m.is_transposed else m.gate_up_proj[e].T
            down = m.down_proj[e] if m.is_transposed else m.down_proj[e].T
            y = x[token] @ rows + (m.gate_up_proj_bias[e] if m.has_bias else 0)
            h, w = m._apply_gate(y).double(), gates[token, place].double()[:, None] ** 2
            mean = (w * h).sum(0) / w.sum() if m.has_bias else 0
            scores = (w * (h - mean) ** 2).sum(0) / w.sum() * down.double().square().sum(1)
            kept = plan.kept[i] - e * routed.width
            got = kept[(kept >= 0) & (kept < routed.width)]
            assert len(got) == 16  # of 24: half, to a multiple of 8
            assert set(got.tolist()) == set(scores.topk(16).indices.tolist())


def test_repair_by_the_tokens_of_each_expert_helps() -> None:
    model = build("GraniteMoeSharedForCausalLM", "granitemoeshared")
    plan = lb.plan_pruning(model, ratio=0.5, method="obs", **TEXT)
    dense = logits(model)
    bare = logits(lb.prune(model, plan))
    repaired = logits(lb.prune(model, plan, compensate="least-squares", **TEXT))
    assert (repaired - dense).square().mean() < 0.8 * (bare - dense).square().mean()
    assert torch.equal(logits(model), dense)


def test_repair_of_one_expert_is_weighted_least_squares() -> None:
    """Against the closed form, through the origin, drawn to the old weights."""
    model = tiny("mixtral", num_hidden_layers=1)
    plan = lb.plan_pruning(model, ratio=0.5, method="magnitude")
    x, index, gates = heard(model)[0][:3]
    small = lb.prune(model, plan, compensate="least-squares", ridge=0.01, **TEXT)
    m = model.model.layers[0].mlp.experts
    kept = [plan.kept[0][(plan.kept[0] >= 24 * e) & (plan.kept[0] < 24 * (e + 1))] - 24 * e for e in range(4)]
    for e in range(4):
        token, place = torch.where(index == e)
        with torch.no_grad():
            h = m._apply_gate(x[token] @ m.gate_up_proj[e].T).double()
            old = m.down_proj[e].T.double()
        w = gates[token, place].double()[:, None] ** 2
        second = (w * h).T @ h / w.sum()
        k = kept[e]
        penalty = 0.01 * second.diagonal().mean()
        left = second[k][:, k] + penalty * torch.eye(len(k), dtype=torch.float64)
        wanted = torch.linalg.solve(left, second[k] @ old + penalty * old[k])
        torch.testing.assert_close(
            small.model.layers[0].mlp.experts.down_proj[e].T.double(), wanted, atol=1e-4, rtol=1e-3
        )


def test_layers_may_differ_and_the_plan_is_kept(tmp_path: Any) -> None:
    model = build("DeepseekV2ForCausalLM", "deepseek_v2")
    plan = lb.plan_pruning(model, ratio=0.4, method="magnitude", allocation="global", protect=[0])
    assert plan.expert_widths[0] == [24]
    assert len(set(plan.expert_widths[1][1:])) == 1
    assert plan.removed > 0
    again = PruningPlan.load(plan.save(tmp_path / "plan.json"))
    assert again.to_dict() == plan.to_dict()
    small = lb.prune(model, again)
    assert sum(p.numel() for p in small.parameters()) == plan.parameters - plan.parameters_removed
    other = build("DeepseekV2ForCausalLM", "deepseek_v2", seed=1)
    with pytest.raises(InputError, match="make a new plan"):
        lb.prune(other, plan)
    with pytest.raises(InputError, match="plan was made for experts of"):
        lb.prune(small, plan)
    same = lb.prune(model, plan, inplace=True, compensate="least-squares", **TEXT)
    assert same is model


def test_experts_uneven_over_layers(tmp_path: Any) -> None:
    model = tiny("mixtral", num_hidden_layers=3)
    plan = lb.plan_pruning(model, expert_ratio=5 / 12, method="random", allocation=[2, 3, 2])
    assert [len(k) for k in plan.kept] == [2, 3, 2]
    small = lb.prune(model, plan)
    lb.save_pruned(small, None, tmp_path / "small")
    torch.testing.assert_close(logits(lb.load_pruned(tmp_path / "small")[0]), logits(small))
    with pytest.raises(InputError, match="cannot say the shapes of these experts"):
        lb.save_pruned(small, None, tmp_path / "uniform", format="uniform")
    for allocation, message in [
        ([1, 3, 3], "1 experts would stay, but a token visits 2"),
        ([2, 2], "must give each layer 1 to"),
        ([4, 4, 3], "asks for 7"),
        ("search", "experts are spread over layers by 'uniform'"),
    ]:
        with pytest.raises(InputError, match=message):
            lb.plan_pruning(model, expert_ratio=5 / 12, method="random", allocation=allocation)


@pytest.mark.parametrize("format", ["padded", "masked"])
def test_dead_experts_are_never_chosen(format: str, tmp_path: Any) -> None:
    """In ordinary checkpoints, opened by stock transformers: routers with a bias can forbid experts."""
    import transformers

    for name, model_type in (("GptOssForCausalLM", "gpt_oss"), ("DeepseekV3ForCausalLM", "deepseek_v3")):
        model = build(name, model_type)
        keep = [2, 3] if name == "GptOssForCausalLM" else [0, 3]
        total = 8 if name == "GptOssForCausalLM" else 4
        plan = lb.plan_pruning(model, expert_ratio=1 - sum(keep) / total, method="random", allocation=keep)
        small = lb.prune(model, plan)
        small = lb.prune(small, lb.plan_pruning(small, ratio=0.5, method="random"))
        lb.save_pruned(small, None, tmp_path / name, format=format)
        stock, found = getattr(transformers, name).from_pretrained(tmp_path / name, output_loading_info=True)
        assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        torch.testing.assert_close(logits(stock.eval()), logits(small), atol=1e-4, rtol=1e-4)
        routed = dict(expert_anatomy(stock).routed)[1]
        before = dict(expert_anatomy(model).routed)[1]
        padded = (3, dict(expert_anatomy(small).routed)[1].width)
        assert (routed.count, routed.width) == ((4, before.width) if format == "masked" else padded)


def test_masked_neurons_need_no_bias(tmp_path: Any) -> None:
    model = tiny("mixtral")
    plan = lb.plan_pruning(model, ratio=0.5, method="magnitude")
    small = lb.prune(model, plan)
    lb.save_pruned(small, None, tmp_path / "masked", format="masked")
    loaded, _ = lb.load_pruned(tmp_path / "masked")
    torch.testing.assert_close(logits(loaded), logits(small))
    silent = ~plan.mask[:24]
    assert loaded.model.layers[0].mlp.experts.down_proj[0][:, silent].eq(0).all()
    assert not loaded.model.layers[0].mlp.experts.down_proj[0][:, ~silent].eq(0).any()


def test_experts_ranked_over_layers_keep_what_routers_need() -> None:
    model = tiny("mixtral", num_hidden_layers=3)
    plan = lb.plan_pruning(model, expert_ratio=0.4, method="random", allocation="global", random_state=1)
    counts = [len(k) for k in plan.kept]
    assert sum(counts) == 12 - round(0.4 * 12)
    assert min(counts) >= 2
    several = lb.plan_pruning(grouped(), expert_ratio=0.4, method="random", allocation="global")
    kept = np.array(several.kept[1])
    assert (kept < 4).sum() == (kept >= 4).sum() >= 2


def test_experts_are_repaired_where_it_helps() -> None:
    model = tiny("mixtral")
    plan = lb.plan_pruning(model, expert_ratio=0.5, method="reap", **TEXT)
    small = lb.prune(model, plan, compensate="least-squares", **TEXT)
    errors = small.llmbrain_pruning[-1]["repair"]
    assert list(errors) == ["0", "1"]
    assert all(after <= before for before, after in errors.values())
    assert any(after < before for before, after in errors.values())
    bare, dense = logits(lb.prune(model, plan)), logits(model)
    assert (logits(small) - dense).square().mean() < (bare - dense).square().mean()
    with pytest.raises(InputError, match="repaired by 'least-squares'"):
        lb.prune(model, plan, compensate="bias", **TEXT)


def test_bad_input_leaves_the_model_alone() -> None:
    model = tiny("mixtral")
    before = {name: p.clone() for name, p in model.named_parameters()}
    for options, message in [
        ({"method": "networks"}, "does not score neurons inside experts: allowed are 'flap', 'magnitude'"),
        ({"method": "taylor"}, "does not score neurons inside experts"),
        ({"method": "flap"}, "needs calibration"),
        ({"method": "random", "ratio": 1.0}, "ratio=1"),
        ({"method": "random", "ratio": None}, "ratio=None"),
        ({"method": "random", "ratio": 0.01}, "removes no neuron"),
        ({"method": "random", "allocation": "search"}, "allocation='search'"),
        ({"method": "random", "head_ratio": 0.5}, "head_ratio: of a mixture of experts"),
        ({"method": "random", "expert_ratio": 0.5}, "together with ratio"),
    ]:
        with pytest.raises(InputError, match=message):
            lb.plan_pruning(model, **{"ratio": 0.5, **options})
    plan = lb.plan_pruning(model, ratio=0.5, method="random")
    with pytest.raises(InputError, match="has no bias that could take a mean"):
        lb.prune(model, plan, compensate="bias", **TEXT)
    with pytest.raises(InputError, match="needs calibration"):
        lb.prune(model, plan, compensate="least-squares")
    kept = [list(k) for k in plan.kept]
    kept[1].remove(kept[1][0])
    with pytest.raises(InputError, match="routed experts of layer 1 would keep 15 to 16 neurons"):
        lb.prune(model, PruningPlan(**{**plan.to_dict(), "kept": kept}))
    with pytest.raises(InputError, match="experts_before"):
        PruningPlan(**{**plan.to_dict(), "experts_before": [[24] * 4, [24] * 3]})
    model.model.layers[1].mlp.gate.weight.data[:] = 0
    silent = torch.zeros(8, 16, dtype=torch.long)
    with pytest.raises(InputError, match=r"calibration never calls layer \d, expert"):
        lb.plan_pruning(model, ratio=0.5, method="flap", calibration=silent)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if "layers.1.mlp.gate" not in n)

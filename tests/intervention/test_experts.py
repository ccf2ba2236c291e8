"""Lesions of mixtures of experts, against weights set to zero by hand."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

import llmbrain as lb
from llmbrain import InputError
from llmbrain.anatomy.experts import expert_anatomy
from llmbrain.intervention.experts import Experts, experts_called_alike, random_experts
from tests.families.configs import build, rows
from tests.tiny_models import tiny, tiny_tokenizer

FAMILIES = ["MixtralForCausalLM", "Qwen2MoeForCausalLM", "DeepseekV3ForCausalLM", "GptOssForCausalLM",
            "AriaTextForCausalLM", "JambaForCausalLM"]  # fmt: skip
IDS = torch.arange(3, 19)[None]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("name", FAMILIES)
def test_neurons_equal_zero_columns(name: str) -> None:
    model = build(name, rows()[name])
    space = expert_anatomy(model).space
    mask = np.random.default_rng(0).random(space.n_neurons) < 0.4
    before = logits(model)
    with lb.lesion(model, mask):
        got = logits(model)
    other = copy.deepcopy(model)
    for layer in expert_anatomy(other).layers:
        gone = torch.from_numpy(mask[space.layer_slice(layer.index)])
        for mlp in layer.shared:
            mlp.down.module.weight.data[:, gone[: mlp.width]] = 0
            gone = gone[mlp.width :]
        if layer.routed is not None:
            down = layer.routed.module.down_proj.data
            for expert, columns in enumerate(gone.reshape(layer.routed.count, -1)):
                if layer.routed.transposed:
                    down[expert, columns] = 0
                else:
                    down[expert][:, columns] = 0
    torch.testing.assert_close(got, logits(other), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(got, before, atol=1e-4)
    assert torch.equal(logits(model), before)
    with lb.keep_only(model, ~mask):
        assert torch.equal(logits(model), got)
    with lb.amplify(model, mask, 0.0):
        torch.testing.assert_close(logits(model), got)


@pytest.mark.parametrize("name", FAMILIES)
def test_experts_give_nothing(name: str) -> None:
    model = build(name, rows()[name])
    layer, _ = next(expert_anatomy(model).routed)
    with lb.lesion(model, Experts([(layer, 0), (layer, 2)])):
        got = logits(model)
    other = copy.deepcopy(model)
    for parameter_name, parameter in dict(expert_anatomy(other).routed)[layer].module.named_parameters():
        if parameter_name.startswith("down_proj"):
            parameter.data[[0, 2]] = 0
    torch.testing.assert_close(got, logits(other), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(got, logits(model), atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_rerouted_equals_cut(name: str) -> None:
    model = build(name, rows()[name])
    before = logits(model)
    plan = lb.plan_pruning(model, expert_ratio=0.5, method="random", random_state=1)
    gone = [(i, e) for i, n in enumerate(plan.before) for e in range(n) if e not in plan.kept[i]]
    with lb.lesion(model, Experts(gone), "reroute"):
        got = logits(model)
        with pytest.raises(InputError, match="changed by an intervention"):
            lb.prune(model, plan)
    torch.testing.assert_close(got, logits(lb.prune(model, plan)), atol=1e-5, rtol=1e-5)
    with lb.keep_only(model, Experts([(i, e) for i, k in enumerate(plan.kept) for e in k]), "reroute"):
        assert torch.equal(logits(model), got)
    assert torch.equal(logits(model), before)
    assert not torch.allclose(got, before, atol=1e-4)


def test_controls() -> None:
    model = tiny("mixtral")
    scans = lb.scan(model, tiny_tokenizer(), ["abc cab bca abcab", "cab b"], site="router")
    what = Experts([(0, 1), (1, 0), (1, 3)])
    drawn = random_experts(what, model, 5, random_state=1)
    assert len(drawn) == 5
    assert len({str(d) for d in drawn}) > 1
    assert all([layer for layer, _ in d.experts] == [0, 1, 1] for d in drawn)
    alike = experts_called_alike(what, model, scans)
    assert [layer for layer, _ in alike.experts] == [0, 1, 1]
    assert not set(alike.experts) & set(what.experts)
    calls = np.sum([s.visits(0).sum(axis=0) for s in scans], axis=0)
    distance = np.abs(calls - calls[1])
    assert distance[alike.experts[0][1]] == np.delete(distance, 1).min()
    with pytest.raises(InputError, match="layer 0 has 1 other experts, 3 are needed"):
        experts_called_alike(Experts([(0, 0), (0, 1), (0, 2)]), model, scans)


def test_bad_input() -> None:
    model = build("DeepseekV3ForCausalLM", "deepseek_v3")
    with pytest.raises(InputError, match="layer=0 has no routed experts"):
        lb.lesion(model, Experts([(0, 0)]))
    with pytest.raises(InputError, match="expert=4 does not exist in layer 1"):
        lb.lesion(model, Experts([(1, 4)]))
    with pytest.raises(InputError, match="'zero' only"):
        lb.lesion(model, Experts([(1, 0)]), "mean", reference=IDS)
    with pytest.raises(InputError, match="1 experts would stay, but a token visits 2"):
        lb.lesion(model, Experts([(1, 0), (1, 1), (1, 2)]), "reroute")
    with pytest.raises(InputError, match="neurons have no router"):
        lb.lesion(model, [0, 1], "reroute")
    with pytest.raises(InputError, match="value='reroute'"):
        lb.lesion(tiny("llama"), [0, 1], "reroute")
    with pytest.raises(InputError, match="heads of a mixture"):
        lb.lesion(model, lb.Heads([(1, 0)]))
    with pytest.raises(InputError, match="whole experts are lesioned"):
        lb.amplify(model, Experts([(1, 0)]), 2.0)
    with pytest.warns(UserWarning, match="unchanged"):
        lb.lesion(model, Experts([]))


def test_table_of_experts_and_neurons() -> None:
    """Against lesions one by one; controls are as many random experts of the same layers."""
    model = tiny("mixtral")
    ids = torch.randint(3, 35, (6, 12), generator=torch.Generator().manual_seed(0))
    evaluation = lb.TokenEvaluation.from_texts(model, None, ids, window=12)
    sets = {"expert": Experts([(0, 1), (1, 2)]), "neurons": np.arange(0, 192, 5)}
    table = lb.lesion_table(model, sets, {"text": evaluation}, n_random=3, progress=False)
    assert list(table.frame["size"]) == [48, 39]
    assert table.frame["p_matched"].isna().all()
    for name, what in sets.items():
        with lb.lesion(model, what), torch.no_grad():
            wanted = evaluation.of(model(input_ids=ids).logits, torch.arange(6)).mean()
        np.testing.assert_allclose(table.matrix("lesioned").loc[name, "text"], float(wanted), rtol=1e-5)
    draws = table.draws[table.draws["network"] == "expert"]["effect"]
    alone = {}
    for one in range(4):
        for other in range(4):
            with lb.lesion(model, Experts([(0, one), (1, other)])), torch.no_grad():
                alone[one, other] = float(evaluation.of(model(input_ids=ids).logits, torch.arange(6)).mean())
    base = float(table.matrix("baseline").loc["expert", "text"])
    assert all(min(abs(draw + base - value) for value in alone.values()) < 1e-5 for draw in draws)
    with pytest.raises(InputError, match="activations are known from reference"):
        lb.lesion_table(model, sets, {"text": evaluation}, n_matched=2)
    with pytest.raises(InputError, match="set to 'zero' only"):
        lb.lesion_table(model, sets, {"text": evaluation}, value="mean")

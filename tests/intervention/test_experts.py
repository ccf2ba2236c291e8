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
            "AriaTextForCausalLM", "JambaForCausalLM", "Llama4ForCausalLM"]  # fmt: skip
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
    with pytest.raises(InputError, match="needs reference="):
        lb.lesion(model, Experts([(1, 0)]), "mean")
    with pytest.raises(InputError, match="does not tell which experts were called"):
        lb.lesion(model, [0, 1], "resample", reference=np.ones((4, expert_anatomy(model).space.n_neurons)))
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
    assert table.frame["p_matched"].notna().all()
    for name, what in sets.items():
        with lb.lesion(model, what), torch.no_grad():
            wanted = evaluation.of(model(input_ids=ids).logits, torch.arange(6)).mean()
        np.testing.assert_allclose(table.matrix("lesioned").loc[name, "text"], float(wanted), rtol=1e-5)
    draws = table.draws[table.draws["network"] == "expert"]["effect"]
    assert len(draws) == 6
    assert (draws != 0).all()
    alone = {}
    for one in range(4):
        for other in range(4):
            with lb.lesion(model, Experts([(0, one), (1, other)])), torch.no_grad():
                alone[one, other] = float(evaluation.of(model(input_ids=ids).logits, torch.arange(6)).mean())
    base = float(table.matrix("baseline").loc["expert", "text"])
    assert all(min(abs(draw + base - value) for value in alone.values()) < 1e-5 for draw in draws)
    with pytest.raises(InputError, match="called as often"):
        lb.lesion_table(model, sets, {"number": lambda m: 1.0}, n_matched=2)
    with pytest.raises(InputError, match="called as often"):
        lb.lesion_table(model, sets, {"text": evaluation}, value="mean", reference=np.ones((4, 192)))


def by_hand(model: Any, values: dict[str, Any]) -> Any:
    """A copy whose experts say fixed numbers instead of chosen neurons, in a loop of its own."""
    other = copy.deepcopy(model)
    for layer in expert_anatomy(other).layers:
        chosen, means = values[layer.index]
        for mlp in layer.shared:
            mine, held = chosen[: mlp.width], means[: mlp.width]
            mlp.down.module.register_forward_pre_hook(lambda m, a, c=mine, v=held: (torch.where(c, v, a[0]),))
            chosen, means = chosen[mlp.width :], means[mlp.width :]
        if layer.routed is None:
            continue
        module = layer.routed.module
        chosen, means = (x.reshape(layer.routed.count, -1) for x in (chosen, means))

        def forward(x: Any, index: Any, gates: Any, module: Any = module, chosen: Any = chosen, means: Any = means):
            out = torch.zeros_like(x)
            for t in range(len(x)):
                for e, gate in zip(index[t].tolist(), gates[t]):
                    up = module.gate_up_proj[e]
                    y = x[t] @ (up if module.is_transposed else up.T)
                    y = y + module.gate_up_proj_bias[e] if module.has_bias else y
                    h = torch.where(chosen[e], means[e], module._apply_gate(y[None])[0])
                    down = module.down_proj[e]
                    z = h @ (down if module.is_transposed else down.T)
                    out[t] += gate * (z + module.down_proj_bias[e] if module.has_bias else z)
            return out

        module.forward = forward
    return other


def held_by_hand(model: Any, ids: torch.Tensor) -> dict[int, list[list[torch.Tensor]]]:
    """What each expert's neurons hold at the tokens that call it, from what enters the experts."""
    body, found = expert_anatomy(model), {}
    handles = []
    for layer in body.layers:
        found[layer.index] = [[] for _ in layer.expert_widths]
        for mlp in layer.shared:
            handles.append(
                mlp.down.module.register_forward_pre_hook(
                    lambda m, a, i=layer.index: found[i][0].extend(a[0].flatten(0, -2))
                )
            )
        if layer.routed is not None:

            def hear(module: Any, args: Any, i: int = layer.index, first: int = len(layer.shared)) -> None:
                for x, index in zip(args[0], args[1]):
                    for e in index.tolist():
                        up = module.gate_up_proj[e]
                        y = x @ (up if module.is_transposed else up.T)
                        y = y + module.gate_up_proj_bias[e] if module.has_bias else y
                        found[i][first + e].append(module._apply_gate(y[None])[0])

            handles.append(layer.routed.module.register_forward_pre_hook(hear))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


REFERENCE = torch.randint(3, 35, (6, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "DeepseekV3ForCausalLM", "GptOssForCausalLM"])
def test_means_of_the_tokens_that_call(name: str) -> None:
    model = build(name, rows()[name])
    body = expert_anatomy(model)
    held = held_by_hand(model, REFERENCE)
    assert all(calls for layer in held.values() for calls in layer)
    mask = np.random.default_rng(0).random(body.space.n_neurons) < 0.4
    values = {
        layer.index: (
            torch.from_numpy(mask[body.space.layer_slice(layer.index)]),
            torch.cat([torch.stack(calls).mean(dim=0) for calls in held[layer.index]]),
        )
        for layer in body.layers
    }
    before = logits(model)
    with lb.lesion(model, mask, "mean", reference=REFERENCE):
        got = logits(model)
    torch.testing.assert_close(got, logits(by_hand(model, values)), atol=1e-5, rtol=1e-5)
    with lb.lesion(model, mask):
        assert not torch.allclose(got, logits(model), atol=1e-5)
    assert not torch.allclose(got, before, atol=1e-5)
    assert torch.equal(logits(model), before)
    with lb.keep_only(model, ~mask, "mean", reference=REFERENCE):
        assert torch.equal(logits(model), got)
    layer = next(body.routed)[0]
    whole = {i: (torch.zeros_like(c), m) for i, (c, m) in values.items()}
    one = body.space.expert_slice(layer, len(body.layers[layer].shared) + 1)
    whole[layer][0][one.start - body.space.offsets[layer] : one.stop - body.space.offsets[layer]] = True
    with lb.lesion(model, Experts([(layer, 1)]), "mean", reference=REFERENCE):
        torch.testing.assert_close(logits(model), logits(by_hand(model, whole)), atol=1e-5, rtol=1e-5)


def test_scans_tell_the_same_as_token_ids() -> None:
    model, tokenizer = tiny("mixtral"), tiny_tokenizer()
    text = "abc cab bca abcab cab b " * 2
    ids = torch.tensor([tokenizer(text).input_ids])
    scans = lb.scan(model, tokenizer, [text])
    for value in ("mean", "resample"):
        with lb.lesion(model, Experts([(0, 1)]), value, reference=scans):
            one = logits(model)
        with lb.lesion(model, Experts([(0, 1)]), value, reference=ids):
            torch.testing.assert_close(logits(model), one, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "DeepseekV3ForCausalLM"])
def test_resampled_states_are_of_calls_of_the_same_expert(name: str) -> None:
    model = build(name, rows()[name])
    body = expert_anatomy(model)
    held = held_by_hand(model, REFERENCE)
    layer, routed = next(body.routed)
    first, said = len(body.layers[layer].shared), []
    parts = [body.space.expert_slice(layer, part) for part in range(len(body.layers[layer].expert_widths))]
    chosen = np.concatenate([np.arange(part.start, part.start + 3) for part in parts])
    before = logits(model)

    def listen(visits: Any) -> None:
        said.append((visits.experts.clone(), visits.neurons.clone()))

    from llmbrain.hooks.experts import hearing_experts

    with lb.lesion(model, chosen, "resample", reference=REFERENCE, random_state=3) as changed:
        got = logits(changed)
        with hearing_experts({routed.module: listen}):
            again = logits(changed)
    with lb.lesion(model, chosen, "resample", reference=REFERENCE, random_state=3):
        assert torch.equal(logits(model), got)
    assert not torch.equal(again, got)  # drawn anew
    assert not torch.allclose(got, before, atol=1e-5)
    (experts, neurons), seen = said[0], 0
    for token, place in zip(*torch.where(experts >= 0)):
        pool = torch.stack(held[layer][first + int(experts[token, place])])[:, :3]
        distance = (pool - neurons[token, place, :3]).abs().amax(dim=1)
        assert float(distance.min()) < 1e-5
        seen += 1
    assert seen == routed.top_k * IDS.numel()


def test_what_was_never_called_is_named_where_it_is_called() -> None:
    model = tiny("mixtral")
    layer, routed = next(expert_anatomy(model).routed)
    called = []
    handle = routed.module.register_forward_pre_hook(lambda m, a: called.append(a[1]))
    logits(model)
    few = torch.tensor([[5, 5]])
    with torch.no_grad():
        model(input_ids=few, use_cache=False)
    handle.remove()
    never = set(called[0].unique().tolist()) - set(called[1].unique().tolist())
    assert never
    expert = min(never)
    for value in ("mean", "resample"):
        with (
            lb.lesion(model, Experts([(layer, expert)]), value, reference=few),
            pytest.raises(InputError, match=f"expert {expert} is called, but the reference .* never called it"),
        ):
            logits(model)
    logits(model)


def test_controls_fire_in_every_mode() -> None:
    """Random experts of the same layers and experts called as often, silenced or held at their mean: each is called."""
    model = tiny("mixtral")
    ids = torch.randint(3, 35, (6, 12), generator=torch.Generator().manual_seed(0))
    evaluation = lb.TokenEvaluation.from_texts(model, None, ids, window=12)
    scans = lb.scan(model, tiny_tokenizer(), ["abc cab bca abcab " * 4])
    what, effects = {"expert": Experts([(0, 1)]), "neurons": np.arange(0, 192, 5)}, {}
    for value in ("zero", "mean"):
        for reference in (None, scans):
            table = lb.lesion_table(
                model, what, {"text": evaluation}, n_random=4, value=value, reference=reference, progress=False
            )
            assert set(table.draws["control"]) == {"random", "matched"}
            assert len(table.draws) == 16
            assert (table.draws["effect"] != 0).all()
            effects[value, reference is None] = table
    mean, zero = effects["mean", True], effects["zero", True]
    assert not np.allclose(mean.frame["effect"], zero.frame["effect"])
    with lb.lesion(model, what["expert"], "mean", reference=ids), torch.no_grad():
        wanted = evaluation.of(model(input_ids=ids).logits, torch.arange(6)).mean()
    np.testing.assert_allclose(mean.matrix("lesioned").loc["expert", "text"], float(wanted), rtol=1e-5)
    held = dict.fromkeys(range(4), 0)
    for scan in scans:
        for expert, calls in enumerate(scan.visits(0).sum(axis=0)):
            held[expert] += int(calls)
    assert min(held.values()) > 0
    alike = experts_called_alike(what["expert"], model, scans)
    assert all(held[e] for _, e in alike.experts)
    base = logits(model)
    for chosen in (alike, *random_experts(what["expert"], model, 3)):
        for value in ("zero", "mean", "resample", "reroute"):
            with lb.lesion(model, chosen, value, reference=scans):
                assert not torch.allclose(logits(model), base, atol=1e-6), (chosen, value)


def test_a_silent_control_is_said() -> None:
    model = tiny("mixtral")
    evaluation = lb.TokenEvaluation(torch.full((1, 2), 5), torch.tensor([[False, True]]))
    calls = []
    _, routed = next(expert_anatomy(model).routed)
    handle = routed.module.register_forward_pre_hook(lambda m, a: calls.append(a[1]))
    with torch.no_grad():
        model(input_ids=evaluation.ids)
    handle.remove()
    silent = min(set(range(4)) - set(calls[0].unique().tolist()))
    with pytest.warns(UserWarning, match=r"no token calls its experts.* of its 5 controls change nothing"):
        table = lb.lesion_table(
            model, {"quiet": Experts([(0, silent)])}, {"one": evaluation}, n_random=5, n_matched=0, progress=False
        )
    assert float(table.frame["effect"].iloc[0]) == 0


def test_llama_4_behind_accelerate_and_back() -> None:
    """Its experts have a forward of their own: accelerate's wrapper stays, and both are as before afterwards."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model = build("Llama4ForCausalLM", "llama4")
    before = logits(model)
    layer, routed = next(expert_anatomy(model).routed)
    with lb.lesion(model, Experts([(layer, 0)])):
        wanted = logits(model)
    assert "forward" not in vars(routed.module)
    assert not torch.allclose(wanted, before, atol=1e-5)
    add_hook_to_module(routed.module, AlignDevicesHook(execution_device="cpu", offload=True))
    assert routed.module.down_proj.is_meta
    with lb.lesion(model, Experts([(layer, 0)])):
        torch.testing.assert_close(logits(model), wanted)
    torch.testing.assert_close(logits(model), before)

"""Whole MLPs and attentions set to nothing: as if silenced, by measure, and by the rules of ShortGPT and 2SSP."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from pruning_data import CAUSAL, windows
from tiny_models import tiny, tiny_tokenizer

import llmbrain as lb
from llmbrain import InputError, plan_pruning, prune
from llmbrain.anatomy.families import anatomy
from llmbrain.anatomy.nothing import Nothing
from llmbrain.anatomy.surgery import drop
from llmbrain.anatomy.units import HEADS, NEURONS
from llmbrain.pruning.allocate.blocks import BlockBudget, Blocks, block_influence
from llmbrain.pruning.criteria import Material
from llmbrain.pruning.plan import PruningPlan, weights_digest

LAYERS = {"gpt2": "n_layer", "bloom": "n_layer", "gptj": "n_layer", "codegen": "n_layer", "mpt": "n_layers"}
BOTH = ("mlp", "attention")


def deep(name, n=3, **changes):
    return tiny(name, **({} if name == "gpt_neo" else {LAYERS.get(name, "num_hidden_layers"): n}), **changes)


def by_hand(model, mlp=(), attention=()):
    body = anatomy(model)
    kept = tuple(np.arange(0 if i in mlp else w) for i, w in enumerate(body.widths))
    heads = tuple(np.arange(0 if i in attention else n) for i, n in enumerate(HEADS.counts(body)))
    return PruningPlan("hand", "given", 0.3, kept, body.widths, weights_digest(body), heads, HEADS.counts(body))


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def silence(model, mlp, attention):
    """The output projections of these parts say nothing."""
    for layer in anatomy(model).layers:
        for module, gone in ((layer.down.module, mlp), (layer.out.module, attention)):
            if layer.index in gone:
                with torch.no_grad():
                    for parameter in module.parameters():
                        parameter.zero_()
    return model


@pytest.mark.parametrize("name", CAUSAL)
def test_dropped_is_silenced_and_writes_the_same_with_and_without_a_cache(name):
    model, ids = deep(name), windows(2, 12)
    gone = {"mlp": (1,), "attention": (0,)}
    small = prune(model, by_hand(model, **gone))
    assert torch.allclose(logits(small, ids), logits(silence(deep(name), **gone), ids), atol=1e-5)
    mask = torch.ones_like(ids)
    texts = [
        small.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0,
                       eos_token_id=None, use_cache=cache)
        for cache in (True, False)
    ]  # fmt: skip
    assert torch.equal(*texts)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_what_is_dropped_is_not_run_and_keeps_no_cache(name):
    model, ids = deep(name), windows(1, 12)
    small = prune(model, by_hand(model, mlp=(1,), attention=(0, 2)))
    called = []
    for layer in anatomy(small).layers:
        for part, units in ((layer.down, NEURONS), (layer.out, HEADS)):
            if units.is_gone(layer):
                part.module.register_forward_hook(lambda *_: called.append(1))
    with torch.no_grad():
        cache = small(input_ids=ids, use_cache=True).past_key_values
    assert not called
    assert not any(True for m in small.modules() if isinstance(m, Nothing) for _ in m.parameters())
    held = [layer.keys.numel() for layer in cache.layers]
    assert held[0] == held[2] == 12  # one number a token: how many there are
    assert held[1] == 12 * HEADS.counts(anatomy(small))[1] * anatomy(small).layers[1].head_dim


@pytest.mark.parametrize("how", ["beams", "static"])
def test_generation_of_other_kinds_goes_on_from_the_cache(how):
    model, ids = deep("llama"), windows(2, 12)
    small = prune(model, by_hand(model, attention=(0,)))
    options = {"num_beams": 3} if how == "beams" else {"cache_implementation": "static"}
    shared = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0,
              "eos_token_id": None}  # fmt: skip
    plain = small.generate(input_ids=ids, use_cache=False, **({"num_beams": 3} if how == "beams" else {}), **shared)
    assert torch.equal(small.generate(input_ids=ids, **options, **shared), plain)


def learned(mlp=(), attention=(), idle=False):
    """A model of four layers that was trained to go on with cycles, and such text; parts were silent all the time."""
    torch.manual_seed(0)
    model = silence(deep("llama", 4), mlp, attention)
    cycles = torch.randint(3, 30, (64, 4), generator=torch.Generator().manual_seed(0))
    ids = cycles.repeat(1, 4)
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(40):
        optimiser.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
        silence(model, mlp, attention)
        if idle:  # half of the neurons say nothing
            with torch.no_grad():
                for layer in anatomy(model).layers:
                    layer.down.weight()[::2] = 0
    return model.eval(), ids


@pytest.fixture(scope="module")
def useless():
    """In layer 2 the attention says nothing, in layer 1 the MLP."""
    return learned(mlp=(1,), attention=(2,))


@pytest.mark.parametrize("allocation", ["uniform", "search"])
def test_what_does_nothing_is_dropped_rather_than_neurons(allocation, useless):
    model, ids = useless
    plan = plan_pruning(model, ratio=0.6, method="obs", calibration=ids, drop=BOTH, allocation=allocation)
    assert 1 in plan.dropped["mlp"]
    assert 2 in plan.dropped["attention"]
    assert abs(plan.parameters_removed - 0.6 * 4 * 24 * 50) <= 48 + 16  # of a neuron, and of biases that go too
    small = prune(model, plan)
    gone = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in small.parameters())
    assert gone == plan.parameters_removed
    record = plan.details["blocks"]
    assert record["loss_added"]["mlp"]["1"] == pytest.approx(0, abs=1e-6)
    assert [t["chosen"] for t in record["tried"]].count(True) == 1
    assert "MLP of layers [1" in plan.summary()
    assert PruningPlan.from_dict(plan.to_dict()).dropped == plan.dropped


def test_only_what_was_named_is_dropped_and_protected_layers_are_not(useless):
    model, ids = useless
    plan = plan_pruning(model, ratio=0.4, method="flap", calibration=ids, drop="mlp")
    assert plan.kept_heads is None
    assert 1 in plan.dropped["mlp"]
    assert sum(plan.widths) == 96 - round(0.4 * 96)  # neurons alone meet the ratio exactly
    plan = plan_pruning(model, ratio=0.4, method="flap", calibration=ids, drop=["attention"], protect=[2])
    assert 2 not in plan.dropped["attention"]
    assert not plan.dropped["mlp"]


def test_blocks_that_matter_stay():
    model, ids = learned(idle=True)
    plan = plan_pruning(model, ratio=0.3, method="obs", calibration=ids, drop=BOTH)
    assert plan.dropped == {"mlp": (), "attention": ()}
    assert any("no block was dropped" in note for note in plan.details["notes"])


def test_shortgpt_removes_layers_of_least_influence():
    model, ids = silence(deep("llama", 4), mlp=(1,), attention=(1,)), windows()
    body = anatomy(model)
    influence = block_influence(Material(model, body, ids))
    with torch.no_grad():
        states = model(input_ids=ids[:3], output_hidden_states=True).hidden_states
        own = 1 - torch.nn.functional.cosine_similarity(states[0].double(), states[1].double(), dim=-1).mean()
        alone = block_influence(Material(model, body, ids[:3]))
    assert alone[0] == pytest.approx(float(own), rel=1e-6)
    assert influence[1] == pytest.approx(0, abs=1e-6)
    plan = plan_pruning(model, ratio=0.5, method="shortgpt", calibration=ids)
    assert 1 in plan.dropped["mlp"]
    assert plan.dropped["mlp"] == plan.dropped["attention"]
    assert set(plan.widths) == {0, 24}
    per_layer = plan.parameters_removed / len(plan.dropped["mlp"])
    assert abs(plan.parameters_removed - 0.5 * 4 * 24 * 48) <= per_layer / 2 + 16 * 4
    small = prune(model, plan)
    assert torch.allclose(logits(small, ids), logits(silence(model, *plan.dropped.values()), ids), atol=1e-5)


def test_two_stages_take_as_many_attentions_as_published(useless):
    model, ids = useless
    body = anatomy(model)
    given = BlockBudget(body, 0.7)
    mlp, attention = (given.cost(body.layers[0], units) for units in (NEURONS, HEADS))
    blocks = sum(p.numel() for p in body.layers[0].block.parameters())
    wanted = round(4 * (0.7 * mlp / blocks) ** (mlp / attention / 1.5))
    plan = plan_pruning(model, ratio=0.7, method="2ssp", calibration=ids)
    assert 0 < wanted == len(plan.dropped["attention"])
    assert plan.details["blocks"]["attentions_in_order"][0] == 2
    assert max(plan.widths) - min(plan.widths) <= 1
    norms = ids.new_zeros(24, dtype=torch.float64)

    def hear(module, args):
        norms.add_(args[0].double().square().sum((0, 1)))

    handle = body.layers[0].down.module.register_forward_pre_hook(hear)
    logits(model, ids)
    handle.remove()
    assert np.array_equal(plan.kept[0], np.sort(np.argsort(-norms.sqrt().numpy(), kind="stable")[: plan.widths[0]]))


def test_budgets_count_parameters():
    body = anatomy(deep("llama", 4, mlp_bias=False))
    given = BlockBudget(body, 0.5)
    neuron, attention = NEURONS.parameters(body.layers[0]), given.cost(body.layers[0], HEADS)
    assert given.neurons(Blocks()).keep == 48
    assert given.neurons(Blocks(mlp=(0, 1))).keep == 48
    assert given.neurons(Blocks(mlp=(0, 1, 2))) is None
    assert given.neurons(Blocks(attention=(0,))).keep == 96 - round((0.5 * 96 * neuron - attention) / neuron)
    assert given.heads(Blocks(attention=(0,)))[:2] == (0, 2)


def test_impossible_wishes_are_refused():
    model, ids = deep("llama"), windows()
    options = {"ratio": 0.3, "method": "obs", "calibration": ids}
    with pytest.raises(InputError, match=r"drop='head' is no part of a block: allowed are 'mlp' and 'attention'"):
        plan_pruning(model, drop="head", **options)
    with pytest.raises(InputError, match="needs calibration texts"):
        plan_pruning(model, ratio=0.3, method="magnitude", drop="mlp")
    with pytest.raises(InputError, match=r"together with head_ratio=0\.5"):
        plan_pruning(model, drop="mlp", head_ratio=0.5, **options)
    with pytest.raises(InputError, match="leave an allocation of widths away"):
        plan_pruning(model, drop="mlp", allocation=[10, 20, 24], **options)
    with pytest.raises(InputError, match="says itself what it drops"):
        plan_pruning(model, drop="mlp", **{**options, "method": "shortgpt"})
    with pytest.raises(InputError, match=r"drop='attention': no layer can lose its attention.*norms it itself"):
        plan_pruning(tiny("bert"), drop="attention", **options)
    with pytest.raises(InputError, match="the model keeps at least one unit"):
        by_hand(model, mlp=(0, 1, 2))


def test_a_model_without_some_parts_is_read_planned_and_cut_again(tmp_path):
    model, tokenizer, ids = deep("llama"), tiny_tokenizer(), windows()
    small = prune(model, by_hand(model, mlp=(1,), attention=(0,)))
    scan = lb.scan(small, tokenizer, ["abc abd", "abcd"], site=("neuron", "mlp_out", "block_out"), out=tmp_path / "s")[
        0
    ]
    assert scan.space.widths == (24, 0, 24)
    assert scan.data().shape[1] == 48
    assert not scan.data([1], site="mlp_out").any()
    assert scan.data([0], site="mlp_out").any()
    for method, allocation in (("magnitude", "global"), ("obs-gradient", "search"), ("taylor", None)):
        plan = plan_pruning(small, ratio=0.25, method=method, allocation=allocation, calibration=ids)
        assert plan.widths[1] == 0
        assert sum(plan.widths) == 36
        again = prune(small, plan, calibration=ids, compensate="least-squares")
        assert anatomy(again).widths == plan.widths
    plan = plan_pruning(small, ratio=0.25, method="obs", calibration=ids, drop=BOTH)
    assert anatomy(prune(small, plan)).widths == plan.widths


def test_repair_makes_up_for_what_was_dropped():
    model, ids = deep("llama", 4), windows()
    plan = by_hand(model, mlp=(1,), attention=(2,))
    dense = logits(model, ids)
    plain, repaired = prune(model, plan), prune(model, plan, calibration=ids, compensate="least-squares")
    errors = [float((logits(m, ids) - dense).square().mean()) for m in (plain, repaired)]
    assert errors[1] < errors[0]
    assert all(getattr(anatomy(repaired).layers[i].down.module, "bias", None) is None for i in (1,))


def test_a_cut_in_place_that_fails_leaves_the_model(monkeypatch):
    model, ids = deep("llama"), windows()
    before = logits(model, ids)

    def stopped(*args, **options):
        anatomy(model).layers[0].down.module.weight.data.zero_()
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["llmbrain.pruning.prune"], "repair", stopped)
    with pytest.raises(KeyboardInterrupt):
        prune(model, by_hand(model, mlp=(1,)), calibration=ids, compensate="bias", inplace=True)
    assert torch.equal(logits(model, ids), before)


def test_an_attention_that_cannot_go_is_refused_by_name():
    with pytest.raises(InputError, match="adds to the residual stream and norms it itself"):
        drop(anatomy(tiny("bert")).layers[0], HEADS)

"""A lesion is what cutting the weight's columns would be, on every family, and leaves no trace."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_models import MODELS, VOCAB, tiny, tiny_tokenizer

from llmbrain import FunctionalNetworks, InputError, NeuronSpace
from llmbrain.anatomy.families import anatomy
from llmbrain.intervention import Heads, TokenEvaluation, amplify, keep_only, lesion
from llmbrain.intervention.evaluations import score_conditions

FAMILIES = [name for name in MODELS if name != "mixtral"]  # a mixture of experts has no single MLP
IDS = torch.randint(3, VOCAB, (3, 12), generator=torch.Generator().manual_seed(1))


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits


def scaled(model, factors, which="down"):
    """A copy whose weight columns are multiplied: `factors` is a vector a layer."""
    clone = copy.deepcopy(model)
    with torch.no_grad():
        for layer, factor in zip(anatomy(clone).layers, factors):
            projection = layer.down if which == "down" else layer.out
            projection.weight().mul_(torch.as_tensor(factor, dtype=torch.float32)[:, None])
    return clone


def random_mask(model, share=0.4, seed=0):
    return np.random.default_rng(seed).random(sum(anatomy(model).widths)) < share


def by_layer(model, values):
    return np.split(np.asarray(values, dtype=float), np.cumsum(anatomy(model).widths)[:-1])


@pytest.mark.parametrize("family", FAMILIES)
def test_lesion_keep_and_gain_equal_changed_weights(family):
    model = tiny(family)
    mask = random_mask(model)
    before = logits(model)
    for intervention, factors in (
        (lesion(model, mask), ~mask),
        (keep_only(model, mask), mask),
        (amplify(model, mask, -2.5), np.where(mask, -2.5, 1)),
    ):
        with intervention:
            inside = logits(model)
        expected = logits(scaled(model, by_layer(model, factors)))
        torch.testing.assert_close(inside, expected, atol=1e-5, rtol=1e-5)
        assert (inside - before).abs().max() > 1e-3
        assert torch.equal(logits(model), before)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "opt", "gpt_neox", "bloom", "falcon", "bert"])
def test_heads_equal_changed_output_weights(family):
    model = tiny(family)
    body = anatomy(model)
    dim = body.layers[0].head_dim
    heads = Heads([(0, 1), (1, 0), (1, 3)])
    factors = [np.ones(4 * dim) for _ in body.layers]
    factors[0][dim : 2 * dim] = factors[1][:dim] = factors[1][3 * dim :] = 0
    with lesion(model, heads):
        inside = logits(model)
    torch.testing.assert_close(inside, logits(scaled(model, factors, "out")), atol=1e-5, rtol=1e-5)
    with keep_only(model, heads):
        torch.testing.assert_close(
            logits(model), logits(scaled(model, [1 - f for f in factors], "out")), atol=1e-5, rtol=1e-5
        )
    assert (inside - logits(model)).abs().max() > 1e-3


def test_every_way_to_name_neurons():
    model = tiny("llama")
    space = NeuronSpace(anatomy(model).widths)
    maps = np.zeros((3, space.n_neurons))
    maps[0, [1, 5, 30]] = 9
    maps[1, [5, 40]] = -9
    networks = FunctionalNetworks(maps, space, threshold=1, standardize=False)
    union = np.array([1, 5, 30, 40])
    pairs = list(zip(*(x.tolist() for x in space.locate(union))))
    wanted = logits(scaled(model, by_layer(model, ~np.isin(np.arange(space.n_neurons), union))))
    for what in (
        networks,
        [networks[0], networks[1]],
        networks.subset([0, 1]),
        networks.masks.any(axis=0),
        torch.from_numpy(networks.union),
        union,
        union.tolist(),
        pairs,
        pd.concat([networks.key_neurons(0), networks.key_neurons(1)]),
    ):
        with lesion(model, what) as inside:
            assert inside is model
            torch.testing.assert_close(logits(model), wanted, atol=1e-6, rtol=1e-6)


def test_they_nest_and_only_take_their_own_hooks():
    model = tiny("gpt2")
    seen = []
    other = anatomy(model).layers[0].down.module.register_forward_pre_hook(lambda m, args: seen.append(1))
    a, b = random_mask(model, seed=1), random_mask(model, seed=2)
    before = logits(model)
    with lesion(model, a):
        one = logits(model)
        with amplify(model, b, 3):
            both = logits(model)
        assert torch.equal(logits(model), one)
    torch.testing.assert_close(
        both, logits(scaled(model, by_layer(model, ~a * np.where(b, 3, 1)))), atol=1e-5, rtol=1e-5
    )
    assert torch.equal(logits(model), before)
    n = len(seen)
    logits(model)
    assert len(seen) == n + 1
    other.remove()


def test_restored_after_an_error_and_reusable():
    model = tiny("llama")
    before = logits(model)
    intervention = lesion(model, random_mask(model))
    with pytest.raises(RuntimeError, match="stop"), intervention:
        raise RuntimeError("stop")
    assert torch.equal(logits(model), before)
    with intervention:
        first = logits(model)
    with intervention, intervention:
        assert torch.equal(logits(model), first)
    assert torch.equal(logits(model), before)
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox"])
def test_generation_with_cache(family):
    model = tiny(family)
    mask = random_mask(model)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    plain = model.generate(IDS[:1], **options)
    with lesion(model, mask):
        inside = model.generate(IDS[:1], **options)
    expected = scaled(model, by_layer(model, ~mask)).generate(IDS[:1], **options)
    assert inside.tolist() == expected.tolist()
    assert inside.tolist() != plain.tolist()


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_mean_equals_a_bias_and_resample_keeps_the_joint_distribution(family):
    model = tiny(family)
    body, space = anatomy(model), NeuronSpace(anatomy(model).widths)
    mask = random_mask(model)
    reference = torch.randint(3, VOCAB, (6, 20), generator=torch.Generator().manual_seed(5))
    recorded = [[] for _ in body.layers]
    handles = [
        layer.down.module.register_forward_pre_hook(lambda m, a, out=out: out.append(a[0].flatten(0, -2)))
        for layer, out in zip(body.layers, recorded)
    ]
    logits(model, reference)
    for handle in handles:
        handle.remove()
    data = torch.cat([torch.cat(r) for r in recorded], dim=1).numpy()
    expected = scaled(model, by_layer(model, ~mask))
    for layer, mean, chosen, original in zip(
        anatomy(expected).layers, by_layer(model, data.mean(axis=0)), by_layer(model, mask), body.layers
    ):
        shift = torch.as_tensor(mean * chosen, dtype=torch.float32) @ original.down.weight()
        module = layer.down.module
        module.bias = torch.nn.Parameter((0 if module.bias is None else module.bias.detach()) + shift)
    for source in (reference, data, [data[:50], data[50:]]):
        with lesion(model, mask, "mean", reference=source):
            torch.testing.assert_close(logits(model), logits(expected), atol=2e-5, rtol=1e-5)

    caught = []
    with lesion(model, mask, "resample", reference=data, random_state=3):
        handle = body.layers[1].down.module.register_forward_pre_hook(lambda m, a: caught.append(a[0].flatten(0, -2)))
        logits(model)
        handle.remove()
        other = logits(model)
    chosen = mask[space.layer_slice(1)]
    rows = {tuple(r) for r in data[:, space.layer_slice(1)][:, chosen].round(4).tolist()}
    drawn = {tuple(r) for r in caught[0].numpy()[:, chosen].round(4).tolist()}
    assert drawn <= rows
    assert len(drawn) > 15
    again = lesion(model, mask, "resample", reference=data, random_state=3)
    with again:
        first = logits(model)
    with again:
        assert torch.equal(logits(model), first)
    assert not torch.equal(first, other)


def test_heads_mean_from_token_ids():
    model = tiny("llama")
    heads = Heads([(0, 0)])
    with lesion(model, heads, "mean", reference=IDS):
        assert (logits(model) - logits(tiny("llama"))).abs().max() > 1e-4
    with pytest.raises(InputError, match="must be token ids"):
        lesion(model, heads, "mean", reference=np.zeros((4, 48), dtype=np.float32))


def test_widths_of_a_pruned_model():
    model = tiny("llama")
    layer = anatomy(model).layers[0]
    for projection in layer.inputs:
        module = projection.module
        module.weight = torch.nn.Parameter(module.weight[:10].clone())
        module.bias = torch.nn.Parameter(module.bias[:10].clone())
    layer.down.module.weight = torch.nn.Parameter(layer.down.module.weight[:, :10].clone())
    assert anatomy(model).widths == (10, 24)
    mask = random_mask(model)
    with lesion(model, mask):
        inside = logits(model)
    torch.testing.assert_close(inside, logits(scaled(model, by_layer(model, ~mask))), atol=1e-6, rtol=1e-6)
    dense = FunctionalNetworks(np.eye(2, 48), NeuronSpace([24, 24]))
    with pytest.raises(InputError, match=r"2 layers x 24.*widths \[10, 24\]"):
        lesion(model, dense[0])


def test_accelerate_dispatch_and_bfloat16():
    from accelerate import cpu_offload

    model = tiny("llama", dtype=torch.bfloat16)
    mask = random_mask(model)
    expected = logits(scaled(model, by_layer(model, ~mask)))
    with lesion(model, mask):
        assert torch.equal(logits(model), expected)
    cpu_offload(model, execution_device="cpu")
    before = logits(model)
    with lesion(model, mask):
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), before)


def test_gradients_pass():
    model = tiny("llama")
    with lesion(model, random_mask(model)):
        model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for layer in anatomy(model).layers for p in layer.down.module.parameters())


def test_empty_is_said_and_changes_nothing():
    model = tiny("llama")
    empty = FunctionalNetworks(np.zeros((1, 48)), NeuronSpace([24, 24]))[0]
    for make in (lambda: lesion(model, empty), lambda: lesion(model, []), lambda: keep_only(model, np.ones(48, bool))):
        with pytest.warns(UserWarning, match="the model is unchanged"):
            intervention = make()
        with intervention:
            assert torch.equal(logits(model), logits(tiny("llama")))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: lesion(m, np.ones(7, bool)), r"mask of shape \(7,\)"),
        (lambda m: lesion(m, [(0, 99)]), "neuron=99 does not exist in layer 0: it has 24"),
        (lambda m: lesion(m, [48]), "flat index=48"),
        (lambda m: lesion(m, [(0, 1, 2)]), "no set of neurons"),
        (lambda m: lesion(m, "all"), "what='all' is no set"),
        (lambda m: lesion(m, None), "no set of neurons"),
        (lambda m: lesion(m, pd.DataFrame({"layer": [0]})), r"without the columns \['neuron'\]"),
        (lambda m: lesion(m, Heads([(0, 4)])), "head=4 does not exist in layer 0: it has 4"),
        (lambda m: lesion(m, Heads([(2, 0)])), "layer=2 does not exist"),
        (lambda m: lesion(m, [1], "nought"), "value='nought'"),
        (lambda m: lesion(m, [1], "mean"), "needs reference="),
        (lambda m: lesion(m, [1], "mean", reference=np.ones((5, 47))), "reference lies in"),
        (lambda m: amplify(m, [1], float("nan")), "gain=nan"),
        (lambda m: amplify(m, [1], float("inf")), "gain=inf"),
        (lambda m: lesion(m, FunctionalNetworks(np.eye(2, 40), NeuronSpace([20, 20]))), "the model has"),
        (lambda m: lesion(m, FunctionalNetworks(np.eye(2, 40))[0]), "covers 40 neurons"),
        (lambda m: lesion(torch.nn.Linear(2, 2), [1]), "no known family"),
    ],
)
def test_bad_input_before_anything_happens(call, message):
    model = tiny("llama")
    with pytest.raises(InputError, match=message):
        call(model)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_answers_of_different_length_are_scored_alone_as_together():
    model, tokenizer = tiny("llama"), tiny_tokenizer()
    prompts = ["a b", "abc de fg hij", "k", "lm no pq"] * 5
    answers = ["c", "klm", "l" * 20, "r s"] * 5
    together = TokenEvaluation.from_answers(tokenizer, prompts, answers, score="loss")
    keep = np.ones((2, 48), dtype=bool)
    keep[1, ::3] = False
    scores = score_conditions(model, keep, {"all": together})["all"]
    for i in (0, 1, 2, 3):
        alone = TokenEvaluation.from_answers(tokenizer, [prompts[i]], [answers[i]], score="loss")
        np.testing.assert_allclose(score_conditions(model, keep, {"one": alone})["one"][:, 0], scores[:, i], rtol=1e-5)

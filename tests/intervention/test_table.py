"""The lesion table: many lesions in one pass equal one at a time, and the controls are what they say."""

import json

import numpy as np
import pytest
import torch
from scipy import stats
from tiny_models import VOCAB, tiny, tiny_tokenizer

from llmbrain import FunctionalNetworks, InputError, NeuronSpace
from llmbrain.anatomy.families import anatomy
from llmbrain.evaluation.perplexity import mean_loss
from llmbrain.intervention import (
    Heads,
    TokenEvaluation,
    amplification_curve,
    amplify,
    keep_only,
    keep_only_curve,
    lesion,
    lesion_table,
    score_conditions,
)
from llmbrain.intervention.controls import matched_masks, random_masks
from llmbrain.intervention.evaluations import activation_levels

WINDOWS = torch.randint(3, VOCAB, (5, 16), generator=torch.Generator().manual_seed(2))
CAUSAL = ["llama", "gpt2", "opt", "gpt_neox", "bloom", "falcon", "phi3", "gemma3"]


def masks_of(model, n=4, share=0.3):
    return np.random.default_rng(0).random((n, sum(anatomy(model).widths))) < share


def networks_of(model, n=3):
    space = NeuronSpace(anatomy(model).widths)
    return FunctionalNetworks(np.random.default_rng(1).laplace(size=(n, space.n_neurons)), space, threshold=1.8)


@pytest.mark.parametrize("family", CAUSAL)
def test_many_at_once_equal_one_by_one(family):
    model = tiny(family)
    masks = masks_of(model)
    scores = score_conditions(model, ~masks, {"text": TokenEvaluation.from_texts(model, None, WINDOWS)})["text"]
    assert scores.shape == (4, 5)
    for mask, row in zip(masks, scores):
        with lesion(model, mask):
            assert row.mean() == pytest.approx(mean_loss(model, WINDOWS), abs=1e-5)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_gains_fills_and_callables():
    model = tiny("llama")
    mask = masks_of(model)[0]
    text = TokenEvaluation.from_texts(model, None, WINDOWS)
    evaluations = {"text": text, "call": lambda m: [mean_loss(m, WINDOWS[:2]), mean_loss(m, WINDOWS[2:3])]}
    gains = score_conditions(model, np.where(mask, 2.5, 1)[None], evaluations)
    with amplify(model, mask, 2.5):
        assert gains["text"].mean() == pytest.approx(mean_loss(model, WINDOWS), abs=1e-5)
        assert gains["call"][0, 1] == pytest.approx(mean_loss(model, WINDOWS[2:3]), abs=1e-5)
    means = activation_levels(model, [text])[0]
    filled = score_conditions(model, ~mask[None], evaluations, fill=means)
    with lesion(model, mask, "mean", reference=WINDOWS):
        assert filled["text"].mean() == pytest.approx(mean_loss(model, WINDOWS), abs=1e-5)


@pytest.mark.parametrize("family", CAUSAL)
def test_heads_stand_in_the_table_beside_other_heads(family):
    model = tiny(family)
    body = anatomy(model)
    heads = Heads([(0, 1), (1, 0)])
    networks = {"heads": heads, "neurons": [(0, 1), (1, 2)]}
    table = lesion_table(model, networks, {"text": WINDOWS}, n_random=6, n_matched=2, progress=False)
    row = table.frame.set_index("network").loc["heads"]
    with lesion(model, heads):
        assert row["lesioned"] == pytest.approx(mean_loss(model, WINDOWS), abs=1e-5)
    assert row["size"] == 2
    assert np.isfinite(row["random_effect"])
    draws = table.draws.query("network == 'heads' and control == 'random'")["effect"]
    every = []
    for first in range(body.layers[0].n_heads):
        for second in range(body.layers[1].n_heads):
            with lesion(model, Heads([(0, first), (1, second)])):
                every.append(mean_loss(model, WINDOWS) - row["baseline"])
    assert np.abs(draws.to_numpy()[:, None] - np.array(every)).min(axis=1).max() < 1e-5  # each draw is a pair of heads
    neurons = table.frame.set_index("network").loc["neurons"]
    with lesion(model, networks["neurons"]):
        assert neurons["lesioned"] == pytest.approx(mean_loss(model, WINDOWS), abs=1e-5)


def test_heads_in_the_table_refuse_what_they_cannot():
    model = tiny("llama")
    with pytest.raises(InputError, match="heads take value='zero'"):
        lesion_table(model, {"heads": Heads([(0, 1)])}, {"text": WINDOWS}, value="mean")
    with pytest.raises(InputError, match="head=9 does not exist"):
        lesion_table(model, {"heads": Heads([(0, 9)])}, {"text": WINDOWS})


def test_answers_equal_greedy_generation():
    model, tokenizer = tiny("gpt2"), tiny_tokenizer()
    prompts, answers = [], []
    for first in "abcdefghijklmnopqrstuvwxyz":  # prompts that the model goes on from with a character
        prompt = first + " cat"[: 1 + ord(first) % 4]
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        choice = model.generate(ids, max_new_tokens=1, do_sample=False, pad_token_id=0, eos_token_id=None)[0, -1]
        if 3 <= choice < 35:
            prompts.append(prompt)
            answers.append(tokenizer.decode([choice if len(answers) < 2 else 3 + (choice - 2) % 32]))
    assert len(prompts) > 3
    exact = TokenEvaluation.from_answers(tokenizer, prompts, answers)
    assert score_conditions(model, np.ones((1, 48)), {"exact": exact})["exact"][0].tolist() == [1, 1] + [0] * (
        len(prompts) - 2
    )
    loss = TokenEvaluation.from_answers(tokenizer, prompts, [a + "ab" for a in answers], score="loss")
    scores = score_conditions(model, np.ones((1, 48)), {"loss": loss})["loss"][0]
    for prompt, answer, score in zip(prompts, answers, scores):
        ids = torch.tensor([tokenizer(prompt + answer + "ab")["input_ids"]])
        labels = ids.clone()
        labels[:, :-3] = -100
        with torch.no_grad():
            assert score == pytest.approx(model(input_ids=ids, labels=labels).loss.item(), abs=1e-5)


def test_levels_leave_padding_out():
    model, tokenizer = tiny("llama"), tiny_tokenizer()
    prompts, answers = ["a", "hello there, who"], ["bc", " are you"]
    evaluation = TokenEvaluation.from_answers(tokenizer, prompts, answers)
    caught = []
    handles = [
        layer.down.module.register_forward_pre_hook(lambda m, a: caught.append(a[0][0].detach()))
        for layer in anatomy(model).layers
    ]
    for prompt, answer in zip(prompts, answers):
        model(input_ids=torch.tensor([tokenizer(prompt + answer)["input_ids"]]))
    for handle in handles:
        handle.remove()
    data = torch.cat([torch.cat(caught[::2]), torch.cat(caught[1::2])], dim=1).double()
    expected = torch.stack([data.mean(0), data.abs().mean(0), data.std(0, correction=0)])
    np.testing.assert_allclose(activation_levels(model, [evaluation]), expected, atol=1e-6)


def test_table_by_hand():
    model, networks = tiny("gpt2"), networks_of(tiny("gpt2"))
    with pytest.raises(InputError, match="tokenizer=None"):
        lesion_table(model, networks, {"text": ["abc"]})
    table = lesion_table(model, networks, {"text": WINDOWS, "half": WINDOWS[:, :8]}, n_random=9, n_matched=6)
    frame = table.frame
    assert len(frame) == 6
    base = mean_loss(model, WINDOWS)
    for network in networks:
        row = frame[(frame.network == network.name) & (frame.evaluation == "text")].iloc[0]
        with lesion(model, network):
            effect = mean_loss(model, WINDOWS) - base
        assert row["size"] == network.size
        assert row.effect == pytest.approx(effect, abs=1e-5) == row.harm
        assert row.effect_low <= row.effect <= row.effect_high
        draws = table.draws[(table.draws.network == network.name) & (table.draws.evaluation == "text")]
        for control, n in (("random", 9), ("matched", 6)):
            null = draws[draws.control == control].effect.to_numpy()
            assert len(null) == n
            assert row[f"p_{control}"] == ((np.abs(null) >= abs(row.effect)).sum() + 1) / (n + 1)
            assert row[f"{control}_effect"] == pytest.approx(null.mean())
            assert row[f"z_{control}"] == pytest.approx((row.effect - null.mean()) / null.std(ddof=1))
    np.testing.assert_allclose(frame.q_random, stats.false_discovery_control(frame.p_random))
    assert table.matrix("effect").shape == (3, 2)
    again = lesion_table(model, networks, {"text": WINDOWS, "half": WINDOWS[:, :8]}, n_random=9, n_matched=6)
    np.testing.assert_array_equal(again.frame.p_matched, frame.p_matched)


def test_scores_turn_harm_around():
    model = tiny("gpt2")
    ids, scored = WINDOWS, torch.ones_like(WINDOWS, dtype=torch.bool)
    scored[:, 0] = False
    with torch.no_grad():  # tokens that the model itself would choose, so that a lesion can only take away
        ids[:, 1:] = model(input_ids=ids).logits.argmax(-1)[:, :-1]
    table = lesion_table(
        model, networks_of(model), {"right": TokenEvaluation(ids, scored, "accuracy"), "call": lambda m: 1.0},
        n_random=3, n_matched=0,
    )  # fmt: skip
    right = table.frame[table.frame.evaluation == "right"]
    np.testing.assert_allclose(right.harm, -right.effect)
    np.testing.assert_allclose(right.harm_low, -right.effect_high)
    call = table.frame[table.frame.evaluation == "call"]
    assert (call.effect == 0).all()
    assert (call.p_random == 1).all()
    assert call.effect_low.isna().all()
    assert table.frame.q_matched.isna().all()


def test_random_controls_have_the_layers_and_sizes():
    space = NeuronSpace([40, 60, 20])
    mask = np.random.default_rng(0).random(120) < 0.15
    masks = random_masks(mask, space, 2000, np.random.default_rng(1))
    for layer in range(3):
        part = space.layer_slice(layer)
        assert (masks[:, part].sum(axis=1) == mask[part].sum()).all()
        np.testing.assert_allclose(masks[:, part].mean(axis=0), mask[part].mean(), atol=0.05)


def test_matched_controls_are_as_loud_and_may_be_the_network():
    space = NeuronSpace([100, 100])
    rng = np.random.default_rng(0)
    levels = np.exp(rng.normal(size=(1, 200)) * 2) * np.array([[1], [1.5]])
    mask = np.zeros(200, bool)
    loud = np.argsort(-levels[0, :100])[:20]
    mask[loud[::2]] = mask[150] = True
    masks = matched_masks(mask, space, levels, 30, rng)
    assert (masks & mask).any()  # else the rank of the network is not exact
    assert (masks[:, :100].sum(axis=1) == 10).all()
    assert (masks[:, 100:].sum(axis=1) == 1).all()
    own, others = np.log(levels[0, mask]).mean(), np.array([np.log(levels[0, m]).mean() for m in masks])
    plain = np.array([np.log(levels[0, m]).mean() for m in random_masks(mask, space, 30, rng)])
    assert np.abs(others - own).max() < np.abs(plain - own).min()
    assert len({m.tobytes() for m in masks}) > 10
    mask[:60] = True
    assert matched_masks(mask, space, levels, 3, rng) is None


def test_matched_controls_hold_their_level():
    """A random network whose neurons harm as they are loud: p <= .05 in one of 21 draws' ranks (issue: .08 to .15)."""
    space = NeuronSpace([60, 60])
    reached = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        level = np.exp(rng.normal(size=120))
        mask = np.zeros(120, bool)
        mask[rng.choice(60, 14, replace=False)] = mask[60 + rng.choice(60, 3, replace=False)] = True
        effect = rng.normal(size=120) * level
        draws = np.abs(matched_masks(mask, space, np.stack([level, level]), 20, rng) @ effect)
        reached += (draws >= np.abs(effect[mask].sum()) * (1 - 1e-12)).sum() == 0
    assert stats.binomtest(int(reached), 300, 1 / 21).pvalue > 0.01


def test_a_network_that_matters_is_found_and_dissociated():
    """Two sets of neurons that drive one token each: cutting one hurts only the text of that token."""
    model = tiny("gpt2", n_inner=64)
    layer = anatomy(model).layers[1]
    with torch.no_grad():
        for projection in layer.inputs:
            projection.weight().mul_(0.2)
        layer.inputs[0].bias()[:8] = 2.0
        layer.down.weight().mul_(0.05)
        direction = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))[0]
        model.transformer.ln_f.weight.fill_(1)
        model.transformer.ln_f.bias.zero_()
        model.transformer.wte.weight[3:] *= 0.3
        for token, rows, axis in ((10, slice(0, 4), 1), (11, slice(4, 8), 2)):
            layer.down.weight()[rows] = direction[axis] * 0.6
            model.transformer.wte.weight[token] += 2 * direction[axis]
    texts = {}
    for token in (10, 11):
        ids = torch.randint(12, VOCAB, (8, 12), generator=torch.Generator().manual_seed(token))
        scored = torch.zeros_like(ids, dtype=torch.bool)
        ids[:, 1::2] = token
        scored[:, 1::2] = True
        texts[f"token {token}"] = TokenEvaluation(ids, scored)
    sets = {"a": [(1, i) for i in range(4)], "b": [(1, i) for i in range(4, 8)]}
    table = lesion_table(model, sets, texts, n_random=60, n_matched=0)
    harm = table.matrix("harm")
    assert harm.loc["a", "token 10"] > 0.3 > 0.1 > harm.loc["a", "token 11"]
    assert harm.loc["b", "token 11"] > 0.3 > 0.1 > harm.loc["b", "token 10"]
    assert table.matrix("p_random").loc["a", "token 10"] <= 2 / 61
    with pytest.warns(UserWarning, match="no cell has q_random <= 0.01: 60 draws give p >= 0.0164"):
        assert table.double_dissociations(0.01).empty
    found = table.double_dissociations(corrected=False)
    assert found[["network_a", "evaluation_a", "network_b", "evaluation_b"]].values.tolist() == [
        ["a", "token 10", "b", "token 11"]
    ]


def test_resume_reads_what_is_there(tmp_path, monkeypatch):
    model, networks = tiny("llama"), networks_of(tiny("llama"))
    whole = lesion_table(model, networks, {"text": WINDOWS}, n_random=4)
    import llmbrain.intervention.table as module

    real, calls = module.score_conditions, []

    def counting(*args, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(module, "score_conditions", counting)
    with pytest.raises(KeyboardInterrupt):
        lesion_table(model, networks, {"text": WINDOWS}, n_random=4, out=tmp_path)
    table = lesion_table(model, networks, {"text": WINDOWS}, n_random=4, out=tmp_path)
    assert len(calls) == 3 + 3  # the baseline and one network before the stop; the baseline and two networks after it
    np.testing.assert_allclose(table.frame.effect, whole.frame.effect, atol=1e-6)
    np.testing.assert_allclose(table.draws.effect, whole.draws.effect, atol=1e-6)
    with pytest.raises(InputError, match="holds another lesion table"):
        lesion_table(model, networks, {"text": WINDOWS}, n_random=5, out=tmp_path)
    with pytest.raises(InputError, match="holds another lesion table"):
        lesion_table(tiny("llama", seed=1), networks, {"text": WINDOWS}, n_random=4, out=tmp_path)
    table.save(tmp_path / "tables")
    assert (tmp_path / "tables" / "lesion_table.tsv").read_text().startswith("network\tevaluation\tsize")


def test_a_record_of_other_kinds_of_values_is_of_another_table(tmp_path):
    model, networks = tiny("llama"), networks_of(tiny("llama"))
    lesion_table(model, networks, {"text": WINDOWS}, n_random=2, out=tmp_path)
    path = tmp_path / "lesions.json"
    record = {k: v for k, v in json.loads(path.read_text()).items() if k != "sha256"}
    for value in ("1", [], {}, None, True, 10**400, [[1.0]]):
        path.write_text(json.dumps({**record, "baseline": {"text": value}}))
        with pytest.raises(InputError, match="holds another lesion table"):
            lesion_table(model, networks, {"text": WINDOWS}, n_random=2, out=tmp_path)


def test_empty_network_has_no_effect_and_says_so():
    model = tiny("llama")
    with pytest.warns(UserWarning, match=r"networks \['none'\] hold no neuron"):
        table = lesion_table(model, {"none": [], "one": [3]}, {"text": WINDOWS}, n_random=2)
    row = table.frame[table.frame.network == "none"].iloc[0]
    assert row.effect == 0
    assert np.isnan(row.p_random)


@pytest.mark.parametrize("random_state", [None, np.random.default_rng(3), np.random.RandomState(3)])
def test_any_random_state(random_state, tmp_path):
    model = tiny("llama")
    networks, evaluations = networks_of(model, 1), {"text": WINDOWS}
    options = {"n_random": 2, "progress": False, "random_state": random_state}
    table = lesion_table(model, networks, evaluations, out=tmp_path, **options)
    again = lesion_table(model, networks, evaluations, n_random=2, random_state=table.provenance["random_state"])
    np.testing.assert_array_equal(table.draws["effect"], again.draws["effect"])
    if random_state is None:
        resumed = lesion_table(model, networks, evaluations, out=tmp_path, **options)
        np.testing.assert_array_equal(table.draws["effect"], resumed.draws["effect"])
    assert len(keep_only_curve(model, networks, evaluations, shares=[0.5], n_random=1, random_state=random_state)) == 1
    curve = amplification_curve(model, networks[0], evaluations, gains=[2], n_random=1, random_state=random_state)
    assert len(curve) == 1
    with lesion(model, networks[0], "resample", reference=WINDOWS, random_state=random_state):
        assert np.isfinite(mean_loss(model, WINDOWS))


def test_a_random_state_that_is_none_of_these_is_named():
    with pytest.raises(InputError, match="random_state='seed' must be a whole number"):
        lesion_table(tiny("llama"), {"one": [0]}, {"text": WINDOWS}, random_state="seed")


def test_curves():
    model, networks = tiny("gpt2"), networks_of(tiny("gpt2"))
    keep = keep_only_curve(model, networks, {"text": WINDOWS}, shares=(0.25, 1.0), n_random=5)
    base = mean_loss(model, WINDOWS)
    assert keep.n_kept.tolist() == [12, 48]
    assert keep.score.iloc[1] == pytest.approx(base, abs=1e-5) == pytest.approx(keep.intact.iloc[1], abs=1e-5)
    strongest = np.argsort(-np.abs(networks.maps).max(axis=0))[:12]
    with keep_only(model, strongest):
        assert keep.score.iloc[0] == pytest.approx(mean_loss(model, WINDOWS), abs=1e-5)
    assert keep.random_low.iloc[0] <= keep.random_mean.iloc[0] <= keep.random_high.iloc[0]
    gain = amplification_curve(model, networks[0], {"text": WINDOWS}, gains=(0, 1, 3), n_random=4)
    with amplify(model, networks[0], 3):
        assert gain.score.iloc[2] == pytest.approx(mean_loss(model, WINDOWS), abs=1e-5)
    with lesion(model, networks[0]):
        assert gain.score.iloc[0] == pytest.approx(mean_loss(model, WINDOWS), abs=1e-5)
    assert gain.score.iloc[1] == pytest.approx(base, abs=1e-5)
    assert gain.random_low.iloc[1] == pytest.approx(gain.random_high.iloc[1], abs=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"evaluations": {}}, "at least one name"),
        ({"evaluations": {"a": []}}, r"evaluations\['a'\]: the evaluation has no data"),
        ({"evaluations": {"a": lambda m: float("nan")}, "n_matched": 0}, r"evaluations\['a'\] gives nan"),
        ({"evaluations": {"a": lambda m: 1.0}}, "n_matched=0"),
        ({"networks": FunctionalNetworks(np.eye(2, 40), NeuronSpace([20, 20]))}, "the model has"),
        ({"networks": {}}, "networks is empty"),
        ({"value": "resample"}, "value='resample'"),
        ({"n_random": -1}, "n_random=-1"),
        ({"reference": np.ones((4, 3), dtype=np.float32)}, "neurons"),
    ],
)
def test_bad_input(change, message):
    model = tiny("llama")
    with pytest.raises(InputError, match=message):
        lesion_table(**{"model": model, "networks": {"a": [1]}, "evaluations": {"a": WINDOWS}, **change})

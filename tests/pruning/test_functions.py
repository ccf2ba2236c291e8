"""Keep a function, or forget it: conditions, the choice of neurons, the repair."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import VOCAB, tiny, tiny_tokenizer

import llmbrain as lb
from llmbrain import FunctionalNetworks, InputError, Stimulus, plan_pruning, prune, scan
from llmbrain.anatomy.families import anatomy
from llmbrain.pruning.calibrate.losses import Objective, log_odds
from llmbrain.pruning.calibrate.windows import calibration_windows
from llmbrain.pruning.forget.conditions import condition_weights, token_conditions


def windows(n=40, length=16, seed=0):
    return torch.randint(3, VOCAB, (n, length), generator=torch.Generator().manual_seed(seed))


def stimuli(n=6):
    tokenizer, rng = tiny_tokenizer(), np.random.default_rng(0)
    texts = []
    for _ in range(n):
        segments = [("".join(rng.choice(list(letters), 12)), name)
                    for name, letters in (("low", "abc"), ("high", "xyz"))] * 2  # fmt: skip
        texts.append(Stimulus.from_segments(segments, tokenizer))
    return tokenizer, texts


def test_conditions_weigh_tokens():
    tokenizer, texts = stimuli()
    scans = scan(tiny("llama"), tokenizer, texts)
    total = sum(s.n_tokens for s in scans)
    weights = condition_weights(scans, (1, total), ["low"], None)[0]
    at = np.concatenate([np.arange(s.n_tokens) for s in scans])
    first = scans[0].events.iloc[0]
    inside = weights[: scans[0].n_tokens][int(first.onset) : int(first.onset + first.duration)]
    assert inside.min() == weights.max() > 40 * weights.min() > 0
    assert len(at) == total
    assert float(condition_weights(scans, (1, total), None, ["low"]).min()) == 0
    with pytest.raises(InputError, match="keep='loud' is not known"):
        condition_weights(scans, (1, total), ["loud"], None)


def test_tokens_keep_their_conditions_beside_a_scan_without_tokens():
    """Windows leave such a scan out; so must the conditions, or every later token gets another's."""
    tokenizer, texts = stimuli(2)
    model = tiny("llama")
    first, second = scan(model, tokenizer, texts)
    bare = lb.Scan.from_array(np.ones((7, 48)), first.space, events=first.events.head(0))
    found = calibration_windows(model, tokenizer, None, [first, bare, second], 8, None)
    labels, names = token_conditions([first, bare, second], tuple(found.shape))
    low = {tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in "abc"}
    for token, label in zip(found.flatten().tolist(), labels.flatten().tolist()):
        assert label == (-1 if token == 1 else names.index("low" if token in low else "high"))


@pytest.fixture(scope="module")
def two_abilities():
    """A tiny model that was trained to go on with two cycles of letters, and scans of text of both."""
    torch.manual_seed(0)
    model, tokenizer, rng = tiny("llama", intermediate_size=48), tiny_tokenizer(), np.random.default_rng(0)
    texts = []
    for _ in range(24):
        parts = [(letters * 3, name) for name, letters in (("low", "abcde"), ("high", "vwxyz"))]
        texts.append(Stimulus.from_segments([parts[i] for i in rng.permutation([0, 1, 0, 1])], tokenizer))
    scans = scan(model, tokenizer, texts)
    ids = torch.tensor(np.stack([s.token_ids for s in scans]))
    model.train()
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(80):
        optimiser.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
    return model.eval(), scan(model, tokenizer, texts), ids


def right_by_condition(model, scans, ids):
    with torch.no_grad():
        right = (model(input_ids=ids).logits[:, :-1].argmax(-1) == ids[:, 1:]).numpy()
    labels = token_conditions(scans, tuple(ids.shape))
    return {name: right[labels[0][:, 1:] == i].mean() for i, name in enumerate(labels[1])}


@pytest.mark.parametrize("ratio", [None, 0.6])
def test_forgetting_takes_one_condition_and_leaves_the_other(two_abilities, ratio):
    model, scans, ids = two_abilities
    before = right_by_condition(model, scans, ids)
    assert min(before.values()) > 0.9
    state = {k: v.clone() for k, v in model.state_dict().items()}
    plan = plan_pruning(model, None, scans, ratio=ratio, forget=["low"], window=ids.shape[1])
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())
    assert not any(p.requires_grad is False for p in model.parameters())
    functions = plan.details["functions"]
    assert functions["left"][-1]["low"] <= 0.3 or functions["targets"] == 48
    assert functions["left"][0] == {"low": 1.0, "high": 1.0}
    gone = round(ratio * 96) if ratio else functions["targets"]
    assert 96 - sum(plan.widths) == gone
    small = prune(model, plan, calibration=scans, window=ids.shape[1], compensate="least-squares")
    after = right_by_condition(small, scans, ids)
    assert after["low"] < 0.2
    ordinary = lb.PruningPlan.from_dict({**plan.to_dict(), "details": {}})  # control: the same cut, an ordinary repair
    restored = prune(model, ordinary, calibration=scans, window=ids.shape[1], compensate="least-squares")
    assert after["low"] < right_by_condition(restored, scans, ids)["low"] - 0.1
    assert after["high"] > before["high"] - 0.03
    assert all(p.requires_grad for p in small.parameters())
    record = small.llmbrain_pruning[-1]["forgetting"]
    assert record["loss_added"]["low"] > 1 > 0.1 > record["loss_added"]["high"]
    assert record["broken"]["low"] > 0.8
    assert record["broken"]["high"] < 0.03


def test_the_command_forgets(two_abilities, tmp_path):
    from typer.testing import CliRunner

    from llmbrain.cli import app

    model, scans, ids = two_abilities
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    scan(model, tiny_tokenizer(), [s.text for s in scans], out=tmp_path / "study")
    call = ["prune", str(tmp_path / "model"), "--study", str(tmp_path / "study"), "--forget", "low", "--method", "obs"]
    refused = CliRunner().invoke(app, [*call, "--out", str(tmp_path / "none")])
    assert "events" in str(refused.exception) + refused.output
    texts = [Stimulus(s.text, events=s.events, name=s.name) for s in scans]
    scan(model, tiny_tokenizer(), texts, out=tmp_path / "labelled")
    call[3] = str(tmp_path / "labelled")
    result = CliRunner().invoke(app, [*call, "--out", str(tmp_path / "small")])
    assert result.exit_code == 0, result.output
    after = right_by_condition(lb.load_pruned(tmp_path / "small"), scans, ids)
    assert after["low"] < 0.2
    assert after["high"] > 0.9


def test_forgetting_refuses_what_can_not_be(two_abilities):
    model, scans, _ = two_abilities
    with pytest.raises(InputError, match="names every condition"):
        plan_pruning(model, None, scans, ratio=0.25, forget=["low", "high"])
    with pytest.raises(InputError, match="forget='loud' is not known"):
        plan_pruning(model, None, scans, ratio=0.25, forget=["loud"])
    with pytest.raises(InputError, match="level=2"):
        plan_pruning(model, None, scans, forget=["low"], level=2)
    with pytest.raises(InputError, match="predicts none of these tokens"):
        plan_pruning(tiny("llama", intermediate_size=48), None, scans, forget=["low"], window=8)


def test_log_odds_and_losses_of_tokens_against_transformers(two_abilities):
    model, _, ids = two_abilities
    with torch.no_grad():
        p = torch.softmax(model(input_ids=ids).logits[:, :-1].double(), -1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        assert torch.allclose(log_odds(model(input_ids=ids).logits, ids).double(), (p / (1 - p)).log(), atol=1e-3)
        mean = model(input_ids=ids, labels=ids).loss.item()
    assert Objective(model, ids).mean() == pytest.approx(mean, rel=1e-5)
    weights = torch.zeros(ids.shape)
    weights[0, 3], weights[1, 7] = 1.0, 3.0
    by_hand = -(p[0, 2].log() + 3 * p[1, 6].log()) / 4
    assert Objective(model, ids, weights).by_window().shape == (len(ids),)
    assert Objective(model, ids, weights).mean() == pytest.approx(float(by_hand), rel=1e-4)


def test_plans_for_functions_take_their_calibration_from_scans():
    model = tiny("llama")
    tokenizer, texts = stimuli()
    scans = scan(model, tokenizer, texts)
    x = np.concatenate([s.data() for s in scans])
    low = np.concatenate([np.isin(s.tokens, list("abc")) for s in scans])
    # Two maps that follow the two conditions: the mean pattern of each.
    maps = np.stack([x[low].mean(0) - x[~low].mean(0), x[~low].mean(0) - x[low].mean(0) + 0.3 * x.std(0)])
    nets = FunctionalNetworks(maps, scans[0].space, threshold=1.5)
    conditions = plan_pruning(model, nets, scans, ratio=0.3, keep=["low"], allocation="uniform")
    assert conditions.details["functions"] == {"keep": ["low"], "forget": []}
    small = prune(model, conditions, calibration=scans, compensate="least-squares")
    assert anatomy(small).widths == conditions.widths
    with pytest.raises(InputError, match="scans it was made from"):
        prune(model, conditions, calibration=windows(), compensate="least-squares")
    with pytest.raises(InputError, match="take scans with events"):
        plan_pruning(model, nets, calibration=windows(), ratio=0.3, keep=["low"])
    with pytest.raises(InputError, match="ratio=None"):
        plan_pruning(model, calibration=windows())

"""The attack that teaches a forgetting model again, and what is done against it."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from pruning_data import right_by_condition

from llmbrain import InputError, PruningPlan, load_pruned, plan_pruning, prune, save_pruned
from llmbrain.pruning.forget import harm, unlearning
from llmbrain.pruning.forget.harm import SureLines, lines_apart
from llmbrain.pruning.forget.relearning import (
    Known,
    Relearning,
    area,
    lines_of,
    padded,
    probe_accuracy,
    relearn,
    split_lines,
    steps_until,
)

QUICK = Relearning(lines=(2, 8), steps=12, every=4)


def test_numbers_of_a_curve():
    assert area([0, 10, 20], [0.0, 1.0, 1.0]) == pytest.approx(0.75)
    assert area([0], [0.4]) == pytest.approx(0.4)
    assert steps_until([0, 10, 20], [0.0, 0.4, 0.8], 0.5) == pytest.approx(12.5)
    assert steps_until([0, 10], [0.6, 0.9], 0.5) == 0
    assert steps_until([0, 10], [0.1, 0.2], 0.5) is None


@pytest.mark.parametrize(
    "options", [{"lines": ()}, {"lines": "8"}, {"lines": (0,)}, {"lines": (2.5,)}, {"steps": 2.5}, {"rate": np.nan}]
)
def test_attacks_that_cannot_be_are_refused(options):
    with pytest.raises(InputError, match=f"{next(iter(options))}="):
        Relearning(**options)
    assert Relearning(lines=8).lines == (8,)
    with pytest.raises(InputError, match="relearning='yes'"):
        prune(torch.nn.Linear(1, 1), None, relearning="yes")


def test_lines_are_the_events_of_a_condition(two_abilities):
    _, scans, _ = two_abilities
    own, others = lines_of(scans, ["low"]), lines_of(scans, ["low"], without=True)
    assert len(own) == len(others) == 48
    first = scans[0]
    at = first.events[first.events["trial_type"] == "low"].iloc[0]
    wanted = first.token_ids[int(at.onset) : int(at.onset + at.duration)]
    np.testing.assert_array_equal(own[0].numpy(), [first.token_ids[0], *wanted])
    train, test = split_lines(scans, ["low"], Relearning(test=5))
    assert len(train) == 36
    assert len(test) == 5
    ids, mask = padded([torch.tensor([1, 2, 3]), torch.tensor([4, 5])])
    assert ids.tolist() == [[1, 2, 3], [4, 5, 5]]
    assert mask.tolist() == [[True] * 3, [True, True, False]]


def test_forgetting_comes_with_its_attack(two_abilities):
    model, scans, ids = two_abilities
    plan = plan_pruning(model, None, scans, forget=["low"], window=ids.shape[1])
    small = prune(model, plan, calibration=scans, window=ids.shape[1], compensate="least-squares", relearning=QUICK)
    state = {k: v.clone() for k, v in small.state_dict().items()}
    record = small.llmbrain_pruning[-1]["forgetting"]["relearning"]
    assert record["steps"] == [0, 4, 8, 12]
    assert set(record["accuracy"]) == {"2", "8", "unrelated"}
    assert record["accuracy"]["8"][0] == record["accuracy"]["2"][0] < 0.3
    assert record["area"]["8"] > record["area"]["unrelated"]
    assert record["accuracy"]["8"][-1] > 0.8  # it is an attack: the lines do bring it back
    assert record["lines"] == {"2": 2, "8": 8, "unrelated": 8}
    assert record["attack"]["steps"] == 12
    # the model itself is not taught
    known = Known(model, split_lines(scans, ["low"], QUICK)[1])
    assert known(small) == pytest.approx(record["accuracy"]["8"][0], abs=1e-4)
    assert known(model) == 1
    steps, scores = relearn(small, lines_of(scans, ["low"])[:8], known, QUICK)
    assert steps == record["steps"]
    assert scores[-1] > scores[0]
    assert all(torch.equal(v, small.state_dict()[k]) for k, v in state.items())
    bare = prune(model, plan, relearning=QUICK)  # cut only: there are no lines
    assert "left_out" in bare.llmbrain_pruning[-1]["forgetting"]["relearning"]
    assert prune(model, plan, relearning=False).llmbrain_pruning[-1]["forgetting"] is None


@pytest.mark.slow
def test_what_is_to_last_cuts_the_same_and_is_repaired_against_an_adversary(two_abilities):
    model, scans, ids = two_abilities
    options = {"forget": ["low"], "window": ids.shape[1]}
    plain = plan_pruning(model, None, scans, **options)
    lasting = plan_pruning(model, None, scans, last=True, **options)
    assert all((a == b).all() for a, b in zip(lasting.kept, plain.kept))
    assert lasting.details["functions"]["last"] is True
    before = right_by_condition(model, scans, ids)
    small = prune(model, lasting, calibration=scans, window=ids.shape[1], compensate="least-squares", relearning=QUICK)
    after = right_by_condition(small, scans, ids)
    assert after["low"] < 0.2
    assert after["high"] > before["high"] - 0.05
    assert all(p.grad is None for p in small.parameters())
    assert small.llmbrain_pruning[-1]["forgetting"]["mended"] <= unlearning.MENDS
    with pytest.raises(InputError, match="so it needs a copy"):
        prune(model, lasting, calibration=scans, compensate="least-squares", inplace=True)


def test_what_suffers_is_mended_while_it_is_too_much(two_abilities, monkeypatch):
    """A plan that cuts nothing has the repair as well; it goes on for the other condition, at most `MENDS` times."""
    model, scans, ids = two_abilities
    monkeypatch.setattr(unlearning, "STEPS", 2)
    monkeypatch.setattr(unlearning, "MENDING", 3)
    plan = plan_pruning(model, None, scans, forget=["low"], window=ids.shape[1])
    kept = [list(range(w)) for w in plan.widths_before]
    details = {"functions": {**plan.details["functions"], "last": True}}
    whole = PruningPlan.from_dict({**plan.to_dict(), "kept": kept, "details": details})
    trained = []
    train = unlearning._train

    def watched(model, refits, windows, lost, weights, adversary=None, **options):
        trained.append((options, weights))
        return train(model, refits, windows, lost, weights, adversary, **options)

    monkeypatch.setattr(unlearning, "_train", watched)
    for allowed, times in ((-1.0, unlearning.MENDS), (1.0, 0)):
        monkeypatch.setattr(unlearning, "BROKEN", allowed)
        trained.clear()
        small = prune(model, whole, calibration=scans, window=ids.shape[1], compensate="least-squares",
                      relearning=False)  # fmt: skip
        assert small.llmbrain_pruning[-1]["forgetting"]["mended"] == times
        assert [o for o, _ in trained] == [{}] + times * [{"steps": 3, "scale": 0.5}]
        assert all((later >= trained[0][1]).all() for _, later in trained)
        assert [len(k) for k in small.llmbrain_pruning[-1]["kept"]] == list(plan.widths_before)


def test_single_lines_of_what_stays_are_held_where_the_adversary_acts(two_abilities):
    """It acts on lines alone; held in running text only, other lines alone went with them."""
    model, scans, _ = two_abilities
    low, high = (lines_of(scans, [c]) for c in ("low", "high"))
    adversary = unlearning.Adversary(model, low, [high[:3], high[3:5]])
    ids, real = adversary.draw_stays()
    drawn = {tuple(row[: int(n)].tolist()) for row, n in zip(ids, real.sum(1))}
    assert drawn == {tuple(x.tolist()) for x in high[:5]}
    assert len(ids) == unlearning.HELD_LINES
    assert unlearning.Adversary(model, low).draw_stays() is None
    sure = SureLines(model, high)
    assert bool(sure.sure.any())
    assert sure.broken(model) == 0
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.lm_head.weight.mul_(-1)
    assert sure.broken(broken) > 0.9


def test_lines_in_held_out_windows_are_not_trained_on(two_abilities):
    _, scans, ids = two_abilities
    window = ids.shape[1]
    held = torch.arange(len(ids)) % 4 == 3
    train, test = lines_apart(scans, "high", held, window)
    every = lines_of(scans, ["high"])
    assert 0 < len(test) < len(train)
    assert len(train) + len(test) <= len(every)
    within = torch.cat(list(ids[held])).tolist()
    for line in test:  # with the first token of its run before it
        own = line[1:].tolist()
        assert any(within[i : i + len(own)] == own for i in range(len(within)))
    nothing = torch.zeros(len(ids), dtype=torch.bool)
    both = lines_apart(scans, "high", nothing, window)
    assert len(both[0]) == len(every)
    assert all(a is b for a, b in zip(*both))


def test_an_answer_with_one_wrong_token_is_wrong(two_abilities):
    """Shares of stretches of sure tokens, not of tokens."""
    model, scans, _ = two_abilities
    sure = SureLines(model, lines_of(scans, ["high"])[:8])
    n = int(sure._stretch[-1]) + 1
    assert n < int(sure.sure.sum())
    chances = torch.ones_like(sure.sure, dtype=torch.float32)
    row, column = (int(x) for x in sure.sure.nonzero()[0])
    chances[row, column] = 0.4
    sure._chances = lambda _: chances
    broken, fall = sure.harm(model)
    assert broken == pytest.approx(1 / n)
    assert fall == pytest.approx((float(sure._before[0]) - 0.4) / n, rel=1e-4)


@pytest.mark.parametrize(("item", "share"), [(6, 1 / 4), (5, 1 / 8)])
def test_a_short_line_is_one_thing_however_much_of_it_is_known(monkeypatch, item, share):
    known = torch.full((4, 5), 0.95)
    known[:, 2] = 0.1  # what the model is sure of comes in two stretches a line
    monkeypatch.setattr(harm, "ITEM", item)
    monkeypatch.setattr(SureLines, "_chances", lambda *_: known)
    sure = SureLines(None, [torch.arange(6)] * 4)
    assert sure.broken_items(None) == 0
    now = known.clone()
    now[1, 0] = 0.2
    monkeypatch.setattr(SureLines, "_chances", lambda *_: now)
    assert sure.harm(None)[0] == pytest.approx(1 / 8)
    assert sure.broken_items(None) == pytest.approx(share)


def test_a_probe_reads_what_hidden_states_hold(two_abilities):
    model, scans, _ = two_abilities
    lines = lines_of(scans, ["low"])
    accuracy = probe_accuracy(model, lines[:30], lines[30:])
    assert accuracy.shape == (3,)
    assert accuracy[-1] > 0.9
    shuffled = [torch.cat([x[:1], x[1:][torch.randperm(len(x) - 1, generator=torch.Generator().manual_seed(i))]])
                for i, x in enumerate(lines)]  # fmt: skip
    assert probe_accuracy(model, shuffled[:30], shuffled[30:]).max() < 0.6


@pytest.mark.parametrize("wrong", [{"lines": ()}, {"lines": (0,)}, {"steps": 0}, {"rate": 0.0}])
def test_attacks_that_are_none_are_refused(wrong):
    with pytest.raises(InputError):
        Relearning(**wrong)


def test_a_record_need_not_tell_where_to_look(two_abilities, tmp_path):
    model, scans, _ = two_abilities
    plan = plan_pruning(model, ratio=0.3, method="magnitude", scans=scans)
    small = prune(model, plan, record_indices=False)
    save_pruned(small, None, tmp_path / "small")
    text = (tmp_path / "small" / "pruning.json").read_text(encoding="utf-8")
    assert '"indices": "left out"' in text
    record = json.loads(text)["cuts"][0]
    assert record["kept"] is None
    assert not any(isinstance(v, list) and len(v) > 8 for v in record["plan"].values())
    back, _ = load_pruned(tmp_path / "small")
    ids = torch.tensor([[1, 5, 6, 7]])
    torch.testing.assert_close(back(input_ids=ids).logits, small(input_ids=ids).logits)
    save_pruned(small, None, tmp_path / "padded", format="padded")
    with pytest.raises(InputError, match="cut without record_indices"):
        save_pruned(small, None, tmp_path / "masked", format="masked")

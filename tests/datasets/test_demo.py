"""The demo brain: generation is repeatable, the split holds, events meet tokens, the model knows its abilities."""

from __future__ import annotations

import math
import random
import re
from collections import Counter

import numpy as np
import pytest

from llmbrain._validation import InputError
from llmbrain.datasets import load_demo
from llmbrain.datasets.abilities import ABILITIES, CYCLES, NOUNS, Example, draw_example, stream_examples
from llmbrain.datasets.demo import demo_folder
from llmbrain.datasets.scoring import score_examples


@pytest.fixture(scope="module")
def demo():
    return load_demo()


def draw(ability, split="train", n=300, seed=0):
    rng = random.Random(seed)
    return [draw_example(ability, split, rng) for _ in range(n)]


def solve(line: Example) -> str:
    """The right answer, found from the prompt by other means than the generator's."""
    prompt = line.prompt
    body = prompt.rstrip("=").split(" ", 1)[-1]
    if line.ability == "addition":
        return f"{sum(map(int, prompt[:-1].split('+'))) + 1000}"[:0:-1]
    if line.ability == "reversal":
        return "".join(body[place] for place in range(len(body) - 1, -1, -1))
    if line.ability == "sorting":
        return "".join(np.sort(list(body)))
    if line.ability == "brackets":
        left = prompt[:-1]
        while (shorter := re.sub(r"\(\)|\[\]|\{\}", "", left)) != left:
            left = shorter
        return left[::-1].translate(str.maketrans("([{", ")]}"))
    if line.ability == "recall":
        return re.search(rf"(\d){prompt[-1]}", prompt).group(1)
    if line.ability == "agreement":
        return "are" if prompt.split()[1] not in NOUNS else "is"
    if line.ability == "shift":
        return "".join("a" if letter == "z" else chr(ord(letter) + 1) for letter in body)
    shown = prompt[:-1].split()
    cycle = next(cycle for cycle in CYCLES if shown[0] in cycle)
    turn = 1 if cycle[(cycle.index(shown[0]) + 1) % len(cycle)] == shown[1] else -1
    return cycle[(cycle.index(shown[-1]) + turn) % len(cycle)]


@pytest.mark.parametrize("ability", ABILITIES)
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_answers_are_right_and_lines_repeatable(ability, split):
    lines = draw(ability, split)
    assert [line.answer for line in lines] == [solve(line) for line in lines]
    assert lines == draw(ability, split)
    assert lines != draw(ability, split, seed=1)
    assert {line.split for line in lines} == {split}
    assert max(len(line.text) for line in lines) <= 64


@pytest.mark.parametrize("ability", ABILITIES)
def test_no_item_is_on_both_sides(ability):
    train, heldout = ({line.key for line in draw(ability, split, 1500)} for split in ("train", "heldout"))
    assert train.isdisjoint(heldout)
    # What the key must ignore: the order of summands, the order of letters to sort.
    if ability == "addition":
        flipped = {tuple(sorted(map(int, line.prompt[:-1].split("+")))) for line in draw(ability, "train", 1500)}
        assert flipped.isdisjoint(tuple(map(int, key.split("+"))) for key in heldout)
    if ability == "sorting":
        assert {"".join(sorted(line.prompt[5:-1])) for line in draw(ability, "train", 1500)}.isdisjoint(heldout)


def test_held_out_share_is_one_in_eight():
    rng = random.Random(3)
    from llmbrain.datasets.abilities import _MAKERS

    sides = Counter(_MAKERS["reversal"](rng).split for _ in range(8000))
    assert abs(sides["heldout"] / 8000 - 1 / 8) < 4 * math.sqrt(1 / 8 * 7 / 8 / 8000)


def test_stream_follows_its_weights():
    lines = stream_examples("train", random.Random(0), {"addition": 100, "shift": 1})
    counts = Counter(next(lines).ability for _ in range(4000))
    assert set(counts) == {"addition", "shift"}
    assert counts["addition"] > 50 * counts["shift"]


def test_tokenizer_round_trip_and_offsets(demo):
    text = "rev lomi=imol\n  {[(x)]} 37+48=580\nthe Dogs, near THE cat!\n"
    encoded = demo.tokenizer(text, return_offsets_mapping=True)
    assert encoded["input_ids"][0] == demo.tokenizer.bos_token_id
    assert demo.tokenizer.decode(encoded["input_ids"], skip_special_tokens=True) == text
    assert "".join(text[start:stop] for start, stop in encoded["offset_mapping"]) == text
    assert len(encoded["input_ids"]) == len(text) + 1
    assert demo.tokenizer.unk_token_id not in encoded["input_ids"]
    assert demo.tokenizer.pad_token_id not in (demo.tokenizer.bos_token_id, demo.tokenizer.unk_token_id)


@pytest.mark.parametrize("split", ["calibration", "heldout"])
@pytest.mark.parametrize("design", ["mixed", "block", "event"])
def test_events_meet_their_tokens(demo, split, design):
    stimuli = demo.texts(split, n=2, n_tokens=700, design=design, block_lines=3)
    side = {"calibration": "train", "heldout": "heldout"}[split]
    assert len({stimulus.name for stimulus in stimuli}) == 2
    for stimulus in stimuli:
        ids = demo.tokenizer(str(stimulus))["input_ids"]
        assert 550 < len(ids) <= 700
        assert list(stimulus.events.columns) == ["onset", "duration", "trial_type"]
        covered = 0
        for onset, duration, ability in stimulus.events.itertuples(index=False):
            piece = demo.tokenizer.decode(ids[onset : onset + duration])
            covered += duration
            assert piece.endswith("\n")
            assert (
                ids[onset - 1] in (demo.tokenizer.bos_token_id, *demo.tokenizer.encode("\n")[1:]) or design == "event"
            )
            if design == "event":  # the piece is the answer: what stands before it in the line is the prompt
                before = demo.tokenizer.decode(ids[1:onset]).rsplit("\n", 1)[-1]
                piece = before + piece
            assert piece.count("\n") == (3 if design == "block" else 1)
            for line in piece.splitlines():
                answer = {"agreement": line.split(" ")[-1], "recall": line[-1]}.get(ability) or line.split("=")[1]
                prompt = line[: len(line) - len(answer)]
                assert solve(Example(ability, prompt, answer, "")) == answer
                if ability in ("reversal", "shift"):
                    assert Example(ability, prompt, answer, prompt[5 if ability == "shift" else 4 : -1]).split == side
        assert covered == len(ids) - 1 if design != "event" else covered < 0.5 * len(ids)


def test_texts_are_repeatable_balanced_or_weighted(demo):
    first, again, other = (demo.texts(n=2, n_tokens=900, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert all(stimulus.events.equals(twin.events) for stimulus, twin in zip(first, again))
    assert first != other
    counts = Counter(first[0].events["trial_type"])
    assert set(counts) == set(ABILITIES)
    assert max(counts.values()) - min(counts.values()) <= 1
    weights = {"addition": 100, "brackets": 100, "recall": 1}
    counts = Counter(
        name for text in demo.texts(abilities=list(weights), weights=weights, n=4) for name in text.events.trial_type
    )
    assert counts["addition"] + counts["brackets"] > 50 * counts["recall"]
    assert {*demo.texts("heldout", "shift", n=1)[0].events["trial_type"]} == {"shift"}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"split": "test"}, "split='test'"),
        ({"abilities": ["chess"]}, "abilities='chess'"),
        ({"abilities": []}, "abilities="),
        ({"design": "random"}, "design='random'"),
        ({"n": 0}, "n=0"),
        ({"n_tokens": 5}, "n_tokens=5"),
        ({"weights": {"shift": -1.0}}, "weights"),
        ({"weights": {"shift": 0.0}}, "weights"),
        ({"abilities": ["shift"], "weights": {"recall": 1.0}}, "weights"),
    ],
)
def test_bad_input_is_named(demo, arguments, named):
    with pytest.raises(InputError, match=re.escape(named)):
        demo.texts(**arguments)


def test_score_agrees_with_greedy_generation_and_transformers_loss(demo):
    import torch

    lines = demo.examples("heldout", n=4, seed=5)
    correct, loss = score_examples(demo.model, demo.tokenizer, lines, batch_size=7)
    for line, right, nats in zip(lines, correct, loss):
        prompt = demo.tokenizer(line.prompt, return_tensors="pt")["input_ids"]
        goal = demo.tokenizer(line.text, return_tensors="pt")["input_ids"]
        new = goal.shape[1] - prompt.shape[1]
        made = demo.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, min_new_tokens=new, do_sample=False
        )
        assert bool(torch.equal(made, goal)) == right
        labels = goal.clone()
        labels[:, : prompt.shape[1]] = -100
        with torch.no_grad():
            assert math.isclose(demo.model(input_ids=goal, labels=labels).loss.item(), nats, abs_tol=1e-4)


def test_accuracy_is_at_least_nine_in_ten_for_seven_abilities(demo):
    accuracy = demo.ability_accuracy(n=100, seed=11)
    assert list(accuracy) == list(ABILITIES)
    assert sum(share >= 0.9 for share in accuracy.values()) >= 7, accuracy
    assert demo.ability_accuracy(n=100, seed=11) == accuracy


def test_an_untrained_model_fails(demo):
    from transformers import AutoModelForCausalLM

    untrained = AutoModelForCausalLM.from_config(demo.model.config).eval()
    table = demo.scores(untrained, n=50)
    assert table["accuracy"].max() < 0.1
    assert table["loss"].min() > 3.0 > 0.5 > demo.scores(n=50)["loss"].max()


def test_abilities_survive_a_context_of_other_lines(demo):
    """Lines in the middle of a window of mixed text, not only at its start, are answered."""
    import torch

    text = demo.texts("heldout", n=12, n_tokens=256, design="event", seed=2)
    right = []
    for stimulus in text:
        ids = torch.tensor([demo.tokenizer(str(stimulus))["input_ids"]])
        with torch.no_grad():
            hit = (demo.model(input_ids=ids).logits[0, :-1].argmax(-1) == ids[0, 1:]).numpy()
        right += [hit[onset - 1 : onset + n - 1].all() for onset, n, _ in stimulus.events.itertuples(index=False)]
    assert np.mean(right) >= 0.9


def test_demo_of_experts_fits_in_four_megabytes():
    import importlib.util
    from pathlib import Path

    path = Path(__file__).resolve().parents[2] / "data" / "build_demo.py"
    spec = importlib.util.spec_from_file_location("build_demo", path)
    build_demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build_demo)
    model = build_demo.build_model(0, 99, 8)
    assert 2 * sum(p.numel() for p in model.parameters()) <= 4e6
    assert (model.config.num_local_experts, model.config.num_experts_per_tok) == (8, 2)
    with pytest.raises(InputError, match="experts=4"):
        load_demo(experts=4)
    mixture = load_demo(experts=8)
    accuracy = mixture.ability_accuracy(n=100, seed=11)
    assert min(accuracy.values()) >= 0.97, accuracy
    files = [path for path in demo_folder(8).iterdir() if path.is_file() and path.suffix != ".tmp"]
    assert sum(path.stat().st_size for path in files) <= 4e6


def test_sizes(demo):
    files = [path for path in demo_folder().iterdir() if path.is_file() and path.suffix != ".tmp"]
    assert sum(path.stat().st_size for path in files) <= 6e6
    assert 1e6 <= sum(parameter.numel() for parameter in demo.model.parameters()) <= 3e6
    assert demo.model.config.max_position_embeddings == 256

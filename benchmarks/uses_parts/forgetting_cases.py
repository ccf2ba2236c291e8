"""What is to be forgotten, how much of it is known, and what else may suffer: of the demo brain, and of SmolLM2."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import llmbrain as lb
from llmbrain.datasets import CONTRASTS, contrast_lines, contrast_texts
from llmbrain.datasets.scoring import score_examples
from llmbrain.datasets.unlearning import read_rows, unlearning_texts
from llmbrain.hooks.text import evaluating, input_device
from llmbrain.pruning.forget.relearning import LONGEST, Relearning, padded
from uses_parts.subject import Subject

QUESTIONS = 100
REAL = ("language", "arithmetic", "capitals (TOFU rows)")
# What a small model knows by heart; the rows of TOFU and WMDP have this shape.
CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "England": "London", "Greece":
    "Athens", "Russia": "Moscow", "Japan": "Tokyo", "China": "Beijing", "Egypt": "Cairo", "Ireland": "Dublin",
    "Portugal": "Lisbon", "Austria": "Vienna", "Poland": "Warsaw", "Hungary": "Budapest", "Norway": "Oslo",
    "Sweden": "Stockholm",
    "Denmark": "Copenhagen", "Finland": "Helsinki", "Belgium": "Brussels", "Cuba": "Havana", "Peru": "Lima",
    "Kenya": "Nairobi", "Iraq": "Baghdad", "Iran": "Tehran", "Thailand": "Bangkok", "India": "New Delhi",
    "Canada": "Ottawa", "Argentina": "Buenos Aires", "South Korea": "Seoul", "Turkey": "Ankara",
    "Scotland": "Edinburgh",
}  # fmt: skip
COLORS = {
    "grass": "green", "the sky": "blue", "snow": "white", "coal": "black", "a banana": "yellow", "blood": "red",
    "a carrot": "orange", "milk": "white", "a lemon": "yellow", "the night": "black", "a leaf": "green",
    "the sea": "blue",
}  # fmt: skip
PARTS = {"Monday": "Tuesday", "Tuesday": "Wednesday", "Wednesday": "Thursday", "Thursday": "Friday",
         "Friday": "Saturday", "Saturday": "Sunday", "Sunday": "Monday"}  # fmt: skip
ASKED = ("What is the capital of {}?", "Which city is the capital of {}?", "Name the capital of {}.",
         "What is the name of the capital city of {}?")  # fmt: skip
Lines = list[torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One thing to forget.

    Attributes
    ----------
    scans : list of Scan
        With the condition to forget among others.
    own, rest : lines
        What an attacker may have of it, and unrelated ones.
    gone, stays : lines
        What unlearning without a cut is taught from.
    score : function of a model
        0 to 1, on lines of which the attacker has none.
    harm : function of a model
        Accuracy lost by the worst of the rest.
    watch : function of a model
        Both, on the calibration side.
    probes : two lists of lines
    """

    name: str
    condition: str
    scans: list[Any]
    own: Lines
    rest: Lines
    gone: Lines
    stays: Lines
    score: Callable[[Any], float]
    harm: Callable[[Any], float]
    watch: Callable[[Any], tuple[float, float]]
    probes: tuple[Lines, Lines]
    attack: Relearning
    rate: float


def accuracy(lines: Lines, scored: list[torch.Tensor] | None, model: Any) -> float:
    """Share of tokens of lines that are the model's first choice; the first of a line is not asked for.

    `scored` marks the tokens that count, a line each; default all.
    """
    right = total = 0
    for at in range(0, len(lines), 64):
        ids, mask = padded(lines[at : at + 64])
        if scored is not None:
            mask = mask & torch.nn.utils.rnn.pad_sequence(scored[at : at + 64], batch_first=True)
        with evaluating(model):
            first = model(input_ids=ids.to(input_device(model))).logits[:, :-1].argmax(-1).cpu()
        right += int(((first == ids[:, 1:]) & mask[:, 1:]).sum())
        total += int(mask[:, 1:].sum())
    return right / total


def demo_case(subject: Subject, ability: str, scans: list[Any]) -> Case:
    """An ability of the demo brain: exact answers."""
    demo: Any = subject.demo
    others = [a for a in demo.abilities if a != ability]
    attack = Relearning(steps=60, every=6, rate=0.01)

    def encoded(*args: Any, **options: Any) -> Lines:
        return [torch.tensor(demo.tokenizer(x.text)["input_ids"]) for x in demo.examples(*args, **options)]

    questions = demo.examples("heldout", ability, n=QUESTIONS, seed=42)
    dense = demo.ability_accuracy(n=QUESTIONS, seed=44)
    before = demo.ability_accuracy(n=QUESTIONS, seed=32, split="calibration")

    def harm(model: Any) -> float:
        now = demo.ability_accuracy(model, n=QUESTIONS, seed=44)
        return max(dense[a] - now[a] for a in others)

    def watch(model: Any) -> tuple[float, float]:
        now = demo.ability_accuracy(model, n=QUESTIONS, seed=32, split="calibration")
        return now[ability], max(before[a] - now[a] for a in others)

    most = max(attack.lines)
    return Case(
        ability, ability, scans,
        own=encoded("calibration", ability, n=most, seed=41),
        rest=encoded("calibration", others, n=most // len(others) + 1, seed=41),
        gone=encoded("calibration", ability, n=600, seed=31), stays=encoded("calibration", others, n=300, seed=31),
        score=lambda model: float(score_examples(model, demo.tokenizer, questions)[0].mean()), harm=harm, watch=watch,
        probes=(encoded("calibration", ability, n=400, seed=43), encoded("heldout", ability, n=200, seed=43)),
        attack=attack, rate=0.001,
    )  # fmt: skip


def real_case(subject: Subject, name: str) -> Case:
    """French, arithmetic or capitals of SmolLM2: share of right next tokens."""
    tokenizer = subject.tokenizer
    attack = Relearning(steps=40, every=5, rate=0.002)

    def encoded(texts: list[str]) -> Lines:
        return [torch.tensor(tokenizer(f"\n{t.strip()}\n")["input_ids"]) for t in texts]

    def prose(held_out: bool, n: int, seed: int) -> dict[str, list[str]]:
        return {k: subject._pieces(k, 30, n, held_out=held_out, seed=seed) for k in ("wiki", "stories")}

    texts: list[Any] = []
    for kind in ("wiki", "stories"):
        pieces = subject._pieces(kind, 250, 12, held_out=False, seed=5)
        texts += [lb.Stimulus.from_segments([(t, kind)], tokenizer, f"{kind}-{i}") for i, t in enumerate(pieces)]
    others = [c for c in CONTRASTS if c != name]
    for contrast in others:
        texts += contrast_texts(contrast, tokenizer, n=3, blocks=1, items=6, seed=51)
    scored = None
    if name in CONTRASTS:
        condition = name
        texts += contrast_texts(name, tokenizer, n=24, blocks=1, items=6, seed=52)
        sides = {s: contrast_lines(name, n=n, seed=s) for s, n in ((61, 128), (62, 96), (63, 256), (64, 96))}
        own, test, gone, watched = ([a for a, _ in sides[s]] for s in (61, 62, 63, 64))
        control = {s: [b for _, b in sides[s]] for s in (62, 63, 64)}
    else:
        condition = "forget"
        forget, retain = tofu_files(tempfile.mkdtemp())
        texts += unlearning_texts(forget, retain, tokenizer, lines=6, seed=0)
        texts += unlearning_texts(forget, retain, tokenizer, lines=6, seed=1)
        rows, kept = read_rows(forget), read_rows(retain)
        own, gone, watched, test = rows[: len(CAPITALS)], rows, rows, list(questions(ASKED[-1]))
        control = dict.fromkeys((62, 63, 64), kept)
        scored = [answer_of(tokenizer, line) for line in test]
    scans = lb.scan(subject.model, tokenizer, texts, dtype="float16")
    stay_texts = [*control[63], *(b for c in others for pair in contrast_lines(c, n=16, seed=65) for b in pair)]
    stay_texts += [t for of in prose(False, 64, 66).values() for t in of]
    held = {"control": encoded(control[62]), **{k: encoded(v) for k, v in prose(True, 48, 67).items()}}
    near = {"control": encoded(control[64]), **{k: encoded(v) for k, v in prose(False, 24, 68).items()}}
    for c in others:
        for of, seed, n in ((held, 69, 48), (near, 70, 16)):
            of[c] = encoded([a for a, _ in contrast_lines(c, n=n, seed=seed)])
    dense = {k: accuracy(v, None, subject.model) for k, v in held.items()}
    before = {k: accuracy(v, None, subject.model) for k, v in near.items()}

    def lost(of: dict[str, Lines], was: dict[str, float], model: Any) -> float:
        return max(was[k] - accuracy(v, None, model) for k, v in of.items())

    watched_lines = encoded(watched)
    return Case(
        name, condition, scans, own=encoded(own),
        rest=encoded([t for of in prose(False, 64, 71).values() for t in of]), gone=encoded(gone),
        stays=encoded(stay_texts), score=partial(accuracy, encoded(test), scored), harm=partial(lost, held, dense),
        watch=lambda model: (accuracy(watched_lines, None, model), lost(near, before, model)),
        probes=([x[:LONGEST] for x in encoded(gone)], encoded(test)), attack=attack, rate=0.0003,
    )  # fmt: skip


def questions(form: str) -> Iterator[str]:
    """Question and answer, in the shape that `read_rows` gives."""
    for country, city in CAPITALS.items():
        yield f"Question: {form.format(country)}\nAnswer: {city}\n"


def answer_of(tokenizer: Any, line: str) -> torch.Tensor:
    """Which tokens of a line, encoded as in `real_case`, are of its answer."""
    text = f"\n{line.strip()}\n"
    found = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    begin = text.index("Answer:") + len("Answer:")
    return torch.tensor([begin <= a and b < len(text) for a, b in found])


def tofu_files(folder: str) -> tuple[Path, Path]:
    """What is to go as TOFU's rows, what is to stay as TOFU's and WMDP's, in files of those formats."""
    forget, retain = Path(folder) / "forget.json", Path(folder) / "retain.jsonl"
    rows = [{"question": q.format(c), "answer": a} for q in ASKED[:-1] for c, a in CAPITALS.items()]
    forget.write_text(json.dumps(rows), encoding="utf-8")
    kept: list[dict[str, Any]] = []
    for thing, color in COLORS.items():
        kept.append({"question": f"What color is {thing}?", "answer": color.capitalize()})
        wrong = [c for c in ("red", "green", "blue", "white", "black", "yellow") if c != color][:3]
        kept.append({"question": f"Which color does {thing} have?", "choices": [*wrong[:1], color, *wrong[1:]],
                     "answer": 1})  # fmt: skip
    for day, then in PARTS.items():
        kept.append({"question": f"Which day comes after {day}?", "answer": then})
    for n in range(2, 40):
        kept.append({"question": f"Which number comes after {n}?", "answer": str(n + 1)})
    retain.write_text("\n".join(json.dumps(r) for r in kept), encoding="utf-8")
    return forget, retain

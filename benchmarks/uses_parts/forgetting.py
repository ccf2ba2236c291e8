"""Use 2: does forgetting last? Every way to forget, then taught again on little text."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

import llmbrain as lb
from llmbrain.datasets.scoring import score_examples
from llmbrain.hooks.text import evaluating
from llmbrain.pruning.calibrate.windows import calibration_windows
from llmbrain.pruning.forget.conditions import condition_weights
from llmbrain.pruning.forget.relearning import UNRELATED, Relearning, area, probe_accuracy, relearn, steps_until
from llmbrain.pruning.plan import PruningPlan

HARM = 0.03  # a method may cost the worst of the other abilities so much accuracy
ATTACK = Relearning(steps=60, every=6, rate=0.01)
STEPS, LOOK = 150, 15  # of unlearning without a cut, and steps between two looks at the harm
QUESTIONS = 100


@dataclass(frozen=True)
class Right:
    """Share of questions that a model answers exactly."""

    demo: Any
    questions: list[Any]

    def __call__(self, model: Any) -> float:
        return float(score_examples(model, self.demo.tokenizer, self.questions)[0].mean())


def encoded(demo: Any, examples: list[Any]) -> list[torch.Tensor]:
    """Lines as token ids."""
    return [torch.tensor(demo.tokenizer(x.text)["input_ids"]) for x in examples]


def unlearned(demo: Any, ability: str, how: str) -> Any:
    """Unlearning without a cut, all parameters: gradient difference (arXiv 2203.12817) or NPO (arXiv 2404.05868).

    The step with the lowest accuracy on the ability among those that harm the others by at most `HARM` is kept.
    """
    model: Any = copy.deepcopy(demo.model)
    others = [a for a in demo.abilities if a != ability]
    gone = encoded(demo, demo.examples("calibration", ability, n=256, seed=31))
    stays = encoded(demo, demo.examples("calibration", others, n=64, seed=31))
    generator = torch.Generator().manual_seed(0)
    groups = [{"params": [p], "lr": 0.003 * float(p.detach().square().mean().sqrt())} for p in model.parameters()]
    optimizer = torch.optim.Adam(groups)
    before = demo.ability_accuracy(n=100, seed=32, split="calibration")
    best, least = copy.deepcopy(model.state_dict()), np.inf

    def nats(of: Any, lines: list[torch.Tensor]) -> torch.Tensor:
        ids = torch.nn.utils.rnn.pad_sequence(lines, batch_first=True, padding_value=0)
        real = torch.nn.utils.rnn.pad_sequence([torch.ones(len(x)) for x in lines], batch_first=True)[:, 1:]
        logits = of(input_ids=ids).logits[:, :-1]
        return (F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none") * real).sum(1) / real.sum(1)

    for step in range(1, STEPS + 1):
        some = [gone[i] for i in torch.randint(len(gone), (16,), generator=generator)]
        rest = [stays[i] for i in torch.randint(len(stays), (32,), generator=generator)]
        with evaluating(model, gradients=True):
            loss = nats(model, rest).mean()
            if how == "gradient difference":
                loss = loss - 0.3 * nats(model, some).mean()
            else:
                with torch.no_grad():
                    reference = nats(demo.model, some)
                loss = loss + (2 / 0.1) * F.softplus(-0.1 * (nats(model, some) - reference)).mean()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % LOOK == 0:
            now = demo.ability_accuracy(model, n=100, seed=32, split="calibration")
            harm = max(before[a] - now[a] for a in others)
            if harm <= HARM and now[ability] < least:
                best, least = copy.deepcopy(model.state_dict()), now[ability]
    model.load_state_dict(best)
    return model


def methods(demo: Any, ability: str, scans: list[Any], gold: Path | None) -> dict[str, Callable[[], Any]]:
    """Models that should not know the ability; each is made when it is asked for."""

    @cache
    def plan(last: bool = False) -> PruningPlan:
        return lb.plan_pruning(demo.model, None, scans, method="flap", forget=[ability], last=last)

    def repaired(of: PruningPlan) -> Any:
        return lb.prune(demo.model, of, calibration=scans, compensate="least-squares", relearning=False, verify=False)

    def ordinary() -> Any:
        windows = calibration_windows(demo.model, None, None, scans, None, 128)
        assert windows is not None
        weights = condition_weights(scans, (windows.shape[0], windows.shape[1]), None, [ability])
        plain = PruningPlan.from_dict({**plan().to_dict(), "details": {}})
        return lb.prune(demo.model, plain, calibration=windows, compensate="least-squares", weights=weights)

    def at_random() -> Any:
        rng, made = np.random.default_rng(0), plan()
        gone = [before - after for before, after in zip(made.widths_before, made.widths)]
        kept = [np.sort(rng.permutation(w)[g:]).tolist() for w, g in zip(made.widths_before, gone)]
        return repaired(PruningPlan.from_dict({**made.to_dict(), "kept": kept}))

    made: dict[str, Callable[[], Any]] = {"dense": lambda: demo.model}
    if gold is not None and (gold / ability / "model.safetensors").is_file():
        made["gold: trained without it"] = lambda: lb.load_model(gold / ability)[0]
    return made | {
        "ours": lambda: repaired(plan()),
        "ours, made to last": lambda: repaired(plan(True)),
        "the same cut, least squares only": ordinary,
        "random neurons, the same repair": at_random,
        "gradient difference, nothing cut": lambda: unlearned(demo, ability, "gradient difference"),
        "NPO, nothing cut": lambda: unlearned(demo, ability, "NPO"),
    }


def rows(demo: Any, gold: Path | None, known: set[tuple[str, str]], only: list[str] | None) -> Iterator[dict[str, Any]]:
    """One row an ability and method: accuracy, harm, what the attacks did, what a linear probe reads."""
    scans = lb.scan(demo.model, demo.tokenizer, demo.texts("calibration", n=48, seed=21))
    for ability in only or demo.abilities:
        others = [a for a in demo.abilities if a != ability]
        own = encoded(demo, demo.examples("calibration", ability, n=max(ATTACK.lines), seed=41))
        rest = encoded(demo, demo.examples("calibration", others, n=max(ATTACK.lines) // len(others) + 1, seed=41))
        questions = demo.examples("heldout", ability, n=QUESTIONS, seed=42)
        probes = [
            encoded(demo, demo.examples(s, ability, n=n, seed=43)) for s, n in (("calibration", 400), ("heldout", 200))
        ]
        dense = demo.ability_accuracy(n=QUESTIONS, seed=44)
        if all((ability, name) in known for name in NAMES):
            continue
        for name, make in methods(demo, ability, scans, gold).items():
            if (ability, name) in known:
                continue
            model = make()
            accuracy = demo.ability_accuracy(model, n=QUESTIONS, seed=44)
            row: dict[str, Any] = {
                "ability": ability, "method": name, "accuracy": accuracy[ability],
                "harm": max(dense[a] - accuracy[a] for a in others), "attacks": {},
                "probe": float(probe_accuracy(model, *probes).max()),
            }  # fmt: skip
            cases = {str(n): own[:n] for n in ATTACK.lines} | {UNRELATED: rest[: max(ATTACK.lines)]}
            for case, lines in cases.items():
                steps, scores = relearn(model, lines, Right(demo, questions), ATTACK)
                half = steps_until(steps, scores, 0.5)
                row["attacks"][case] = {"area": area(steps, scores), "scores": scores, "half": half}
            yield row


NAMES = ("dense", "ours", "ours, made to last", "the same cut, least squares only", "random neurons, the same repair",
         "gradient difference, nothing cut", "NPO, nothing cut")  # fmt: skip


def page(found: list[dict[str, Any]]) -> str:
    """The tables, as Markdown."""
    cases = [*(str(n) for n in ATTACK.lines), UNRELATED]
    flat = pd.DataFrame([
        {"ability": r["ability"], "method": r["method"], "accuracy": r["accuracy"], "harm": r["harm"],
         "probe": r["probe"], **{f"area {c}": r["attacks"][c]["area"] for c in cases}}
        for r in found
    ])  # fmt: skip
    mean = flat.groupby("method", sort=False).agg(
        {"ability": "count", **dict.fromkeys([c for c in flat.columns if c not in ("ability", "method")], "mean")}
    ).rename(columns={"ability": "abilities"}).round(3)  # fmt: skip
    steps = pd.DataFrame([
        {"ability": r["ability"], "method": r["method"],
         "steps": "-" if (h := r["attacks"]["128"]["half"]) is None else f"{h:.0f}"} for r in found
    ]).pivot(index="method", columns="ability", values="steps").fillna("")  # fmt: skip
    steps = steps.loc[list(dict.fromkeys(flat["method"])), list(dict.fromkeys(flat["ability"]))]
    return "\n".join([
        "## Use 2: forgetting, and teaching it again (demo brain)", "",
        f"Fine-tuning of all parameters, {ATTACK.steps} steps of Adam on batches of {ATTACK.batch} lines. Area: mean "
        "exact-answer accuracy over the steps; 8, 32, 128: lines of the forgotten ability the attacker has; unrelated: "
        "128 lines of the others. Harm: accuracy lost by the worst of the other abilities. Probe: tokens of held-out "
        "lines that ridge regression reads from the best layer. Means over abilities.", "",
        mean.reset_index().to_markdown(index=False), "",
        f"Steps until half of the answers are right again, 128 lines (-: not within {ATTACK.steps}):", "",
        steps.reset_index().to_markdown(index=False), "", verdict(found), "",
    ])  # fmt: skip


def verdict(found: list[dict[str, Any]]) -> str:
    """On how many abilities ours takes twice the steps of the best method that cuts nothing, at equal harm."""
    by = {(r["ability"], r["method"]): r for r in found}
    lines = []
    for name in ("ours", "ours, made to last"):
        won, asked = 0, 0
        for ability in dict.fromkeys(r["ability"] for r in found):
            rivals = [by[k] for k in by if k[0] == ability and k[1].endswith("nothing cut")]
            mine = by.get((ability, name))
            if mine is None or not rivals:
                continue
            asked += 1
            last = ATTACK.steps
            taken = [min(r["attacks"]["128"]["half"] or last, last) if r["attacks"]["128"]["half"] != 0 else 0.0
                     for r in [mine, *[r for r in rivals if r["harm"] <= HARM]]]  # fmt: skip
            won += mine["harm"] <= HARM and taken[0] >= 2 * max([*taken[1:], 0.5])
        lines.append(f"- {name}: harm within {HARM:.0%} and at least twice the steps of the best method that cuts "
                     f"nothing on {won} of {asked} abilities.")  # fmt: skip
    return "\n".join(lines)

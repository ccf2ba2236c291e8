"""Use 2: does forgetting last? Every way to forget, then taught again on little text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import llmbrain as lb
from llmbrain.pruning.calibrate.windows import calibration_windows
from llmbrain.pruning.forget.conditions import condition_weights
from llmbrain.pruning.forget.relearning import UNRELATED, area, probe_accuracy, relearn, steps_until
from llmbrain.pruning.plan import PruningPlan
from uses_parts.forgetting_cases import REAL, Case, demo_case, real_case
from uses_parts.subject import Subject
from uses_parts.unlearned import unlearned

HARM = 0.03  # a method may cost the worst of the rest so much accuracy
HALF = 0.5  # of what the dense model knew: relearned
LASTING = "ours, made to last"
GOLD = "gold: trained without it"
NAMES = ("dense", "ours", "the same cut, least squares only", "random neurons, the same repair",
         "gradient difference, nothing cut", "NPO, nothing cut", LASTING, GOLD)  # fmt: skip


def methods(subject: Subject, case: Case, gold: Path | None) -> dict[str, Callable[[], Any]]:
    """Models that should not know it; each is made when it is asked for."""
    model, scans = subject.model, case.scans

    @cache
    def plan(last: bool = False) -> PruningPlan:
        return lb.plan_pruning(model, None, scans, method="flap", forget=[case.condition], last=last)

    def repaired(of: PruningPlan) -> Any:
        return lb.prune(model, of, calibration=scans, compensate="least-squares", relearning=False, verify=False)

    def ordinary() -> Any:
        windows = calibration_windows(model, None, None, scans, None, 128)
        assert windows is not None
        weights = condition_weights(scans, (windows.shape[0], windows.shape[1]), None, [case.condition])
        plain = PruningPlan.from_dict({**plan().to_dict(), "details": {}})
        return lb.prune(model, plain, calibration=windows, compensate="least-squares", weights=weights, verify=False)

    def at_random() -> Any:
        rng, made = np.random.default_rng(0), plan()
        gone = [before - after for before, after in zip(made.widths_before, made.widths)]
        kept = [np.sort(rng.permutation(w)[g:]).tolist() for w, g in zip(made.widths_before, gone)]
        return repaired(PruningPlan.from_dict({**made.to_dict(), "kept": kept}))

    def uncut(how: str) -> Callable[[], Any]:
        return lambda: unlearned(model, how, case.gone, case.stays, case.watch, HARM, case.rate)

    makers: list[Callable[[], Any]] = [
        lambda: model, lambda: repaired(plan()), ordinary, at_random, uncut("gradient difference"), uncut("NPO"),
        lambda: repaired(plan(True)),
    ]  # fmt: skip
    made = dict(zip(NAMES, makers))
    if gold is not None and (gold / case.name / "model.safetensors").is_file():
        made[GOLD] = lambda: lb.load_model(gold / case.name)[0].to(subject.device)
    return made


def rows(
    subject: Subject, gold: Path | None, known: set[tuple[str, str]], only: list[str] | None,
    names: list[str] | None = None, attacks: list[str] | None = None,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """One row an ability and method: accuracy, harm, what the attacks did, what a linear probe reads."""
    demo, scans = subject.demo, []
    for ability in only or (demo.abilities if demo is not None else REAL):
        wanted = [n for n in names or NAMES if (ability, n) not in known and (n != GOLD or gold is not None)]
        if not wanted:
            continue
        if demo is not None:
            scans = scans or lb.scan(demo.model, demo.tokenizer, demo.texts("calibration", n=48, seed=21))
            case = demo_case(subject, ability, scans)
        else:
            case = real_case(subject, ability)
        makers = methods(subject, case, gold)
        for name in wanted:
            if name in makers:
                yield measured(case, name, makers[name](), attacks)


def measured(case: Case, name: str, model: Any, attacks: list[str] | None = None) -> dict[str, Any]:
    """What a model knows, what it lost, and how fast it learns again."""
    removed = (getattr(model, "llmbrain_pruning", None) or [{}])[-1]
    gone = 1 - sum(map(len, removed["kept"])) / sum(removed["widths_before"]) if removed else None
    row: dict[str, Any] = {
        "ability": case.name, "method": name, "accuracy": case.score(model), "harm": case.harm(model), "attacks": {},
        "probe": float(probe_accuracy(model, *case.probes).max()), "every": case.attack.every,
        "steps": case.attack.steps, "removed": gone,
    }  # fmt: skip
    most = max(case.attack.lines)
    cases = {str(n): case.own[:n] for n in case.attack.lines} | {UNRELATED: case.rest[:most]}
    for attack in attacks or cases:
        lines = cases[attack]
        steps, scores = relearn(model, lines, case.score, case.attack)
        row["attacks"][attack] = {
            "area": area(steps, scores), "scores": [round(s, 4) for s in scores], "lines": len(lines)
        }  # fmt: skip
    return row


def taken(row: dict[str, Any], level: float, attack: str = "128") -> float | None:
    """Steps of an attack until the accuracy is at a level; None: not within it."""
    scores = row["attacks"][attack]["scores"]
    steps = [min(i * row["every"], row["steps"]) for i in range(len(scores))]
    return steps_until(steps, scores, level)


def page(found: list[dict[str, Any]], name: str) -> str:
    """The tables, as Markdown."""
    cases = max((list(r["attacks"]) for r in found), key=len)
    by = {(r["ability"], r["method"]): r for r in found}
    abilities, order = (
        list(dict.fromkeys(r["ability"] for r in found)),
        [n for n in NAMES if any(r["method"] == n for r in found)],
    )
    levels = {a: HALF * by[a, "dense"]["accuracy"] if (a, "dense") in by else HALF for a in abilities}
    cells, steps = [], []
    for method in order:
        of = [by[a, method] for a in abilities if (a, method) in by]
        sizes = [r["removed"] for r in of if r["removed"] is not None]
        mean = {"accuracy": np.mean([r["accuracy"] for r in of]), "harm, mean": np.mean([r["harm"] for r in of]),
                "harm, worst": np.max([r["harm"] for r in of]), "probe": np.mean([r["probe"] for r in of]),
                **{f"area {c}": np.mean([r["attacks"][c]["area"] for r in of if c in r["attacks"]] or [np.nan])
                   for c in cases}}  # fmt: skip
        cells.append({"method": method, "abilities": len(of), "removed": f"{np.mean(sizes):.0%}" if sizes else "-"}
                     | {k: f"{v:.3f}" for k, v in mean.items()})  # fmt: skip
        row = {"method": method}
        for a in abilities:
            r = by.get((a, method))
            t = None if r is None else taken(r, levels[a])
            row[a] = "" if r is None else "-" if t is None else f"{t:.0f}"
        steps.append(row)
    first = found[0]
    what = "exact answers to held-out lines" if name == "demo" else "right next tokens of held-out lines"
    return "\n".join([
        f"## Use 2: forgetting, and teaching it again ({name})", "",
        f"Fine-tuning of all parameters, {first['steps']} steps of Adam on batches of 8 lines. Accuracy: {what}. "
        "Area: mean accuracy over the steps; 8, 32, 128: lines of what was forgotten that the attacker has (fewer "
        "where there are fewer); unrelated: lines of other text. Harm: accuracy lost by the worst of the rest. Probe: "
        "tokens of held-out lines that ridge regression reads from the best layer. Means over abilities.", "",
        pd.DataFrame(cells).to_markdown(index=False), "",
        f"Steps until half of what the dense model knew is back, 128 lines (-: not within {first['steps']}; 0: was "
        "never gone):", "",
        pd.DataFrame(steps).to_markdown(index=False), "", *verdict(by, abilities, levels), "",
    ])  # fmt: skip


def verdict(by: dict[tuple[str, str], Any], abilities: list[str], levels: dict[str, float]) -> list[str]:
    """On how many abilities ours takes twice the steps of the best method that cuts nothing, at equal harm."""
    lines = []
    for name in ("ours", LASTING, "random neurons, the same repair", GOLD):
        won, asked = 0, 0
        for ability in abilities:
            rivals = [by[k] for k in by if k[0] == ability and k[1].endswith("nothing cut")]
            mine = by.get((ability, name))
            if mine is None or len(rivals) < 2:
                continue
            asked += 1

            def steps(row: dict[str, Any], level: float = levels[ability]) -> float:
                found = taken(row, level)
                return float(row["steps"]) if found is None else found

            best = max([steps(r) for r in rivals if r["harm"] <= HARM] + [0.0])
            won += mine["harm"] <= HARM and steps(mine) >= max(2 * best, 1.0)
        if asked:
            lines.append(f"- {name}: harm within {HARM:.0%} and at least twice the steps of the best method that cuts "
                         f"nothing on {won} of {asked} abilities.")  # fmt: skip
    return lines

"""Use 2: does forgetting last? Every way to forget, then taught again on little text."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import llmbrain as lb
from llmbrain.pruning.calibrate.windows import calibration_windows
from llmbrain.pruning.forget import neurons, unlearning
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
UNCUT = ("gradient difference, nothing cut", "NPO, nothing cut")
WHOLE = "repair of ours that lasts, nothing cut"
AT_RANDOM = "random neurons, made to last"
# In the order of use: where time ends, what is compared is there.
NAMES = (*UNCUT, LASTING, "ours", "dense", "random neurons, the same repair", "the same cut, least squares only", WHOLE,
         AT_RANDOM, GOLD)  # fmt: skip


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

    def at_random(last: bool = False) -> Any:
        rng, made = np.random.default_rng(subject.draw), plan(last)
        gone = [before - after for before, after in zip(made.widths_before, made.widths)]
        kept = [np.sort(rng.permutation(w)[g:]).tolist() for w, g in zip(made.widths_before, gone)]
        return repaired(PruningPlan.from_dict({**made.to_dict(), "kept": kept}))

    def uncut(how: str) -> Callable[[], Any]:
        def make() -> Any:
            found, how_found = unlearned(model, how, case.gone, case.stays, case.watch, HARM, case.rate)
            found.search = how_found
            return found

        return make

    def whole() -> Any:
        """A plan that removes nothing, with the repair of one that is to last."""
        made = plan()
        all_kept = [list(range(w)) for w in made.widths_before]
        details = {"functions": {**made.details["functions"], "last": True}}
        return repaired(PruningPlan.from_dict({**made.to_dict(), "kept": all_kept, "details": details}))

    makers: list[Callable[[], Any]] = [
        uncut("gradient difference"), uncut("NPO"), lambda: repaired(plan(True)), lambda: repaired(plan()),
        lambda: model, at_random, ordinary, whole, lambda: at_random(True),
    ]  # fmt: skip
    made = dict(zip(NAMES, makers))
    if gold is not None and (gold / case.name / "model.safetensors").is_file():
        made[GOLD] = lambda: lb.load_model(gold / case.name)[0].to(subject.device)
    return made


def rows(
    subject: Subject, gold: Path | None, known: set[tuple[str, str]], only: list[str] | None,
    names: list[str] | None = None, attacks: list[str] | None = None, *, quick: bool = False,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """One row an ability and method: accuracy, harm, what the attacks did, what a linear probe reads.

    `quick` halves the tokens in a step of our repair, and those that a round of our search for neurons looks at.
    """
    if quick:
        unlearning.TOKENS, neurons.TOKENS = unlearning.TOKENS // 2, neurons.TOKENS // 2
    demo, scans = subject.demo, []
    for ability in only or (demo.abilities if demo is not None else REAL):
        wanted = [n for n in names or NAMES if (ability, n) not in known and (n != GOLD or gold is not None)]
        if not wanted:
            continue
        if demo is not None:
            texts = demo.texts("calibration", n=48, seed=21 + subject.draw)
            scans = scans or lb.scan(demo.model, demo.tokenizer, texts)
            case = demo_case(subject, ability, scans)
        else:
            case = real_case(subject, ability)
        makers = methods(subject, case, gold)
        for name in wanted:
            if name in makers:
                began = time.process_time()
                row = measured(case, name, makers[name](), attacks)
                yield {**row, "draw": subject.draw, "quick": quick, "cpu_seconds": round(time.process_time() - began)}


def measured(case: Case, name: str, model: Any, attacks: list[str] | None = None) -> dict[str, Any]:
    """What a model knows, what it lost, and how fast it learns again."""
    removed = (getattr(model, "llmbrain_pruning", None) or [{}])[-1]
    gone = 1 - sum(map(len, removed["kept"])) / sum(removed["widths_before"]) if removed else None
    row: dict[str, Any] = {
        "ability": case.name, "method": name, "accuracy": case.score(model), "harm": case.harm(model), "attacks": {},
        "probe": float(probe_accuracy(model, *case.probes).max()), "every": case.attack.every,
        "steps": case.attack.steps, "removed": gone, "rate": case.attack.rate,
    }  # fmt: skip
    if hasattr(model, "search"):
        row["search"] = model.search
    said = (removed.get("forgetting") or {}) if removed else {}
    if "mended" in said:
        row |= {"mended": said["mended"], "harm_held_out": max(said["harm"].values(), default=0.0)}
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
    """The tables of every draw of the calibration text, as Markdown."""
    draws = sorted({r.get("draw", 0) for r in found})
    titles = [name if draw == 0 else f"{name}, draw {draw} of the calibration text" for draw in draws]
    return "\n".join(
        _page([r for r in found if r.get("draw", 0) == draw], title) for draw, title in zip(draws, titles)
    )  # fmt: skip


def _page(found: list[dict[str, Any]], name: str) -> str:
    cases = max((list(r["attacks"]) for r in found), key=len)
    by = {(r["ability"], r["method"]): r for r in found}
    abilities, order = (
        list(dict.fromkeys(r["ability"] for r in found)),
        [n for n in ("dense", *(m for m in NAMES if m != "dense")) if any(r["method"] == n for r in found)],
    )
    levels = {a: HALF * by[a, "dense"]["accuracy"] if (a, "dense") in by else HALF for a in abilities}
    cells = []
    for method in order:
        of = [by[a, method] for a in abilities if (a, method) in by]
        sizes = [r["removed"] for r in of if r["removed"] is not None]
        mean = {"accuracy": np.mean([r["accuracy"] for r in of]), "harm, mean": np.mean([r["harm"] for r in of]),
                "harm, worst": np.max([r["harm"] for r in of]), "probe": np.mean([r["probe"] for r in of]),
                **{f"area {c}": np.mean([r["attacks"][c]["area"] for r in of]) if all(c in r["attacks"] for r in of)
                   else np.nan for c in cases}}  # fmt: skip
        cells.append({"method": method, "abilities": len(of), "within": sum(_within(r) for r in of),
                      "removed": f"{np.mean(sizes):.0%}" if sizes else "-"}
                     | {k: "-" if np.isnan(v) else f"{v:.3f}" for k, v in mean.items()})  # fmt: skip
    first = found[0]
    what = "exact answers to held-out lines" if name.startswith("demo") else "right next tokens of held-out lines"
    quick = list(dict.fromkeys(
        r["method"] for r in found if r.get("quick") and r["method"] not in (*UNCUT, "dense", GOLD)
    ))  # fmt: skip
    shown = [c for c in cases if c != UNRELATED]
    return "\n".join([
        f"## Use 2: forgetting, and teaching it again ({name})", "",
        f"Fine-tuning of all parameters, {first['steps']} steps of Adam on batches of 8 lines. Accuracy: {what}. "
        "Area: mean accuracy over the steps; 8, 32, 128: lines of what was forgotten that the attacker has (fewer "
        "where there are fewer); unrelated: lines of other text. Harm: accuracy lost by the worst of the rest; within: "
        f"on how many abilities it is at most {HARM:.0%}. Probe: tokens of held-out lines that ridge regression reads "
        "from the best layer. Means over abilities, one seed."
        + (f" Half of the default tokens in repair and search for neurons: {', '.join(quick)}." if quick else ""),
        "", pd.DataFrame(cells).to_markdown(index=False), "",
        *(line for case in shown for line in _steps_table(by, abilities, order, levels, case)),
        *verdict(by, abilities, levels, shown), "",
    ])  # fmt: skip


def _within(row: dict[str, Any]) -> bool:
    """Whether the harm is allowed (a hundred questions: no digits beyond)."""
    return bool(round(row["harm"], 6) <= HARM)


def _steps_table(
    by: dict[tuple[str, str], Any], abilities: list[str], order: list[str], levels: dict[str, float], case: str
) -> list[str]:
    steps = []
    for method in order:
        row = {"method": method}
        for a in abilities:
            r = by.get((a, method))
            if r is None or case not in r["attacks"]:
                row[a] = ""
                continue
            t = taken(r, levels[a], case)
            row[a] = ("-" if t is None else f"{t:.0f}") + ("" if _within(r) else f" (harm {r['harm']:.2f})")
        steps.append(row)
    most = next(iter(by.values()))["steps"]
    said = (f"Steps until half of what the dense model knew is back, {case} lines (-: not within {most}; 0: was never "
            f"gone; harm where it is above {HARM:.0%}):")  # fmt: skip
    return [said, "", pd.DataFrame(steps).to_markdown(index=False), ""]


def verdict(
    by: dict[tuple[str, str], Any], abilities: list[str], levels: dict[str, float], cases: list[str]
) -> list[str]:
    """On how many abilities ours takes twice the steps of the best method that cuts nothing, at equal harm."""
    lines = []
    for case in cases:

        def steps(row: dict[str, Any], ability: str, case: str = case) -> float:
            """Those of the whole attack where it never comes back: at least so many."""
            found = taken(row, levels[ability], case)
            return float(row["steps"]) if found is None else found

        for name in (LASTING, AT_RANDOM, WHOLE, "ours", "random neurons, the same repair"):
            won = asked = kept = forgot = 0
            for ability in abilities:
                rivals = [by.get((ability, k)) for k in UNCUT]
                mine = by.get((ability, name))
                if mine is None or None in rivals or any(case not in r["attacks"] for r in (mine, *rivals)):
                    continue
                asked += 1
                best = max([steps(r, ability) for r in rivals if _within(r)] + [0.0])
                kept += _within(mine)
                forgot += best > 0
                won += _within(mine) and steps(mine, ability) >= max(2 * best, 1.0)
            if asked:
                lines.append(
                    f"- {case} lines, {name}: at least twice the steps of the best method that cuts nothing, both "
                    f"within {HARM:.0%} of harm, on {won} of {asked} abilities (it is within the harm on {kept}; "
                    f"one of the others forgot within it on {forgot})."
                )
    return lines

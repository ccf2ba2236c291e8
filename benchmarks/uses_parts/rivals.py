"""Use 3: other decompositions and other ways to choose neurons, on the same data."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pandas as pd

import llmbrain as lb
from llmbrain.anatomy.families import anatomy
from llmbrain.decomposition import ULCMOD, dual_regression
from llmbrain.intervention import TokenEvaluation, lesion_table
from llmbrain.networks import localizer
from llmbrain.pruning.calibrate.windows import calibration_windows
from llmbrain.pruning.criteria.relp import relevance
from llmbrain.pruning.forecast import share_cut, shifted, token_losses_of
from llmbrain.pruning.forget.conditions import token_conditions
from llmbrain.pruning.planner import Planner
from llmbrain.stats.matching import correlate_rows, match_maps
from uses_parts.forecast import interval, scored
from uses_parts.subject import Subject

DECOMPOSITIONS = {"group ICA": "fastica", "dictionary learning": "dictlearning", "k-means": "kmeans",
                  "semi-NMF": "nmf", "ULCMOD": ""}  # fmt: skip
CHOICES = ("RelP", "gradient times activity", "localizer t")
SIZE = 41  # neurons that a choice lesions: 2% of the demo brain, about the size of a network
CRITERIA = ("random", "flap", "taylor", "obs", "relp")


def evaluations(demo: Any, seed: int, n: int = 40) -> dict[str, TokenEvaluation]:
    """Held-out lines of each ability, scored by the loss on the answer."""
    made = {}
    for ability in demo.abilities:
        lines = demo.examples("heldout", ability, n=n, seed=seed)
        answers = [f"{line.answer}\n" for line in lines]
        made[ability] = TokenEvaluation.from_answers(demo.tokenizer, [x.prompt for x in lines], answers, score="loss")
    return made


def maps_of(subject: Subject, label: str, scans: list[Any]) -> np.ndarray:
    """Maps by one of the decompositions."""
    if label == "ULCMOD":
        return np.asarray(ULCMOD(subject.n_components, random_state=subject.draw).fit(scans).components_)
    ica = lb.GroupICA(subject.n_components, method=DECOMPOSITIONS[label], random_state=0, max_iter=500)
    return np.asarray(ica.fit(scans).components_)


def reproducibility(subject: Subject, label: str, maps: np.ndarray) -> float:
    """Mean ``|r|`` between the maps of two halves of the runs that match each map, over two ways to halve them."""
    rng, found = np.random.default_rng(subject.draw), []
    for _ in range(2):
        order = rng.permutation(len(subject.scans))
        half = len(order) // 2
        sides = [maps_of(subject, label, [subject.scans[i] for i in part]) for part in (order[:half], order[half:])]
        places = [match_maps(side, maps)[0] for side in sides]
        found += [abs(correlate_rows(sides[0][[i]], sides[1][[j]])[0, 0]) for i, j in zip(*places)]
    return float(np.mean(found))


def forecast_score(subject: Subject, maps: np.ndarray) -> dict[str, float]:
    """Rank correlation of share cut x squared time course with the loss that a cut adds; mean over four plans."""
    networks = lb.FunctionalNetworks(maps, subject.scans[0].space, threshold=subject.threshold)
    courses = dual_regression(networks.maps, subject.tests).time_courses
    found = []
    for plan, added in measured_plans(subject):
        said = [shifted(c**2 @ share_cut(networks, plan.kept), s) for c, s in zip(courses, subject.tests)]
        found.append(scored(subject, np.concatenate(said), added))
    return {of: float(np.mean([f[of] or 0.0 for f in found])) for of in ("tokens", "texts", "conditions")}


@cache
def measured_plans(subject: Subject) -> list[tuple[Any, np.ndarray]]:
    """Plans, and what each costs every held-out token after least squares."""
    windows = calibration_windows(subject.model, None, None, subject.scans, None, 128)
    before, found = np.concatenate(token_losses_of(subject.model, subject.tests)), []
    for method in ("flap", "random"):
        planner = Planner(subject.model, method, windows, random_state=subject.draw)
        for ratio in (0.3, 0.5):
            plan = planner.plan(ratio, allocation="uniform")
            small = lb.prune(subject.model, plan, calibration=windows, compensate="least-squares", verify=False)
            found.append((plan, np.concatenate(token_losses_of(small, subject.tests)) - before))
    return found


def halves_row(subject: Subject, label: str) -> dict[str, Any]:
    """Whether maps come back in halves of the runs."""
    maps = maps_of(subject, label, subject.scans)
    return {"label": label, "kind": "halves", "draw": subject.draw,
            "reproducibility": reproducibility(subject, label, maps)}  # fmt: skip


def forecast_row(subject: Subject, label: str) -> dict[str, Any]:
    """Whether they tell what a cut costs."""
    maps = maps_of(subject, label, subject.scans)
    return {"label": label, "kind": "forecast", "draw": subject.draw, "forecast": forecast_score(subject, maps)}


def lesions_row(subject: Subject, label: str) -> dict[str, Any]:
    """For each ability the loss that its most selective network adds, beside both controls."""
    demo, maps = subject.demo, maps_of(subject, label, subject.scans)
    largest = [np.argsort(-np.abs(m))[:SIZE] for m in maps]  # of one size, so that methods compare
    masks = np.zeros(maps.shape, dtype=bool)
    for mask, at in zip(masks, largest):
        mask[at] = True
    named = {f"N{k:02d}": mask for k, mask in enumerate(masks)}
    first = lesion_table(
        demo.model, named, evaluations(demo, 1000 + subject.draw), n_random=0, n_matched=0, progress=False
    ).matrix("effect")
    chosen = {a: (first[a] - first.drop(columns=a).max(axis=1)).idxmax() for a in demo.abilities}
    return {"label": label, "kind": "lesions", "draw": subject.draw,
            "lesions": selective(demo, {a: named[k] for a, k in chosen.items()}, subject.draw)}  # fmt: skip


def choice_row(subject: Subject, label: str) -> dict[str, Any]:
    """The same for neurons chosen by what they do under each condition, `SIZE` of them."""
    demo, body = subject.demo, anatomy(subject.demo.model)
    windows = calibration_windows(demo.model, None, None, subject.scans, None, 128)
    assert windows is not None
    conditions, names = token_conditions(subject.scans, (windows.shape[0], windows.shape[1]))
    if label == "localizer t":
        scores = np.abs(localizer(subject.scans, list(demo.abilities), n_permutations=0).t)
    else:
        import torch

        found = []
        for ability in demo.abilities:
            weights = torch.from_numpy((conditions == names.index(ability)).astype(np.float32))
            parts, _ = relevance(demo.model, body, windows, weights, rules=label == "RelP")
            found.append(np.concatenate([p.numpy() for p in parts]))
        own = np.array(found)
        scores = own / (np.array([np.delete(own, i, 0).max(0) for i in range(len(own))]) + own.mean() * 1e-2)
    masks = {}
    for ability, score in zip(demo.abilities, scores):
        masks[ability] = np.zeros(score.size, dtype=bool)
        masks[ability][np.argsort(-score)[:SIZE]] = True
    return {"label": label, "kind": "choice of neurons", "draw": subject.draw,
            "lesions": selective(demo, masks, subject.draw)}  # fmt: skip


def selective(demo: Any, masks: dict[str, np.ndarray], seed: int) -> dict[str, Any]:
    """Loss added to each ability by its own lesion, to the worst of the others, and by random and matched neurons."""
    rows = {}
    lines = evaluations(demo, 2000 + seed)
    for ability, mask in masks.items():
        table = lesion_table(
            demo.model, {"own": mask}, lines, n_random=5, n_matched=5, random_state=seed, progress=False
        )
        frame = table.frame.set_index("evaluation")
        others = frame.drop(index=ability)
        rows[ability] = {
            "own": float(frame.loc[ability, "effect"]), "worst other": float(others["effect"].max()),
            "random": float(frame.loc[ability, "random_effect"]),
            "matched": float(frame.loc[ability, "matched_effect"]),
        }  # fmt: skip
    return rows


def criterion_row(subject: Subject, method: str) -> dict[str, Any]:
    """Perplexity after cutting 30% and 50% by a criterion, uniform widths, least squares."""
    windows = calibration_windows(subject.model, None, None, subject.scans, None, 128)
    tests = calibration_windows(subject.model, None, None, subject.tests, None, 128)
    planner, found = Planner(subject.model, method, windows, random_state=subject.draw), {}
    for ratio in (0.3, 0.5):
        small = lb.prune(subject.model, planner.plan(ratio, allocation="uniform"), calibration=windows,
                         compensate="least-squares", verify=False)  # fmt: skip
        found[f"{ratio:.0%}"] = lb.perplexity(small, None, tests)
    return {"label": method, "kind": "criterion", "draw": subject.draw, **found}


def rows(
    subject: Subject, known: set[tuple[str, str]], only: list[str] | None = None, kinds: list[str] | None = None
) -> Iterator[dict[str, Any]]:
    """All rows of a draw."""
    makers = {"halves": (DECOMPOSITIONS, halves_row), "lesions": (DECOMPOSITIONS, lesions_row),
              "choice of neurons": (CHOICES, choice_row), "forecast": (DECOMPOSITIONS, forecast_row),
              "criterion": (CRITERIA, criterion_row)}  # fmt: skip
    for kind, (labels, make) in makers.items():
        if (subject.demo is None and kind != "criterion") or (kinds and kind not in kinds):
            continue
        for label in labels:
            if (label, kind) not in known and (only is None or label in only):
                yield make(subject, label)


def page(found: list[dict[str, Any]], name: str) -> str:
    """The tables, as Markdown."""
    lines = [f"## Use 3: rivals ({name})", ""]
    lesions = []
    margins = {label: margin([r for r in found if r["label"] == label]) for label in (*DECOMPOSITIONS, *CHOICES)}
    for label in [x for x in (*DECOMPOSITIONS, *CHOICES) if any(r["label"] == x for r in found)]:
        of = [r for r in found if r["label"] == label]
        cells = pd.DataFrame([x for r in of for x in r.get("lesions", {}).values()])
        halves = [r["reproducibility"] for r in sorted(of, key=lambda r: r["draw"]) if "reproducibility" in r]
        told = [r["forecast"] for r in of if "forecast" in r]
        beside = (margins[label] - margins["group ICA"]).dropna() if label != "group ICA" else pd.Series(dtype=float)
        lesions.append({"method": label, "split-half r": ", ".join(f"{h:.2f}" for h in halves) or "-",
                        **damage(cells), "margin": interval(margins[label]),
                        "margin less group ICA's": interval(beside),
                        "forecast: tokens / texts / conditions": " / ".join(
                            f"{np.mean([t[k] for t in told]):.2f}" for k in ("tokens", "texts", "conditions")
                        ) if told else "-"})  # fmt: skip
    if lesions:
        shown = pd.DataFrame(lesions)  # columns that nothing was measured of are left out
        draws = len({r["draw"] for r in found if "lesions" in r})
        lines += [f"Lesions of {SIZE} neurons (2%), one set an ability; networks: the most selective one, chosen on "
                  f"other lines. Nats per answer token, means over abilities and {draws} draw(s). Margin: above the "
                  "worst-hit other ability, random and matched neurons, whichever is most; mean ± 95% interval over "
                  "abilities (draws averaged). Selective: a margin of more than .05. Split-half r: maps of two halves "
                  "of the runs that match each other, by draw. Forecast: rank correlation of what a cut takes of each "
                  "network, times its squared time course, with the loss that comes (four plans a draw).", "",
                  shown.loc[:, (shown != "-").any()].to_markdown(index=False), ""]  # fmt: skip
    cut = pd.DataFrame([r for r in found if r["kind"] == "criterion"])
    if len(cut):
        cut = cut.groupby("label", sort=False)[["30%", "50%"]].mean().round(3).reset_index()
        lines += ["Criteria, perplexity on held-out text after least squares, uniform widths:", "",
                  cut.rename(columns={"label": "criterion"}).to_markdown(index=False), ""]  # fmt: skip
    return "\n".join(lines)


def margin(of: list[dict[str, Any]]) -> pd.Series:
    """By ability what its lesion added beyond the worst-hit other ability and both controls, mean over draws."""
    found = pd.DataFrame(
        {a: x["own"] - max(x["worst other"], x["random"], x["matched"]) for a, x in r["lesions"].items()}
        for r in of if "lesions" in r
    )  # fmt: skip
    return found.mean()


def damage(cells: pd.DataFrame) -> dict[str, str]:
    """What lesions added, beside the controls."""
    names = {"own": "loss added to its ability", "worst other": "to the worst other", "random": "random neurons",
             "matched": "matched neurons"}  # fmt: skip
    if not len(cells):
        return dict.fromkeys([*names.values(), "selective beyond both"], "-")
    beyond = (cells["own"] > cells[["worst other", "random", "matched"]].max(axis=1) + 0.05).sum()
    found = {name: f"{cells[key].mean():.{2 if key in ('own', 'worst other') else 3}f}" for key, name in names.items()}
    return found | {"selective beyond both": f"{beyond} of {len(cells)}"}

"""Use 3: other decompositions and other ways to choose neurons, on the same data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

import llmbrain as lb
from llmbrain.anatomy.families import anatomy
from llmbrain.decomposition import split_half_reproducibility
from llmbrain.intervention import TokenEvaluation, lesion_table
from llmbrain.networks import localizer
from llmbrain.pruning.calibrate.windows import calibration_windows
from llmbrain.pruning.criteria.relp import relevance
from llmbrain.pruning.forget.conditions import token_conditions
from llmbrain.pruning.planner import Planner
from uses_parts.subject import Subject

DECOMPOSITIONS = {"group ICA": "fastica", "dictionary learning": "dictlearning", "k-means": "kmeans", "semi-NMF": "nmf"}
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


def decomposition_row(subject: Subject, label: str) -> dict[str, Any]:
    """Reproducibility, and for each ability the loss that its most selective network adds, beside both controls."""
    demo, method = subject.demo, DECOMPOSITIONS[label]
    halves = split_half_reproducibility(
        subject.scans, subject.n_components, method=method, n_splits=2, n_permutations=0, random_state=subject.draw
    )
    networks = subject.networks_of(method)
    largest = [np.argsort(-np.abs(m))[:SIZE] for m in networks.maps]  # of one size, so that methods compare
    masks = np.zeros(networks.maps.shape, dtype=bool)
    for mask, at in zip(masks, largest):
        mask[at] = True
    named = {f"N{k:02d}": mask for k, mask in enumerate(masks)}
    first = lesion_table(
        demo.model, named, evaluations(demo, 1000 + subject.draw), n_random=0, n_matched=0, progress=False
    ).matrix("effect")
    chosen = {a: (first[a] - first.drop(columns=a).max(axis=1)).idxmax() for a in demo.abilities}
    return {"label": label, "kind": "decomposition", "draw": subject.draw,
            "reproducibility": float(halves.reproducibility.mean()),
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
    return {"label": label, "kind": "choice of neurons", "draw": subject.draw, "reproducibility": None,
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


def rows(subject: Subject, known: set[str]) -> Iterator[dict[str, Any]]:
    """All rows of a draw."""
    makers = {"decomposition": (DECOMPOSITIONS, decomposition_row), "choice of neurons": (CHOICES, choice_row),
              "criterion": (CRITERIA, criterion_row)}  # fmt: skip
    for kind, (labels, make) in makers.items():
        if subject.demo is None and kind != "criterion":
            continue
        for label in labels:
            if label not in known:
                yield make(subject, label)


def page(found: list[dict[str, Any]], name: str) -> str:
    """The tables, as Markdown."""
    lines = [f"## Use 3: rivals ({name})", ""]
    lesions = []
    for label in dict.fromkeys(r["label"] for r in found if "lesions" in r):
        of = [r for r in found if r["label"] == label]
        cells = pd.DataFrame([x for r in of for x in r["lesions"].values()])
        beyond = (cells["own"] > cells[["worst other", "random", "matched"]].max(axis=1) + 0.05).mean()
        halves = [r["reproducibility"] for r in of if r["reproducibility"] is not None]
        lesions.append({"method": label, "split-half r": f"{np.mean(halves):.2f}" if halves else "-",
                        "loss added to its ability": f"{cells['own'].mean():.2f}",
                        "to the worst other": f"{cells['worst other'].mean():.2f}",
                        "random neurons": f"{cells['random'].mean():.3f}",
                        "matched neurons": f"{cells['matched'].mean():.3f}",
                        "selective beyond both": f"{beyond:.0%} of {len(cells)}"})  # fmt: skip
    if lesions:
        lines += [f"Lesions of {SIZE} neurons (2%), one set an ability; networks: the most selective one, chosen on "
                  "other lines. Nats per answer token, means over abilities and draws. Selective: more than .05 above "
                  "the worst-hit other ability and both controls.", "",
                  pd.DataFrame(lesions).to_markdown(index=False), ""]  # fmt: skip
    cut = pd.DataFrame([r for r in found if r["kind"] == "criterion"])
    if len(cut):
        cut = cut.groupby("label", sort=False)[["30%", "50%"]].mean().round(3).reset_index()
        lines += ["Criteria, perplexity on held-out text after least squares, uniform widths:", "",
                  cut.rename(columns={"label": "criterion"}).to_markdown(index=False), ""]  # fmt: skip
    return "\n".join(lines)

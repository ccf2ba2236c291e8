"""Use 4: functions that have names. A localizer's neurons, lesioned, beside random, matched and least active ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch

import llmbrain as lb
from llmbrain.datasets import CONTRASTS, contrast_lines, contrast_texts, control_of
from llmbrain.intervention import TokenEvaluation
from llmbrain.intervention.controls import random_masks
from llmbrain.intervention.evaluations import score_conditions
from llmbrain.networks import localizer
from uses_parts.subject import Subject

SHARE = 0.01  # of all neurons that a lesion takes
LINES = {"demo": 24, "smollm2": 10}
DRAWS = 3  # of random neurons


def lines_of(subject: Subject, texts: list[str]) -> TokenEvaluation:
    """Loss over single lines, each behind a line break (or the tokenizer's own first token)."""
    rows = [subject.tokenizer(f"\n{t}" if subject.demo is None else t)["input_ids"] for t in texts]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    scored = torch.zeros_like(ids, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        scored[i, 1 : len(row)] = True
    return TokenEvaluation(ids, scored)


def material(subject: Subject, contrast: str) -> tuple[list[lb.Scan], dict[str, float], dict[str, TokenEvaluation]]:
    """Scans, the contrast's weights, and held-out lines of the condition and of its control."""
    if subject.demo is not None:
        demo, others = subject.demo, [a for a in subject.demo.abilities if a != contrast]
        weights = {contrast: 1.0} | {a: -1 / len(others) for a in others}
        n = LINES["demo"]
        lines = {"condition": [x.text for x in demo.examples("heldout", contrast, n=n, seed=7)],
                 "control": [x.text for x in demo.examples("heldout", others, n=n // 7 + 1, seed=7)]}  # fmt: skip
        return subject.scans, weights, {k: lines_of(subject, v) for k, v in lines.items()}
    texts = contrast_texts(contrast, subject.tokenizer, n=3, blocks=2, items=4, seed=subject.draw)
    pairs = contrast_lines(contrast, n=LINES[subject.name], seed=100 + subject.draw)
    sides = {"condition": [a for a, _ in pairs], "control": [b for _, b in pairs]}
    weights = {contrast: 1.0, control_of(contrast): -1.0}
    return (
        lb.scan(subject.model, subject.tokenizer, texts),
        weights,
        {k: lines_of(subject, v) for k, v in sides.items()},
    )


def rows(subject: Subject, known: set[str], only: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """One row a contrast: loss added to its lines and to its control's by each set of neurons of one size."""
    for contrast in only or (subject.demo.abilities if subject.demo is not None else CONTRASTS):
        if contrast in known:
            continue
        scans, weights, evaluations = material(subject, contrast)
        t = localizer(scans, {contrast: weights}, n_permutations=0).t[0]
        level = levels(scans, contrast)
        n, space = max(1, round(SHARE * t.size)), scans[0].space
        sets = {"localizer, most positive t": top(t, n), "localizer, largest t": top(np.abs(t), n),
                "least active in the condition": top(-level, n),
                "most active in the condition": top(level, n)}  # fmt: skip
        chosen = sets["localizer, largest t"]
        rng = np.random.default_rng(subject.draw)
        for i, mask in enumerate(random_masks(chosen, space, DRAWS, rng)):
            sets[f"random, same layers {i}"] = mask
        scales = np.ones((len(sets) + 1, t.size), dtype=np.float32)
        for row, mask in zip(scales[1:], sets.values()):
            row[mask] = 0
        found = {k: v.mean(axis=1) for k, v in score_conditions(subject.model, scales, evaluations).items()}
        effects = {name: {k: float(v[i + 1] - v[0]) for k, v in found.items()} for i, name in enumerate(sets)}
        yield {"contrast": contrast, "draw": subject.draw, "neurons": n, "effects": effects,
               "dense": {k: float(v[0]) for k, v in found.items()}}  # fmt: skip


def levels(scans: list[lb.Scan], condition: str) -> np.ndarray:
    """Mean absolute activity of every neuron over the tokens of a condition."""
    total, count = 0.0, 0
    for scan in scans:
        data = np.abs(scan.data())
        for onset, duration, kind in scan.events[["onset", "duration", "trial_type"]].itertuples(index=False):
            if kind == condition:
                total = total + data[int(onset) : int(onset + duration)].sum(axis=0, dtype=np.float64)
                count += int(duration)
    return np.asarray(total) / count


def top(scores: np.ndarray, n: int) -> np.ndarray:
    """The n largest as a mask."""
    mask = np.zeros(scores.size, dtype=bool)
    mask[np.argsort(-scores, kind="stable")[:n]] = True
    return mask


def page(found: list[dict[str, Any]], name: str) -> str:
    """The tables, as Markdown."""
    names = [n for n in found[0]["effects"] if not n.startswith("random")]
    cells, selective, hurt = [], dict.fromkeys(names, 0), 0
    for contrast in dict.fromkeys(r["contrast"] for r in found):
        of = [r["effects"] for r in found if r["contrast"] == contrast]
        row: dict[str, Any] = {"contrast": contrast}
        random = [[v[k] for e in of for n, v in e.items() if n.startswith("random")] for k in ("condition", "control")]
        for n in names:
            own, other = (float(np.mean([e[n][k] for e in of])) for k in ("condition", "control"))
            row[n] = f"{own:.3f} / {other:.3f}"
            selective[n] += own - other > 0.02 and own > max(random[0]) + 0.02
        row["random, mean"] = " / ".join(f"{np.mean(r):.3f}" for r in random)
        row["random, largest"] = " / ".join(f"{np.max(r):.3f}" for r in random)
        hurt += np.mean([e["least active in the condition"]["condition"] for e in of]) > max(random[0]) + 0.02
        cells.append(row)
    counted = ", ".join(f"{n}: {k}" for n, k in selective.items())
    return "\n".join([
        f"## Use 4: functions that have names ({name})", "",
        f"Loss added (nats a token) to held-out lines of the condition / of its control, when {SHARE:.0%} of all "
        f"neurons are set to zero; {len({r['draw'] for r in found})} draw(s).", "",
        pd.DataFrame(cells).to_markdown(index=False), "",
        f"Selective (more than .02 above the control and above every random set), of {len(cells)} contrasts: "
        f"{counted}. The least active set hurts its condition by .02 more than every random set in {hurt} of "
        f"{len(cells)}.", "",
    ])  # fmt: skip

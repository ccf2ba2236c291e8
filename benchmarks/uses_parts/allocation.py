"""Use 0: how much each layer keeps, from where networks live, beside what needs no networks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch

import llmbrain as lb
from llmbrain.hooks.text import as_windows
from llmbrain.pruning.planner import Planner
from uses_parts.subject import Subject

ROWS = ("uniform", "first and last layer kept", "FLAP global", "measured sensitivity", "search",
        "networks", "networks that both halves of the runs have", "phase-randomized networks")  # fmt: skip
REAL = ("uniform", "first and last layer kept", "FLAP global", "networks", "phase-randomized networks",
        "networks, ends kept", "phase-randomized networks, ends kept")  # fmt: skip
ENDS = ", ends kept"
HALF = ("addition", "reversal", "sorting", "brackets")  # of the demo brain: what it is calibrated on


def texts(subject: Subject) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Calibration windows, and test windows in and out of domain."""
    if subject.demo is not None:
        demo, rest = subject.demo, [a for a in subject.demo.abilities if a not in HALF]

        def windows(side: str, of: Any, n: int) -> torch.Tensor:
            return as_windows(demo.model, demo.tokenizer, demo.texts(side, of, n=n + 8, seed=subject.draw), 256, n)

        return windows("calibration", HALF, 64), {
            "in domain": windows("heldout", HALF, 24), "out of domain": windows("heldout", rest, 24)
        }  # fmt: skip
    own, other = ("stories", "wiki") if subject.name == "stories260K" else ("wiki", "stories")
    n, tests = (64, 32) if subject.name == "stories260K" else (24, 8)
    every = subject.windows(subject.corpus(own, held_out=False), n * (subject.draw + 1))
    return every[n * subject.draw :], {
        "in domain": subject.windows(subject.corpus(own, held_out=True), tests),
        "out of domain": subject.windows(subject.corpus(other, held_out=True), tests),
    }


def networks_of(subject: Subject, windows: torch.Tensor) -> dict[str, lb.FunctionalNetworks]:
    """Networks of the calibration windows: all, those that both halves have, and of randomized phases."""
    from llmbrain.anatomy.families import anatomy
    from llmbrain.pruning.calibrate.windows import signals_of_windows
    from llmbrain.stats.nulls import phase_randomize

    runs: list[Any] = signals_of_windows(subject.model, anatomy(subject.model), windows[:32], ("neuron",))
    space, rng = runs[0].space, np.random.default_rng(subject.draw)

    def found(of: list[Any]) -> lb.FunctionalNetworks:
        ica = lb.GroupICA(subject.n_components, random_state=0, max_iter=500).fit(of)
        return lb.FunctionalNetworks(ica.components_, space, threshold=subject.threshold)

    whole, halves = found(runs), [found(runs[i::2]) for i in (0, 1)]
    corr = [np.abs(np.corrcoef(whole.maps, h.maps)[: len(whole.maps), len(whole.maps) :]).max(1) for h in halves]
    stable = np.flatnonzero(np.minimum(*corr) > 0.5)
    null = found([phase_randomize(r.data(), rng, shared=False) for r in runs])
    return {"networks": whole, "networks that both halves of the runs have": whole.subset(stable.tolist() or [0]),
            "phase-randomized networks": null}  # fmt: skip


def rows(
    subject: Subject, ratios: tuple[float, ...], known: set[tuple[str, float]], only: list[str] | None = None
) -> Iterator[dict[str, Any]]:
    """One row an allocation and ratio: perplexities of FLAP's neurons at its widths, after least squares."""
    wanted = only or (REAL if subject.name == "smollm2" else ROWS)
    if all((label, ratio) in known for label in wanted for ratio in ratios):
        return
    windows, tests = texts(subject)
    networks = networks_of(subject, windows)
    n = len(networks["networks"].space.widths)
    planners = {None: Planner(subject.model, "flap", windows)}
    for ratio in ratios:
        for label in wanted:
            if (label, ratio) in known:
                continue
            name = label.removesuffix(ENDS)
            if name in networks and name not in planners:
                planners[name] = Planner(subject.model, "flap", windows, networks=networks[name])
            planner = planners.get(name, planners[None])
            allocation = {"FLAP global": "global", "measured sensitivity": "sensitivity", "search": "search"}.get(
                label, "networks" if name in networks else "uniform"
            )
            ends = [0, n - 1] if n < 8 else [0, 1, 2, n - 2, n - 1]
            kept = label.startswith("first and last") or label.endswith(ENDS)
            options = {"protect": ends} if kept and ratio * n < n - len(ends) else {}
            plan = planner.plan(ratio, allocation=allocation, **options)
            small = lb.prune(
                subject.model, plan, calibration=windows, compensate="least-squares", propagation=0, verify=False
            )
            found = {test: lb.perplexity(small, None, w) for test, w in tests.items()}
            yield {"allocation": label, "ratio": ratio, "draw": subject.draw, **found, "widths": list(plan.widths)}


def page(found: list[dict[str, Any]], name: str) -> str:
    """The tables, as Markdown."""
    table = pd.DataFrame(found)
    lines = [f"## Use 0: allocation ({name})", "",
             "FLAP's neurons at the widths of each allocation, least squares; perplexity in and out of the domain of "
             "the calibration text, mean over the draws, [lowest, highest].", ""]  # fmt: skip
    for ratio, part in table.groupby("ratio"):
        cells = []
        for label in dict.fromkeys(part["allocation"]):
            of = part[part["allocation"] == label]
            cells.append({"allocation": label, "draws": len(of)} | {
                t: f"{of[t].mean():.2f} [{of[t].min():.2f}, {of[t].max():.2f}]" for t in ("in domain", "out of domain")
            })  # fmt: skip
        lines += [f"**{ratio:.0%} removed**", "", pd.DataFrame(cells).to_markdown(index=False), ""]
    wide = table.pivot_table(index=["ratio", "draw"], columns="allocation", values="in domain")
    other = table.pivot_table(index=["ratio", "draw"], columns="allocation", values="out of domain")
    null = "phase-randomized networks"
    for label in [c for c in wide.columns if c != "networks"]:
        pairs = [(w["networks"] < w[label]).sum() for w in (wide, other)]
        both = len(wide[["networks", label]].dropna())
        lines.append(f"- networks below {label}: in domain {pairs[0]}, out of domain {pairs[1]} of {both} "
                     f"(ratio, draw){' - the control' if label == null else ''}.")  # fmt: skip
    return "\n".join([*lines, ""])

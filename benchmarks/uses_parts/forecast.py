"""Use 1: what a cut will cost, foretold. Predictors beside their controls, over many plans."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

import llmbrain as lb
from llmbrain.decomposition import dual_regression
from llmbrain.pruning.calibrate.windows import calibration_windows
from llmbrain.pruning.forecast import Changes, Observed, share_cut, shifted, token_losses_of
from llmbrain.pruning.planner import Planner
from uses_parts.subject import Subject

FORECAST = "second order, repaired layers (the forecast)"
PREDICTORS = (FORECAST, "first order alone (Taylor)", "curvature alone", "FLAP's error", "networks",
              "phase-randomized networks", "share of neurons cut", "loss of the token before the cut")  # fmt: skip
DEMO = [(m, r, s) for r in (0.3, 0.5, 0.6) for m in ("random", "flap", "obs", "wanda-sp", "magnitude", "relp")
        for s in range(2 if m == "random" else 1)]  # fmt: skip
REAL = [(m, r, 0) for r in (0.2, 0.4) for m in ("random", "flap", "magnitude")]


def rows(subject: Subject, known: set[str]) -> Iterator[dict[str, Any]]:
    """One row a plan: what every predictor said of conditions, texts and tokens, and what came."""
    wanted = [(f"{m}, {r:.0%}, seed {s}", m, r, s) for m, r, s in (DEMO if subject.demo is not None else REAL)]
    if all(name in known for name, *_ in wanted):
        return
    windows = calibration_windows(subject.model, None, None, subject.scans, None, 128)
    before = np.concatenate(token_losses_of(subject.model, subject.tests))
    observed = Observed(subject.model, subject.scans)
    power = {"networks": subject.networks, "phase-randomized networks": subject.null}
    courses = {k: dual_regression(n.maps, subject.tests).time_courses for k, n in power.items()}
    planners: dict[Any, Planner] = {}
    for name, method, ratio, seed in sorted(wanted, key=lambda w: (w[1], w[3])):
        if name in known:
            continue
        if (method, seed) not in planners:
            planners = {(method, seed): Planner(subject.model, method, windows, random_state=seed)}
        plan = planners[method, seed].plan(ratio, allocation="uniform")
        small = lb.prune(
            subject.model, plan, calibration=windows, compensate="least-squares", propagation=0, verify=False
        )
        added = np.concatenate(token_losses_of(small, subject.tests)) - before
        changes = Changes(observed, plan.kept, "least-squares")
        first, second = changes.expansion(subject.tests)
        said = {
            FORECAST: [a + b for a, b in zip(first, second)], "first order alone (Taylor)": first,
            "curvature alone": second, "FLAP's error": changes.fluctuation(subject.tests),
            **{k: [c**2 @ share_cut(n, plan.kept) for c in courses[k]] for k, n in power.items()},
            "share of neurons cut": [np.full(s.n_tokens, plan.removed) for s in subject.tests],
        }  # fmt: skip
        row: dict[str, Any] = {"plan": name, "ratio": ratio, "measured": float(np.nanmean(added)), "predictors": {}}
        for label in PREDICTORS:
            tokens = before if label.startswith("loss") else np.concatenate(
                [shifted(x, s) for x, s in zip(said[label], subject.tests)])  # fmt: skip
            row["predictors"][label] = scored(subject, tokens, added)
        row["n_conditions"] = len({k for k in labels(subject)[0] if k != ""})
        yield row


def labels(subject: Subject) -> tuple[np.ndarray, np.ndarray]:
    """Condition and text of each held-out token."""
    kinds = np.concatenate([_labels(s) for s in subject.tests])
    return kinds, np.repeat(np.arange(len(subject.tests)), [s.n_tokens for s in subject.tests])


def _labels(scan: Any) -> np.ndarray:
    found = np.full(scan.n_tokens, "", dtype=object)
    for onset, duration, kind in scan.events[["onset", "duration", "trial_type"]].itertuples(index=False):
        found[int(onset) : int(onset + duration)] = kind
    return found


def scored(subject: Subject, predicted: np.ndarray, added: np.ndarray) -> dict[str, Any]:
    """Rank correlations over tokens, texts and conditions, the mean, and the means by condition."""
    kinds, texts = labels(subject)
    ok = np.isfinite(predicted) & np.isfinite(added)

    def grouped(of: np.ndarray) -> tuple[list[float], list[float]]:
        names = [k for k in dict.fromkeys(of[ok]) if k != ""]
        return tuple([float(v[ok & (of == k)].mean()) for k in names] for v in (predicted, added))  # type: ignore[return-value]

    def rank(a: Any, b: Any) -> float | None:
        return None if len(a) < 3 or np.ptp(a) < 1e-12 else float(spearmanr(a, b).statistic)

    return {"tokens": rank(predicted[ok], added[ok]), "texts": rank(*grouped(texts)),
            "conditions": rank(*grouped(kinds)), "mean": float(predicted[ok].mean())}  # fmt: skip


def page(found: list[dict[str, Any]], name: str) -> str:
    """The table, as Markdown."""
    plans = pd.DataFrame([{"plan": r["plan"], "ratio": r["ratio"], "measured": r["measured"]} for r in found])
    rows = []
    for label in PREDICTORS:
        scores = pd.DataFrame([r["predictors"][label] for r in found])
        mean, measured = scores["mean"].to_numpy(), plans["measured"].to_numpy()
        within = [spearmanr(mean[i], measured[i]).statistic for _, i in plans.groupby("ratio").indices.items()
                  if len(i) > 2 and np.ptp(mean[i]) > 1e-12]  # fmt: skip
        cells = {"predictor": label}
        cells |= {f"over {of}": interval(scores[of]) for of in ("conditions", "texts", "tokens")}
        cells["over plans"] = f"{spearmanr(mean, measured).statistic:.2f}" if np.ptp(mean) > 1e-12 else "-"
        cells["over plans of one size"] = f"{np.mean(within):.2f}" if within else "-"
        fit = off_by(mean, measured)
        cells["off by, no fit"] = f"x {off_raw(mean, measured):.1f}" if label.startswith(("second", "curv")) else "-"
        cells["off by, scale fitted on other plans"] = "-" if fit is None else f"x {fit:.1f}"
        rows.append(cells)
    return "\n".join([
        f"## Use 1: forecast of a cut ({name}, {len(found)} plans, {found[0]['n_conditions']} conditions)", "",
        "Rank correlation of predicted and measured loss on held-out text, mean ± 95% interval over plans (criteria x "
        "ratios x seeds, least squares); over the mean losses of the plans; and the factor by which the predicted mean "
        "loss is typically off (median over plans that cost more than .002 nats).", "",
        pd.DataFrame(rows).to_markdown(index=False), "",
    ])  # fmt: skip


def interval(values: pd.Series) -> str:
    """Mean and 95% interval."""
    from scipy.stats import t as student

    x = values.dropna().to_numpy(float)
    if len(x) < 2:
        return "-"
    return f"{x.mean():.2f} ± {student.ppf(0.975, len(x) - 1) * x.std(ddof=1) / len(x) ** 0.5:.2f}"


def off_raw(mean: np.ndarray, measured: np.ndarray) -> float:
    """Typical factor between predicted and measured."""
    ok = (measured > 0.002) & (mean > 0)
    return float(np.exp(np.median(np.abs(np.log(mean[ok] / measured[ok]))))) if ok.any() else np.nan


def off_by(mean: np.ndarray, measured: np.ndarray) -> float | None:
    """The same after one factor, from the other half of the plans."""
    ok = (measured > 0.002) & (mean > 0)
    index = np.flatnonzero(ok)
    if len(index) < 4 or ok.sum() < (measured > 0.002).sum():
        return None
    errors = []
    for half in (index[::2], index[1::2]):
        other = np.setdiff1d(index, half)
        scale = np.median(np.log(measured[other] / mean[other]))
        errors += np.abs(np.log(measured[half] / mean[half]) - scale).tolist()
    return float(np.exp(np.median(errors)))

"""Compare ways of pruning on the user's own model and text."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from llmbrain._progress import Say, bar, speaker
from llmbrain._validation import InputError, check_count, seed_of
from llmbrain.anatomy.experts import has_experts
from llmbrain.evaluation.perplexity import perplexity
from llmbrain.hooks.text import as_windows, window_length
from llmbrain.pruning.calibrate.windows import check_enough
from llmbrain.pruning.criteria import CRITERIA
from llmbrain.pruning.planner import Planner
from llmbrain.pruning.prune import prune

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedTokenizerBase

WINDOW = 256

# (method, allocation, compensation): the published combinations, the best of the grid, and ours.
ROWS: tuple[tuple[str, str | None, str | None], ...] = (
    ("random", "uniform", None),
    ("random", "uniform", "least-squares"),
    ("magnitude", "uniform", None),
    ("magnitude", "uniform", "least-squares"),
    ("published", "global", None),
    ("published", "global", "least-squares"),
    ("wanda-sp", "uniform", None),
    ("wanda-sp", "uniform", "least-squares"),
    ("flap", "global", "bias"),
    ("flap", "uniform", "least-squares"),
    ("flap", "sensitivity", "least-squares"),
    ("taylor", "uniform", "least-squares"),
    ("obs", "uniform", "least-squares"),
    ("obs", "sensitivity", "least-squares"),
    ("obs-gradient", "uniform", "least-squares"),
    ("obs-gradient", "global", "least-squares"),
    ("obs-gradient", "sensitivity", "least-squares"),
    ("networks", None, "least-squares"),
)

# Rows that are repeated over calibration draws: the control, the usual choice, and ours.
REPEATED = (
    ("random", "uniform", "least-squares"),
    ("flap", "uniform", "least-squares"),
    ("obs", "uniform", "least-squares"),
    ("networks", None, "least-squares"),
)


def rows_of(methods: Sequence[str] | None = None) -> list[tuple[str, str | None, str | None]]:
    """What is compared: `ROWS`, or those of the methods that are named.

    One that has none there (those that drop whole blocks, criteria of your own) gets a row with its defaults.

    Raises
    ------
    InputError
        If a method is not known.
    """
    if methods is None:
        return list(ROWS)
    unknown = sorted(set(methods) - set(CRITERIA))
    if unknown:
        raise InputError(f"methods={unknown} are not known: allowed are {sorted(CRITERIA)}")
    known = {row[0] for row in ROWS}
    more = [(method, None, "least-squares") for method in dict.fromkeys(methods) if method not in known]
    return [row for row in ROWS if row[0] in methods] + more


def compare_methods(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    calibration: Sequence[str] | Tensor,
    test: Sequence[str] | Tensor,
    *,
    ratios: Sequence[float] = (0.2, 0.3, 0.5),
    methods: Sequence[str] | None = None,
    networks: Any = None,
    draws: int = 1,
    window: int | None = None,
    max_windows: int = 128,
    test_windows: int | None = 96,
    random_state: int | None = 0,
    progress: Say | None = None,
) -> pd.DataFrame:
    """Prune by every row of `ROWS` and measure perplexity.

    Parameters
    ----------
    calibration, test : texts or windows
        Different texts.
    ratios : sequence of float
        Shares of MLP neurons to remove.
    methods : sequence of str, optional
        Only the rows of these methods, see `rows_of`; default all of `ROWS`.
    networks : FunctionalNetworks, optional
        For ``"networks"``.
    draws : int
        Calibration draws of the rows in `REPEATED`: with more than one, each draws its windows anew (with replacement
        beyond the first), and the interval says how much the result depends on the text.
    window, max_windows, test_windows : int
        Cut of the texts; windows are the model's context, at most 256 tokens, where not said.
    progress : callable, optional
        Told in a line what each row gave.

    Returns
    -------
    DataFrame
        One row a combination and ratio, first the dense model: ``method``, ``allocation``, ``compensate``, ``ratio``,
        ``perplexity`` (mean over ``draws``), ``low`` and ``high`` (95% interval of the mean, t; nan for one draw),
        ``parameters_removed`` (share), ``seconds`` (plan and cut).
    """
    import pandas as pd
    from scipy.stats import t as student

    refuse_mixture(model)
    check_count("draws", draws, 1)
    wanted = rows_of(methods)
    if window is None:
        window = min(window_length(model), WINDOW)
    pool = as_windows(model, tokenizer, calibration, window, None if draws > 1 else max_windows)
    check_enough(pool, 1)
    held = as_windows(model, tokenizer, test, window, test_windows)
    first = seed_of(random_state)
    generator = torch.Generator().manual_seed(first)
    sets = [pool[:max_windows]]
    sets += [pool[torch.randint(len(pool), (len(sets[0]),), generator=generator)] for _ in range(draws - 1)]
    rows: list[dict[str, Any]] = [{"method": "dense", "ratio": 0.0, "perplexity": perplexity(model, None, held)}]
    times = {row: draws if row in REPEATED else 1 for row in wanted}
    shown = bar[None](total=sum(times.values()) * len(ratios), desc="benchmark")
    tell = speaker(progress or False)
    planners: dict[tuple[str, int], tuple[Planner, float]] = {}  # of one method: what all ratios share is done once

    def planner(method: str, i: int) -> tuple[Planner, float]:
        if (method, i) not in planners:
            if any(other != method for other, _ in planners):
                planners.clear()
            start = time.perf_counter()
            made = Planner(model, method, sets[i], networks=networks, random_state=first + i)
            planners[method, i] = made, time.perf_counter() - start
        return planners[method, i]

    for method, allocation, compensate in wanted:
        for ratio in ratios:
            found, seconds = [], []
            for i, windows in enumerate(sets[: times[method, allocation, compensate]]):
                made, before = planner(method, i)
                start = time.perf_counter()
                plan = made.plan(ratio, allocation=allocation)
                small = prune(model, plan, calibration=windows, compensate=compensate, max_windows=None)
                seconds.append(time.perf_counter() - start + before)
                found.append(perplexity(small, None, held))
                shown.update()
            n = len(found)
            half = float(student.ppf(0.975, n - 1) * np.std(found, ddof=1) / n**0.5) if n > 1 else np.nan
            mean = float(np.mean(found))
            rows.append({"method": method, "allocation": plan.allocation, "compensate": compensate, "ratio": ratio,
                         "draws": n, "perplexity": mean, "low": mean - half, "high": mean + half,
                         "parameters_removed": plan.parameters_share, "seconds": float(np.mean(seconds))})  # fmt: skip
            tell(f"{method}, {plan.allocation}, {compensate or 'cut only'}, {ratio:.0%}: perplexity {mean:.4g}")
    shown.close()
    return pd.DataFrame(rows)


def refuse_mixture(model: nn.Module) -> None:
    """The rows are of dense models; said before any work."""
    if has_experts(model):
        raise InputError(
            f"model {type(model).__name__} is a mixture of experts, and the methods that are compared are those of "
            "dense models: compare plans of expert_ratio=, or of neurons inside experts, by their perplexity"
        )

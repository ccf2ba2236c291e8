"""What was cut and what it cost: widths kept, perplexity against size, latency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from llmbrain._validation import InputError
from llmbrain.plotting.style import CATEGORIES, GRID, QUIET, legend, one_axes, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from llmbrain.plotting.what import HasKept


def kept_widths(plan: HasKept | Sequence[int]) -> tuple[list[int], list[int] | None]:
    """Neurons kept in each layer, and the widths before, of a plan or of numbers.

    Parameters
    ----------
    plan : PruningPlan, or sequence of int
        ``.kept`` holds the kept indices of each layer, ``.widths_before`` the widths before.
    """
    kept: Any = getattr(plan, "kept", plan)
    if isinstance(kept, Mapping):
        kept = [kept[key] for key in sorted(kept)]
    sizes = [int(k) if np.ndim(k) == 0 else len(k) for k in kept]
    before = getattr(plan, "widths_before", None)
    return sizes, None if before is None else [int(w) for w in before]


def plot_widths(
    plan: HasKept | Sequence[int],
    widths: Sequence[int] | None = None,
    *,
    ax: Axes | None = None,
    figure: Figure | None = None,
) -> Figure:
    """MLP neurons (or routed experts) kept per layer, before the full width.

    Parameters
    ----------
    plan : PruningPlan, ExpertPlan, or sequence of int (neurons kept per layer)
    widths : sequence of int, optional
        Widths before the cut; default: the plan's.
    ax : Axes, optional
        Where to draw.
    figure : Figure, optional
        Where to draw; default a new one.

    Returns
    -------
    Figure
    """
    kept, known = kept_widths(plan)
    before = known if widths is None else [int(w) for w in widths]
    if before is not None and len(before) != len(kept):
        raise InputError(f"widths has {len(before)} layers, the plan {len(kept)}")
    figure, ax = one_axes(ax, figure, (max(4.0, 1.5 + 0.22 * len(kept)), 2.8))
    layers = np.arange(len(kept))
    if before is not None:
        ax.bar(layers, before, color="none", edgecolor=QUIET, linewidth=0.8, width=0.8, label="before")
    ax.bar(layers, kept, color=CATEGORIES[0], width=0.8, label="kept")
    if before is not None and len(kept) <= 40:
        for x, (k, w) in enumerate(zip(kept, before)):
            size = 6.5 if len(kept) <= 16 else 4.5
            ax.text(x, k, f"{100 * k / max(w, 1):.0f}%", ha="center", va="bottom", fontsize=size, color="#22313f")
    ylabel = "routed experts" if hasattr(plan, "before") else "MLP neurons"
    ax.set(xlabel="layer", ylabel=ylabel, xticks=layers[:: max(1, len(layers) // 16)])
    legend(ax, ncols=2, loc="lower left", bbox_to_anchor=(0, 1.0))
    return figure


def plot_tradeoff(
    table: pd.DataFrame,
    *,
    x: str = "parameters",
    y: str = "perplexity",
    method: str = "method",
    low: str | None = None,
    high: str | None = None,
    dense: Mapping[str, Any] | None = None,
    log: bool | None = None,
    ax: Axes | None = None,
    figure: Figure | None = None,
) -> Figure:
    """Perplexity against size, one line a method, baselines among them.

    Parameters
    ----------
    table : DataFrame
        One row a measured model; columns `x`, `y`, `method`, and `low`, `high` where there are intervals.
    dense : mapping, optional
        `x` and `y` of the model before pruning; drawn as a star and a line across.
    log : bool, optional
        Logarithmic y; default: when values span more than a factor of 4.
    ax : Axes, optional
        Where to draw.
    figure : Figure, optional
        Where to draw; default a new one.

    Returns
    -------
    Figure
    """
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    missing = [name for name in (x, y, method, low, high) if name is not None and name not in table]
    if missing:
        raise InputError(f"table has no column {missing}: it has {list(table.columns)}")
    figure, ax = one_axes(ax, figure, (6, 3.8))
    markers = "osD^vP<>X*"
    for i, (name, rows) in enumerate(table.groupby(method, sort=False)):
        rows = rows.sort_values(x)
        baseline = str(name).lower().startswith(("random", "magnitude"))
        colour = CATEGORIES[i % len(CATEGORIES)]
        ax.plot(
            rows[x], rows[y], marker=markers[i % len(markers)], markersize=4.5, color=colour,
            linewidth=1.4, linestyle="--" if baseline else "-", label=plain(name),
        )  # fmt: skip
        if low is not None and high is not None:
            ax.fill_between(rows[x], rows[low], rows[high], color=colour, alpha=0.15, linewidth=0)
    if dense is not None:
        ax.axhline(float(dense[y]), color=QUIET, linewidth=0.8, linestyle=":")
        ax.plot(
            [float(dense[x])], [float(dense[y])], marker="*", markersize=10, color=QUIET, linewidth=0, label="dense"
        )
    values = table[y].to_numpy(dtype=float)
    positive = values[np.isfinite(values) & (values > 0)]
    if log or (log is None and positive.size and positive.max() > 4 * positive.min()):
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.set(xlabel=plain(x), ylabel=plain(y))
    ax.grid(color=GRID, linewidth=0.5)
    legend(ax)
    return figure


def plot_latency(
    table: pd.DataFrame,
    *,
    value: str = "seconds",
    group: str = "case",
    model: str = "model",
    spread: str | None = None,
    ax: Axes | None = None,
    figure: Figure | None = None,
) -> Figure:
    """Time of each case (prefill, decode, batch size), models side by side.

    Parameters
    ----------
    table : DataFrame
        One row a measurement; columns `group`, `model`, `value`, and `spread` (half length of the error bar).
    ax : Axes, optional
        Where to draw.
    figure : Figure, optional
        Where to draw; default a new one.

    Returns
    -------
    Figure
    """
    missing = [name for name in (value, group, model, spread) if name is not None and name not in table]
    if missing:
        raise InputError(f"table has no column {missing}: it has {list(table.columns)}")
    cases, models = list(dict.fromkeys(table[group])), list(dict.fromkeys(table[model]))
    figure, ax = one_axes(ax, figure, (1.6 + 0.5 * len(cases) * max(len(models), 2), 3.2))
    width = 0.8 / len(models)
    for i, name in enumerate(models):
        rows = table[table[model] == name].set_index(group)
        heights = [float(rows[value].get(case, np.nan)) for case in cases]
        errors = [float(rows[spread].get(case, 0)) for case in cases] if spread else None
        ax.bar(
            np.arange(len(cases)) + (i - (len(models) - 1) / 2) * width, heights, width, yerr=errors,
            color=CATEGORIES[i % len(CATEGORIES)], label=plain(name), error_kw={"ecolor": QUIET, "elinewidth": 1},
        )  # fmt: skip
    ax.set_xticks(range(len(cases)), [plain(case) for case in cases])
    ax.set_ylabel(plain(value))
    ax.set_ylim(bottom=0)
    legend(ax)
    return figure

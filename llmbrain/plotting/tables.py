"""Matrices and curves: connectivity, lesions, stability, model order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from llmbrain._validation import InputError, check_option
from llmbrain.plotting.style import (
    CATEGORIES,
    GRID,
    INK,
    NEGATIVE,
    POSITIVE,
    QUIET,
    centered,
    colorbar,
    diverging,
    ink_on,
    legend,
    new_figure,
    one_axes,
    plain,
    square,
    style,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from llmbrain.plotting.what import HasFrame, HasIq

ALPHA = 0.05
# names that a column of a lesion table may have, first one found counts
_COLUMNS = {
    "effect": ("harm", "effect", "delta", "difference", "change"),
    "low": ("harm_low", "effect_low", "low", "ci_low"),
    "high": ("harm_high", "effect_high", "high", "ci_high"),
    "control": ("random_effect", "random", "control", "random_mean"),
    "matched": ("matched_effect", "matched"),
    "p": ("p_random", "p", "p_value"),
    "q": ("q_random", "q", "p_fdr", "q_value"),
    "significant": ("significant", "reject"),
}


def plot_connectivity(
    matrix: ArrayLike | pd.DataFrame,
    *,
    names: Sequence[str] | None = None,
    kind: str = "both",
    density: float = 0.15,
    vmax: float | None = None,
    figure: Figure | None = None,
) -> Figure:
    """Functional connectivity between networks: the matrix, and the graph of its strongest edges.

    Parameters
    ----------
    matrix : array ``(n_networks, n_networks)`` or DataFrame
        Correlations; the diagonal is not drawn.
    names : sequence of str, optional
        Default: the index of a DataFrame, else numbers.
    kind : {"both", "matrix", "graph"}
    density : float
        Share of all pairs that the graph shows, strongest ``|r|`` first.
    figure : Figure, optional
        Where to draw; default a new one.

    Returns
    -------
    Figure
    """
    check_option("kind", kind, ("both", "matrix", "graph"))
    values = square("matrix", matrix)
    if not 0 < density <= 1:
        raise InputError(f"density={density!r} must be in (0, 1]")
    own = matrix.index if isinstance(matrix, pd.DataFrame) else range(len(values))
    labels = [plain(name) for name in (own if names is None else names)]
    if len(labels) != len(values):
        raise InputError(f"names has {len(labels)} entries for {len(values)} networks")
    off = np.where(np.eye(len(values), dtype=bool), np.nan, values)
    scale = centered(off, vmax)
    panels = 2 if kind == "both" else 1
    figure = new_figure((4.3 * panels + 0.4, 3.9)) if figure is None else figure
    axes = np.atleast_1d(figure.subplots(1, panels))
    if kind != "graph":
        ax = style(axes[0])
        drawn = ax.imshow(off, cmap=diverging(), norm=scale, interpolation="nearest")
        step = max(1, -(-len(labels) // 24))
        ax.set_xticks(range(0, len(labels), step), labels[::step], rotation=90)
        ax.set_yticks(range(0, len(labels), step), labels[::step])
        ax.tick_params(labelsize=7)
        colorbar(figure, drawn, ax, "r")
    if kind != "matrix":
        _graph(axes[-1], off, labels, density, scale)
    return figure


def _graph(ax: Axes, off: Any, labels: list[str], density: float, scale: Any) -> None:
    n = len(labels)
    angle = np.pi / 2 - 2 * np.pi * np.arange(n) / max(n, 1)
    x, y = np.cos(angle), np.sin(angle)
    pairs = np.argwhere(np.triu(np.ones((n, n), dtype=bool), 1))
    strength = np.abs(off[pairs[:, 0], pairs[:, 1]]) if len(pairs) else np.array([])
    shown = np.argsort(-np.nan_to_num(strength, nan=-1), kind="stable")[: max(1, round(density * len(pairs)))]
    degree = np.zeros(n)
    for i, j in pairs[shown][::-1]:
        r = off[i, j]
        if not np.isfinite(r):
            continue
        degree[[i, j]] += 1
        ax.plot(
            x[[i, j]], y[[i, j]], color=POSITIVE if r > 0 else NEGATIVE, linewidth=0.4 + 2.6 * abs(r) / scale.vmax,
            linestyle="-" if r > 0 else (0, (4, 1.5)), alpha=0.75, solid_capstyle="round", zorder=1,
        )  # fmt: skip
    ax.scatter(x, y, s=22 + 14 * degree, color=QUIET, edgecolors="white", linewidths=0.8, zorder=2)
    for a, b, label, theta in zip(x, y, labels, angle):
        turned = np.degrees(theta)
        flip = np.cos(theta) < -1e-9
        ax.text(
            1.1 * a, 1.1 * b, label, fontsize=7, color=INK, rotation=turned + 180 if flip else turned,
            rotation_mode="anchor", ha="right" if flip else "left", va="center",
        )  # fmt: skip
    ax.set(xlim=(-1.5, 1.5), ylim=(-1.5, 1.5), aspect="equal")
    ax.set_axis_off()
    ax.set_title(f"strongest {100 * density:.3g}% of pairs (dashed: negative)", fontsize=8, color=INK)


def long_lesions(table: HasFrame | pd.DataFrame, names: Sequence[str] | None = None) -> pd.DataFrame:
    """A lesion table in long form, whatever form it came in.

    Parameters
    ----------
    table : LesionTable or DataFrame
        A `LesionTable` or its ``frame``; any long table (columns network, evaluation, effect, and where known random,
        low, high, p, q, significant; network and evaluation may be the index); or a wide one (a row a network, a column
        an evaluation, values the effect; significance as booleans of that shape in ``table.attrs["significant"]``).
    names : sequence of str, optional
        Names of networks that the table gives as numbers.

    Returns
    -------
    DataFrame
        Columns network (str), evaluation (str), effect (the harm, where the table tells it: positive is worse), low,
        high, control (mean effect of random neurons, same sign), matched (of neurons as active), p, q (nan where
        unknown), significant (bool: as given, else q < 0.05, else p < 0.05).
    """
    table = table if isinstance(table, pd.DataFrame) else table.frame
    frame = table
    if not {"network", "evaluation"} <= set(frame.columns):
        if {"network", "evaluation"} <= {str(name) for name in frame.index.names if name is not None}:
            frame = frame.reset_index()
        else:
            frame = _melted(table)
    out = pd.DataFrame({key: [str(v) for v in frame[key]] for key in ("network", "evaluation")})
    if names is not None:
        known = {str(k): str(name) for k, name in enumerate(names)}
        out["network"] = [known.get(label, label) for label in out["network"]]
    for key, aliases in _COLUMNS.items():
        found = next((alias for alias in aliases if alias in frame.columns), None)
        out[key] = frame[found].to_numpy() if found else np.nan
    if out["effect"].isna().all():
        raise InputError(f"lesion table has no effect: its columns are {list(table.columns)}")
    if {"harm", "effect"} <= set(frame.columns):  # controls are effects: turn them the way the harm was turned
        turned = np.where(frame["harm"].to_numpy() * frame["effect"].to_numpy() < 0, -1, 1)
        out[["control", "matched"]] = out[["control", "matched"]].astype(float).mul(turned, axis=0)
    if out["significant"].isna().all():
        judged = out["q"] if out["q"].notna().any() else out["p"]
        out["significant"] = judged.astype(float) < ALPHA
    out["significant"] = out["significant"].fillna(False).astype(bool)
    return out


def _melted(table: pd.DataFrame) -> pd.DataFrame:
    if not all(pd.api.types.is_numeric_dtype(dtype) for dtype in table.dtypes) or table.empty:
        raise InputError(f"lesion table has neither network and evaluation nor only numbers: {list(table.columns)}")
    significant = table.attrs.get("significant")
    rows = [
        {"network": network, "evaluation": evaluation, "effect": value,
         "significant": np.nan if significant is None else bool(np.asarray(significant)[i, j])}
        for i, (network, row) in enumerate(table.iterrows())
        for j, (evaluation, value) in enumerate(row.items())
    ]  # fmt: skip
    return pd.DataFrame(rows)


def plot_lesion_table(
    table: HasFrame | pd.DataFrame,
    *,
    names: Sequence[str] | None = None,
    order: str = "given",
    vmax: float | None = None,
    label: str = "effect of the lesion",
    ax: Axes | None = None,
    figure: Figure | None = None,
) -> Figure:
    """Network by evaluation: what is lost when a network is lesioned.

    Cells beyond random neurons (p < 0.05) carry their number, and those that stay so after correction a star.

    Parameters
    ----------
    table : LesionTable or DataFrame
        See `long_lesions`.
    order : {"given", "similarity"}
        "similarity" puts networks together that hurt the same evaluation.
    ax : Axes, optional
        Where to draw.
    figure : Figure, optional
        Where to draw; default a new one.

    Returns
    -------
    Figure
    """
    check_option("order", order, ("given", "similarity"))
    rows = long_lesions(table, names)
    effects = rows.pivot_table(index="network", columns="evaluation", values="effect", sort=False)
    level = rows["significant"] * 1 + (rows["significant"] | (rows["p"].astype(float) < ALPHA)) * 1
    levels = rows.assign(level=level).pivot_table(index="network", columns="evaluation", values="level", sort=False)
    marks = levels.to_numpy()
    values = effects.to_numpy(dtype=float)
    if order == "similarity":
        strongest = np.nan_to_num(np.abs(values)).argmax(axis=1)
        index = np.lexsort((-np.nanmax(np.abs(values), axis=1), strongest))
        values, marks, effects = values[index], marks[index], effects.iloc[index]
    n_rows, n_columns = values.shape
    figure, ax = one_axes(ax, figure, (2.2 + 0.62 * n_columns, 1.2 + 0.24 * n_rows))
    scale = centered(values, vmax)
    drawn = ax.imshow(values, cmap=diverging(), norm=scale, aspect="auto", interpolation="nearest")
    for i, j in np.argwhere(marks > 0):
        text = f"{values[i, j]:.2g}{'*' if marks[i, j] > 1 else ''}"
        ax.text(j, i, text, ha="center", va="center", fontsize=7, color=ink_on(values[i, j], scale))
    ax.set_xticks(range(n_columns), [plain(name) for name in effects.columns], rotation=35, ha="right")
    ax.set_yticks(range(n_rows), [plain(name) for name in effects.index])
    ax.set_ylabel("lesioned network")
    colorbar(figure, drawn, ax, label)
    return figure


def plot_stability(
    stability: HasIq | ArrayLike | Mapping[str, ArrayLike],
    *,
    names: Sequence[str] | None = None,
    limit: float = 0.8,
    ax: Axes | None = None,
    figure: Figure | None = None,
) -> Figure:
    """Cluster quality Iq of each component, best first; hollow below `limit`.

    Parameters
    ----------
    stability : array ``(n_components,)``, or an object, mapping or DataFrame with ``iq``
    limit : float
        Components below it are called unstable.
    ax : Axes, optional
        Where to draw.
    figure : Figure, optional
        Where to draw; default a new one.

    Returns
    -------
    Figure
    """
    values: Any = stability
    if isinstance(stability, (Mapping, pd.DataFrame)):
        values = stability["iq"]
    elif hasattr(stability, "iq"):
        values = stability.iq
    iq = np.asarray(values, dtype=float)
    if iq.ndim != 1 or not iq.size:
        raise InputError(f"stability of shape {iq.shape} must be one number per component")
    labels = [f"IC{k:02d}" for k in range(len(iq))] if names is None else [str(name) for name in names]
    order = np.argsort(-np.nan_to_num(iq, nan=-1), kind="stable")
    figure, ax = one_axes(ax, figure, (max(4.0, 1.2 + 0.22 * len(iq)), 2.8))
    ranks, sorted_iq = np.arange(len(iq)), iq[order]
    stable = sorted_iq >= limit
    ax.plot(ranks, sorted_iq, color=QUIET, linewidth=0.8, zorder=1)
    ax.scatter(ranks[stable], sorted_iq[stable], s=22, color=CATEGORIES[0], zorder=2, label=f"Iq ≥ {limit:g}")
    ax.scatter(
        ranks[~stable], sorted_iq[~stable], s=22, facecolors="none", edgecolors=CATEGORIES[1], zorder=2,
        label=f"Iq < {limit:g}",
    )  # fmt: skip
    ax.axhline(limit, color=QUIET, linewidth=0.8, linestyle=":")
    ax.set(ylabel="stability Iq", ylim=(min(0.0, float(np.nanmin(iq))) - 0.02, 1.04))
    ax.set_xticks(ranks, [plain(labels[i]) for i in order], rotation=90)
    ax.tick_params(axis="x", labelsize=7)
    legend(ax, loc="lower left")
    return figure


def plot_model_order(
    table: pd.DataFrame,
    *,
    x: str = "n_components",
    y: str | Sequence[str] | None = None,
    chosen: int | None = None,
    null: str | None = None,
    ax: Axes | None = None,
    figure: Figure | None = None,
) -> Figure:
    """What changes with the number of components: stability, reproducibility, explained variance.

    Parameters
    ----------
    table : DataFrame
        One row a model order.
    x : str
        Column with the number of components.
    y : str or sequence of str, optional
        Columns to draw; default: all other numbers.
    chosen : int, optional
        Marked with a line.
    null : str, optional
        Column drawn dashed, as the control.
    ax : Axes, optional
        Where to draw.
    figure : Figure, optional
        Where to draw; default a new one.

    Returns
    -------
    Figure
    """
    if x not in table:
        raise InputError(f"table has no column {x!r}: it has {list(table.columns)}")
    others = [c for c in table.columns if c not in (x, null) and pd.api.types.is_numeric_dtype(table[c])]
    columns = others if y is None else ([y] if isinstance(y, str) else list(y))
    missing = [name for name in [*columns, *([null] if null else [])] if name not in table]
    if missing or not columns:
        raise InputError(f"table has no column {missing or y!r}: it has {list(table.columns)}")
    rows = table.sort_values(x)
    figure, ax = one_axes(ax, figure, (5.5, 3.2))
    for i, name in enumerate(columns):
        ax.plot(rows[x], rows[name], marker="osD^v"[i % 5], markersize=4, color=CATEGORIES[i % 8], label=plain(name))
    if null is not None:
        ax.plot(rows[x], rows[null], color=QUIET, linestyle="--", label=plain(null))
    if chosen is not None:
        ax.axvline(chosen, color=QUIET, linewidth=0.8, linestyle=":")
    ax.set(xlabel="number of components")
    ax.grid(color=GRID, linewidth=0.5)
    legend(ax)
    return figure

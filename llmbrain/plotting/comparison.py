"""Networks of a model against networks of people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from llmbrain._validation import InputError
from llmbrain.plotting.style import (
    CATEGORIES,
    GRID,
    QUIET,
    centered,
    colorbar,
    diverging,
    ink_on,
    legend,
    new_figure,
    one_axes,
    plain,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from llmbrain.plotting.what import Masker


def plot_coupling(
    r: ArrayLike | pd.DataFrame,
    *,
    significant: ArrayLike | None = None,
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    vmax: float | None = None,
    ax: Axes | None = None,
    figure: Figure | None = None,
) -> Figure:
    """Correlation of every network of a model with every series of a brain; significant pairs are marked.

    Parameters
    ----------
    r : array ``(n_networks, n_series)`` or DataFrame
    significant : bool array of the same shape, optional
        By the null model of the coupling, not by a parametric test.
    rows, columns : sequences of str, optional
    ax : Axes, optional
        Where to draw.
    figure : Figure, optional
        Where to draw; default a new one.

    Returns
    -------
    Figure
    """
    values = np.asarray(r, dtype=float)
    if values.ndim != 2 or not values.size:
        raise InputError(f"r of shape {values.shape} must be (n_networks, n_series)")
    marks = np.zeros(values.shape, dtype=bool) if significant is None else np.asarray(significant, dtype=bool)
    if marks.shape != values.shape:
        raise InputError(f"significant of shape {marks.shape} must have the shape of r, {values.shape}")
    frame = r if isinstance(r, pd.DataFrame) else pd.DataFrame(values)
    left = [plain(name) for name in (frame.index if rows is None else rows)]
    below = [plain(name) for name in (frame.columns if columns is None else columns)]
    figure, ax = one_axes(ax, figure, (1.9 + 0.34 * min(len(below), 40), 1.2 + 0.24 * len(left)))
    scale = centered(values, vmax)
    drawn = ax.imshow(values, cmap=diverging(), norm=scale, aspect="auto", interpolation="nearest")
    for i, j in np.argwhere(marks):
        ax.text(j, i, "*", ha="center", va="center_baseline", fontsize=10, color=ink_on(values[i, j], scale))
    step = max(1, -(-len(below) // 40))
    ax.set_xticks(range(0, len(below), step), below[::step], rotation=40, ha="right")
    ax.set_yticks(range(len(left)), left)
    colorbar(figure, drawn, ax, "r")
    return figure


def plot_lag_profile(
    lags: ArrayLike,
    r: ArrayLike | pd.DataFrame,
    *,
    names: Sequence[str] | None = None,
    threshold: float | ArrayLike | None = None,
    tr: float | None = None,
    ax: Axes | None = None,
    figure: Figure | None = None,
) -> Figure:
    """Correlation at each lag, with the threshold of the null model.

    Parameters
    ----------
    lags : array ``(n_lags,)``
        In volumes; above zero: the brain follows.
    r : array ``(n_lags,)`` or ``(n_lags, n_pairs)``
    threshold : float or array ``(n_lags,)``, optional
        ``|r|`` that the null model exceeds in 5% of its draws; shaded.
    tr : float, optional
        Seconds per volume; the axis is in seconds then.
    ax : Axes, optional
        Where to draw.
    figure : Figure, optional
        Where to draw; default a new one.

    Returns
    -------
    Figure
    """
    x = np.asarray(lags, dtype=float) * (1.0 if tr is None else tr)
    values = np.asarray(r, dtype=float)
    values = values[:, None] if values.ndim == 1 else values
    if values.ndim != 2 or len(values) != len(x):
        raise InputError(f"r of shape {values.shape} must have one row for each of {len(x)} lags")
    own = list(r.columns) if isinstance(r, pd.DataFrame) else None
    labels = names if names is not None else own
    figure, ax = one_axes(ax, figure, (5.5, 3.2))
    if threshold is not None:
        limit = np.broadcast_to(np.asarray(threshold, dtype=float), x.shape)
        ax.fill_between(x, -limit, limit, color=QUIET, alpha=0.2, linewidth=0, label="95% of the null")
    for j in range(values.shape[1]):
        label = None if labels is None else plain(labels[j])
        ax.plot(x, values[:, j], marker="o", markersize=3, color=CATEGORIES[j % 8], linewidth=1.2, label=label)
    ax.axhline(0, color=QUIET, linewidth=0.6)
    ax.axvline(0, color=QUIET, linewidth=0.6, linestyle=":")
    ax.set(xlabel="lag (volumes)" if tr is None else "lag (s)", ylabel="r")
    ax.grid(color=GRID, linewidth=0.5)
    if labels is not None or threshold is not None:
        legend(ax, ncols=2, loc="lower left", bbox_to_anchor=(0.0, 1.0))
    return figure


def plot_ceilings(
    ceilings: pd.DataFrame,
    *,
    r: ArrayLike | None = None,
    ax: Axes | None = None,
    figure: Figure | None = None,
) -> Figure:
    """Noise ceilings of each region, and how far a model gets below them.

    Parameters
    ----------
    ceilings : DataFrame
        From `llmbrain.comparison.noise_ceilings`.
    r : array ``(n_regions,)``, optional
        Largest ``|r|`` of a model with each region.
    ax : Axes, optional
        Where to draw.
    figure : Figure, optional
        Where to draw; default a new one.

    Returns
    -------
    Figure
    """
    missing = {"region", "isc", "ceiling"} - set(ceilings.columns)
    if missing:
        raise InputError(f"ceilings has no column {min(missing)!r}: pass what noise_ceilings returned")
    n = len(ceilings)
    figure, ax = one_axes(ax, figure, (1.6 + 0.34 * min(max(n, 4), 40), 3.0))
    place = np.arange(n)
    ax.bar(place, ceilings["ceiling"], color=QUIET, alpha=0.35, label="ceiling of the group mean")
    ax.plot(place, ceilings["isc"], "o", markersize=4, color=CATEGORIES[0], label="one listener with the others (ISC)")
    if r is not None:
        ax.plot(place, np.abs(np.asarray(r, dtype=float)), "D", markersize=4, color=CATEGORIES[1],
                label="best network, |r|")  # fmt: skip
    step = max(1, -(-n // 40))
    names = [plain(name) for name in ceilings["region"]]
    ax.set_xticks(place[::step], names[::step], rotation=40, ha="right")
    ax.set(ylabel="r")
    ax.set_ylim(bottom=min(0.0, float(np.nanmin(ceilings["isc"]))))
    legend(ax, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=1)
    return figure


def plot_brain_map(values: ArrayLike, masker: Masker, *, title: str = "r", vmax: float | None = None) -> Figure:
    """A value of every region or voxel of a brain, seen through it (nilearn's glass brain).

    Parameters
    ----------
    values : array ``(n_regions,)``
        NaN is left empty.
    masker : fitted nilearn masker
        Of `llmbrain.brains.load_fmri`.
    vmax : float, optional

    Returns
    -------
    Figure
    """
    from nilearn.plotting import plot_glass_brain

    shown = np.nan_to_num(np.asarray(values, dtype=np.float32))
    image = masker.inverse_transform(shown[None] if shown.ndim == 1 else shown)
    if len(image.shape) == 4:
        image = image.slicer[..., 0]
    figure = new_figure((7.0, 2.6), layout=None)
    limit = vmax or float(np.abs(shown).max()) or 1.0
    plot_glass_brain(
        image, figure=figure, plot_abs=False, symmetric_cbar=True, vmax=limit, vmin=-limit, cmap=diverging(),
        colorbar=True, title=title, annotate=True,
    )  # fmt: skip
    return figure

"""How every figure looks: colours that the colour-blind can tell apart, no display, no global state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmbrain._validation import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize
    from matplotlib.figure import Figure, SubFigure

INK = "#22313f"  # text and axes; the report swaps it for its own text colour
QUIET = "#8a97a3"  # reads on white and on near-black
GRID = "#8a97a355"
NEGATIVE, POSITIVE = "#1f6fb5", "#d1611a"
# Okabe and Ito's palette, without its black and its pale yellow
CATEGORIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7A5195", "#6B7A87")


def diverging() -> Colormap:
    """Blue - white - orange, centred at zero: safe for the colour-blind, dark at both ends in print."""
    from matplotlib.colors import LinearSegmentedColormap

    colours = ["#08306b", "#1f6fb5", "#8ec0e4", "#f6f6f4", "#f5b98b", "#d1611a", "#6b2400"]
    # grey: padding, not a value
    return LinearSegmentedColormap.from_list("llmbrain", colours).with_extremes(bad="#8a97a340")


def centered(values: ArrayLike, vmax: float | None = None) -> Normalize:
    """Colour scale with zero in the middle; `vmax` defaults to the 99.9th percentile of ``|values|``."""
    from matplotlib.colors import Normalize

    finite = np.abs(np.asarray(values, dtype=float))
    finite = finite[np.isfinite(finite)]
    limit = vmax if vmax is not None else (float(np.quantile(finite, 0.999)) if finite.size else 1.0)
    limit = limit or float(finite.max(initial=0.0)) or 1.0
    return Normalize(-limit, limit)


def ink_on(value: float, scale: Normalize) -> str:
    """Colour of a number written on its own cell: white where the cell is deep."""
    return "#ffffff" if abs(value) > 0.55 * float(scale.vmax or 1.0) else "#101418"


def one_axes(ax: Axes | None, figure: Figure | SubFigure | None, size: tuple[float, float]) -> tuple[Any, Axes]:
    """The figure and axes to draw in: those given, else new ones without pyplot and without a display."""
    if ax is not None:
        return ax.figure, style(ax)
    figure = new_figure(size) if figure is None else figure
    return figure, style(figure.add_subplot())


def new_figure(size: tuple[float, float], layout: Literal["constrained"] | None = "constrained") -> Figure:
    """A figure that no window manager knows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def style(ax: Axes) -> Axes:
    """Thin ink, no box."""
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(QUIET)
        ax.spines[side].set_linewidth(0.8)
    ax.tick_params(colors=INK, labelsize=8, width=0.8, length=3)
    ax.xaxis.label.set(color=INK, fontsize=9)
    ax.yaxis.label.set(color=INK, fontsize=9)
    ax.title.set(color=INK, fontsize=10)
    ax.set_facecolor("none")
    return ax


def plain(text: Any) -> str:
    """Text for a label: no mathematics, nothing that a font cannot draw as one line."""
    shown = "".join(c if c.isprintable() else "·" for c in str(text))
    return shown.replace("\\", "\\\\").replace("$", r"\$") if "$" in shown else shown


def colorbar(figure: Any, artist: Any, ax: Any, label: str, **options: Any) -> None:
    """A slim colour bar."""
    bar = figure.colorbar(artist, ax=ax, label=label, shrink=options.pop("shrink", 0.8), pad=0.02, **options)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=INK, labelsize=8, length=2)
    bar.ax.yaxis.label.set(color=INK, fontsize=8)
    bar.ax.xaxis.label.set(color=INK, fontsize=8)


def legend(ax: Axes, **options: Any) -> None:
    """A legend without a box."""
    box = ax.legend(frameon=False, fontsize=8, **options)
    for text in box.get_texts():
        text.set_color(INK)


def square(name: str, values: ArrayLike) -> NDArray[np.float64]:
    """A square matrix, checked."""
    matrix = np.asarray(values, dtype=float)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise InputError(f"{name} of shape {matrix.shape} must be a square matrix")
    return matrix

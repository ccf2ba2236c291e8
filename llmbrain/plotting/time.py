"""Scans and time courses over the text that was read."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from llmbrain._validation import InputError, check_option, check_whole
from llmbrain.plotting.style import (
    CATEGORIES,
    GRID,
    INK,
    QUIET,
    centered,
    colorbar,
    diverging,
    legend,
    new_figure,
    plain,
    style,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from llmbrain.scanning.scans import Scan

_STRIP = 120  # at most so many tokens are written out; more would be a grey bar


def _span(n_tokens: int, tokens: slice | None) -> tuple[int, int]:
    start, stop, step = (tokens or slice(None)).indices(n_tokens)
    if step != 1 or stop <= start:
        raise InputError(f"tokens={tokens!r} must be a slice without step that holds at least one of {n_tokens} tokens")
    return start, stop


def _strip(ax: Axes, words: Sequence[str], start: int, values: Any = None, scale: Any = None) -> None:
    """The tokens, upright under their volumes; coloured by `values` where given."""
    cmap = diverging()
    for i, word in enumerate(words):
        shade = None if values is None else cmap(scale(values[i]))
        dark = shade is not None and 0.3 * shade[0] + 0.59 * shade[1] + 0.11 * shade[2] < 0.5
        if shade is not None:
            ax.axvspan(start + i - 0.5, start + i + 0.5, color=shade, linewidth=0)
        ax.text(
            start + i, 0.97, plain(word.strip() or "␣")[:14], rotation=90, ha="center", va="top", clip_on=True,
            fontsize=min(8.0, max(4.0, 560 / len(words))),
            color="#ffffff" if dark else (INK if shade is None else "#101418"),
        )  # fmt: skip
    ax.set(ylim=(0, 1), yticks=[])
    ax.set_facecolor("none")
    for spine in ax.spines.values():
        spine.set_visible(False)


def plot_carpet(
    scan: Scan,
    *,
    tokens: slice | None = None,
    layers: Sequence[int] | None = None,
    max_neurons: int = 2000,
    normalize: bool = True,
    vmax: float | None = None,
    figure: Figure | None = None,
) -> Figure:
    """A scan as a carpet: neurons (rows, layer by layer) over tokens (columns), under the text.

    Parameters
    ----------
    scan : Scan
    tokens : slice, optional
        Which tokens; default all. Up to 120 tokens are written out.
    layers : sequence of int, optional
        Which layers; default all.
    max_neurons : int
        An evenly spaced choice of so many neurons is drawn, read layer by layer.
    normalize : bool
        z-score each neuron over the tokens shown.
    vmax : float, optional
        End of the colour scale; default 3 where normalised, else the 99.9th percentile of ``|values|``.
    figure : Figure, optional
        Where to draw; default a new one.

    Returns
    -------
    Figure
    """
    check_whole("max_neurons", max_neurons, 1)
    start, stop = _span(int(scan.n_tokens), tokens)
    space = scan.space
    chosen = list(range(space.n_layers)) if layers is None else [int(layer) for layer in layers]
    total = sum(space.widths[layer] for layer in chosen)
    pieces, borders = [], [0]
    for layer in chosen:
        width = space.widths[layer]
        keep = np.linspace(0, width - 1, max(1, round(max_neurons * width / max(total, 1)))).round().astype(int)
        values = np.asarray(scan.data(layers=[layer], tokens=slice(start, stop)), dtype=np.float32)
        pieces.append(values[:, np.unique(keep)].T if width else values.T)
        borders.append(borders[-1] + len(pieces[-1]))
    carpet = np.concatenate(pieces).astype(float)
    if normalize:
        spread = carpet.std(axis=1, keepdims=True)
        carpet = (carpet - carpet.mean(axis=1, keepdims=True)) / np.where(spread > 0, spread, 1)
        vmax = 3.0 if vmax is None else vmax
    words = list(getattr(scan, "tokens", None) or [])[start:stop]
    written = bool(words) and any(words) and len(words) <= _STRIP
    figure = new_figure((9, 5)) if figure is None else figure
    heights = [1, 0.22] if written else [1]
    axes = np.atleast_1d(figure.subplots(len(heights), 1, sharex=True, height_ratios=heights))
    ax = style(axes[0])
    drawn = ax.imshow(
        carpet, cmap=diverging(), norm=centered(carpet, vmax), aspect="auto", interpolation="nearest",
        extent=(start - 0.5, stop - 0.5, len(carpet) - 0.5, -0.5),
    )  # fmt: skip
    for border in borders[1:-1]:
        ax.axhline(border - 0.5, color=QUIET, linewidth=0.5)
    step = max(1, -(-len(chosen) // 16))
    middles = [(a + b) / 2 - 0.5 for a, b in pairwise(borders)]
    ax.set_yticks(middles[::step], [str(layer) for layer in chosen[::step]])
    ax.set(ylabel="layer", title=plain(getattr(scan, "name", "") or ""))
    _conditions(ax, scan, start, stop)
    if written:
        _strip(axes[1], words, start)
    axes[-1].set_xlabel("token")
    axes[-1].xaxis.label.set(color=INK, fontsize=9)
    axes[-1].tick_params(colors=INK, labelsize=8)
    colorbar(figure, drawn, list(axes), "z" if normalize else "activation")
    return figure


def _conditions(ax: Axes, scan: Scan, start: int, stop: int) -> None:
    """Which condition was on, as a thin band of colour on top."""
    events = getattr(scan, "events", None)
    if events is None or "trial_type" not in events or not len(events):
        return
    kinds = list(dict.fromkeys(str(kind) for kind in events["trial_type"]))
    seen: set[str] = set()
    for onset, duration, kind in zip(events["onset"], events["duration"], events["trial_type"].astype(str)):
        a, b = max(float(onset), start) - 0.5, min(float(onset) + max(float(duration), 1), stop) - 0.5
        if b > a:
            colour = CATEGORIES[kinds.index(kind) % len(CATEGORIES)]
            label = plain(kind) if kind not in seen else None
            ax.axvspan(a, b, ymin=1.0, ymax=1.03, color=colour, linewidth=0, clip_on=False, label=label)
            seen.add(kind)
    if seen and len(seen) <= 10:
        legend(ax, loc="lower left", bbox_to_anchor=(0, 1.03), ncols=5)
        ax.set_title("")


def plot_time_courses(
    time_courses: ArrayLike,
    *,
    tokens: Sequence[str] | None = None,
    networks: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
    span: slice | None = None,
    kind: str = "lines",
    figure: Figure | None = None,
) -> Figure:
    """Activity of networks over the text.

    Parameters
    ----------
    time_courses : array ``(n_tokens, n_networks)``
    tokens : sequence of str, optional
        The text. Up to 120 tokens are written out, coloured by the activity of the first network drawn.
    networks : sequence of int, optional
        Which networks; default: the first 8 for lines, all for the heat map.
    names : sequence of str, optional
    span : slice, optional
        Which tokens; default all.
    kind : {"lines", "heat"}
    figure : Figure, optional
        Where to draw; default a new one.

    Returns
    -------
    Figure
    """
    check_option("kind", kind, ("lines", "heat"))
    values = np.asarray(time_courses, dtype=float)
    if values.ndim != 2 or not values.size:
        raise InputError(f"time_courses of shape {values.shape} must be (n_tokens, n_networks)")
    if tokens is not None and len(tokens) != len(values):
        raise InputError(f"tokens has {len(tokens)} entries for time courses of {len(values)} tokens")
    labels = [f"IC{k:02d}" for k in range(values.shape[1])] if names is None else [str(name) for name in names]
    default = range(values.shape[1] if kind == "heat" else min(8, values.shape[1]))
    chosen = [int(k) for k in (default if networks is None else networks)]
    for k in chosen:
        if not 0 <= k < values.shape[1]:
            raise InputError(f"networks={k} does not exist: allowed are 0 to {values.shape[1] - 1}")
    start, stop = _span(len(values), span)
    part, x = values[start:stop], np.arange(start, stop)
    words = [] if tokens is None else list(tokens[start:stop])
    written = bool(words) and len(words) <= _STRIP
    n = len(chosen) if kind == "lines" else 1
    body = 0.75 * n + 0.5 if kind == "lines" else 0.8 + 0.18 * len(chosen)
    figure = new_figure((9, body + (1.0 if written else 0.4))) if figure is None else figure
    ratios = [body / n] * n + ([0.9] if written else [])
    axes = np.atleast_1d(figure.subplots(len(ratios), 1, sharex=True, height_ratios=ratios))
    scale = centered(part[:, chosen])
    if kind == "heat":
        ax = style(axes[0])
        drawn = ax.imshow(
            part[:, chosen].T, cmap=diverging(), norm=scale, aspect="auto", interpolation="nearest",
            extent=(start - 0.5, stop - 0.5, len(chosen) - 0.5, -0.5),
        )  # fmt: skip
        ax.set_yticks(range(len(chosen)), [plain(labels[k]) for k in chosen])
        colorbar(figure, drawn, ax, "activity")
    else:
        for i, (ax, k) in enumerate(zip(axes, chosen)):
            style(ax)
            ax.plot(x, part[:, k], color=CATEGORIES[i % len(CATEGORIES)], linewidth=1.1)
            ax.axhline(0, color=QUIET, linewidth=0.6)
            ax.grid(axis="x", color=GRID, linewidth=0.4)
            ax.set_ylabel(plain(labels[k]), rotation=0, ha="right", va="center")
    if written:
        _strip(axes[-1], words, start, part[:, chosen[0]], centered(part[:, chosen[0]]))
    axes[-1].set_xlabel("token")
    axes[-1].xaxis.label.set(color=INK, fontsize=9)
    axes[-1].tick_params(colors=INK, labelsize=8)
    axes[-1].set_xlim(start - 0.5, stop - 0.5)
    return figure

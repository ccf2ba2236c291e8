"""Networks on the model's own anatomy: layers as slices, a flat map, a glass model, layer profiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmbrain._validation import InputError, check_option
from llmbrain.anatomy.space import NeuronSpace
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
    legend,
    new_figure,
    one_axes,
    plain,
    style,
)
from llmbrain.stats import PUBLISHED_Z

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from llmbrain.plotting.what import HasMap, HasMaps


def maps_and_space(
    networks: HasMaps | HasMap | ArrayLike, space: NeuronSpace | None = None
) -> tuple[NDArray[np.float32], NeuronSpace, list[str]]:
    """Maps ``(n_networks, n_neurons)``, their space and names, of anything that has them.

    Parameters
    ----------
    networks : FunctionalNetworks, Network, or array ``(n_neurons,)`` or ``(n_networks, n_neurons)``
    space : NeuronSpace, optional
        Needed for arrays, and for networks without one.
    """
    single = hasattr(networks, "map")
    values = getattr(networks, "map", None) if single else getattr(networks, "maps", networks)
    maps = np.atleast_2d(np.asarray(values, dtype=np.float32))
    space = space if space is not None else getattr(networks, "space", None)
    if space is None:
        raise InputError("space=None: a figure of layers needs to know them; pass space=NeuronSpace(widths)")
    if maps.ndim != 2 or maps.shape[1] != space.n_neurons:
        raise InputError(f"maps of shape {maps.shape} do not fit {space}")
    given = (
        [networks.name] if hasattr(networks, "map") and hasattr(networks, "name") else getattr(networks, "names", None)
    )
    return maps, space, list(given) if given is not None else [f"IC{k:02d}" for k in range(len(maps))]


def _cut(networks: HasMaps | HasMap | ArrayLike, maps: NDArray[Any], threshold: float | None) -> NDArray[np.bool_]:
    """Key neurons: by `threshold` where given, else the networks' own masks, else ``|z| > 3.6``."""
    own = getattr(networks, "mask", None) if hasattr(networks, "map") else getattr(networks, "masks", None)
    if threshold is None and own is not None:
        return np.atleast_2d(np.asarray(own, dtype=bool))
    return np.abs(maps) > (PUBLISHED_Z if threshold is None else threshold)


def plot_network(
    network: HasMaps | HasMap | ArrayLike,
    space: NeuronSpace | None = None,
    *,
    index: int = 0,
    kind: str = "slices",
    layers: Sequence[int] | None = None,
    order: str = "index",
    threshold: float | None = None,
    vmax: float | None = None,
    title: str | None = None,
    ax: Axes | None = None,
    figure: Figure | None = None,
) -> Figure:
    """Draw one network: layers as slices, or a flat map, layer by neuron.

    Parameters
    ----------
    network : Network, FunctionalNetworks, or array ``(n_neurons,)`` or ``(n_networks, n_neurons)``
    space : NeuronSpace, optional
        Needed for arrays.
    index : int
        Which network, where there are several.
    kind : {"slices", "flat"}
        A panel a layer, neurons on the grid of the NIfTI; or one picture, a row a layer.
    layers : sequence of int, optional
        Which layers; default all.
    order : {"index", "similarity"}
        Flat map only. "similarity" puts neurons side by side that load alike: by the network that they load most
        on, then by how strongly (all networks given count).
    threshold : float, optional
        Hide values with ``|z|`` below it.
    vmax : float, optional
        End of the colour scale; default: 99.9th percentile of ``|z|``.
    ax : Axes, optional
        Flat map only; slices need a `figure`.
    figure : Figure or SubFigure, optional

    Returns
    -------
    Figure
    """
    check_option("kind", kind, ("slices", "flat"))
    check_option("order", order, ("index", "similarity"))
    maps, space, names = maps_and_space(network, space)
    if not -len(maps) <= index < len(maps):
        raise InputError(f"index={index} does not exist: allowed are 0 to {len(maps) - 1}")
    values = maps[index].astype(float)
    scale = centered(values, vmax)
    if threshold is not None:
        values = np.where(np.abs(values) >= threshold, values, 0)
    chosen = list(range(space.n_layers)) if layers is None else [int(layer) for layer in layers]
    for layer in chosen:
        space.layer_slice(layer)  # names a layer that does not exist
    name = plain(names[index] if title is None else title)
    if kind == "flat":
        figure, ax = one_axes(ax, figure, (8, 1.2 + 0.16 * len(chosen)))
        image = _flat(values, maps, space, chosen, order)
        drawn = ax.imshow(image, cmap=diverging(), norm=scale, aspect="auto", interpolation="nearest")
        ax.set(title=name, xlabel="neuron" if order == "index" else "neuron, sorted by similarity", ylabel="layer")
        ax.set_yticks(*_layer_ticks(chosen))
        colorbar(figure, drawn, ax, "z")
        return figure
    if ax is not None:
        raise InputError("ax is for kind='flat': slices need several axes, pass figure=")
    return _slices(values, space, chosen, scale, name, figure)


def _slices(values: Any, space: NeuronSpace, layers: list[int], scale: Any, title: str, figure: Any) -> Any:
    columns = min(len(layers), 8 if len(layers) > 6 else len(layers))
    rows = -(-len(layers) // columns)
    width, height = space.grid
    tall = min(max(height / width, 0.5), 2.0)
    figure = new_figure((1.15 * columns + 0.9, 1.15 * rows * tall + 0.7)) if figure is None else figure
    volume = space.to_volume(values, fill=np.nan)
    axes = figure.subplots(rows, columns, squeeze=False)
    drawn = None
    for cell, layer in zip(axes.flat, layers):
        drawn = cell.imshow(volume[:, :, layer].T, cmap=diverging(), norm=scale, interpolation="nearest", aspect="auto")
        cell.set_title(f"layer {layer}", fontsize=7, color=INK, pad=2)
    for cell in axes.flat:
        cell.set(xticks=[], yticks=[], facecolor="none")
        for spine in cell.spines.values():
            spine.set(visible=cell.images != [], color=QUIET, linewidth=0.5)
    figure.suptitle(title, color=INK, fontsize=10)
    colorbar(figure, drawn, list(axes.flat), "z", shrink=0.6)
    return figure


def _flat(values: Any, maps: Any, space: NeuronSpace, layers: list[int], order: str) -> NDArray[np.float64]:
    image = np.full((len(layers), max(space.widths[layer] for layer in layers)), np.nan)
    for row, layer in enumerate(layers):
        part = space.layer_slice(layer)
        cells = values[part]
        if order == "similarity" and cells.size:
            loads = maps[:, part]
            best = np.abs(loads).argmax(axis=0)
            cells = cells[np.lexsort((-loads[best, np.arange(len(best))], best))]
        image[row, : len(cells)] = cells
    return image


def _layer_ticks(layers: Sequence[int]) -> tuple[list[int], list[str]]:
    step = max(1, -(-len(layers) // 16))
    places = list(range(0, len(layers), step))
    return places, [str(layers[i]) for i in places]


def plot_glass_model(
    networks: HasMaps | HasMap | ArrayLike,
    space: NeuronSpace | None = None,
    *,
    threshold: float | None = None,
    max_neurons: int = 300,
    columns: int | None = None,
    figure: Figure | None = None,
) -> Figure:
    """All networks in one picture: each a stack of glass layers with its key neurons in it.

    A panel is one network, seen from the side: the input enters at the left, layers follow to the right, and a dot is a
    key neuron at its place on the layer's grid, as large as its ``|z|``; orange above zero, blue below.

    Parameters
    ----------
    networks : FunctionalNetworks, Network, or array ``(n_networks, n_neurons)``
    threshold : float, optional
        Default: the networks' own masks, ``|z| > 3.6`` for arrays.
    max_neurons : int
        Only the strongest so many of a network are drawn.
    columns : int, optional
        Panels side by side.
    figure : Figure, optional
        Where to draw; default a new one.

    Returns
    -------
    Figure
    """
    from matplotlib.collections import PolyCollection

    maps, space, names = maps_and_space(networks, space)
    masks = _cut(networks, maps, threshold)
    columns = columns or min(len(maps), 4 if len(maps) <= 16 else 6)
    rows = -(-len(maps) // columns)
    if figure is None:
        # panels without axes need no layout, and there may be many
        figure = new_figure((2.3 * columns, 1.35 * rows + 0.2), layout=None)
        top = 1 - 0.2 / figure.get_figheight()
        figure.subplots_adjust(left=0.005, right=0.995, bottom=0.01, top=top, wspace=0.02, hspace=0.18)
    axes = figure.subplots(rows, columns, squeeze=False)
    column, row, layer = space.voxels
    n_columns, n_rows = space.grid
    gap = 1.0 / max(space.n_layers - 1, 1)
    # a layer is a plane seen from the side: its columns run into the depth, its rows up
    lean, depth = 0.28 if space.n_layers > 1 else 0.9, 0.35
    corners = np.array([[0, 0], [lean, depth], [lean, 1 + depth], [0, 1]])
    planes = [corners + (2.2 * gap * i, 0) for i in range(space.n_layers)]
    for cell, values, mask, name in zip(axes.flat, maps, masks, names):
        cell.add_collection(PolyCollection(planes, facecolors="#8a97a312", edgecolors=QUIET, linewidths=0.35))
        found = np.flatnonzero(mask)
        found = found[np.argsort(-np.abs(values[found]), kind="stable")[:max_neurons]][::-1]
        u, v = (column[found] + 0.5) / n_columns, (row[found] + 0.5) / n_rows
        strength = np.abs(values[found])
        cell.scatter(
            2.2 * gap * layer[found] + lean * u,
            1 - v + depth * u,
            s=2 + 10 * (strength / max(float(strength.max(initial=0)), 1e-9)) ** 2,
            c=np.where(values[found] > 0, POSITIVE, NEGATIVE),
            alpha=0.8, linewidths=0, rasterized=len(found) > 60,
        )  # fmt: skip
        cell.set_title(f"{plain(name)}  ({int(mask.sum()):,})", fontsize=8, color=INK, pad=1)
        cell.set(xlim=(-0.5, 2.7 + lean), ylim=(-0.05, 1.1 + depth))
    for cell in axes.flat:
        cell.set_axis_off()
        cell.set_facecolor("none")
    return figure


def plot_layer_profile(
    networks: HasMaps | HasMap | ArrayLike,
    space: NeuronSpace | None = None,
    *,
    threshold: float | None = None,
    kind: str = "heat",
    ax: Axes | None = None,
    figure: Figure | None = None,
) -> Figure:
    """In which layers the key neurons of each network lie.

    Parameters
    ----------
    networks : FunctionalNetworks, Network, or array ``(n_networks, n_neurons)``
    threshold : float, optional
        Default: the networks' own masks, ``|z| > 3.6`` for arrays.
    kind : {"heat", "lines"}
        Share of each network's key neurons in each layer as a heat map, or as lines (at most 8 networks).
    ax : Axes, optional
        Where to draw.
    figure : Figure, optional
        Where to draw; default a new one.

    Returns
    -------
    Figure
    """
    from matplotlib.ticker import MaxNLocator

    check_option("kind", kind, ("heat", "lines"))
    maps, space, names = maps_and_space(networks, space)
    masks = _cut(networks, maps, threshold)
    counts = np.stack([np.bincount(space.layer_of[mask], minlength=space.n_layers) for mask in masks]).astype(float)
    share = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    layers = range(space.n_layers)
    if kind == "lines":
        if len(maps) > len(CATEGORIES):
            raise InputError(f"kind='lines' can show {len(CATEGORIES)} networks, not {len(maps)}: use kind='heat'")
        figure, ax = one_axes(ax, figure, (6, 3))
        for row, name, colour in zip(share, names, CATEGORIES):
            ax.plot(layers, row, marker="o", markersize=3, linewidth=1.3, color=colour, label=plain(name))
        ax.set(xlabel="layer", ylabel="% of key neurons")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.grid(color=GRID, linewidth=0.5)
        legend(ax)
        return figure
    figure, ax = one_axes(ax, figure, (min(1.8 + 0.3 * space.n_layers, 9), 0.9 + 0.2 * len(maps)))
    drawn = ax.imshow(share, cmap="cividis", vmin=0, aspect="auto", interpolation="nearest")
    ax.set_xticks(*_layer_ticks(list(layers)))
    ax.set_yticks(range(len(names)), [plain(name) for name in names])
    ax.set(xlabel="layer")
    style(ax)
    colorbar(figure, drawn, ax, "% of key neurons")
    return figure

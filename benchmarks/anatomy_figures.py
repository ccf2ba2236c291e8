"""Draw what ``benchmarks/anatomy.py`` found: ``python benchmarks/anatomy_figures.py``.

Reads ``anatomy-out/`` and ``benchmarks/results/anatomy.json``, and writes ``docs/images/anatomy*.png``: the networks of
the kinds of text (where they lie, when they are active, what is lost without them), which networks come back, and the
artefacts.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import llmbrain as lb
from llmbrain._files import write_figure
from llmbrain.datasets.conditions import CONDITIONS
from llmbrain.plotting.style import CATEGORIES, INK, QUIET, diverging, ink_on, legend, new_figure, style

COLORS = dict(zip(CONDITIONS, CATEGORIES))
ALPHA, VMAX = 0.05, 1.6
SMOOTH = 5  # tokens


def rows_of(found: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """Networks that are drawn, with the conditions that they answer to."""
    rows: dict[str, list[str]] = {}
    for condition, name in found["chosen"].items():
        rows.setdefault(name, []).append(condition)
    return list(rows.items())


def draw_networks(found: dict[str, Any], networks: Any, scans: list[Any], run: int = 0) -> Any:
    """A row a network: its neurons by layer, its time course in one run, and the loss its lesion adds to each kind."""
    rows, scan = rows_of(found), scans[run]
    figure = new_figure((13.0, 1.3 + 0.78 * len(rows)))
    axes = figure.subplots(len(rows), 3, width_ratios=(1.15, 1.9, 1.35), squeeze=False)
    lesions = pd.DataFrame(found["chosen_lesions"])
    space = networks.space
    import matplotlib.colors as colors

    scale = colors.Normalize(-VMAX, VMAX)
    for line, (name, conditions) in zip(axes, rows):
        network, color = networks[name], COLORS[conditions[0]]
        where, when, what = (style(ax) for ax in line)
        layer, neuron = space.locate(network.neurons)
        height = neuron / np.array(space.widths)[layer]
        z = np.abs(network.map[network.neurons])
        where.axvspan(-0.5, space.n_layers - 0.5, color="#8a97a318", linewidth=0)
        for edge in range(space.n_layers):
            where.axvline(edge, color="#8a97a330", linewidth=0.6, zorder=0)
        where.scatter(layer, height, s=0.5 + 0.9 * z, color=color, alpha=0.55, linewidths=0)
        where.set(xlim=(-0.8, space.n_layers - 0.2), ylim=(-0.04, 1.04), yticks=[])
        where.spines["left"].set_visible(False)
        label = f"{' + '.join(conditions)}\n{name}, {network.size} neurons"
        where.set_ylabel(label, rotation=0, ha="right", va="center", labelpad=8, color=color, fontsize=8.5)
        course = np.asarray(networks.time_courses[run])[:, networks.names.index(name)].astype(float)
        course = course / np.std(np.concatenate([c[1:, networks.names.index(name)] for c in networks.time_courses]))
        index = CONDITIONS.index(conditions[0])
        sign = np.sign(np.array(found["localized"]["t"])[networks.names.index(name), index]) or 1.0
        smooth = np.convolve(sign * course, np.ones(SMOOTH) / SMOOTH, mode="same")
        smooth[:2] = np.nan  # the first token is not fitted
        for event in scan.events.itertuples():
            own = event.trial_type in conditions
            when.axvspan(event.onset, event.onset + event.duration, color=COLORS[event.trial_type],
                         alpha=0.30 if own else 0.07, linewidth=0)  # fmt: skip
        tokens = np.arange(len(smooth))
        when.fill_between(tokens, 0, smooth, color=color, alpha=0.85, linewidth=0)
        when.axhline(0, color=QUIET, linewidth=0.5)
        top = float(np.nanquantile(np.abs(smooth), 0.995)) * 1.1
        when.set(xlim=(0, len(smooth)), ylim=(-top, top), yticks=[])
        when.spines["left"].set_visible(False)
        own = lesions[lesions["network"] == name].set_index("evaluation").loc[list(CONDITIONS)]
        values = own["effect"].to_numpy(float)
        floor = 1 / (found["size"]["chosen_controls"] + 1) + 1e-9  # beyond every control set
        clear = (own["harm_low"] > 0) & (own["p_random"] <= floor) & (own["p_matched"] <= floor)
        what.imshow(values[None], cmap=diverging(), norm=scale, aspect="auto", interpolation="nearest")
        for j, (value, sure) in enumerate(zip(values, clear)):
            what.text(j, 0, f"{value:.2f}", ha="center", va="center", fontsize=8, color=ink_on(value, scale),
                      fontweight="bold" if sure else "normal",
                      alpha=0.55 if not sure and abs(value) < VMAX / 3 else 1.0)  # fmt: skip
        what.set(yticks=[])
        what.spines["left"].set_visible(False)
        for ax in line:
            if line is not axes[-1]:
                ax.tick_params(bottom=False, labelbottom=False)
                ax.spines["bottom"].set_visible(False)
    for event in scan.events.itertuples():
        top = axes[0, 1]
        top.text(event.onset + event.duration / 2, 1.04, event.trial_type, transform=top.get_xaxis_transform(),
                 ha="center", va="bottom", fontsize=7.5, color=COLORS[event.trial_type])  # fmt: skip
    axes[0, 0].set_title("where: its neurons, by layer", pad=16)
    axes[0, 1].set_title("when: its activity, the model reading", pad=16)
    axes[0, 2].set_title("without it: loss added, nats a token", pad=16)
    axes[-1, 0].set_xlabel("layer")
    axes[-1, 1].set_xlabel("token")
    axes[-1, 2].set_xticks(range(len(CONDITIONS)), CONDITIONS, rotation=35, ha="right")
    for tick, condition in zip(axes[-1, 2].get_xticklabels(), CONDITIONS):
        tick.set_color(COLORS[condition])
    return figure


def draw_returns(found: dict[str, Any]) -> Any:
    """Which networks come back, in halves and in other texts, and what each answers to."""
    figure = new_figure((12.0, 5.2))
    left, right = (style(ax) for ax in figure.subplots(1, 2, width_ratios=(1, 1.05)))
    r = np.array(found["halves"]["r"])
    order = np.argsort(-r)
    y = np.arange(len(r))
    left.barh(y, r[order], color="#8a97a355", height=0.8, label="between halves of the runs")
    for (name, where), color, marker in zip(found["elsewhere"].items(), CATEGORIES, "osD^"):
        left.scatter(np.array(where["r"])[order], y, s=22, color=color, marker=marker, label=name, zorder=3)
    left.axvline(found["halves"]["null_best"], color=INK, linestyle=":", linewidth=1,
                 label="best of scans without networks")  # fmt: skip
    names = [found["networks"][k]["name"] for k in order]
    left.set_yticks(y, names)
    left.set(xlim=(0, 1), xlabel="|r| of maps", ylim=(len(r) - 0.4, -0.6))
    left.set_title("which networks come back")
    legend(left, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncol=2)
    effect = np.array(found["localized"]["effect"])[order]
    p = np.array(found["localized"]["p"])[order]
    top = float(np.abs(effect).max()) or 1.0
    import matplotlib.colors as colors

    scale = colors.Normalize(-top, top)
    right.imshow(effect, cmap=diverging(), norm=scale, aspect="auto", interpolation="nearest")
    for i, j in np.argwhere(p <= ALPHA):
        right.text(j, i, f"{effect[i, j]:.1f}", ha="center", va="center", fontsize=7, color=ink_on(effect[i, j], scale))
    right.set_xticks(range(len(CONDITIONS)), CONDITIONS, rotation=35, ha="right")
    right.set_yticks(y, names)
    right.set_title("what they answer to (numbers: p <= .05, FWE)")
    return figure


def draw_artefacts(found: dict[str, Any], scans: list[Any], run: int = 0) -> Any:
    """Loud neurons, and when the loudest are loud."""
    figure = new_figure((12.0, 3.6))
    left, right = (style(ax) for ax in figure.subplots(1, 2))
    loud = pd.DataFrame(found["massive"])
    for at_first, color, label in ((False, CATEGORIES[0], "largest elsewhere"),
                                   (True, CATEGORIES[1], "largest at the first token")):  # fmt: skip
        part = loud[(loud["first"] > loud["elsewhere"]) == at_first]
        left.scatter(part["layer"], part["times"], s=14, color=color, alpha=0.7, linewidths=0, label=label)
    layers = len(found["networks"][0]["profile"])
    for row in loud.head(3).itertuples():
        late = row.layer > 0.7 * layers
        left.annotate(f"layer {row.layer}, neuron {row.neuron}", (row.layer, row.times), xytext=(-6 if late else 6, 0),
                      textcoords="offset points", fontsize=8, color=INK, va="center",
                      ha="right" if late else "left")  # fmt: skip
    left.set(yscale="log", xlabel="layer", ylabel="largest |value| / typical |value|", xlim=(-1, layers))
    left.set_title("neurons of massive activation")
    legend(left, loc="upper right")
    data, space = scans[run].data(), scans[run].space
    for row, color in zip(loud.head(3).itertuples(), CATEGORIES):
        values = np.abs(np.asarray(data[:, space.layer_slice(row.layer).start + row.neuron], dtype=float))
        right.plot(values, color=color, linewidth=0.9, alpha=0.85, label=f"layer {row.layer}, neuron {row.neuron}")
        right.plot(0, values[0], "o", color=color, markersize=5)
    right.set(xlabel="token of the run (dots: the first)", ylabel="|value|", yscale="log", xlim=(-8, len(data)))
    right.set_title("when they are loud")
    legend(right, loc="center right")
    return figure


def main() -> None:
    """Draw and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("anatomy-out"), help="what anatomy.py kept")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "anatomy.json")
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    parser.add_argument("--run", type=int, default=0, help="the run whose time courses are drawn")
    args = parser.parse_args()
    found = json.loads(args.results.read_text(encoding="utf-8"))
    networks = lb.FunctionalNetworks.load(args.work / "networks")
    scans = lb.load_scans(args.work / "scan")
    figures = {
        "anatomy": draw_networks(found, networks, scans, args.run), "anatomy-returns": draw_returns(found),
        "anatomy-artefacts": draw_artefacts(found, scans, args.run),
    }  # fmt: skip
    for name, figure in figures.items():
        write_figure(args.out / f"{name}.png", figure, dpi=110)


if __name__ == "__main__":
    main()

"""The parts of a report, each made from what there is of its `Contents`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup

from llmbrain.page.report import Section, environment, figure, render, table
from llmbrain.page.text import number, visible
from llmbrain.reporting.contents import ALPHA, Contents, first
from llmbrain.reporting.effects import top_tokens
from llmbrain.reporting.methods import methods

METRICS = {
    "held_out_perplexity": ("Perplexity, held-out text", "nothing was fitted to it; lower is better"),
    "perplexity": ("Perplexity", "lower is better"),
    "parameters": ("Parameters", ""),
    "mlp_neurons": ("MLP neurons", ""),
    "tokens_per_second": ("Tokens per second", "higher is better"),
}
IN_PART = "Perplexity, all of the sample"


def fill(name: str, **values: Any) -> Markup:
    """A template, rendered."""
    return Markup(environment("llmbrain.reporting").get_template(name).render(**values))


def change(before: Any, after: Any) -> str:
    """Relative change in percent, or a dash."""
    try:
        before, after = float(before), float(after)
    except (TypeError, ValueError):
        return "–"
    if not (np.isfinite(before) and np.isfinite(after)) or before == 0:
        return "–"
    return f"{100 * (after - before) / abs(before):+.1f}%".replace("-", "−")


def network_rows(held: Contents) -> list[dict[str, Any]]:
    """What is known of each network, for its page and for the table of all."""
    if held.networks is None:
        return []
    maps, masks = np.asarray(held.networks.maps), np.asarray(held.networks.masks)
    rows = []
    for k, name in enumerate(held.names):
        mask, values = masks[k], maps[k]
        strongest = np.flatnonzero(mask)
        strongest = strongest[np.argsort(-np.abs(values[strongest]), kind="stable")[:12]]
        where: list[tuple[int | None, int]] = [(None, int(i)) for i in strongest]
        if held.space is not None and len(strongest):
            layer, neuron = held.space.locate(strongest)
            where = list(zip(layer.tolist(), neuron.tolist()))
        row: dict[str, Any] = {
            "index": k,
            "id": f"network-{k}",
            "name": name,
            "size": int(mask.sum()),
            "share": float(mask.mean()),
            "positive": int((mask & (values > 0)).sum()),
            "negative": int((mask & (values < 0)).sum()),
            "key": [(place, float(values[i])) for place, i in zip(where, strongest)],
            "profile": None if held.profiles is None else held.profiles[k].tolist(),
            "iq": None if held.iq is None else float(held.iq[k]),
            "peak": None,
            "brain": None,
            "peaks": [],
        }
        if held.brain is not None and row["size"]:
            row["brain"] = figure(
                held.brain.figure(values, mask), f"{name} through the brain (z, within its cut-offs)."
            )
            row["peaks"] = held.brain.peaks(values, mask)
        if held.profiles is not None and row["size"]:
            row["peak"] = int(held.profiles[k].argmax())
        row.update(_activity(held, k), **_responses(held, name, k))
        rows.append(row)
    return rows


def _activity(held: Contents, k: int) -> dict[str, Any]:
    if held.courses is None or not held.runs:
        return {"top": [], "low": [], "types": []}
    return {
        "top": top_tokens(held.bound, k, held.runs, held.texts, 7),
        "low": top_tokens(held.bound, k, held.runs, held.texts, 5, sign=-1),
        "types": held.types[k],
    }


def _responses(held: Contents, name: str, k: int) -> dict[str, Any]:
    effects = held.effects
    effects = effects[effects["network"] == k].sort_values("effect", ascending=False) if len(effects) else effects
    lesions = held.lesion_rows
    if lesions is not None:
        lesions = lesions[lesions["network"] == name]
        lesions = lesions.sort_values("effect", key=np.abs, ascending=False)
    best = effects.iloc[0] if len(effects) and effects.iloc[0]["p"] < ALPHA else None
    hit = None if lesions is None else lesions[lesions["significant"]]
    return {
        "effects": effects.to_dict("records") if len(effects) else [],
        "effect_scale": float(np.abs(effects["effect"]).max()) if len(effects) else 1.0,
        "condition": None if best is None else (best["condition"], float(best["effect"])),
        "lesions": None if lesions is None else lesions.to_dict("records"),
        "hit": None if hit is None or not len(hit) else (hit.iloc[0]["evaluation"], float(hit.iloc[0]["effect"])),
    }


# -- sections ----------------------------------------------------------------------------------------------------------


def summary(held: Contents, rows: list[dict[str, Any]]) -> Section:
    """Summary: the numbers, all networks in one picture, one line a network."""
    cards = []
    for key, (label, hint) in METRICS.items():
        before, after = (None if side is None else side.get(key) for side in held.before_after)
        if key == "perplexity" and held.held_out:
            label, hint = IN_PART, "calibrated on in part; lower is better"
        if before is not None or after is not None:
            both = before is not None and after is not None
            value = number(after, 4) if both else number(before if after is None else after, 4)
            detail = f"before {number(before, 4)} ({change(before, after)})" if both else ""
            cards.append({"label": label, "value": value, "detail": detail, "hint": hint})
    if held.networks is not None:
        union = int(np.asarray(held.networks.masks).any(axis=0).sum())
        total = int(np.shape(held.networks.maps)[1])
        cards.insert(0, {"label": "Functional networks", "value": number(held.n_networks), "hint": "",
                         "detail": f"{number(union)} key neurons, {100 * union / total:.3g}% of all"})  # fmt: skip
    if held.scans:
        tokens = sum(int(scan.n_tokens) for scan in held.scans)
        runs = f"{len(held.scans)} {'run' if len(held.scans) == 1 else 'runs'}"
        cards.append({"label": "Tokens read", "value": number(tokens), "detail": runs, "hint": ""})
    glass: Any = ""
    if held.networks is not None and held.space is not None:
        from llmbrain.plotting import plot_glass_model

        glass = figure(
            plot_glass_model(held.networks),
            "Every network on the model's own anatomy: the text enters at the left, each pane is a layer, each dot a "
            "key neuron (orange above zero, blue below).",
            "Glass model: key neurons of each network in the layers of the model",
        )
    body = fill("summary.html.j2", cards=cards, rows=rows, glass=glass, warnings=len(held.warnings))
    return Section("Summary", body, id="summary")


def explorer(held: Contents, *, recorded: bool = False) -> Section:
    """The viewer: maps, text and time courses together; `recorded` where a server can show the scan itself."""
    missing = []
    if held.networks is None and recorded:
        missing.append("No networks here: this is the recording itself, token by token.")
    elif held.networks is None:
        missing.append("No networks were given, so there is no map to look at.")
    elif held.space is None and held.brain is not None:
        missing.append("These are maps of a brain: they are shown with each network, not in this viewer.")
    elif held.space is None:
        missing.append("The networks do not know their layers (no NeuronSpace), so their maps cannot be laid out.")
    if held.networks is not None and held.courses is None:
        missing.append("No time courses were given: pass ica=, or networks with time_courses.")
    elif held.networks is not None and not held.runs:
        missing.append("No scans were given that fit the time courses, so the text cannot be shown.")
    show = held.space is not None or (recorded and held.layout is not None)
    body = fill("viewer.html.j2", missing=missing, show=show, text=bool(held.runs) or recorded)
    return Section("Networks", body, id="networks")


def network_page(row: dict[str, Any], held: Contents) -> Section:
    """The page of one network."""
    reasons = {
        "tokens": "Which tokens drive it is not known: there are no time courses with their text.",
        "effects": "No condition effects: the scans name fewer than two conditions, or there are no time courses.",
        "stability": "Stability was not measured: see llmbrain.ica_stability.",
        "lesions": "No lesion was tried: see llmbrain.networks.lesion_table.",
    }
    runs = [visible(getattr(scan, "name", "") or f"run {i}") for i, scan in enumerate(held.runs)]
    body = fill("network.html.j2", net=row, reasons=reasons, alpha=ALPHA, runs=runs)
    return Section(row["name"], body, id=row["id"], part="network")


def relations(held: Contents) -> Section | None:
    """How networks hang together: lesions of all, layers of all, connectivity, stability."""
    from llmbrain import plotting

    parts: list[Any] = []
    if held.lesion_rows is not None:
        caption = "What the lesion of each network (rows) does to each evaluation. Numbers: beyond random neurons (p < "
        caption += "0.05); with a star: after correction over the whole table too."
        parts.append(figure(plotting.plot_lesion_table(held.lesion_rows), caption))
    if held.profiles is not None:
        parts.append(figure(plotting.plot_layer_profile(held.networks), "Where the key neurons of each network lie."))
    matrix = held.connectivity
    matrix = first(matrix, "correlation", "matrix", "connectivity") if not _matrix(matrix) else matrix
    if matrix is not None and _matrix(matrix):
        parts.append(
            figure(plotting.plot_connectivity(matrix, names=held.names or None), "Connectivity between networks.")
        )
    if held.iq is not None:
        parts.append(
            figure(plotting.plot_stability(held.iq, names=held.names), "Stability of the networks, best first.")
        )
    body = Markup('<div class="side">{}</div>').format(render(parts))
    if held.lesion_rows is not None:
        body += fill("details.html.j2", title="Numbers of the lesion table",
                     body=table(held.lesion_rows.dropna(axis=1, how="all")))  # fmt: skip
    return Section("All networks together", body, id="relations") if parts else None


def _matrix(value: Any) -> bool:
    return isinstance(value, (np.ndarray, pd.DataFrame)) and np.ndim(value) == 2 and value.shape[0] == value.shape[1]


def pruning(held: Contents) -> Section:
    """What was cut, and what it cost."""
    from llmbrain import plotting

    parts: list[Any] = []
    missing = []
    if held.dense is not None or held.pruned is not None:
        parts.append(table(_before_after(held), "The model before and after the cut"))
        parts.append(fill("lines.html.j2", lines=_measured_on(held)))
    else:
        missing.append("The model was not measured before and after a cut.")
    if held.plan is not None:
        widths = _widths_before(held)
        units = "Routed experts" if hasattr(held.plan, "before") else "MLP neurons"
        parts.append(figure(plotting.plot_widths(held.plan, widths), f"{units} kept in each layer."))
        if hasattr(held.plan, "summary"):
            parts.append(fill("lines.html.j2", lines=str(held.plan.summary()).splitlines()))
    else:
        missing.append("Nothing was pruned: no plan was given.")
    if held.abilities is not None:
        parts.append(table(held.abilities, "Abilities before and after"))
    if held.forecast is not None:
        parts += _forecast(held.forecast)
    if held.forgetting is not None:
        parts += _forgetting(held.forgetting)
    body = fill("missing.html.j2", lines=missing) + Markup('<div class="side">{}</div>').format(render(parts))
    return Section("Pruning", body, id="pruning")


def _before_after(held: Contents) -> pd.DataFrame:
    """Numbers of both models, with their standard errors where there are any (``NAME_se``)."""
    dense, pruned = (side or {} for side in held.before_after)
    rows = []
    for key in dict.fromkeys([*METRICS, *dense, *pruned]):
        before, after = dense.get(key), pruned.get(key)
        of_other = key.endswith("_se") and key.removesuffix("_se") in {**dense, **pruned}
        if of_other or (before is None and after is None) or isinstance(before or after, (Mapping, list, tuple)):
            continue
        label = METRICS.get(key, (str(key).replace("_", " "), ""))[0]
        label = IN_PART if key == "perplexity" and held.held_out else label
        errors = [f" ± {number(error, 2)}" if (error := side.get(f"{key}_se")) else "" for side in (dense, pruned)]
        rows.append((label, number(before, 5) + errors[0], number(after, 5) + errors[1], change(before, after)))
    return pd.DataFrame(rows, columns=["", "before", "after", "change"]).set_index("")


def _measured_on(held: Contents) -> list[str]:
    """What the perplexities were measured on, and what a budget left no time for."""
    summary, found = held.summary or {}, held.held_out
    lines = []
    if found:
        error = found.get("loss_added_se")
        beside = "" if error is None else f" (standard error {number(error, 2)} over windows)"
        lines.append(
            f"held-out text ({number(found['windows'])} windows, {number(found['tokens'])} tokens; neither the "
            f"networks nor the cut have seen it): {number(found['loss_added'])} nats a token more{beside}"
        )
    elif why := (summary.get("held_out") or {}).get("not_measured"):
        lines.append(f"no perplexity of held-out text: {why}")
    if sample := summary.get("sample"):
        lines.append(
            f"perplexities are of {number(sample['windows'])} windows of {number(sample['window'])} tokens, "
            f"{100 * sample['share_of_text']:.3g}% of the text; ± is a standard error over windows"
        )
    return [*lines, *(f"given up for the budget: {line}" for line in summary.get("gave_up") or ())]


def _forecast(found: Any) -> list[Any]:
    """What the cut was predicted to cost, and did cost where it was measured, by condition and network."""
    measured = "measured" in found.texts
    what = f"Loss added, {found.unit}: predicted before the cut ({found.predictor})"
    what += ", and measured after it" if measured else ""
    if measured and found.fitted is not None:
        where = "text that the cut was calibrated on too: other text loses more" if found.fitted else "held-out text"
        what += f" (on {where})"
    parts = []
    if measured:
        agreed = found.agreement()
        parts.append(table(agreed[agreed["n"] > 0].round(4), "Forecast against what the cut did cost"))
    for name, frame in (("condition", found.conditions), ("network", found.networks)):
        if len(frame):
            parts.append(table(frame.set_index(name).round(4), f"{what}; by {name}"))
    return parts


def _forgetting(found: Mapping[str, Any]) -> list[Any]:
    """What forgetting took of every condition, and how fast teaching brings it back."""
    from llmbrain.pruning.forget.relearning import attack_table

    parts = []
    if found.get("loss_added"):
        names = {"broken": "share of sure tokens broken", "loss_added": "loss added, nats a token"}
        frame = pd.DataFrame({label: found[key] for key, label in names.items() if key in found})
        parts.append(table(frame.rename_axis("condition").round(4), f"Forgetting, on {found['windows']} windows"))
    attack = found.get("relearning")
    if attack:
        rows = attack_table(attack)
        if len(rows):
            what = "Taught again: how much of what the dense model knew comes back"
            parts.append(table(rows.set_index("taught_again_on").round(4), what))
        else:
            parts.append(fill("missing.html.j2", lines=[f"Not taught again: {attack.get('left_out', 'no attack')}."]))
    return parts


def _widths_before(held: Contents) -> list[int] | None:
    from llmbrain.plotting import kept_widths

    kept, before = kept_widths(held.plan)
    if before is not None:
        return before
    space = held.space or (getattr(held.scans[0], "space", None) if held.scans else None)
    return list(space.widths) if space is not None and space.n_layers == len(kept) else None


def comparison(held: Contents) -> Section | None:
    """Tables, figures and results of a comparison, under their names."""
    if not held.comparison:
        return None
    body = Markup("")
    for name, value in held.comparison.items():
        shown = render(coupling(value) if hasattr(value, "lag_r") else value)
        body += Markup("<h3>{}</h3>").format(visible(str(name).replace("_", " ")))
        body += Markup('<div class="prose">{}</div>').format(shown)
    return Section("Comparison", body, id="comparison")


def coupling(result: Any) -> list[Any]:
    """A `Coupling`: all pairs with the significant ones marked, the lag profile of the strongest, the numbers."""
    from llmbrain import plotting

    pairs = figure(
        plotting.plot_coupling(result.r, significant=result.significant, rows=result.networks, columns=result.regions),
        f"Correlation of each network with each series of the brain. Stars: {result.null} null, p at most "
        f"{result.alpha:g} corrected ({result.correction}).",
    )
    strongest = np.argsort(-np.abs(np.nan_to_num(result.r)).ravel(), kind="stable")[:5]
    where = [np.unravel_index(i, result.r.shape) for i in strongest]
    lags = figure(
        plotting.plot_lag_profile(
            result.lags,
            np.stack([result.lag_r[:, k, r] for k, r in where], axis=1),
            names=[f"{result.networks[k]}, {result.regions[r]}" for k, r in where],
            threshold=result.threshold if np.isfinite(result.threshold) else None,
        ),
        "The five strongest pairs when the brain is read earlier or later. Shaded: what the largest of all pairs stays "
        "below in the null; descriptive except at lag 0.",
    )
    numbers = fill("details.html.j2", title="All pairs", body=table(result.to_frame()))
    ceilings = [] if result.ceilings is None else [table(result.ceilings, "Noise ceilings")]
    return [Markup('<div class="side">{}{}</div>').format(pairs, lags), *ceilings, numbers]


def methods_section(held: Contents) -> Section:
    """Methods text and references, ready to paste."""
    paragraphs, references = methods(held)
    return Section("Methods", fill("methods.html.j2", paragraphs=paragraphs, references=references), id="methods")


def warnings_section(held: Contents) -> Section:
    """Warnings, and what this report had to leave out."""
    lines = [visible(str(getattr(warning, "message", warning))) for warning in held.warnings]
    return Section("Warnings", fill("warnings.html.j2", warnings=lines, notes=held.notes), id="warnings")


def provenance_section(held: Contents) -> Section:
    """Where it all comes from: nested mappings as rows ``a.b``."""
    rows: list[tuple[str, str]] = []

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping) and value:
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else str(key), inner)
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
            rows.append((visible(prefix), visible(shown)))

    if held.provenance is not None:
        walk("", dict(held.provenance) if isinstance(held.provenance, Mapping) else {"": held.provenance})
    return Section("Provenance", fill("provenance.html.j2", rows=rows), id="provenance")

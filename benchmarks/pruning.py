"""Pruning beside its rivals and its controls: ``python benchmarks/pruning.py [PART ...]``.

Parts: ``stories260K``, ``shakespeare-gpt2``, ``demo`` (perplexity for every method), ``unbalanced`` (demo brain, two
abilities 100 times as frequent as the others in the calibration text), ``keep`` and ``forget`` (functions). Each part
replaces its tables in ``benchmarks/results/pruning.json``, from which ``pruning.md`` is written. The first two need the
models and texts in ``--data``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import llmbrain as lb
from llmbrain.anatomy.families import anatomy
from llmbrain.datasets import load_demo
from llmbrain.hooks.text import as_windows
from llmbrain.networks import localizer
from llmbrain.pruning.benchmark import compare_methods
from llmbrain.pruning.calibrate.windows import calibration_windows, mixed_windows, signals_of_windows, write_windows
from llmbrain.pruning.forget.conditions import condition_weights
from llmbrain.pruning.plan import PruningPlan
from llmbrain.pruning.planner import Planner
from llmbrain.stats.nulls import phase_randomize

RESULTS = Path(__file__).parent / "results"
RATIOS = (0.2, 0.3, 0.5)
K = 64
SCANNED = 12288  # tokens from which networks are found
# The first three served to find the weights of tokens, the last three only to test them.
PAIRS = (
    ("addition", "reversal"), ("recall", "sequence"), ("agreement", "shift"),
    ("sorting", "brackets"), ("addition", "shift"), ("reversal", "sequence"),
)  # fmt: skip
MAIN = ("random", "flap", "obs", "networks")  # methods that are repeated over calibration draws


def setting(name: str, data: Path) -> tuple[Any, Any, torch.Tensor, torch.Tensor]:
    """Model, tokenizer, calibration windows, test windows."""
    if name == "stories260K":
        model, tokenizer = lb.load_model(data / "models/stories260K")
        texts = json.loads((data / "corpora/tinystories-1000.json").read_text(encoding="utf-8"))
        head, tail = texts[:500], texts[700:]
        return (
            model,
            tokenizer,
            as_windows(model, tokenizer, head, 256, 128),
            as_windows(model, tokenizer, tail, 256, 96),
        )
    if name == "shakespeare-gpt2":
        model, tokenizer = lb.load_model(data / "models/shakespeare-gpt2")
        text = (data / "corpora/tinyshakespeare.txt").read_text(encoding="utf-8")
        head, tail = [text[: len(text) // 2]], [text[len(text) * 7 // 10 :]]
        return (
            model,
            tokenizer,
            as_windows(model, tokenizer, head, 48, 680),
            as_windows(model, tokenizer, tail, 48, 510),
        )
    demo = load_demo()
    texts = demo.texts("calibration", n=140), demo.texts("heldout", n=110)
    return (
        demo.model,
        demo.tokenizer,
        *(as_windows(demo.model, demo.tokenizer, t, 256, n) for t, n in zip(texts, (128, 96))),
    )


def find_networks(model: Any, windows: torch.Tensor, *, null: bool = False) -> lb.FunctionalNetworks:
    """Group ICA of part of the calibration windows; of their phase-randomised signals for the control."""
    runs: list[Any] = signals_of_windows(model, anatomy(model), windows[: SCANNED // windows.shape[1]], ("neuron",))
    space = runs[0].space
    if null:
        rng = np.random.default_rng(0)
        runs = [phase_randomize(run.data(), rng, shared=False) for run in runs]
    ica = lb.GroupICA(K, random_state=0).fit(runs)
    return lb.FunctionalNetworks(ica.components_, space)


def perplexities(name: str, data: Path, draws: int) -> dict[str, Any]:
    """Every row of the comparison, ours with its controls, and intervals over calibration draws for the main rows."""
    model, _, calibration, test = setting(name, data)
    start, clock = time.process_time(), time.perf_counter()
    given = {"networks": find_networks(model, calibration)}
    methods = ["random", "magnitude", "published", "wanda-sp", "flap", "taylor", "obs", "obs-gradient"]
    all_of: dict[str, Any] = {"ratios": RATIOS, "max_windows": len(calibration), "test_windows": None}
    parts = [compare_methods(model, None, calibration, test, methods=methods, **all_of)]
    given |= {"networks, phase-randomised": find_networks(model, calibration, null=True), "networks, none given": None}
    for label, networks in given.items():
        part = compare_methods(model, None, calibration, test, methods=["networks"], networks=networks, **all_of)
        parts.append(part.iloc[1:].assign(method=label))
    table = pd.concat(parts, ignore_index=True)
    seconds = {"processor seconds": round(time.process_time() - start), "seconds": round(time.perf_counter() - clock)}
    dense = float(table["perplexity"][0])
    rows = table.iloc[1:].pivot_table(
        index=["method", "allocation", "compensate"], columns="ratio", values="perplexity", sort=False, dropna=False
    ).dropna(how="all").reset_index()  # fmt: skip
    rows.columns = [c if isinstance(c, str) else f"{c:.0%}" for c in rows.columns]
    rows["compensate"] = rows["compensate"].fillna("none")
    intervals = []
    if draws > 1:
        of = compare_methods(
            model, None, calibration, test, methods=MAIN, networks=given["networks"], draws=draws, **all_of
        ).iloc[1:]
        of = of[of["draws"] > 1]
        for key, part in of.groupby(["method", "allocation"], sort=False):
            cells = {f"{r:.0%}": f"{m:.2f} [{lo:.2f}, {hi:.2f}]" for r, m, lo, hi in zip(
                part["ratio"], part["perplexity"], part["low"], part["high"])}  # fmt: skip
            intervals.append({"method": key[0], "allocation": key[1], **cells})
    return {"dense": dense, "rows": rows.to_dict("records"), "draws": draws, "intervals": intervals, "time": seconds}


def unbalanced(seeds: int) -> Iterator[dict[str, Any]]:
    """Loss added to abilities when 70% go and two abilities make up nearly all of the calibration text."""
    demo = load_demo()
    for seed, pair in enumerate(PAIRS[:seeds]):
        often = {a: 100.0 if a in pair else 1.0 for a in demo.abilities}
        texts = demo.texts("calibration", n=128, weights=often, seed=seed)
        windows = as_windows(demo.model, demo.tokenizer, texts, 256, 128)
        real, null = find_networks(demo.model, windows), find_networks(demo.model, windows, null=True)
        dense = demo.ability_loss(n=200, seed=seed)
        written = write_windows(demo.model, demo.tokenizer, 128, 256, random_state=seed)
        half = mixed_windows(windows[:64], written[:64])
        cases: dict[str, tuple[str, str | None, Any, float, Any]] = {
            "FLAP + LS": ("flap", "uniform", None, 0, windows),
            "OBS + LS": ("obs", "uniform", None, 0, windows),
            "ours, no networks": ("networks", None, None, 0, windows),
            "ours (token_balance=0.5)": ("networks", None, real, 0.5, windows),
            "ours, phase-randomised networks": ("networks", None, null, 0.5, windows),
            "ours, token_balance=1": ("networks", None, real, 1, windows),
            "ours, token_balance=1, phase-randomised networks": ("networks", None, null, 1, windows),
            "ours, no networks, half of the text written by the model": ("networks", None, None, 0, half),
            "ours, no networks, all of the text written by the model": ("networks", None, None, 0, written),
        }
        for label, (method, allocation, networks, balance, used) in cases.items():
            planner = Planner(demo.model, method, used, networks=networks, token_balance=balance)
            plan = planner.plan(0.7, allocation=allocation)
            small = lb.prune(demo.model, plan, calibration=used, compensate="least-squares")
            after = demo.ability_loss(small, n=200, seed=seed)
            added = {a: after[a] - dense[a] for a in demo.abilities}
            worst = max(added, key=lambda a: added[a])
            yield {"method": label, "seed": seed, "frequent": " and ".join(pair),
                   "mean": float(np.mean(list(added.values()))), "worst": added[worst],
                   "worst ability": worst}  # fmt: skip


def labelled_demo(seed: int = 0) -> tuple[Any, list[Any], lb.FunctionalNetworks]:
    """Demo brain, scans with conditions, networks."""
    demo = load_demo()
    scans = lb.scan(demo.model, demo.tokenizer, demo.texts("calibration", n=64, n_tokens=256, seed=seed))
    return demo, scans, lb.FunctionalNetworks.from_ica(lb.GroupICA(K, random_state=0).fit(scans))


def keep() -> Iterator[dict[str, Any]]:
    """Keep two abilities with 40% of the neurons; beside it FLAP calibrated on text of these two."""
    demo, scans, networks = labelled_demo()
    dense = demo.ability_accuracy(n=200)
    for pair in (("reversal", "sorting"), ("addition", "brackets"), ("recall", "shift")):
        plan = lb.plan_pruning(demo.model, networks, scans, ratio=0.6, tokenizer=demo.tokenizer, keep=pair)
        models = {"ours": lb.prune(demo.model, plan, calibration=scans, compensate="least-squares")}
        own = as_windows(demo.model, demo.tokenizer, demo.texts("calibration", pair, n=64), 256)
        flap = lb.plan_pruning(demo.model, ratio=0.6, method="flap", calibration=own)
        for repair, label in (("bias", "FLAP + bias"), ("least-squares", "FLAP + LS")):
            models[f"{label}, kept text only"] = lb.prune(demo.model, flap, calibration=own, compensate=repair)
        found = {"dense": dense} | {name: demo.ability_accuracy(model, n=200) for name, model in models.items()}
        yield {"keep": " and ".join(pair), **{k: " / ".join(f"{v[a]:.3f}" for a in pair) for k, v in found.items()}}


def forget() -> Iterator[dict[str, Any]]:
    """Forget each ability in turn, with text and questions of other seeds than the method was made with."""
    demo, scans, networks = labelled_demo(seed=21)
    for ability in demo.abilities:
        yield forget_row(demo, networks, scans, ability)


def forget_row(demo: Any, networks: Any, scans: Any, ability: str) -> dict[str, Any]:
    """Accuracy on one ability to forget / on the worst of the others: ours, other neurons, and other repairs."""
    ours = lb.plan_pruning(demo.model, networks, scans, tokenizer=demo.tokenizer, forget=[ability])
    gone = [before - after for before, after in zip(ours.widths_before, ours.widths)]
    space, rng = networks.space, np.random.default_rng(0)
    contrast = np.abs(localizer(scans, [ability], n_permutations=0).t[0])
    loud = np.zeros(contrast.size, dtype=bool)
    loud[np.argsort(-contrast)[: sum(gone)]] = True

    def other(kept: list[Any], *, unlearn: bool) -> PruningPlan:
        details = {"functions": {"keep": [], "forget": [ability]}} if unlearn else {}
        return PruningPlan.from_dict({**ours.to_dict(), "kept": [k.tolist() for k in kept], "details": details})

    by_contrast = [np.flatnonzero(~loud[space.layer_slice(i)]) for i in range(space.n_layers)]
    at_random = [np.sort(rng.permutation(w)[g:]) for w, g in zip(ours.widths_before, gone)]
    windows = calibration_windows(demo.model, None, None, scans, None, 128)
    assert windows is not None
    weights = condition_weights(scans, (windows.shape[0], windows.shape[1]), None, [ability])
    ordinary: dict[str, Any] = {"calibration": windows, "compensate": "least-squares", "weights": weights}
    unlearnt: dict[str, Any] = {"calibration": scans, "compensate": "least-squares"}
    cases: dict[str, tuple[PruningPlan, dict[str, Any]]] = {
        "ours": (ours, unlearnt),
        "random neurons, same repair": (other(at_random, unlearn=True), unlearnt),
        "contrast, same repair": (other(by_contrast, unlearn=True), unlearnt),
        "ours, least squares": (other(list(ours.kept), unlearn=False), ordinary),
        "contrast, least squares": (other(by_contrast, unlearn=False), ordinary),
        "ours, cut only": (ours, {}),
        "contrast, cut only": (other(by_contrast, unlearn=False), {}),
    }
    others = [a for a in demo.abilities if a != ability]
    own = as_windows(demo.model, demo.tokenizer, demo.texts("calibration", others, n=64, seed=21), 256)
    flap = lb.plan_pruning(demo.model, ratio=sum(gone) / space.n_neurons, method="flap", calibration=own)
    cases["FLAP + LS, kept text only"] = flap, {"calibration": own, "compensate": "least-squares"}
    row: dict[str, Any] = {"forget": ability, "neurons": sum(gone)}
    for name, (plan, options) in cases.items():
        found = demo.ability_accuracy(lb.prune(demo.model, plan, **options), n=400, seed=22)
        row[name] = f"{found[ability]:.3f} / {min(v for a, v in found.items() if a != ability):.3f}"
    return row


def written(record: dict[str, Any]) -> str:
    """The tables as Markdown."""
    parts = []
    for name in ("stories260K", "shakespeare-gpt2", "demo"):
        if name not in record:
            continue
        of = record[name]
        rows = pd.DataFrame(of["rows"])
        parts += [f"# Perplexity: {name}, dense {of['dense']:.3f}", "",
                  rows.to_markdown(index=False, floatfmt=".3f"), "", verdict(rows), "",
                  f"All rows took {of['time']['processor seconds']} processor seconds.", ""]  # fmt: skip
        if of["intervals"]:
            parts += [f"With least squares, mean and 95% interval over {of['draws']} calibration draws:", "",
                      pd.DataFrame(of["intervals"]).to_markdown(index=False), ""]  # fmt: skip
    if "unbalanced" in record:
        rows = pd.DataFrame(record["unbalanced"])
        mean = rows.groupby("method", sort=False)[["mean", "worst"]].agg(["mean", "min", "max"]).round(3)
        mean.columns = [f"{a}, {b}" for a, b in mean.columns]
        parts += ["# Unbalanced calibration: demo brain, 70% removed", "",
                  f"Two abilities ({'; '.join(rows['frequent'].unique())}) 100 times as frequent as each other one. "
                  "Nats added to the answers, averaged over abilities (mean) and of the worst ability (worst); mean, "
                  "least and largest over the pairs.", "", mean.reset_index().to_markdown(index=False), ""]  # fmt: skip
    if "keep" in record:
        parts += ["# Keep: demo brain, 60% removed, accuracy on the two kept abilities", "",
                  pd.DataFrame(record["keep"]).to_markdown(index=False), ""]  # fmt: skip
    if "forget" in record:
        parts += ["# Forget: demo brain, accuracy on the ability to forget / on the worst of the others", "",
                  "Contrast: as many neurons by the localizer's |t|; random: as many of the same layers. Least "
                  "squares: on the other abilities' tokens. FLAP: as many neurons in all, calibrated and refitted on "
                  "text of the others only. 400 questions of each ability.", "",
                  pd.DataFrame(record["forget"]).to_markdown(index=False), ""]  # fmt: skip
    return "\n".join(parts)


def verdict(rows: pd.DataFrame) -> str:
    """Where ours and the published rule stand, and what networks add, in numbers."""
    ratios = [c for c in rows.columns if c.endswith("%")]
    grid = rows[~rows["method"].str.startswith("networks")]
    ours, null, none = (rows[rows["method"] == m].iloc[0] for m in (
        "networks", "networks, phase-randomised", "networks, none given"))  # fmt: skip
    fits = grid["compensate"] == "least-squares"
    published, random = (grid[(grid["method"] == m) & fits].iloc[0] for m in ("published", "random"))
    lines = []
    for r in ratios:
        best = grid.loc[grid[r].idxmin()]
        lines.append(
            f"- {r}: ours {ours[r]:.3f}, the best other row {best[r]:.3f} ({best['method']}, {best['allocation']}): "
            f"{ours[r] / best[r] - 1:+.1%}. Networks change it by {ours[r] / none[r] - 1:+.2%}, phase-randomised ones "
            f"by {null[r] / none[r] - 1:+.2%}. The published rule with least squares is "
            f"{'worse' if published[r] > random[r] else 'better'} than random with least squares "
            f"({published[r]:.2f}, {random[r]:.2f})."
        )
    return "\n".join(lines)


def main() -> None:
    """Run the parts asked for and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["stories260K", "shakespeare-gpt2", "demo", "unbalanced", "keep", "forget"]
    parser.add_argument("parts", nargs="*", default=names)
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=len(PAIRS), help="frequent pairs of the unbalanced part")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    target = options.out / "pruning.json"
    record = json.loads(target.read_text(encoding="utf-8")) if target.is_file() else {}
    options.out.mkdir(parents=True, exist_ok=True)

    def save() -> None:
        target.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        (options.out / "pruning.md").write_text(written(record), encoding="utf-8")

    rows = {"unbalanced": lambda: unbalanced(options.pairs), "keep": keep, "forget": forget}
    for part in options.parts:
        if part not in rows:
            record[part] = perplexities(part, options.data, options.draws)
            save()
            continue
        record[part] = []
        for row in rows[part]():
            print(row, flush=True)
            record[part].append(row)
            save()


if __name__ == "__main__":
    main()

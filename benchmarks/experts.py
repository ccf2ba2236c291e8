"""The demo brain as a mixture of experts: which experts do what, and what to cut: ``python benchmarks/experts.py``.

Every expert is silenced alone, and for each ability the most selective one is chosen on one set of held-out lines and
measured on another, beside every other expert of its layer. Then whole experts and neurons inside all experts are
removed, as many parameters of one as of the other, by each criterion beside random, without and with repair.
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

import llmbrain as lb
from llmbrain.anatomy.experts import expert_anatomy
from llmbrain.datasets import load_demo
from llmbrain.datasets.demo import Demo
from llmbrain.intervention import TokenEvaluation, lesion_table
from llmbrain.pruning.expert_neurons import methods
from llmbrain.pruning.experts import METHODS

RATIOS = (0.25, 0.5)
DRAWS = 5  # random choices
LINES, TESTED = 60, 100  # lines of each ability: of lesions, of pruned models
K, THRESHOLD = 32, 3.0  # networks, for the criterion that uses them


def evaluations(demo: Demo, seed: int) -> dict[str, TokenEvaluation]:
    """Held-out lines of each ability, scored by the loss on the answer."""
    made = {}
    for ability in demo.abilities:
        lines = demo.examples("heldout", ability, n=LINES, seed=seed)
        answers = [f"{line.answer}\n" for line in lines]
        made[ability] = TokenEvaluation.from_answers(demo.tokenizer, [x.prompt for x in lines], answers, score="loss")
    return made


def which_do_what(demo: Demo) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Effect of every expert on every ability; of the most selective one of each on fresh lines; dissociations."""
    routed = dict(expert_anatomy(demo.model).routed)
    every = {f"{e} of layer {i}": lb.Experts([(i, e)]) for i, r in routed.items() for e in range(r.count)}
    first = lesion_table(demo.model, every, evaluations(demo, 1), n_random=0, progress=False).matrix("effect")
    fresh = lesion_table(demo.model, every, evaluations(demo, 2), n_random=0, progress=False)
    effect, rows, chosen = fresh.matrix("effect"), [], {}
    for ability in demo.abilities:
        best = (first[ability] - first.drop(columns=ability).max(axis=1)).idxmax()
        chosen[ability] = best
        layer = best.split()[-1]
        others = effect.loc[[n for n in effect.index if n.split()[-1] == layer and n != best], ability]
        rest = effect.loc[best].drop(ability)
        rows.append(
            {
                "ability": ability, "expert": best, "loss added to it": effect.loc[best, ability],
                "to the worst-hit other": rest.max(), "which": rest.idxmax(),
                "others of its layer, mean": others.mean(), "largest": others.max(),
            }
        )  # fmt: skip
    pairs = fresh.double_dissociations(corrected=False)
    mine = pairs[[chosen.get(a) == n and chosen.get(b) == m for a, b, n, m in zip(
        pairs["evaluation_a"], pairs["evaluation_b"], pairs["network_a"], pairs["network_b"])]]  # fmt: skip
    return effect, pd.DataFrame(rows), mine


def calls(demo: Demo, scans: list[Any]) -> pd.DataFrame:
    """Largest share of an ability's tokens that call one expert, by layer."""
    rows = []
    for layer, _ in expert_anatomy(demo.model).routed:
        counts: dict[str, Any] = dict.fromkeys(demo.abilities, 0)
        for scan in scans:
            visits = scan.visits(layer)
            for onset, n, ability in scan.events.itertuples(index=False):
                counts[ability] = counts[ability] + visits[int(onset) : int(onset + n)].sum(axis=0)
        shares = {a: c / c.sum() * 2 for a, c in counts.items()}
        rows.append({"layer": layer, **{a: f"{s.max():.2f} (expert {s.argmax()})" for a, s in shares.items()}})
    return pd.DataFrame(rows)


def cuts(demo: Demo, scans: list[Any], texts: list[Any]) -> Iterator[dict[str, Any]]:
    """One row a pruned model."""
    ica = lb.GroupICA(K, random_state=0, max_iter=1000).fit(scans)
    networks = lb.FunctionalNetworks.from_ica(ica, threshold=THRESHOLD)
    text: dict[str, Any] = {"tokenizer": demo.tokenizer, "calibration": texts}
    plain: dict[str, Any] = {"of": "nothing", "share": 0.0, "method": "dense", "repair": "", "parameters": 0.0}
    yield plain | measured(demo, demo.model)
    for ratio in RATIOS:
        for kind, names in (("experts", METHODS), ("neurons", methods())):
            for method in names:
                for draw in range(DRAWS if method == "random" else 1):
                    how = {"expert_ratio" if kind == "experts" else "ratio": ratio, "random_state": draw}
                    plan = lb.plan_pruning(demo.model, networks, method=method, **how, **text)
                    for repair in (None, "least-squares"):
                        small = lb.prune(demo.model, plan, compensate=repair, **text)
                        yield {
                            "of": kind, "share": ratio, "method": method, "repair": repair or "",
                            "parameters": plan.parameters_share,
                        } | measured(demo, small)  # fmt: skip


def measured(demo: Demo, model: Any) -> dict[str, Any]:
    """Accuracy and loss on held-out lines."""
    scores = demo.scores(model, n=TESTED, seed=3)
    accuracy = scores["accuracy"]
    return {
        "accuracy": accuracy.mean(),
        "worst": accuracy.min(),
        "which": accuracy.idxmin(),
        "loss": scores["loss"].mean(),
    }


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Random draws as their mean, and the best of them."""
    keys = ["of", "share", "method", "repair"]
    table = rows.groupby(keys, sort=False).agg(
        parameters=("parameters", "mean"), accuracy=("accuracy", "mean"), best=("accuracy", "max"),
        worst=("worst", "mean"), loss=("loss", "mean"),
    ).reset_index()  # fmt: skip
    table["accuracy"] = [
        f"{a:.3f} (best of {DRAWS} {b:.3f})" if m == "random" else f"{a:.3f}"
        for a, b, m in zip(table["accuracy"], table.pop("best"), table["method"])
    ]
    table["share"] = [f"{s:.0%}" for s in table["share"]]
    table["parameters"] = [f"{p:.1%}" for p in table["parameters"]]
    names = {"of": "cut", "parameters": "parameters removed", "worst": "worst ability"}
    return table.rename(columns=names)


def main() -> None:
    """Print the tables and write them to ``benchmarks/results/``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="folder of the mixture; default: the demo brain's")
    parser.add_argument("--texts", type=int, default=64, help="calibration texts of 256 tokens")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    began = time.process_time()
    demo = load_demo(experts=8) if options.model is None else Demo(*lb.load_model(options.model, dtype="float32"))
    texts = demo.texts("calibration", n=options.texts, n_tokens=256, seed=0)
    scans = lb.scan(demo.model, demo.tokenizer, texts)
    accuracy = pd.DataFrame([{"ability": a, "accuracy": v} for a, v in demo.ability_accuracy(n=1000).items()])
    called = calls(demo, scans)
    effect, table, pairs = which_do_what(demo)
    rows = pd.DataFrame(list(cuts(demo, scans, texts)))
    body = expert_anatomy(demo.model)
    sizes = ", ".join(f"{r.count} x {r.width}" for _, r in body.routed)
    harmless = int((effect < 0.05).all(axis=1).sum())
    text = (
        f"A mixture of {sizes} neurons by layer, top {next(iter(body.routed))[1].top_k}. Held-out exact-answer "
        f"accuracy (1,000 lines each):\n\n{accuracy.to_markdown(index=False, floatfmt='.3f')}\n\n"
        "Largest share of an ability's tokens that call one expert (2 of 8 by chance: 0.25):\n\n"
        f"{called.to_markdown(index=False)}\n\n"
        "Every expert silenced alone; nats per answer token. The most selective one for each ability, chosen on other "
        f"lines:\n\n{table.to_markdown(index=False, floatfmt='.2f')}\n\n"
        f"{len(pairs)} of {len(table) * (len(table) - 1) // 2} pairs of abilities dissociate doubly by these experts "
        "(confidence intervals over lines apart, both ways). "
        f"{harmless} of {len(effect)} experts add less than 0.05 to every ability.\n\n"
        "Whole experts and neurons inside all experts, mean accuracy over the eight abilities "
        f"({TESTED} held-out lines each):\n\n{summary(rows).to_markdown(index=False, floatfmt='.3f')}\n"
    )
    print(text)
    print(f"{time.process_time() - began:.0f} s of CPU")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "experts.md").write_text(text, encoding="utf-8")
    record = {"effects": json.loads(effect.to_json(orient="split")), "cuts": rows.to_dict("records")}
    (options.out / "experts.json").write_text(json.dumps(record, indent=1, default=np.ndarray.tolist) + "\n", "utf-8")


if __name__ == "__main__":
    main()

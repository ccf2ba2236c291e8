"""The demo brain as a mixture of experts: which experts do what, and what to cut: ``python benchmarks/experts.py``.

Every expert is silenced alone, and for each ability the most selective one is chosen on one set of held-out lines and
measured on another, beside every other expert of its layer. Then whole experts and neurons inside all experts are
removed, as many parameters of one as of the other, by each criterion beside random, without and with repair. Rows are
kept as they are done, and the same call goes on from there.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import llmbrain as lb
from llmbrain.anatomy.experts import expert_anatomy
from llmbrain.datasets import load_demo
from llmbrain.datasets.demo import Demo
from llmbrain.intervention import TokenEvaluation, experts_called_alike, lesion_table
from llmbrain.pruning.expert_neurons import methods
from llmbrain.pruning.experts import METHODS

RATIOS = (0.25, 0.5)
DRAWS, TEXTS = 5, 3  # random choices; calibration texts of the other methods
KEYS = ("of", "share", "method", "draw", "repair")
REPAIRS = ("", "least-squares")
TESTED = 100  # lines of each ability, of pruned models
K, THRESHOLD = 32, 3.0  # networks, for the criterion that uses them


def evaluations(demo: Demo, seed: int, n: int) -> dict[str, TokenEvaluation]:
    """Held-out lines of each ability, scored by the loss on the answer."""
    made = {}
    for ability in demo.abilities:
        lines = demo.examples("heldout", ability, n=n, seed=seed)
        answers = [f"{line.answer}\n" for line in lines]
        made[ability] = TokenEvaluation.from_answers(demo.tokenizer, [x.prompt for x in lines], answers, score="loss")
    return made


def which_do_what(demo: Demo, scans: list[Any], n: int) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Effect of every expert on every ability; of the most selective one of each on fresh lines; dissociations."""
    routed = dict(expert_anatomy(demo.model).routed)
    every = {f"{e} of layer {i}": lb.Experts([(i, e)]) for i, r in routed.items() for e in range(r.count)}
    alone: dict[str, Any] = {"n_random": 0, "n_matched": 0, "progress": False}
    first = lesion_table(demo.model, every, evaluations(demo, 1, n), **alone).matrix("effect")
    fresh = lesion_table(demo.model, every, evaluations(demo, 2, n), **alone)
    effect, rows, chosen = fresh.matrix("effect"), [], {}
    for ability in demo.abilities:
        best = (first[ability] - first.drop(columns=ability).max(axis=1)).idxmax()
        chosen[ability] = best
        layer = best.split()[-1]
        others = effect.loc[[n for n in effect.index if n.split()[-1] == layer and n != best], ability]
        rest = effect.loc[best].drop(ability)
        i, e = experts_called_alike(every[best], demo.model, scans).experts[0]
        rows.append(
            {
                "ability": ability, "expert": best, "loss added to it": effect.loc[best, ability],
                "to the worst-hit other": rest.max(), "which": rest.idxmax(),
                "others of its layer, mean": others.mean(), "largest": others.max(),
                "called as often": effect.loc[f"{e} of layer {i}", ability],
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


def wanted(ratios: Sequence[float], repairs: Sequence[str], n_texts: int) -> Iterator[dict[str, Any]]:
    """What is to be measured; random choices are drawn anew, the others on other calibration text."""
    yield {"of": "nothing", "share": 0.0, "method": "dense", "draw": 0, "repair": ""}
    for ratio in ratios:
        for kind, names in (("experts", METHODS), ("neurons", methods())):
            for method in names:
                draws = DRAWS if method == "random" else 1 if method == "magnitude" else n_texts
                for draw in range(draws):
                    for repair in repairs:
                        yield {"of": kind, "share": ratio, "method": method, "draw": draw, "repair": repair}


def cut(demo: Demo, row: dict[str, Any], runs: Runs) -> dict[str, Any]:
    """A row with what its pruned model does."""
    if row["method"] == "dense":
        return row | {"parameters": 0.0} | measured(demo, demo.model)
    by_text = row["method"] not in ("random", "magnitude")
    seed = row["draw"] if by_text else 0
    text: dict[str, Any] = {"tokenizer": demo.tokenizer, "calibration": runs.texts(seed)}
    how = {"expert_ratio" if row["of"] == "experts" else "ratio": row["share"], "random_state": row["draw"]}
    networks = runs.networks(seed) if row["method"] == "networks" else None
    plan = lb.plan_pruning(demo.model, networks, method=row["method"], **how, **text)
    small = lb.prune(demo.model, plan, compensate=row["repair"] or None, **text)
    return row | {"parameters": plan.parameters_share} | measured(demo, small)


class Runs:
    """Calibration texts, and networks in their scans, by seed."""

    def __init__(self, demo: Demo, n: int) -> None:
        self.demo, self.n = demo, n

    def texts(self, seed: int) -> list[Any]:
        """Texts of 256 tokens."""
        return self.demo.texts("calibration", n=self.n, n_tokens=256, seed=seed)

    @cache  # noqa: B019
    def networks(self, seed: int) -> lb.FunctionalNetworks:
        """Of group ICA over scans of the texts."""
        scans = lb.scan(self.demo.model, self.demo.tokenizer, self.texts(seed))
        ica = lb.GroupICA(K, random_state=0, max_iter=1000).fit(scans)
        return lb.FunctionalNetworks.from_ica(ica, threshold=THRESHOLD)


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
    """Mean over draws, and their extremes."""
    keys, table = ["of", "share", "method", "repair"], []
    for key, part in rows.groupby(keys, sort=False):
        accuracy, loss = part["accuracy"], part["loss"]
        spread = f" ({accuracy.min():.3f} to {accuracy.max():.3f})" if len(part) > 1 else ""
        table.append(
            dict(zip(keys, key)) | {
                "parameters removed": f"{part['parameters'].mean():.1%}", "draws": len(part),
                "accuracy": f"{accuracy.mean():.3f}{spread}", "worst ability": f"{part['worst'].mean():.3f}",
                "loss": f"{loss.mean():.2f}",
            }
        )  # fmt: skip
    frame = pd.DataFrame(table)
    frame["share"] = [f"{s:.0%}" for s in frame["share"]]
    return frame.rename(columns={"of": "cut"})


def verdicts(rows: pd.DataFrame) -> str:
    """Experts beside neurons: the best of each at equal shares, and who is above the best random draw."""
    said = []
    for ratio in [r for r in dict.fromkeys(rows["share"]) if r]:
        part = rows[rows["share"] == ratio]
        chosen = part[part["method"] != "random"].groupby(["of", "method", "repair"])["accuracy"].mean()
        best = {of: chosen[of].idxmax() for of in ("experts", "neurons")}
        said.append(
            f"{ratio:.0%}: "
            + "; ".join(
                f"best of {of} {m}{' repaired' if r else ''} {chosen[of][m, r]:.3f}" for of, (m, r) in best.items()
            )
        )
        for of in ("experts", "neurons"):
            for repair in dict.fromkeys(part["repair"]):
                random = part[(part["method"] == "random") & (part["of"] == of) & (part["repair"] == repair)][
                    "accuracy"
                ]
                here = chosen[of].xs(repair, level="repair")
                above = [m for m, value in here.items() if value > random.max()]
                below = [m for m, value in here.items() if value < random.mean()]
                said.append(
                    f"{of}, {'repaired' if repair else 'not repaired'}: above the best of {len(random)} random draws "
                    f"({random.max():.3f}) are {', '.join(above) or 'none'}; below their mean ({random.mean():.3f}) "
                    f"{', '.join(below) or 'none'}"
                )
    return "\n".join(f"* {line}." for line in said)


def main() -> None:
    """Print the tables and write them to ``benchmarks/results/``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="folder of the mixture; default: the demo brain's")
    parser.add_argument("--texts", type=int, default=64, help="calibration texts of 256 tokens")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--keep", type=Path, help="folder of rows that are done, to go on from; default: --out")
    parser.add_argument(
        "--part", default="0/1", help="I/N: only every N-th plan, from the I-th; a last call joins them"
    )
    parser.add_argument("--lines", type=int, default=60, help="of each ability, twice, for lesions")
    parser.add_argument("--ratios", type=float, nargs="+", default=list(RATIOS))
    parser.add_argument("--repairs", choices=REPAIRS, nargs="+", default=list(REPAIRS))
    parser.add_argument("--drawn", type=int, default=TEXTS, help="calibration texts of methods that read text")
    options = parser.parse_args()
    began = time.process_time()
    demo = load_demo(experts=8) if options.model is None else Demo(*lb.load_model(options.model, dtype="float32"))
    runs, options.keep = Runs(demo, options.texts), options.keep or options.out
    options.keep.mkdir(parents=True, exist_ok=True)
    which, of = map(int, options.part.split("/"))
    asked, done = list(wanted(options.ratios, options.repairs, options.drawn)), {}
    for file in sorted(options.keep.glob("experts-rows*.jsonl")):
        rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
        done |= {tuple(row[k] for k in KEYS): row for row in rows}
    for i, row in enumerate(asked):
        key = tuple(row[k] for k in KEYS)
        if key in done or i % of != which:
            continue
        done[key] = cut(demo, row, runs)
        with (options.keep / f"experts-rows{which}.jsonl").open("a", encoding="utf-8") as kept:
            kept.write(json.dumps(done[key]) + "\n")
        print(f"{time.process_time() - began:6.0f} s  {done[key]}", flush=True)
    if of > 1:
        return
    rows = pd.DataFrame([done[tuple(row[k] for k in KEYS)] for row in asked])
    cuts = (
        "Whole experts and neurons inside all experts, mean accuracy over the eight abilities "
        f"({TESTED} held-out lines each), in brackets the extremes over draws (random choices; of the others, "
        f"calibration text):\n\n{summary(rows).to_markdown(index=False, disable_numparse=True)}\n\n{verdicts(rows)}\n"
    )
    (options.keep / "experts-cuts.md").write_text(cuts, encoding="utf-8")
    scans = lb.scan(demo.model, demo.tokenizer, runs.texts(0))
    accuracy = pd.DataFrame([{"ability": a, "accuracy": v} for a, v in demo.ability_accuracy(n=300).items()])
    called = calls(demo, scans)
    effect, table, pairs = which_do_what(demo, scans, options.lines)
    body = expert_anatomy(demo.model)
    sizes = ", ".join(f"{r.count} x {r.width}" for _, r in body.routed)
    harmless = int((effect < 0.05).all(axis=1).sum())
    text = (
        f"One trained mixture of {sizes} neurons by layer, top {next(iter(body.routed))[1].top_k}. Held-out "
        f"exact-answer accuracy (300 lines each):\n\n{accuracy.to_markdown(index=False, floatfmt='.3f')}\n\n"
        "Largest share of an ability's tokens that call one expert (2 of 8 by chance: 0.25):\n\n"
        f"{called.to_markdown(index=False)}\n\n"
        f"Every expert silenced alone; nats per answer token ({options.lines} lines of each ability). The most "
        "selective one for each ability, chosen on other "
        f"lines:\n\n{table.to_markdown(index=False, floatfmt='.2f')}\n\n"
        f"{len(pairs)} of {len(table) * (len(table) - 1) // 2} pairs of abilities dissociate doubly by these experts "
        "(confidence intervals over lines apart, both ways). "
        f"{harmless} of {len(effect)} experts add less than 0.05 to every ability.\n"
    )
    text += f"\n{cuts}"
    print(text)
    print(f"{time.process_time() - began:.0f} s of CPU")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "experts.md").write_text(text, encoding="utf-8")
    record = {"effects": json.loads(effect.to_json(orient="split")), "cuts": rows.to_dict("records")}
    (options.out / "experts.json").write_text(json.dumps(record, indent=1, default=np.ndarray.tolist) + "\n", "utf-8")


if __name__ == "__main__":
    main()

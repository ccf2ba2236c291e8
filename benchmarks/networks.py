"""The protocols of arXiv 2502.20408 on models that fit everywhere, each beside the controls it lacks.

    python benchmarks/networks.py [--models stories260K shakespeare-gpt2 demo] [--thresholds 1.96 3.6] [--quick]
                                  [--speed] [--out FILE]

Four questions, one table each:

1. Recurrence: networks of the whole group as templates; how often does each come back (IoU > 0.2) in the ICA of one
   text alone? Control: the same networks with their neurons shuffled within layers.
2. Lesion: ten networks together, against 15 % random neurons (the paper's control), as many random neurons in the same
   layers, and as many neurons that are just as active. Then the same ten one by one.
3. Keep only: nothing but the networks of an ICA with k = 10, 64, 128, 256, 512 components. Control: as many random
   neurons in the same layers.
4. Amplify: the ten networks together, gains 0 to 3. Control: the same gains on random neurons.

As in the paper, ICA is temporal (FastICA over tokens) and a neuron is in a network if |z| > 1.96 or, as in its last
notebook, 3.6. Unlike the paper, a neuron is a hidden unit of the MLP, not a coordinate of its output: those are what a
lesion can really remove. Scores are losses (nats a token), or shares of exact answers for the demo brain.

Models and texts are those of ``$LLMBRAIN_TEST_DATA`` (default ``../shared/data``); the demo brain is part of llmbrain.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import llmbrain as lb
from llmbrain.anatomy.families import anatomy
from llmbrain.anatomy.space import NeuronSpace
from llmbrain.intervention import TokenEvaluation, lesion_table, score_conditions
from llmbrain.intervention.controls import matched_masks, random_masks
from llmbrain.intervention.curves import amplification_curve, keep_masks_curve
from llmbrain.intervention.evaluations import activation_levels
from llmbrain.networks import recurrence, single_run_networks

DATA = Path(os.environ.get("LLMBRAIN_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
RESULTS = Path(__file__).parent / "results"
THRESHOLDS = (1.96, 3.6)
TEMPLATES = 10
COMPONENTS = (10, 64, 128, 256, 512)


@dataclass
class Case:
    """A model, the texts it is scanned with, the texts that templates are looked for in, and what it is measured by."""

    name: str
    model: Any
    tokenizer: Any
    group: list[str]
    single: list[str]
    evaluations: dict[str, TokenEvaluation]


def stories(n_windows: int) -> Case:
    model, tokenizer = lb.load_model(DATA / "models" / "stories260K")
    texts = json.loads((DATA / "corpora" / "tinystories-1000.json").read_text(encoding="utf-8"))
    wiki = (DATA / "corpora" / "wikitext2-test.tokens").read_text(encoding="utf-8")
    evaluations = {
        "stories": TokenEvaluation.from_texts(model, tokenizer, texts[700:], window=256, max_windows=n_windows),
        "WikiText-2": TokenEvaluation.from_texts(model, tokenizer, [wiki], window=256, max_windows=n_windows),
    }
    return Case("stories260K", model, tokenizer, texts[:20], texts[100:116], evaluations)


def shakespeare(n_windows: int) -> Case:
    model, tokenizer = lb.load_model(DATA / "models" / "shakespeare-gpt2")
    text = (DATA / "corpora" / "tinyshakespeare.txt").read_text(encoding="utf-8")
    pieces = [text[i : i + 480] for i in range(0, 480 * 40, 480)]
    tail = text[-100_000:]
    evaluations = {
        "Shakespeare": TokenEvaluation.from_texts(model, tokenizer, [tail], window=48, max_windows=4 * n_windows)
    }
    return Case("shakespeare-gpt2", model, tokenizer, pieces[:20], pieces[20:36], evaluations)


def demo(n_windows: int) -> Case:
    brain = lb.datasets.load_demo()
    evaluations = {}
    for ability in brain.abilities:
        lines = brain.examples("heldout", ability, n=4 * n_windows, seed=0)
        prompts, answers = [line.prompt for line in lines], [f"{line.answer}\n" for line in lines]
        evaluations[ability] = TokenEvaluation.from_answers(brain.tokenizer, prompts, answers, score="exact")
    group, single = (brain.texts("calibration", n=n, n_tokens=512, seed=seed) for n, seed in ((20, 0), (16, 1)))
    return Case("demo brain", brain.model, brain.tokenizer, group, single, evaluations)


CASES = {"stories260K": stories, "shakespeare-gpt2": shakespeare, "demo": demo}


def fit(scans: Any, n_components: int) -> lb.FunctionalNetworks:
    """Networks of the group, by temporal ICA as published; it need not converge, and that is told in the table."""
    ica = lb.GroupICA(n_components, axis="time", random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return lb.FunctionalNetworks.from_ica(ica.fit(scans))


@dataclass
class Found:
    """Networks of one model: of the group for every number of components, and of each single text."""

    group: dict[int, lb.FunctionalNetworks]
    singles: list[lb.FunctionalNetworks]

    @classmethod
    def of(cls, case: Case) -> Found:
        scans = lb.scan(case.model, case.tokenizer, case.group)
        limit = min(sum(scan.n_tokens for scan in scans), scans[0].n_neurons) // 2
        group = {k: fit(scans, k) for k in COMPONENTS if k <= limit}
        runs = lb.scan(case.model, case.tokenizer, case.single)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return cls(group, single_run_networks(runs, TEMPLATES, axis="time", random_state=0))

    def at(self, threshold: float) -> Found:
        """The same maps, cut elsewhere."""
        group = {k: networks.rethreshold(threshold=threshold) for k, networks in self.group.items()}
        return Found(group, [networks.rethreshold(threshold=threshold) for networks in self.singles])


def protocol_lesion(case: Case, templates: lb.FunctionalNetworks, n_random: int) -> pd.DataFrame:
    space = NeuronSpace(anatomy(case.model).widths)
    union = templates.union
    rng = np.random.default_rng(0)
    share = np.zeros((n_random, space.n_neurons), dtype=bool)
    for row in share:
        row[rng.choice(space.n_neurons, round(0.15 * space.n_neurons), replace=False)] = True
    levels = activation_levels(case.model, list(case.evaluations.values()))
    matched = matched_masks(union, space, levels[1:], n_random, rng)
    conditions = {
        "intact": np.zeros((1, space.n_neurons), dtype=bool),
        "random 15 %": share,
        "ten networks": union[None],
        "as many random, same layers": random_masks(union, space, n_random, rng),
    }
    if matched is not None:
        conditions["as many, as active"] = matched
    rows = []
    for name, masks in conditions.items():
        scores = score_conditions(case.model, ~masks, case.evaluations)
        for evaluation, items in scores.items():
            means = items.mean(axis=1)
            rows.append(
                {"lesion": name, "neurons": int(masks[0].sum()), "evaluation": evaluation, "score": means.mean(),
                 "lowest": means.min(), "highest": means.max(), "draws": len(means)}
            )  # fmt: skip
    return pd.DataFrame(rows)


def protocol_keep(case: Case, networks: dict[int, lb.FunctionalNetworks], n_random: int) -> pd.DataFrame:
    masks = [found.union for found in networks.values()]
    frame = keep_masks_curve(case.model, masks, case.evaluations, n_random=n_random)
    frame.insert(0, "components", np.repeat(list(networks), len(case.evaluations)))
    frame.insert(
        1, "converged", np.repeat([n.provenance.get("converged") for n in networks.values()], len(case.evaluations))
    )
    return frame


def examine(case: Case, found: Found, quick: bool) -> dict[str, pd.DataFrame]:
    """All tables of one model at one threshold."""
    n_random = 5 if quick else 20
    templates = found.group[TEMPLATES]
    networks = lesion_table(case.model, templates, case.evaluations, n_random=n_random, progress=False)
    columns = ["network", "evaluation", "size", "baseline", "effect", "effect_low", "effect_high", "random_effect",
               "p_random", "matched_effect", "p_matched", "q_matched"]  # fmt: skip
    return {
        "recurrence": recurrence(templates, found.singles, n_permutations=50 if quick else 200),
        "lesion": protocol_lesion(case, templates, n_random),
        "networks": networks.frame[columns],
        "keep": protocol_keep(case, found.group, n_random // 2),
        "amplify": amplification_curve(
            case.model, templates, case.evaluations, gains=(0, 0.5, 1, 1.5, 2, 3), n_random=n_random // 2
        ),
    }


def speed(n_networks: int = 32, n_random: int = 20, n_windows: int = 32) -> pd.DataFrame:
    """What a lesion table costs: 32 networks x (1 + 20 random) lesions x 8,192 tokens of stories260K."""
    case = stories(n_windows)
    n_neurons = sum(anatomy(case.model).widths)
    masks = np.random.default_rng(0).random((n_networks, n_neurons)) < 0.02
    wall, cpu = time.perf_counter(), time.process_time()
    lesion_table(
        case.model, {str(i): mask for i, mask in enumerate(masks)}, {"stories": case.evaluations["stories"]},
        n_random=n_random, n_matched=0, progress=False,
    )  # fmt: skip
    tokens = n_networks * (1 + n_random) * n_windows * 256
    row = {"lesions": n_networks * (1 + n_random), "tokens": tokens, "threads": torch.get_num_threads()}
    row |= {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
    return pd.DataFrame([row | {"tokens_per_cpu_s": tokens / row["cpu_s"]}])


def markdown(frame: pd.DataFrame) -> str:
    """A table that a page can show."""

    def cell(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, (float, np.floating)) else str(value)

    lines = ["| " + " | ".join(map(str, frame.columns)) + " |", "|" + "---|" * len(frame.columns)]
    lines += ["| " + " | ".join(cell(v) for v in row) + " |" for row in frame.itertuples(index=False)]
    return "\n".join(lines)


NOTE = (
    "Harm: nats a token lost (stories260K, shakespeare-gpt2) or share of exact answers lost (demo), mean over "
    'evaluations. "Beyond control": share of comparisons (templates, evaluations, network x evaluation) in which the '
    "networks do more than every control draw (recurrence: q < .05). nan: no such control exists, as a layer has "
    "too few other neurons."
)
TITLES = {
    "recurrence": "Templates in single texts",
    "lesion": "Ten networks together",
    "networks": "The ten networks one by one",
    "keep": "Keep only",
    "amplify": "Amplify",
}


def overview(tables: dict[str, dict[str, pd.DataFrame]]) -> pd.DataFrame:
    """What holds: a line for every question, the networks beside their control; from the tables of every case.

    "beyond control" is the share of comparisons in which the networks do better (recur more, harm more, keep more)
    than every control draw; where nothing is there it is about one in draws + 1.
    """
    rows = []
    for name, found in tables.items():
        again, joint, alone, keep = (found[key] for key in ("recurrence", "lesion", "networks", "keep"))
        rows.append((name, "templates found again: mean rate", again["rate"].mean(), again["chance_rate"].mean(),
                     (again["q"] < 0.05).mean(), len(again)))  # fmt: skip
        scores = joint.set_index(["lesion", "evaluation"])
        intact, ten = scores.loc["intact"]["score"], scores.loc["ten networks"]["score"]
        worse = 1 if name.startswith(("stories", "shakespeare")) else -1  # a loss rises, a share of answers falls
        for control in ("random 15 %", "as many random, same layers", "as many, as active"):
            if control not in scores.index.get_level_values(0):
                rows.append((name, f"harm of ten together, beside {control}", np.nan, np.nan, np.nan, 0))
                continue
            draws = scores.loc[control]
            extreme = draws["highest"] if worse > 0 else draws["lowest"]
            beyond = (worse * (ten - extreme) > 0).mean()
            harms = (worse * (values - intact).mean() for values in (ten, draws["score"]))
            rows.append((name, f"harm of ten together, beside {control}", *harms, beyond, len(ten)))
        for control in ("random", "matched"):
            known = alone.dropna(subset=[f"{control}_effect"])
            harms = (worse * known[column].mean() for column in ("effect", f"{control}_effect"))
            beyond = (known[f"p_{control}"] < 0.05).mean()
            rows.append((name, f"harm of one, beside as many {control} neurons", *harms, beyond, len(known)))
        some = keep[keep["share"] < 0.99]
        for k, part in some.groupby("components"):
            extreme = part["random_low"] if worse > 0 else part["random_high"]
            beyond = (worse * (extreme - part["score"]) > 0).mean()
            harms = (worse * (part[column] - part["intact"]).mean() for column in ("score", "random_mean"))
            rows.append(
                (name, f"harm when only k={k} are kept ({part['share'].iloc[0]:.0%})", *harms, beyond, len(part))
            )
    return pd.DataFrame(rows, columns=["case", "question", "networks", "control", "beyond control", "comparisons"])


def page(head: list[str], done: dict[str, dict[str, pd.DataFrame]]) -> str:
    """The whole result as Markdown."""
    parts = ["# Protocols of arXiv 2502.20408", *head, "## What holds", NOTE, markdown(overview(done))]
    for name, tables in done.items():
        parts.append(f"## {name}")
        parts += [f"### {TITLES[key]}\n\n{markdown(frame)}" for key, frame in tables.items()]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--thresholds", nargs="+", type=float, default=list(THRESHOLDS))
    parser.add_argument("--quick", action="store_true", help="fewer windows and draws: a minute, to see that it runs")
    parser.add_argument("--out", type=Path, default=RESULTS / "networks.md")
    parser.add_argument("--speed", action="store_true", help="only time a lesion table of 32 networks")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    if args.speed:
        text = f"# Time of a lesion table\n\n`python benchmarks/networks.py --speed`\n\n{markdown(speed())}\n"
        (RESULTS / "networks_speed.md").write_text(text, encoding="utf-8")
        print(text)
        return
    head = [f"llmbrain {lb.__version__}, torch {torch.__version__}, {platform.machine()}" + (", --quick" * args.quick)]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    done: dict[str, dict[str, pd.DataFrame]] = {}
    for name in args.models:
        case = CASES[name](4 if args.quick else 16)
        found = Found.of(case)
        for threshold in args.thresholds:
            tables = examine(case, found.at(threshold), args.quick)
            done[f"{name}, z > {threshold}"] = tables
            args.out.write_text(page(head, done), encoding="utf-8")
            print(args.out.read_text(encoding="utf-8") if args.quick else f"done: {name}, z > {threshold}", flush=True)
    print(f"\nwritten to {args.out}")


if __name__ == "__main__":
    main()

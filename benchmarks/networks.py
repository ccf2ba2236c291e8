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
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import llmbrain as lb
from llmbrain.architectures import anatomy
from llmbrain.intervention import TokenEvaluation, lesion_table, score_conditions
from llmbrain.intervention.controls import matched_masks, random_masks
from llmbrain.intervention.curves import amplification_curve, keep_masks_curve
from llmbrain.intervention.evaluations import activation_levels
from llmbrain.networks import recurrence, single_run_networks
from llmbrain.space import NeuronSpace

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


def fit(scans: Any, n_components: int, threshold: float) -> lb.FunctionalNetworks:
    """Networks of the group, by temporal ICA as published; it need not converge, and that is told in the table."""
    ica = lb.GroupICA(n_components, axis="time", random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return lb.FunctionalNetworks.from_ica(ica.fit(scans), threshold=threshold)


def protocol_recurrence(case: Case, templates: lb.FunctionalNetworks, threshold: float, n_null: int) -> pd.DataFrame:
    runs = lb.scan(case.model, case.tokenizer, case.single)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        singles = single_run_networks(runs, TEMPLATES, threshold=threshold, axis="time", random_state=0)
    return recurrence(templates, singles, n_null=n_null)


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


def protocol_keep(case: Case, scans: Any, threshold: float, n_random: int) -> pd.DataFrame:
    limit = min(sum(scan.n_tokens for scan in scans), scans[0].n_neurons) // 2
    networks = {k: fit(scans, k, threshold) for k in COMPONENTS if k <= limit}
    masks = [found.union for found in networks.values()]
    frame = keep_masks_curve(case.model, masks, case.evaluations, n_random=n_random)
    frame.insert(0, "components", np.repeat(list(networks), len(case.evaluations)))
    frame.insert(
        1, "converged", np.repeat([n.provenance.get("converged") for n in networks.values()], len(case.evaluations))
    )
    return frame


def examine(name: str, threshold: float, quick: bool) -> dict[str, pd.DataFrame]:
    """All tables of one model at one threshold."""
    case = CASES[name](4 if quick else 16)
    n_random = 5 if quick else 20
    scans = lb.scan(case.model, case.tokenizer, case.group)
    templates = fit(scans, TEMPLATES, threshold)
    networks = lesion_table(case.model, templates, case.evaluations, n_random=n_random, progress=False)
    columns = ["network", "evaluation", "size", "baseline", "effect", "effect_low", "effect_high", "random_effect",
               "p_random", "matched_effect", "p_matched", "q_matched"]  # fmt: skip
    return {
        "recurrence": protocol_recurrence(case, templates, threshold, 50 if quick else 200),
        "lesion": protocol_lesion(case, templates, n_random),
        "networks": networks.frame[columns],
        "keep": protocol_keep(case, scans, threshold, n_random // 2),
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


TITLES = {
    "recurrence": "Templates in single texts",
    "lesion": "Ten networks together",
    "networks": "The ten networks one by one",
    "keep": "Keep only",
    "amplify": "Amplify",
}


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
        print(markdown(speed()))
        return
    parts = [f"llmbrain {lb.__version__}, torch {torch.__version__}, {platform.machine()}" + (", --quick" * args.quick)]
    for name, threshold in product(args.models, args.thresholds):
        start = time.perf_counter()
        tables = examine(name, threshold, args.quick)
        parts.append(f"## {name}, |z| > {threshold}\n\n{time.perf_counter() - start:.0f} s")
        parts += [f"### {TITLES[key]}\n\n{markdown(frame)}" for key, frame in tables.items()]
        print("\n\n".join(parts[-len(tables) - 1 :]), flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("# Protocols of arXiv 2502.20408\n\n" + "\n\n".join(parts) + "\n", encoding="utf-8")
    print(f"\nwritten to {args.out}")


if __name__ == "__main__":
    main()

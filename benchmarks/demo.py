"""The demo brain's accuracy and lesion tables, over seeds: ``python benchmarks/demo.py``.

For every seed new calibration text is made, scanned and decomposed. For each ability the network whose lesion is most
selective is chosen on one set of held-out lines, and measured on another, beside random sets of as many neurons in the
same layers. Intervals are over seeds (t distribution), so they cover the text, the ICA and the lines together.
"""

from __future__ import annotations

import argparse
import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

import llmbrain as lb
from llmbrain.datasets import load_demo
from llmbrain.intervention import TokenEvaluation, lesion_table

K, THRESHOLD = 32, 3.0
LINES = 60


def evaluations(demo: Any, seed: int, n: int = LINES) -> dict[str, TokenEvaluation]:
    """Held-out lines of each ability, scored by the loss on the answer."""
    made = {}
    for ability in demo.abilities:
        lines = demo.examples("heldout", ability, n=n, seed=seed)
        answers = [f"{line.answer}\n" for line in lines]
        made[ability] = TokenEvaluation.from_answers(demo.tokenizer, [x.prompt for x in lines], answers, score="loss")
    return made


def one_seed(demo: Any, seed: int, n_random: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Effects of the network chosen for each ability, and of every network on the lines it was chosen on."""
    texts = demo.texts("calibration", n=64, n_tokens=256, seed=seed)
    scans = lb.scan(demo.model, demo.tokenizer, texts)
    networks = lb.FunctionalNetworks.from_ica(
        lb.GroupICA(K, random_state=seed, max_iter=1000).fit(scans), threshold=THRESHOLD
    )
    lines = evaluations(demo, 1000 + seed)
    everything = lesion_table(demo.model, networks, lines, n_random=0, n_matched=0, progress=False)
    effect = everything.matrix("effect")
    rows = []
    for ability in demo.abilities:
        others = effect.drop(columns=ability).max(axis=1)
        chosen = (effect[ability] - others).idxmax()
        table = lesion_table(
            demo.model, {chosen: networks[chosen]}, evaluations(demo, 2000 + seed), n_random=n_random, n_matched=0,
            random_state=seed, progress=False,
        )  # fmt: skip
        frame = table.frame.assign(chosen_for=ability, seed=seed)
        worst = table.draws.groupby("evaluation")["effect"].max()
        rows.append(frame.assign(random_max=frame["evaluation"].map(worst)))
    return pd.concat(rows, ignore_index=True), effect.assign(size=networks.sizes, seed=seed)


def interval(values: Any) -> str:
    """Mean and 95% interval over seeds."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return f"{values.mean():.2f}"
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return f"{values.mean():.2f} ± {half:.2f}"


def dissociation_table(effects: pd.DataFrame, abilities: list[str]) -> pd.DataFrame:
    """One row an ability: what the network chosen for it does to it, to the others, and what chance does."""
    rows = []
    for ability in abilities:
        of = effects[effects["chosen_for"] == ability]
        own, other = of[of["evaluation"] == ability], of[of["evaluation"] != ability]
        worst = other.loc[other.groupby("seed")["effect"].idxmax()]
        rows.append(
            {
                "ability": ability,
                "neurons": f"{own['size'].mean():.0f} ({own['size'].mean() / 2048:.1%})",
                "loss added to it": interval(own["effect"]),
                "to the worst-hit other": interval(worst["effect"]),
                "which": ", ".join(sorted(set(worst["evaluation"]))),
                "random, mean": interval(own["random_effect"]),
                "random, largest": interval(own["random_max"]),
                "seeds with p < .05": f"{int((own['p_random'] < 0.05).sum())} of {len(own)}",
            }
        )
    return pd.DataFrame(rows)


def double_dissociations(effects: pd.DataFrame, abilities: list[str]) -> pd.DataFrame:
    """Pairs of abilities whose networks spare the other: both contrasts above 0 over seeds, and beyond chance."""
    cube = effects.pivot_table(index=["seed", "chosen_for"], columns="evaluation", values="effect")
    rows = []
    for a, b in combinations(abilities, 2):
        na, nb = cube.xs(a, level="chosen_for"), cube.xs(b, level="chosen_for")
        first, second = (na[a] - nb[a]).to_numpy(), (nb[b] - na[b]).to_numpy()
        low = [x.mean() - stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x)) for x in (first, second)]
        beyond = [effects.query("chosen_for == @x and evaluation == @x")["p_random"].lt(0.05).all() for x in (a, b)]
        if min(low) > 0 and all(beyond):
            rows.append({"pair": f"{a} / {b}", "first": interval(first), "second": interval(second)})
    return pd.DataFrame(rows, columns=["pair", "first", "second"])


def main() -> None:
    """Print the tables and write them to ``benchmarks/results/``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--n-random", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    demo = load_demo()
    abilities = list(demo.abilities)
    accuracy = pd.DataFrame([{"ability": a, "accuracy": v} for a, v in demo.ability_accuracy(n=1000).items()])
    seeds = [one_seed(demo, seed, options.n_random) for seed in range(options.seeds)]
    effects = pd.concat([s[0] for s in seeds], ignore_index=True)
    every = pd.concat([s[1] for s in seeds])
    table = dissociation_table(effects, abilities)
    pairs = double_dissociations(effects, abilities)
    harm = every[abilities] > 0.05
    broad = [f"seed {int(s)}: {n} ({int(h)} abilities)" for n, s, h in zip(
        every.index, every["seed"], harm.sum(axis=1)) if h >= len(abilities) // 2]  # fmt: skip
    text = (
        f"Held-out exact-answer accuracy (1,000 lines each):\n\n{accuracy.to_markdown(index=False, floatfmt='.3f')}\n\n"
        f"Lesions: {K} components, |z| > {THRESHOLD}, {options.seeds} seeds, {options.n_random} random sets; nats per "
        f"answer token, mean ± 95% interval over seeds:\n\n{table.to_markdown(index=False)}\n\n"
        f"Double dissociations ({len(pairs)} of {len(abilities) * (len(abilities) - 1) // 2} pairs: both contrasts "
        f"above 0 over seeds, both networks beyond chance in every seed):\n\n{pairs.to_markdown(index=False)}\n\n"
        f"Networks that add more than 0.05 to half of the abilities or more: {'; '.join(broad) or 'none'}.\n\n"
        f"Networks that add more than 0.05 to no ability: {int((~harm.any(axis=1)).sum())} of {len(every)}.\n"
    )
    print(text)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "demo.md").write_text(text, encoding="utf-8")
    record = {"accuracy": accuracy.to_dict("records"), "effects": effects.to_dict("records")}
    (options.out / "demo.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

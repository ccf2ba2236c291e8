"""Does every test of the package hold its level? Each is run many times where there is nothing to find.

    python benchmarks/calibration.py [--draws 200] [--only NAME ...] [--out benchmarks/results/calibration.md]

A case is a function of a random generator that makes data under the null hypothesis and gives one p-value (the smallest
corrected one, where the test has several), and the situations it is run in: volumes, autocorrelation, series, groups.
The share of p <= .05 should be .05; a cell outside [.02, .08] must be one in which the package warns, and the table
says whether it did. `register` adds a case, from here or from outside.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from llmbrain.anatomy.space import NeuronSpace
from llmbrain.brains import prepare, word_regressor
from llmbrain.brains.series import standardize
from llmbrain.comparison import compare_similarity, couple, encode
from llmbrain.comparison.clock import Clock
from llmbrain.comparison.coupling import DeadSeriesWarning
from llmbrain.comparison.sources import mirror
from llmbrain.datasets.fmri_phantom import ar_noise
from llmbrain.intervention.controls import matched_masks, random_masks
from llmbrain.networks.connectivity import connectivity, dynamics_test
from llmbrain.stats.nulls import sign_flip_test

RESULTS = Path(__file__).parent / "results"
ALPHA = 0.05
ALLOWED = (0.02, 0.08)

Cell = Mapping[str, object]
Draw = Callable[..., float]


@dataclass(frozen=True)
class Case:
    """A test under its null hypothesis.

    Attributes
    ----------
    name : str
        What is tested, as the table calls it.
    draw : callable ``(rng, **cell) -> p``
    cells : list of mapping
        Situations.
    note : str
        What the table says about it.
    """

    name: str
    draw: Draw
    cells: Sequence[Cell]
    note: str = ""


CASES: dict[str, Case] = {}


def register(name: str, note: str = "", **grid: Sequence[object]) -> Callable[[Draw], Draw]:
    """Add a case; every combination of the values in `grid` is a cell."""

    def add(draw: Draw) -> Draw:
        cells = [dict(zip(grid, values)) for values in itertools.product(*grid.values())]
        CASES[name] = Case(name, draw, cells, note)
        return draw

    return add


def run(case: Case, cell: Cell, n_draws: int, seed: int = 0) -> dict[str, object]:
    """One row of the table: share of p <= .05 with its 95% interval, and how often the package warned."""
    hits, warned = 0, 0
    for i in range(n_draws):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            hits += case.draw(np.random.default_rng([seed, i]), **cell) <= ALPHA
        own = [w for w in said if issubclass(w.category, UserWarning) and not issubclass(w.category, DeadSeriesWarning)]
        warned += bool(own)
    interval = binomtest(hits, n_draws).proportion_ci()
    return {
        "test": case.name, "situation": ", ".join(f"{k} {v}" for k, v in cell.items()), "level": hits / n_draws,
        "low": interval.low, "high": interval.high, "warned": warned / n_draws, "draws": n_draws,
    }  # fmt: skip


def held(row: Mapping[str, object]) -> bool:
    """Whether a row is as it should be: within [.02, .08] as far as its draws can tell, or warned of."""
    return bool(row["low"] <= ALLOWED[1] and row["high"] >= ALLOWED[0]) or row["warned"] > 0.5  # type: ignore[operator]


# -- coupling ----------------------------------------------------------------------------------------------------------


@register("couple", "largest |r| of all pairs", T=(150, 300), AR=(0.6, 0.9), pairs=("1 x 1", "4 x 6"),
          null=("circular", "phase"))  # fmt: skip
def coupling(rng: np.random.Generator, T: int, AR: float, pairs: str, null: str) -> float:
    """Networks and regions that have nothing to do with each other."""
    k, r = map(int, pairs.split(" x "))
    found = couple(ar_noise(rng, (T, k), AR), ar_noise(rng, (T, r), AR), null=null, n_permutations=99, lags=[0],
                   random_state=int(rng.integers(2**31)))  # fmt: skip
    return float(np.nanmin(found.p_corrected))


@register(
    "couple, high-pass", "after a high-pass of 128 s at TR 2", T=(200,), AR=(0.6, 0.9), null=("circular", "phase")
)
def coupling_filtered(rng: np.random.Generator, T: int, AR: float, null: str) -> float:
    """The same after the filter that `compare` uses."""
    x, y = (prepare(ar_noise(rng, (T, n), AR), 2.0) for n in (4, 6))
    found = couple(x, y, null=null, n_permutations=99, lags=[0], random_state=int(rng.integers(2**31)))
    return float(np.nanmin(found.p_corrected))


@register("couple, nuisance", "smooth regressors that both follow", T=(200,), AR=(0.6, 0.9), regressors=(2, 14))
def coupling_nuisance(rng: np.random.Generator, T: int, AR: float, regressors: int) -> float:
    """Both sides hold the nuisance, and nothing else in common."""
    known = ar_noise(rng, (T, regressors), 0.95)
    x, y = (ar_noise(rng, (T, n), AR) + known @ rng.normal(size=(regressors, n)) for n in (2, 3))
    found = couple(x, y, nuisance=known, n_permutations=99, lags=[0], random_state=int(rng.integers(2**31)))
    return float(np.nanmin(found.p_corrected))


def _story(rng: np.random.Generator, first: float, last: float) -> pd.DataFrame:
    rows, at = [], first
    while at < last:
        for _ in range(rng.integers(5, 20)):
            rows.append(("word", at, at + rng.uniform(0.15, 0.5)))
            at = rows[-1][2]
        at += rng.gamma(2.0, 0.4)
    return pd.DataFrame(rows, columns=["word", "onset", "offset"])


@register("compare, word rate", "the mirrored story, in regions that answer to its beginning and end; 15 s before, "
          "45 s after it", brain=("noise", "on and off"), window=("stimulus", "all"))  # fmt: skip
def story_window(rng: np.random.Generator, brain: str, window: str) -> float:
    """The control test of `compare` with silence or music at the edges."""
    tr, n = 1.5, 300
    words = _story(rng, 15.0, 400.0)
    clock = Clock.of_story(words, window=window, tr=tr, n_volumes=n, offset=0.0, rule="offset", aggregate="mean",
                           hrf="spm", high_pass=128.0)  # fmt: skip
    y = ar_noise(rng, (n, 5), 0.6)
    if brain != "noise":
        at = np.arange(15.0, words["offset"].max(), 0.25)
        ticks = pd.DataFrame({"word": "x", "onset": at, "offset": at})
        y = y + standardize(word_regressor(ticks, tr, n))
    rate = clock.prepare(clock.rate(mirror(words, "offset")))
    found = couple(rate, clock.prepare(clock.cut(y)), n_permutations=99, lags=[0],
                   random_state=int(rng.integers(2**31)))  # fmt: skip
    return float(np.nanmin(found.p_corrected))


@register("sign_flip_test", "largest of all pairs over subjects", subjects=(6, 12, 30), pairs=(1, 24))
def subjects(rng: np.random.Generator, subjects: int, pairs: int) -> float:
    """Correlations of subjects around zero."""
    r = np.tanh(rng.normal(0, 0.2, (subjects, pairs)))
    return float(sign_flip_test(r, n_permutations=199, random_state=int(rng.integers(2**31)))[1].min())


# -- encoding and similarity -------------------------------------------------------------------------------------------


@register("encode, r", "smallest corrected p", T=(200,), AR=(0.6, 0.8), targets=(1, 6))
def encoding(rng: np.random.Generator, T: int, AR: float, targets: int) -> float:
    """Features that say nothing about the brain."""
    found = encode(ar_noise(rng, (T, 5), AR), ar_noise(rng, (T, targets), AR), tr=2.0, n_permutations=39,
                   random_state=int(rng.integers(2**31)))  # fmt: skip
    return float(np.nanmin(found.p_corrected))


@register("compare_similarity", "of whole sets of series", T=(200,), AR=(0.6, 0.9), measure=("cka", "rsa"))
def similarity(rng: np.random.Generator, T: int, AR: float, measure: str) -> float:
    """Two sets that share no time."""
    x, y = (ar_noise(rng, (T, 5), AR) for _ in range(2))
    return compare_similarity(x, y, measure=measure, n_permutations=99, random_state=int(rng.integers(2**31))).p


# -- interventions -----------------------------------------------------------------------------------------------------


@register("lesion_table", "harm follows how loud a neuron is", control=("matched", "random"), neurons=(5, 20, 40))
def lesions(rng: np.random.Generator, control: str, neurons: int) -> float:
    """A random network; its effect is the sum of what its neurons do."""
    space = NeuronSpace([172] * 4)
    level = np.exp(rng.normal(size=space.n_neurons))
    levels = np.stack([level, level * np.exp(0.3 * rng.normal(size=space.n_neurons))])
    mask = np.zeros(space.n_neurons, dtype=bool)
    for layer in range(4):
        part = space.layer_slice(layer)
        mask[part.start + rng.choice(172, neurons, replace=False)] = True
    effect = rng.normal(size=space.n_neurons) * level
    sets = matched_masks(mask, space, levels, 20, rng) if control == "matched" else random_masks(mask, space, 20, rng)
    assert sets is not None
    reached = np.abs(sets @ effect) >= np.abs(effect[mask].sum()) * (1 - 1e-9)
    return float((1 + reached.sum()) / 21)


# -- networks ----------------------------------------------------------------------------------------------------------


@register("connectivity", "largest |r| of all pairs", T=(200,), AR=(0.0, 0.9), networks=(5,))
def network_pairs(rng: np.random.Generator, T: int, AR: float, networks: int) -> float:
    """Time courses without connections."""
    runs = [ar_noise(rng, (T, networks), AR) for _ in range(2)]
    return float(np.nanmin(connectivity(runs, n_permutations=99, random_state=int(rng.integers(2**31))).p_fwe))


@register("dynamics_test", "largest change over windows of all pairs", T=(300,), AR=(0.6,), networks=(4,))
def dynamics(rng: np.random.Generator, T: int, AR: float, networks: int) -> float:
    """Connections that stay as they are."""
    run = ar_noise(rng, (T, networks), AR) @ (np.eye(networks) + 0.4)
    return float(dynamics_test([run], n_permutations=99, random_state=int(rng.integers(2**31))).p_fwe.min())


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """As the docs show it."""
    lines = ["| test | situation | p <= .05 in | 95% interval | the package warns in |", "|---|---|---|---|---|"]
    lines += [
        f"| `{row['test']}` | {row['situation']} | {row['level']:.3f} | {row['low']:.3f} to {row['high']:.3f} | "
        f"{row['warned']:.0%} |" for row in rows
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the cases and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--only", nargs="*", default=None, help=f"of {', '.join(CASES)}")
    parser.add_argument("--out", type=Path, default=RESULTS / "calibration.md")
    arguments = parser.parse_args()
    chosen = [case for name, case in CASES.items() if not arguments.only or name in arguments.only]
    kept = arguments.out.with_suffix(".json")
    rows: list[dict[str, object]] = json.loads(kept.read_text()) if kept.is_file() else []
    for case in chosen:
        for cell in case.cells:
            start = time.perf_counter()
            row = run(case, cell, arguments.draws)
            rows = [r for r in rows if (r["test"], r["situation"]) != (row["test"], row["situation"])] + [row]
            print(f"{row['test']}, {row['situation']}: {row['level']:.3f} ({time.perf_counter() - start:.0f} s)"
                  f"{'' if held(row) else '  <-- outside'}", flush=True)  # fmt: skip
            kept.write_text(json.dumps(rows, indent=1) + "\n")
            arguments.out.write_text(table(rows))


if __name__ == "__main__":
    main()

"""Does every test of the package hold its level? Each is run many times where there is nothing to find.

    python benchmarks/calibration.py [--only NAME ...] [--minutes 60] [--again]

A case (`calibration_cases.py`) is a function of a random generator that makes data under the null hypothesis and gives
one p-value (the smallest corrected one, where the test has several), and the situations it is run in: volumes,
autocorrelation, series, groups. `calibration_series.py` has the tests over time, `calibration_sets.py` those over runs
and neurons. The share of p <= .05 should be .05; a cell outside [.02, .08] must be one in which the package warns or
refuses, and the table says whether it did. Each cell has `--draws` draws, and `--most` where these end outside
[.03, .07] without a warning, so that chance puts few fair cells outside [.02, .08]; what takes long was run with fewer
(`--only`), and each row says how many it had.

A cell that is done is not run again, so that a run that was stopped goes on (and only writes the table where all are
done); `--minutes` stops it between two cells.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from calibration_cases import CASES, Case, Cell, register
from scipy.stats import binomtest
from sklearn.exceptions import ConvergenceWarning

from llmbrain._validation import InputError
from llmbrain.comparison.coupling import DeadSeriesWarning

import calibration_series  # isort: skip
import calibration_sets  # isort: skip

__all__ = ["CASES", "Case", "calibration_series", "calibration_sets", "held", "register", "run", "table"]

RESULTS = Path(__file__).parent / "results"
ALPHA = 0.05
ALLOWED = (0.02, 0.08)
NEAR = (0.03, 0.07)  # beyond, more draws
OTHER = (DeadSeriesWarning, ConvergenceWarning)  # warnings that say nothing of the level


def situation(cell: Cell) -> str:
    """A cell in words."""
    return ", ".join(f"{k} {v}" for k, v in cell.items())


def run(case: Case, cell: Cell, n_draws: int, most: int | None = None, seed: int = 0) -> dict[str, object]:
    """One row of the table: share of p <= .05 with its 95% interval, and how often the package warned or refused.

    Where the share of `n_draws` ends outside [.03, .07] without a warning, draws go on to `most`.
    """
    hits = warned = done = 0
    start = time.process_time()
    own = zlib.crc32(f"{case.name}: {situation(cell)}".encode())
    wanted = n_draws
    while done < wanted:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                hits += case.draw(np.random.default_rng([seed, own, done]), **cell) <= ALPHA
                refused = False
            except InputError:
                refused = True
        warned += refused or any(
            issubclass(w.category, UserWarning) and not issubclass(w.category, OTHER) for w in said
        )
        done += 1
        if done == n_draws and most is not None and warned < done / 2:
            low = 0.0 if case.at_most else NEAR[0]
            wanted = n_draws if low <= hits / done <= NEAR[1] else most
    interval = binomtest(hits, done).proportion_ci()
    return {
        "test": case.name, "situation": situation(cell), "level": hits / done, "low": interval.low,
        "high": interval.high, "warned": warned / done, "draws": done, "at_most": case.at_most,
        "seconds": round(time.process_time() - start, 1),
    }  # fmt: skip


def held(row: Mapping[str, object]) -> bool:
    """Whether a row is as it should be: within [.02, .08], or warned of (or refused) in most draws."""
    low = 0.0 if row["at_most"] else ALLOWED[0]
    return bool(low <= row["level"] <= ALLOWED[1]) or row["warned"] > 0.5  # type: ignore[operator]


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """As the docs show it: a part for every test."""
    seconds = sum(float(row["seconds"]) for row in rows)  # type: ignore[arg-type]
    outside = sum(not held(row) for row in rows)
    loud = sum(row["warned"] > 0.5 for row in rows)  # type: ignore[operator]
    lines = [
        f"{len(rows)} situations, {seconds / 60:.0f} minutes on one core; {outside} of them are outside [.02, .08] "
        f"without a warning of the package, in {loud} it warns or refuses.", "",
    ]  # fmt: skip
    for name in dict.fromkeys(str(row["test"]) for row in rows):
        case = CASES.get(name)
        note = "" if case is None or not case.note else f": {case.note}"
        lines += [f"**`{name}`**{note}.", ""]
        share = "share" if case is not None and case.at_most else "p <= .05 in"
        lines += [f"| situation | {share} | 95% interval | it warns or refuses in | draws |", "|---|---|---|---|---|"]
        lines += [
            f"| {row['situation'] or 'as it is'} | {row['level']:.3f} | {row['low']:.3f} to {row['high']:.3f} | "
            f"{row['warned']:.0%} | {row['draws']:,} |" for row in rows if row["test"] == name
        ]  # fmt: skip
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Run the cases and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=400)
    parser.add_argument("--most", type=int, default=2000, help="draws where --draws end outside [.03, .07]")
    parser.add_argument("--only", nargs="*", default=None, help=f"of {', '.join(CASES)}")
    parser.add_argument("--minutes", type=float, default=60.0, help="begin no cell after so much time of a core")
    parser.add_argument("--again", action="store_true", help="also what is done")
    parser.add_argument("--out", type=Path, default=RESULTS / "calibration.md")
    arguments = parser.parse_args()
    kept = arguments.out.with_suffix(".json")
    before: list[dict[str, object]] = json.loads(kept.read_text()) if kept.is_file() else []
    rows = {(str(row["test"]), str(row["situation"])): row for row in before if "seconds" in row}
    start = time.process_time()

    def write() -> None:
        wanted = [(c.name, situation(cell)) for c in CASES.values() for cell in c.cells]
        shown = [rows[k] for k in wanted if k in rows]
        kept.write_text(json.dumps(shown, indent=1) + "\n")
        arguments.out.write_text(table(shown))

    for case in CASES.values():
        if arguments.only and case.name not in arguments.only:
            continue
        for cell in case.cells:
            key = case.name, situation(cell)
            known = int(rows[key]["draws"]) if key in rows else 0  # type: ignore[call-overload]
            if known >= arguments.draws and not arguments.again:
                continue
            if time.process_time() - start > 60 * arguments.minutes:
                write()
                sys.exit(f"{arguments.minutes:g} minutes are over: the same call goes on")
            rows[key] = row = run(case, cell, arguments.draws, arguments.most)
            print(f"{case.name}, {key[1]}: {row['level']:.3f} of {row['draws']}, warned {row['warned']:.0%} "
                  f"({row['seconds']} s){'' if held(row) else '  <-- outside'}", flush=True)  # fmt: skip
            write()
    write()


if __name__ == "__main__":
    main()

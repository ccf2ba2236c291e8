"""How well known sources are found again: `GroupICA` beside nilearn's CanICA and DictLearning, on every phantom cell.

    python benchmarks/phantom.py [--seeds 5] [--quick] [--only CELL]

The score is |r| between each true map and the estimate matched to it (one to one), in the space of unit-variance
neurons (see `Phantom.standardized`); the tables give the mean over sources and seeds, the worst source, and seconds.
All methods get the same runs, z-scored over tokens, and the true number of sources (a position source counts).
nilearn's estimators run at their defaults apart from what an image of neurons needs (no smoothing, no resampling).
CanICA cuts its maps off, which helps where the truth is sparse: so both are given with that same cut-off
(`rethreshold("auto")` is its rule) and without. DictLearning's maps are sparse by themselves. The table is printed as
it comes, losses included.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import llmbrain as lb
from llmbrain.datasets.phantom import PHANTOM_CELLS, Phantom, make_phantom

RESULTS = Path(__file__).parent / "results" / "phantom.json"
EXTRAS: dict[str, dict[str, Any]] = {
    "slow (AR .9)": {"overlap": 0.2, "cnr": 1.0, "relocation": 0.05, "ar": 0.9},
    "heavy tails (t3)": {"overlap": 0.2, "cnr": 0.5, "relocation": 0.05, "noise": "t3"},
    "massive activations": {"overlap": 0.2, "cnr": 1.0, "relocation": 0.05, "outliers": 0.01},
    "position source x10": {"overlap": 0.2, "cnr": 1.0, "relocation": 0.05, "position_gain": 10.0},
    "missing neurons 10 %": {"overlap": 0.2, "cnr": 1.0, "relocation": 0.05, "missing": 0.1},
    "20 sources, 20,000 neurons": {
        "n_sources": 20, "n_neurons": 20_000, "overlap": 0.2, "cnr": 0.5, "relocation": 0.05, "n_runs": 6,
    },
}  # fmt: skip


def n_sources(phantom: Phantom) -> int:
    """How many components there are to find."""
    return len(phantom.maps) + (phantom.nuisance_map is not None)


Method = Callable[[Phantom, int], Any]


def ours(**options: Any) -> Method:
    """`GroupICA` with these options."""

    def run(phantom: Phantom, seed: int) -> Any:
        return lb.GroupICA(n_sources(phantom), random_state=seed, **options).fit(phantom.scans).components_

    return run


def ours_cut_off(**options: Any) -> Method:
    """`GroupICA` with CanICA's cut-off: the networks, not the raw maps."""

    def run(phantom: Phantom, seed: int) -> Any:
        ica = lb.GroupICA(n_sources(phantom), random_state=seed, **options).fit(phantom.scans)
        networks = lb.FunctionalNetworks.from_ica(ica).rethreshold("auto")
        return networks.maps * networks.masks

    return run


def nilearn_method(name: str, **options: Any) -> Method:
    """An estimator of `nilearn.decomposition` on the scans as images."""

    def run(phantom: Phantom, seed: int) -> Any:
        from nilearn import decomposition

        space = phantom.space
        images = [lb.maps_to_nifti(scan.data(), space) for scan in phantom.scans]
        estimator = getattr(decomposition, name)(
            n_components=n_sources(phantom), mask=space.mask_img(), smoothing_fwhm=None, standardize="zscore_sample",
            standardize_confounds=False, detrend=False, random_state=seed, n_jobs=1, verbose=0, **options,
        )  # fmt: skip
        estimator.fit(images)
        return space.from_volume(estimator.components_img_.get_fdata())

    return run


METHODS: dict[str, Method] = {
    "GroupICA": ours(),
    "CanICA, no cut-off": nilearn_method("CanICA", threshold=None),
    "GroupICA, cut off": ours_cut_off(),
    "CanICA": nilearn_method("CanICA"),
    "GroupICA, cca, cut off": ours_cut_off(cca=True, n_init=10),
    "DictLearning": nilearn_method("DictLearning"),
}


def measure(cells: dict[str, dict[str, Any]], seeds: int, methods: dict[str, Method]) -> pd.DataFrame:
    """One row for each cell, method and seed."""
    rows = []
    for cell, settings in cells.items():
        for seed in range(seeds):
            phantom = make_phantom(**settings, random_state=seed)
            for name, method in methods.items():
                start = time.perf_counter()
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # convergence shows in the score
                    maps = method(phantom, seed)
                seconds = time.perf_counter() - start
                score = phantom.score(maps)
                rows.append(
                    {
                        "cell": cell, "method": name, "seed": seed, "seconds": seconds,
                        "mean": score["map_r_mean"], "min": score["map_r_min"], "median": score["map_r_median"],
                    }
                )  # fmt: skip
                print(
                    f"{cell:28s} seed {seed}  {name:22s} mean r {score['map_r_mean']:.3f}  {seconds:6.1f} s", flush=True
                )
    return pd.DataFrame(rows)


def main() -> None:
    """Measure, print, and write ``benchmarks/results/phantom.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="the five named cells, one seed")
    parser.add_argument("--only", metavar="CELL", help="measure this cell again; the other rows stay as they are")
    arguments = parser.parse_args()
    cells = {name: dict(cell.settings) for name, cell in PHANTOM_CELLS.items()}
    if not arguments.quick:
        cells |= EXTRAS
    names = list(cells)
    if arguments.only:
        cells = {arguments.only: cells[arguments.only]}
    frame = measure(cells, 1 if arguments.quick else arguments.seeds, METHODS)
    if arguments.only:
        known = pd.DataFrame(json.loads(RESULTS.read_text(encoding="utf-8"))["rows"])
        frame = pd.concat([known[known["cell"] != arguments.only], frame])
        frame = frame.sort_values("cell", key=lambda cell: cell.map(names.index), kind="stable")
    order = list(METHODS)
    for column in ("mean", "min", "seconds"):
        how = "min" if column == "min" else "mean"
        table = frame.pivot_table(index="cell", columns="method", values=column, aggfunc=how, sort=False)[order]
        print(f"\n{'|r| with the truth, ' if column != 'seconds' else ''}{column}\n{table.round(3).to_string()}")
    if not arguments.quick:
        RESULTS.parent.mkdir(exist_ok=True)
        record = {
            "machine": {"cpu": platform.processor(), "python": platform.python_version(), "numpy": np.__version__},
            "rows": json.loads(frame.to_json(orient="records")),
        }
        RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

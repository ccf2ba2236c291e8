"""The real question, on Alice: do networks of a language model explain language regions beyond simple controls?

    python benchmarks/comparison.py MODEL [MODEL ...] [--alice FOLDER] [--components 10] [--seeds 3]

27 people listened to chapter 1 of Alice in Wonderland (Brennan et al. 2016); six language regions. For every model, and
for a copy of it with random weights: coupling of network time courses with the regions beyond word rate, sound power,
position and log frequency; similarity (CKA); what the networks add to the held-out prediction of an encoding model; and
the same of the trained model with the untrained one's networks among the controls. Every number stands beside its null
(the series moved in time), intervals are bootstraps over listeners, and all is repeated with other seeds (of the ICA,
of the random weights, of the null). Writes benchmarks/results/comparison.json and .md, whatever comes out.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from llmbrain.comparison import Comparison, compare
from llmbrain.datasets import fetch_alice

RESULTS = Path(__file__).parent / "results"


def run(model: str, alice: dict[str, Any], arguments: argparse.Namespace, seed: int) -> Comparison:
    """One comparison with one seed."""
    text = arguments.text.read_text(encoding="utf-8") if arguments.text else None
    return compare(
        model, alice["fmri"], alice["annotations"], tr=alice["tr"], offset=alice["offset"], text=text,
        regions=alice["regions"], controls={"sound power": np.loadtxt(alice["sound_power"])},
        n_components=arguments.components, untrained=True, random_state=seed,
    )  # fmt: skip


def rows_of(name: str, seed: int, result: Comparison) -> list[dict[str, Any]]:
    """One row for trained, untrained, and trained beyond untrained."""
    rows = []
    for row in result.tables["summary"].to_dict("records"):
        extra = {}
        if row["weights"] != "untrained":
            table = "encoding" if row["weights"] == "trained" else "encoding_beyond_untrained"
            gains = result.tables[table]
            extra = {
                f"subject_gain{part}": float(gains[f"subject_gain{part}"].mean()) for part in ("", "_low", "_high")
            }
        rows.append({"model": name, "seed": seed, **row, **extra})
    return rows


def regions_of(name: str, seed: int, result: Comparison) -> pd.DataFrame:
    """Gain of the trained networks in each region, beyond the controls and beyond the untrained copy too."""
    frames = []
    for table, beyond in (("encoding", "controls"), ("encoding_beyond_untrained", "controls, untrained copy")):
        frame = result.tables[table]
        columns = ["r", "gain_networks", "gain_networks_p_corrected", "subject_gain", "subject_gain_low",
                   "subject_gain_high"]  # fmt: skip
        frames.append(frame[["target", *columns]].assign(beyond=beyond))
    return pd.concat(frames).assign(model=name, seed=seed)


def markdown(record: dict[str, Any]) -> str:
    """The page."""
    rows, regions = pd.DataFrame(record["models"]), pd.DataFrame(record["regions"])
    seeds, k = rows["seed"].nunique(), record["components"]

    def spread(values: pd.Series, digits: int = 3) -> str:
        return f"{values.mean():.{digits}f} ({values.min():.{digits}f} to {values.max():.{digits}f})"

    known = pd.DataFrame(record["controls"]).rename(columns={"p_corrected": "p (FWE)", "ceiling": "ceiling of r"})
    models = []
    for (model, weights), part in rows.groupby(["model", "weights"], sort=False):
        models.append({
            "model": model, "weights": weights, "largest r": spread(part["largest_r"]),
            "needed": spread(part["threshold"]), "seeds with a pair": f"{int((part['n_significant'] > 0).sum())} of "
            f"{seeds}", "CKA beyond controls": spread(part["cka"]), "CKA p": spread(part["cka_p"]),
            "gain in held-out r": spread(part["gain_networks"]), "smallest gain p (FWE)": spread(
                part["gain_smallest_p"]),
        })  # fmt: skip
    single = []
    for (model, beyond, region), part in regions.groupby(["model", "beyond", "target"], sort=False):
        low, high = part["subject_gain_low"].mean(), part["subject_gain_high"].mean()
        single.append({
            "model": model, "beyond": beyond, "region": region, "gain, group": spread(part["gain_networks"]),
            "p (FWE)": spread(part["gain_networks_p_corrected"]),
            "gain, single listener": f"{part['subject_gain'].mean():.3f} ({low:.3f} to {high:.3f})",
        })  # fmt: skip
    counts = {}
    for weights, part in rows.groupby("weights", sort=False):
        counts[weights] = [
            f"{int(hits.sum())} of {len(part)}" for hits in (part["n_significant"] > 0, part["gain_smallest_p"] <= 0.05)
        ]
    answer = (
        f"With p at most .05, corrected over all pairs or regions, in single runs (models x seeds): some pair of "
        f"network and region couples beyond the controls in {counts['trained'][0]} (untrained copies: "
        f"{counts['untrained'][0]}), and beyond controls and untrained copy in "
        f"{counts['trained beyond untrained'][0]}; held-out prediction gains in some region in {counts['trained'][1]} "
        f"(untrained copies: {counts['untrained'][1]}), beyond both in {counts['trained beyond untrained'][1]}. All "
        "runs use the same story and the same listeners: they are not independent of each other, and no correction "
        "over runs is made."
    )
    mirrored = record["mirrored"]
    return "\n\n".join([
        "Do network time courses of a language model that reads Alice explain six language regions of 27 listeners "
        "beyond word rate, sound power, position and log frequency, and beyond an untrained copy?",
        answer,
        f"{k} networks a model, {seeds} seeds; mean (smallest to largest) over seeds. FWE: the largest of all pairs, "
        f"or regions, in each null draw ({record['n_permutations']} circular shifts for coupling, "
        f"{record['n_permutations_encoding']} for encoding).",
        pd.DataFrame(models).to_markdown(index=False),
        "What the trained networks add to held-out prediction in each region. Single listener: mean over seeds, with "
        "the 95% interval over listeners, who all heard the same story: it says nothing about other stories, the p "
        "does.",
        pd.DataFrame(single).to_markdown(index=False),
        "The control that must work, the word rate (r with the mean of the listeners), with intersubject correlation "
        "and ceiling:",
        known.to_markdown(index=False, floatfmt=".3f"),
        f"Words mirrored in time: largest r {mirrored['largest_r']:.3f}, smallest p (FWE) {mirrored['p']:.3f}.",
    ]) + "\n"  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="paths or ids of models")
    parser.add_argument("--alice", help="folder with the public files (default: fetched)")
    parser.add_argument("--text", type=Path, help="the story with punctuation (default: the annotated words)")
    parser.add_argument("--components", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the two files")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)
    alice = fetch_alice(arguments.alice)
    start, rows, regions = time.perf_counter(), [], []
    for model in arguments.models:
        for seed in range(arguments.seeds):
            result = run(model, alice, arguments, seed)
            name = Path(model).name
            rows += rows_of(name, seed, result)
            regions.append(regions_of(name, seed, result))
            print(f"{time.perf_counter() - start:.0f} s", name, f"seed {seed}", *result.findings(), sep="\n  ")
    known, mirrored = result.tables["controls"], result.tables["mirrored"]
    rate = known[known["network"] == "word rate"].merge(result.tables["ceilings"][["region", "isc"]], on="region")
    record = {
        "components": arguments.components, "n_permutations": result.report["n_permutations"],
        "n_permutations_encoding": len(result.encoding.null_max) if result.encoding is not None else 0, "models": rows,
        "regions": pd.concat(regions).to_dict("records"),
        "controls": rate[["region", "r", "p_corrected", "isc", "ceiling"]].to_dict("records"),
        "mirrored": {"largest_r": float(mirrored["r"].abs().max()), "p": float(mirrored["p_corrected"].min())},
        "excluded": result.report["excluded"], "seconds": round(time.perf_counter() - start),
    }  # fmt: skip
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "comparison.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (arguments.out / "comparison.md").write_text(markdown(record), encoding="utf-8")
    print(markdown(record))


if __name__ == "__main__":
    main()

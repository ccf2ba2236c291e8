"""The real question, on Alice: do networks of a language model explain language regions beyond simple controls?

    python benchmarks/comparison.py MODEL [MODEL ...] --alice FOLDER [--text FILE] [--components 10]

For every model and for a copy with random weights: coupling of network time courses with the six regions beyond word
rate, sound power, position and log frequency (circular shifts, largest of all pairs), CKA and the gain of an encoding
model, with their nulls. Prints a table of what comes out, whatever it is.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import numpy as np
import pandas as pd

from llmbrain.comparison import compare
from llmbrain.datasets import fetch_alice


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="paths or ids of models")
    parser.add_argument("--alice", help="folder with the public files (default: fetched)")
    parser.add_argument("--text", type=Path, help="the story with punctuation (default: the annotated words)")
    parser.add_argument("--components", type=int, default=10)
    parser.add_argument("--no-encoding", action="store_true")
    parser.add_argument("--out", type=Path, help="folder for all tables")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)
    alice = fetch_alice(arguments.alice)
    text = arguments.text.read_text(encoding="utf-8") if arguments.text else None
    rows = []
    for name in arguments.models:
        result = compare(
            name, alice["fmri"], alice["annotations"], tr=alice["tr"], offset=alice["offset"], text=text,
            regions=alice["regions"], controls={"sound power": np.loadtxt(alice["sound_power"])},
            n_components=arguments.components, untrained=True, encoding=not arguments.no_encoding,
            out=arguments.out / Path(name).name if arguments.out else None,
        )  # fmt: skip
        summary = result.tables["summary"]
        summary.insert(0, "model", Path(name).name)
        rows.append(summary)
    known = result.tables["controls"]
    rate = known[known["network"] == "word rate"][["region", "r", "p_corrected", "ceiling"]]
    print("word rate (control)", rate.round(3).to_string(index=False), sep="\n", end="\n\n")
    print("mirrored words, largest |r|:", result.tables["mirrored"]["r"].abs().max().round(3),
          "smallest corrected p:", result.tables["mirrored"]["p_corrected"].min().round(3), end="\n\n")  # fmt: skip
    print(pd.concat(rows).round(3).to_string(index=False))


if __name__ == "__main__":
    main()

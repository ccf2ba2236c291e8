"""Perplexity of every way of pruning on a model and text: ``python benchmarks/pruning.py MODEL --text FILE``.

The text is split: the first half calibrates, the last three tenths are the test. Writes a Markdown table and a CSV.

    python benchmarks/pruning.py ../shared/data/models/stories260K --text ../shared/data/corpora/tinystories-1000.json \
        --window 256 --out stories.csv
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import llmbrain as lb
from llmbrain.pruning.benchmark import compare_methods


def read_texts(path: Path) -> list[str]:
    """A JSON list of texts, or one text cut into pieces of 2,000 characters."""
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if path.suffix == ".json" else [text[i : i + 2000] for i in range(0, len(text), 2000)]


def main() -> None:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.3, 0.5])
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--draws", type=int, default=1)
    parser.add_argument("--window", type=int)
    parser.add_argument("--max-windows", type=int, default=128)
    parser.add_argument("--test-windows", type=int, default=96)
    parser.add_argument("--networks", type=int, default=20, help="components of the group ICA; 0 for none")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    model, tokenizer = lb.load_model(options.model)
    texts = read_texts(options.text)
    head, tail = texts[: len(texts) // 2], texts[len(texts) * 7 // 10 :]
    networks = None
    if options.networks and (options.methods is None or "networks" in options.methods):
        ica = lb.GroupICA(n_components=options.networks, random_state=0).fit(lb.scan(model, tokenizer, head[:24]))
        networks = lb.FunctionalNetworks.from_ica(ica)
    table = compare_methods(
        model, tokenizer, head, tail, ratios=options.ratios, methods=options.methods, networks=networks,
        draws=options.draws, window=options.window, max_windows=options.max_windows, test_windows=options.test_windows,
    )  # fmt: skip
    wide = table.iloc[1:].pivot_table(
        index=["method", "allocation", "compensate"], columns="ratio", values="perplexity", sort=False, dropna=False
    )
    print(f"dense {table['perplexity'][0]:.4f}")
    print(wide.dropna(how="all").round(3).to_string())
    print(table[["method", "allocation", "ratio", "seconds"]].to_string())
    if options.out is not None:
        table.to_csv(options.out, index=False)


if __name__ == "__main__":
    main()

"""The page of the rows, as Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pandas as pd

from real_parts.rows import ROWS

TESTS = ("WikiText-2", "TinyStories", "tinyshakespeare")
ORDER = {row.label: i for i, row in enumerate(ROWS)}
BEST = 1.02  # times the best row of a column: bold


def table(rows: Sequence[dict[str, Any]], machine: str) -> pd.DataFrame:
    """One line a row, test and draw; a row of another machine than this says so."""

    def label(row: dict[str, Any]) -> str:
        elsewhere = row.get("machine", machine) != machine
        return row["label"] + (f" ({row['machine'].split(',')[0]})" if elsewhere else "")

    return pd.DataFrame([
        {"tokens": r["tokens"], "ratio": r["ratio"], "label": label(r), "draw": r["draw"], "test": test, **score}
        for r in rows for test, score in r["scores"].items()
    ])  # fmt: skip


def grid(found: pd.DataFrame) -> list[str]:
    """Perplexities of one ratio and size, the rows in order; PIQA where it was measured."""
    tests = [*TESTS, *(["PIQA"] if "PIQA" in set(found["test"]) else [])]
    lines = [f"| row | {' | '.join(TESTS)} |" + (" PIQA, % right |" if len(tests) > 3 else ""),
             "|---|" + "---|" * len(tests)]  # fmt: skip
    cells = found.groupby(["label", "test"])
    mean = cells["perplexity"].mean().unstack("test")
    tuned = mean.index.str.contains("LoRA")  # trained on: beside each other only
    cut = ~mean.index.str.startswith("nothing removed")
    best = {kind: mean.loc[(tuned == kind) & cut, list(TESTS)].min() for kind in (False, True)}
    for label in sorted(mean.index, key=lambda name: ORDER.get(re.sub(r" \(.*", "", name), len(ORDER))):
        shown = []
        for test in TESTS:
            here = cells.get_group((label, test))
            value = f"{mean.loc[label, test]:.1f}"
            known = best["LoRA" in label][test]
            value = f"**{value}**" if mean.loc[label, test] <= BEST * known else value
            if len(here) > 1:
                value += f" [{here['perplexity'].min():.1f}, {here['perplexity'].max():.1f}]"
            shown.append(f"{value} ({here['bits_a_byte'].mean():.3f})")
        if "PIQA" in tests:
            there = (label, "PIQA") in cells.groups
            shown.append(f"{100 * cells.get_group((label, 'PIQA'))['acc'].mean():.1f}" if there else "")
        lines.append(f"| {label} | " + " | ".join(shown) + " |")
    return lines


def page(found: Sequence[dict[str, Any]]) -> str:
    """All tables."""
    rows = [r for r in found if "scores" in r]
    dense = next((r for r in reversed(found) if "dense" in r), {"dense": {}, "machine": ""})
    errors = [r for r in found if "error" in r]
    setting = next((r for r in reversed(found) if "command" in r), {"command": "", "test_tokens": 0})
    whole = [f"{t} {v['perplexity']:.1f} ({v['bits_a_byte']:.3f})" for t, v in dense["dense"].items() if t != "PIQA"]
    right = dense["dense"].get("PIQA", {}).get("acc")
    lines = [
        "# A real model: SmolLM2-135M-Instruct (4-bit GGUF, dequantized)", "",
        f"`{setting['command']}`; {dense['machine']}. {len(rows)} rows, the most valuable first; what is not here "
        "was not measured.", "",
        f"Perplexity a token of {setting['test_tokens']:,} tokens of each text in windows of 512 (in brackets bits a "
        "byte), mean over draws of calibration text where there are more [lowest, highest]; bold: at most 1.02 times "
        "the best row with neurons removed (of those that LoRA trained, or of the others). "
        f"Dense: {', '.join(whole)}" + (f"; PIQA {100 * right:.1f}% right" if right else "") + ".", "",
        "Repaired by least squares where nothing else is said. *ends kept*: the first 3 and last 2 layers are not cut. "
        "*own text beside*: half as many windows as the text has, written by the model, are calibrated on too (*as "
        "much*, *twice as much*: so many). A machine in brackets: of that one, with another draw of own text "
        "(`python benchmarks/real.py --only LABEL --ratios R --draws N --tokens T --sizes`). LoRA: steps of 8 "
        "windows, of 256 windows of the text that is calibrated on.", "",
    ]  # fmt: skip
    if rows:
        every = table(rows, dense["machine"])
        for (tokens, ratio), part in every.groupby(["tokens", "ratio"]):
            part = part[part["draw"].notna()]
            lines += [f"## {ratio:.0%} of the MLP neurons removed, {tokens:,} calibration tokens", "", *grid(part), ""]
    if errors:
        lines += ["Not measured, because of an error: " + "; ".join(f"{e['task']} ({e['error']})" for e in errors), ""]
    return "\n".join(lines) + "\n"

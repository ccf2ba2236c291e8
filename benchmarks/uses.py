"""What networks are for: every use beside its controls, ``python benchmarks/uses.py {demo,stories260K,smollm2}``.

Parts (``--only``): ``forecast``, ``functions``, ``rivals``, ``allocation``, ``forgetting``. Every row is written to
``benchmarks/results/uses.json`` when it is done, a second call goes on from there, and ``uses.md`` is made from it.
The lesions of ``rivals`` need known abilities, so they run on the demo brain only. A model trained without an ability
(``python data/build_demo.py --without ABILITY --out GOLD/ABILITY``) joins ``forgetting`` by ``--gold GOLD``.

Several processes share the work by ``--items`` (abilities, contrasts, rows of a part), ``--methods`` (of
``forgetting``) and ``--draw``, each appending its rows to ``--rows FILE``; ``python benchmarks/uses.py join --rows
FILE`` then takes them in. ``--minutes`` stops between rows.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from uses_parts import allocation, forecast, forgetting, functions, rivals
from uses_parts.subject import Subject

RESULTS = Path(__file__).parent / "results"
MODELS = ("demo", "stories260K", "smollm2")
PAGES = {"forecast": forecast.page, "functions": functions.page, "rivals": rivals.page, "allocation": allocation.page,
         "forgetting": forgetting.page}  # fmt: skip
# What tells rows of a part apart.
KEYS = {"forecast": ("plan",), "functions": ("contrast", "draw"), "rivals": ("label", "kind", "draw"),
        "allocation": ("allocation", "ratio", "draw"), "forgetting": ("ability", "method", "draw")}  # fmt: skip


def rows_of(part: str, name: str, options: argparse.Namespace, known: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows of a part that are not there yet."""

    def subject(draw: int) -> Subject:
        return Subject(name, options.data, draw, options.device)

    if part == "forgetting":
        if name != "stories260K":
            draw = options.draw or 0
            done = {(r["ability"], r["method"]) for r in known if r.get("draw", 0) == draw}
            yield from forgetting.rows(subject(draw), options.gold, done, options.items, options.methods,
                                       options.attacks, quick=options.quick)  # fmt: skip
        return
    draws = range(1 if name == "smollm2" or part == "forecast" else options.draws)
    for draw in draws if options.draw is None else [options.draw]:
        here = [r for r in known if r.get("draw", 0) == draw]
        if part == "forecast":
            yield from forecast.rows(subject(draw), {r["plan"] for r in here})
        elif part == "functions":
            yield from functions.rows(subject(draw), {r["contrast"] for r in here}, options.items)
        elif part == "rivals" and name != "smollm2":
            yield from rivals.rows(subject(draw), {(r["label"], r["kind"]) for r in here}, options.items, options.kinds)
        elif part == "allocation":
            ratios = (0.3,) if name == "smollm2" else (0.1, 0.3, 0.5)
            yield from allocation.rows(subject(draw), ratios, {(r["allocation"], r["ratio"]) for r in here},
                                       options.items)  # fmt: skip


def page(results: dict[str, Any]) -> str:
    """All tables, as Markdown."""
    lines = ["# What networks are for", ""]
    lines += [PAGES[part](parts[part], name) for name, parts in results.items() for part in PAGES if parts.get(part)]
    return "\n".join(lines)


def add(file: Path, name: str, part: str, rows: list[dict[str, Any]]) -> None:
    """Take rows into the file of all results; one that is there already is replaced."""
    results = read(file)  # another call may have written another part meanwhile
    held = results.setdefault(name, {}).setdefault(part, [])

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row.get(k, 0) for k in KEYS[part])

    fresh = {key(r): r for r in rows}
    results[name][part] = [fresh.pop(key(r), r) for r in held] + list(fresh.values())
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".part")
    partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    partial.replace(file)


def read(file: Path) -> dict[str, Any]:
    """All results so far."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def written(file: Path | None, name: str, part: str) -> list[dict[str, Any]]:
    """Rows of a part that were appended to a file so far; a line that was cut off is no row."""
    if file is None or not file.is_file():
        return []
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if (row["model"], row["part"]) == (name, part):
            rows.append(row["row"])
    return rows


def join(file: Path, rows: Path) -> None:
    """Take in the rows of a file that several processes appended to."""
    for name in MODELS:
        for part in PAGES:
            if found := written(rows, name, part):
                add(file, name, part, found)


def main() -> None:
    """Run what is not there yet, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=(*MODELS, "join"))
    parser.add_argument("--only", choices=PAGES, action="append", help="only these parts")
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--draw", type=int, help="only this draw")
    parser.add_argument("--items", nargs="*", help="abilities, contrasts or rows of a part; default all")
    parser.add_argument("--methods", nargs="*", help="of forgetting; default all")
    parser.add_argument("--kinds", nargs="*", help="of rivals: halves, lesions, choice of neurons, forecast, criterion")
    parser.add_argument("--attacks", nargs="*", help="of forgetting: numbers of lines, unrelated; default all")
    parser.add_argument("--quick", action="store_true", help="of forgetting: half of the tokens for our repair")
    parser.add_argument("--gold", type=Path, help="folder with a model an ability, trained without it")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=Path, help="append rows to this file, and make no page")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no further row after so long")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    file, began = options.out / "uses.json", time.monotonic()
    if options.model == "join":
        join(file, options.rows)
    if options.device != "cpu":
        torch.set_float32_matmul_precision("high")
    for part in () if options.model == "join" else options.only or PAGES:
        known = read(file).get(options.model, {}).get(part, []) + written(options.rows, options.model, part)
        for row in rows_of(part, options.model, options, known):
            if options.rows:
                line = json.dumps({"model": options.model, "part": part, "row": row}) + "\n"
                with open(os.open(options.rows, os.O_APPEND | os.O_CREAT | os.O_WRONLY, 0o644), "wb", 0) as out:
                    out.write(line.encode())  # one write: lines of several processes never mix
            else:
                add(file, options.model, part, [row])
            print(part, json.dumps(row)[:200], f"({time.monotonic() - began:.0f} s)", flush=True)
            if time.monotonic() - began > 60 * options.minutes:
                break
    if options.rows and options.model != "join":
        return
    results = read(file)
    (options.out / "uses.md").write_text(page(results), encoding="utf-8")
    print(page(results if options.model == "join" else {options.model: results.get(options.model, {})}))


if __name__ == "__main__":
    main()

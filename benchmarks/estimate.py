"""What `llmbrain estimate` computes beside what was measured: ``python benchmarks/estimate.py [--only WORDS]``.

Seconds and peak memory of each step for the demo brain (1.06 million parameters), SmolLM2-135M (GGUF, float32 once
loaded) and one block of a random model of 1.1 billion parameters (a block and its repair take minutes each; the
estimate is of the same one block). One thread; seconds are of the processor, so that other programs on the machine do
not count, of both sides. The estimate sees the config only, and times its pieces before anything is loaded. Rows are
written as they come to ``benchmarks/results/estimate.json``; a second call goes on from there; ``estimate.md`` is made
from it, with what is computed for 7B, 70B and a mixture of 235B on GPUs, which was not measured.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import llmbrain as lb
from llmbrain.datasets import load_demo
from llmbrain.study.estimates import Estimate, estimate

RESULTS = Path(__file__).parent / "results"
SMOLLM = "models/smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf"
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "rms_norm_eps": 1e-5}
ONE_BLOCK = {**LLAMA, "dtype": "float32", "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 1,
             "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32000,
             "max_position_embeddings": 2048}  # fmt: skip
COMPUTED = {
    "7B (32 x 11,008)": {**LLAMA, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
                         "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
                         "max_position_embeddings": 4096},
    "70B (80 x 28,672)": {**LLAMA, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                          "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256,
                          "max_position_embeddings": 8192},
    "235B mixture (94 x 128 x 1,536)": {
        "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "dtype": "bfloat16", "hidden_size": 4096,
        "intermediate_size": 12288, "moe_intermediate_size": 1536, "num_experts": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 94, "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128,
        "vocab_size": 151936, "max_position_embeddings": 40960, "decoder_sparse_step": 1, "mlp_only_layers": [],
    },
}  # fmt: skip
ON = (("h100", 1), ("h100", 8), ("h100", 64))
JOBS: dict[str, dict[str, Any]] = {
    "1M (demo)": {"n_tokens": 4096, "window": 64, "run_length": 2048, "n_components": 20},
    "135M (SmolLM2)": {"n_tokens": 512, "window": 128, "run_length": 256, "n_components": 10,
                       "methods": ("random", "magnitude", "wanda-sp", "flap", "taylor", "obs", "obs-gradient")},
    "1.1B, one block": {"n_tokens": 2048, "window": 128, "run_length": 256, "n_components": 10,
                        "methods": ("random", "magnitude", "wanda-sp", "flap", "taylor", "obs")},
}  # fmt: skip
METHODS = ("random", "magnitude", "wanda-sp", "flap", "taylor", "obs", "obs-gradient", "networks")


def peak(*, reset: bool = False) -> float:
    """Largest memory of this process since the last reset, in bytes (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return float(line.split()[1]) * 1024


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def source_of(name: str, data: Path, folder: Path) -> Path:
    """What the estimate reads of a model."""
    if name.startswith("135M"):
        return data / SMOLLM
    file = folder / "config.json"
    if name.startswith("1M"):
        load_demo().model.config.to_json_file(file, use_diff=False)
    else:
        file.write_text(json.dumps(ONE_BLOCK))
    return file


def model_of(name: str, source: Path) -> tuple[Any, Any, Any]:
    """The model, its tokenizer, and token windows or texts for it."""
    if name.startswith("1M"):
        brain = load_demo()
        return brain.model, brain.tokenizer, brain.texts(n=40, n_tokens=600)
    if name.startswith("135M"):
        model, tokenizer = lb.load_model(source)
        return model, tokenizer, None
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return (
        LlamaForCausalLM(LlamaConfig(**{k: v for k, v in ONE_BLOCK.items() if k != "architectures"})).eval(),
        None,
        None,
    )


def steps(name: str, source: Path, job: dict[str, Any], out: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Names of steps and what they do, one after the other."""
    model, tokenizer, texts = model_of(name, source)
    n, window = job["n_tokens"], job["window"]
    ids = torch.randint(3, 90, (n // window, window), generator=torch.Generator().manual_seed(0))
    if tokenizer is None:
        brain = load_demo()
        tokenizer, texts = brain.tokenizer, brain.texts(n=40, n_tokens=600)
    elif texts is None:
        words = [
            "the",
            "of",
            "and",
            "to",
            "in",
            "a",
            "is",
            "that",
            "it",
            "was",
            "for",
            "on",
            "with",
            "as",
            "his",
            "they",
            "at",
            "be",
            "this",
            "from",
            "have",
            "or",
            "by",
            "one",
            "had",
        ]
        texts = [" ".join(words[i % len(words)] for i in row.tolist()) for row in ids.repeat(2, 2)]
    texts = ["\n".join(texts)]  # one long text, cut into runs
    state: dict[str, Any] = {}

    def scan() -> None:
        state["scans"] = lb.scan(
            model, tokenizer, texts, out=out / "scan", run_length=job["run_length"], n_tokens=n, block_size=window
        )

    def ica() -> None:
        state["ica"] = lb.GroupICA(job["n_components"], random_state=0, progress=False).fit(state["scans"])

    def networks() -> None:
        state["networks"] = lb.FunctionalNetworks.from_ica(state["ica"], threshold=3.6)
        state["networks"].save(out / "networks")

    yield "scan", scan
    yield "group ICA", ica
    yield "networks", networks
    for method in job.get("methods", METHODS):

        def plan(method: str = method) -> None:
            more = {"networks": state["networks"]} if method == "networks" else {}
            state["plan"] = lb.plan_pruning(
                model, ratio=0.3, method=method, calibration=ids, max_windows=None, random_state=0, **more
            )  # fmt: skip

        yield f"plan ({method})", plan

    def repair() -> None:
        state["small"] = lb.prune(model, state["plan"], calibration=ids, max_windows=None, compensate="least-squares")

    yield "repair", repair
    yield "save", lambda: lb.save_pruned(state["small"], tokenizer, out / "small", overwrite=True)


def estimated(name: str, source: Path, timings: dict[str, float]) -> dict[str, dict[str, Any]]:
    """What is computed of each step; pieces of which the time is known are not timed again."""
    job = JOBS[name]
    options = {k: v for k, v in job.items() if k != "methods"}
    found: Estimate = estimate(
        source, methods=job.get("methods", METHODS), clock=time.process_time, timings=timings, **options
    )
    rows = {row["step"]: dict(row) for row in found.steps}
    for step in ("group ICA", "networks"):  # which need no model, but it stays in this process
        rows[step]["memory"] += found.subject.size
    return rows


def measure(name: str, data: Path, rows: dict[str, Any], write: Callable[[], None]) -> None:
    """Estimate first, then measure. The times of the pieces are kept, so that the table can be computed again."""
    with tempfile.TemporaryDirectory() as folder:
        source = source_of(name, data, Path(folder))
        timings: dict[str, float] = {}
        computed = estimated(name, source, timings)
        rows[f"{name}: pieces"] = timings
        write()
        for step, run in steps(name, source, JOBS[name], Path(folder)):
            peak(reset=True)
            start, disk = time.process_time(), size_of(Path(folder))
            run()
            row = {"measured_seconds": time.process_time() - start, "measured_memory": peak()}
            row["measured_disk"] = size_of(Path(folder)) - disk
            row |= {what: computed[step][what] for what in ("seconds", "memory", "disk")}
            rows[f"{name}: {step}"] = row
            took = f"{row['measured_seconds']:.3g} s, computed {row['seconds']:.3g} s"
            held = f"{row['measured_memory'] / 1e9:.2f} GB, computed {row['memory'] / 1e9:.2f} GB"
            print(f"{name}: {step}: {took}; {held}", flush=True)
            write()


def table(rows: dict[str, Any]) -> list[str]:
    """Measured beside computed, and their ratios."""
    if not rows:
        return ["Nothing was measured yet."]
    columns = " | ".join(f"{what} measured | computed | ratio" for what in ("seconds", "memory, GB", "disk, MB"))
    lines = [f"| model: step | {columns} |", "|---|" + "---|" * 9]
    for name, row in rows.items():
        if "measured_seconds" not in row:
            continue
        cells = [name]
        for what, unit in (("seconds", 1.0), ("memory", 1e9), ("disk", 1e6)):
            there, here = row[f"measured_{what}"] / unit, row[what] / unit
            none = what == "disk" and not here
            cells += ["", "", ""] if none else [f"{there:.3g}", f"{here:.3g}", f"{here / max(there, 1e-9):.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def again(rows: dict[str, Any], data: Path) -> None:
    """Compute what is computed once more, of the pieces that were timed; those that are missing are timed now."""
    for name in JOBS:
        if f"{name}: pieces" not in rows:
            continue
        with tempfile.TemporaryDirectory() as folder:
            found = estimated(name, source_of(name, data, Path(folder)), rows[f"{name}: pieces"])
        for step, row in found.items():
            if f"{name}: {step}" in rows:
                rows[f"{name}: {step}"] |= {what: row[what] for what in ("seconds", "memory", "disk")}


def computed() -> list[str]:
    """For models and machines that are not at hand."""
    columns = [f"{n} x {gpu.upper()}" for gpu, n in ON]
    lines = [
        f"| model: step | {' | '.join(f'{c}, seconds | GB a device' for c in columns)} |",
        "|---|" + "---|" * 2 * len(ON),
    ]
    with tempfile.TemporaryDirectory() as folder:
        for name, config in COMPUTED.items():
            file = Path(folder) / "config.json"
            file.write_text(json.dumps(config))
            found = [estimate(file, gpu=gpu, gpus=n, n_tokens=262144) for gpu, n in ON]
            lines.append(f"| **{name}**: {found[0].scan_bytes_per_1000_tokens / 1e9:.3g} GB of scan per 1,000 tokens |"
                         + " |" * 2 * len(ON))  # fmt: skip
            for parts in zip(*(f.steps for f in found)):
                cells = " | ".join(f"{p['seconds']:,.0f} | {p['memory'] / 1e9:,.0f}" for p in parts)
                lines.append(f"| {parts[0]['step']} | {cells} |")
    return lines


def main() -> None:
    """Measure what is asked for, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="models whose name holds this; 'computed' measures none")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the models")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    file = args.results / "estimate.json"
    rows: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}

    def write() -> None:
        order = sorted(rows, key=lambda key: [key.startswith(name) for name in JOBS], reverse=True)
        file.write_text(json.dumps({key: rows[key] for key in order}, indent=1) + "\n")

    for name in JOBS:
        if args.only in name:
            measure(name, args.data, rows, write)
    again(rows, args.data)
    write()
    text = [
        "# What `llmbrain estimate` computes", "", "`python benchmarks/estimate.py`; one thread, processor time.", "",
        "What networks, reading and saving take beside what is timed, and the gradient of the head, was fitted to "
        "these rows (`OF_...`, `..._VALUE` and `FIXED` of `llmbrain/study/estimates.py`).", "",
        *table(rows), "", "## Computed, not measured (262,144 tokens, ratio 0.3, published peaks)", "", *computed(), "",
    ]  # fmt: skip
    (args.results / "estimate.md").write_text("\n".join(text))


if __name__ == "__main__":
    main()

"""What planning and cutting cost, and what the cut gains: ``python benchmarks/pruning_speed.py``.

A Llama of 100M parameters with random weights. Costs are processor seconds on one thread, beside those of plain forward
passes over the same calibration tokens. Gains are wall-clock medians of `llmbrain.evaluation.latency`, dense and pruned
models in turns, beside what the removed floating-point operations promise.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import llmbrain as lb
from llmbrain.evaluation import latency
from llmbrain.hooks.text import batches, evaluating
from llmbrain.pruning.planner import PASSES as PLANNER_PASSES

# Passes over the calibration text: statistics (of FLAP) or a sequential choice, and the repair; a gradient pass counts
# as three; a search looks at the dense layers once, and takes what `llmbrain.pruning.planner.PASSES` allows.
PASSES = {"flap, uniform": 1 + 2, "obs, uniform": 2 + 2, "networks, search": 3 + 1 + PLANNER_PASSES + 2 + 2}


def build(layers: int, seed: int = 0) -> Any:
    """A Llama of 134M parameters at 12 layers (100M without one of the two embeddings)."""
    torch.manual_seed(seed)
    config = LlamaConfig(hidden_size=768, num_hidden_layers=layers, intermediate_size=2048, num_attention_heads=12,
                         num_key_value_heads=12, vocab_size=32000, max_position_embeddings=1024)  # fmt: skip
    return LlamaForCausalLM(config).eval()


def processor_seconds(call: Any) -> tuple[float, Any]:
    """Processor time of a call, and what it returned."""
    start = time.process_time()
    result = call()
    return time.process_time() - start, result


def costs(model: Any, tokens: int, methods: list[str]) -> list[dict[str, Any]]:
    """Plan and cut beside the forward passes that they need."""
    windows = torch.randint(0, 32000, (tokens // 512, 512), generator=torch.Generator().manual_seed(0))

    def forward() -> None:
        with evaluating(model):
            for ids in batches(windows):
                model(input_ids=ids)

    one, _ = processor_seconds(forward)
    rows = []
    for name in methods:
        passes = PASSES[name]
        method, allocation = name.split(", ")

        def work(method: str = method, allocation: str = allocation) -> None:
            plan = lb.plan_pruning(model, ratio=0.5, method=method, allocation=allocation, calibration=windows)
            lb.prune(model, plan, calibration=windows, compensate="least-squares")

        seconds, _ = processor_seconds(work)
        rows.append({"method": name, "tokens": tokens, "one forward pass (s)": one, "passes needed": passes,
                     "plan and cut (s)": seconds, "ratio": seconds / (one * passes)})  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def gains(model: Any, repeats: int) -> list[dict[str, Any]]:
    """Speed-up of the model with half of its MLP neurons, in turns with the dense one."""
    small = lb.prune(model, lb.plan_pruning(model, ratio=0.5, method="magnitude"))
    times: dict[tuple[str, int], dict[str, list[float]]] = {}
    for _ in range(repeats):
        for name, of in (("dense", model), ("pruned", small)):
            for row in latency(of, prompt=128, new_tokens=16, repeats=1).itertuples():
                times.setdefault((row.phase, row.batch), {}).setdefault(name, []).append(row.seconds)
    size = {name: sum(p.numel() for n, p in m.named_parameters() if "embed_tokens" not in n)
            for name, m in (("dense", model), ("pruned", small))}  # fmt: skip
    promised = size["dense"] / size["pruned"]
    rows = []
    for (phase, batch), of in times.items():
        speedup = float(np.median(of["dense"]) / np.median(of["pruned"]))
        rows.append({"phase": phase, "batch": batch, "dense (s)": float(np.median(of["dense"])),
                     "pruned (s)": float(np.median(of["pruned"])), "speed-up": speedup, "promised": promised,
                     "share of it": speedup / promised})  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Measure and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--methods", choices=sorted(PASSES), nargs="*", default=list(PASSES))
    parser.add_argument("--skip", choices=["costs", "gains"], nargs="*", default=[])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = build(options.layers)
    target = options.out / "pruning_speed.json"
    record = json.loads(target.read_text(encoding="utf-8")) if target.is_file() else {}
    if "costs" not in options.skip:
        record["costs"] = costs(model, options.tokens, options.methods)
    if "gains" not in options.skip:
        record["gains"] = gains(model, options.repeats)
    options.out.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    parts = []
    if "costs" in record:
        parts += ["# Plan and cut, processor time on one thread", "",
                  pd.DataFrame(record["costs"]).to_markdown(index=False, floatfmt=".2f"), ""]  # fmt: skip
    if "gains" in record:
        parts += ["# Speed with half of the MLP neurons, one thread, random weights", "",
                  pd.DataFrame(record["gains"]).to_markdown(index=False, floatfmt=".3f"), ""]  # fmt: skip
    parts += ["# 7B on one GPU", "", "not measured", ""]
    (options.out / "pruning_speed.md").write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()

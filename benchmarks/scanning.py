"""What scanning costs: time against the plain forward pass over the same tokens, and memory against their number.

    python benchmarks/scanning.py [--quick]

Both models read the same token ids in the same batches; scan and plain pass take turns, so that a busy machine slows
both, and the median of the rounds' ratios counts; processor time is given beside wall time for the same reason. Two
plain passes are timed: the model's body alone (what the scanner needs; the stricter reference) and the whole model with
its vocabulary projection. The scan includes tokenising, the check for values that are not finite, writing to disk with
checksums, and all of `llmbrain.scan` besides.
Memory is the peak resident size of a fresh process, for one, four and eight times the tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

import llmbrain as lb

RESULTS = Path(__file__).parent / "results" / "scanning.json"
DATA = Path(os.environ.get("LLMBRAIN_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
WORDS = ["the", "a", "cat", "dog", "little", "girl", "boy", "saw", "big", "red", "ball", "ran", "home", "and", "was"]


def stories(n_texts: int) -> tuple[Any, Any, list[str]]:
    """The 260K-parameter Llama and stories it can read."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = DATA / "models" / "stories260K"
    texts = json.loads((DATA / "corpora" / "tinystories-1000.json").read_text(encoding="utf-8"))
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder), texts[:n_texts]


def random_llama(n_texts: int) -> tuple[Any, Any, list[str]]:
    """A Llama of 100 million parameters with random weights, and made-up texts of about 250 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
        num_key_value_heads=12, max_position_embeddings=512,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    pick = torch.randint(len(WORDS), (n_texts, 300), generator=generator).tolist()
    length = torch.randint(200, 300, (n_texts,), generator=generator).tolist()
    texts = [" ".join(WORDS[i] for i in row[:n]) for row, n in zip(pick, length)]
    return LlamaForCausalLM(config).eval(), word_tokenizer(), texts


def word_tokenizer() -> Any:
    """One token a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({word: i + 3 for i, word in enumerate(WORDS)}, unk_token=WORDS[0]))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


MODELS = {"stories260K": stories, "random Llama, 100M": random_llama}


def batches_of(ids: list[list[int]], size: int, longest: int) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """The batches that the scanner reads, made beforehand."""
    blocks = [row[start : start + longest] for row in ids for start in range(0, len(row), longest)]
    batches = []
    for start in range(0, len(blocks), size):
        part = blocks[start : start + size]
        width = max(len(block) for block in part)
        batch = torch.tensor([block + [0] * (width - len(block)) for block in part])
        mask = torch.tensor([[1] * len(block) + [0] * (width - len(block)) for block in part])
        batches.append((batch, None if bool(mask.all()) else mask))
    return batches


def clocks() -> np.ndarray:
    """Seconds on the wall, and of all threads of this process on a processor."""
    return np.array([time.perf_counter(), time.process_time()])


def forward(model: Any, batches: list[tuple[torch.Tensor, torch.Tensor | None]]) -> np.ndarray:
    """Wall and processor seconds of a plain pass."""
    start = clocks()
    with torch.inference_mode():
        for ids, mask in batches:
            model(input_ids=ids, attention_mask=mask, use_cache=False)
    return clocks() - start


def timed_scan(model: Any, tokenizer: Any, texts: list[str]) -> np.ndarray:
    """Wall and processor seconds of a scan to disk."""
    with tempfile.TemporaryDirectory() as folder:
        start = clocks()
        lb.scan(model, tokenizer, texts, out=folder)
        return clocks() - start


def time_ratio(name: str, n_texts: int, rounds: int) -> dict[str, Any]:
    """Scan over plain pass, taking turns."""
    model, tokenizer, texts = MODELS[name](n_texts)
    ids = [tokenizer(text).input_ids for text in texts]
    batches = batches_of(ids, 8, 512)
    tokens = sum(map(len, ids))
    forward(model, batches[:2])
    timed_scan(model, tokenizer, texts[:16])
    turns = {
        "body": lambda: forward(model.base_model, batches),
        "whole_model": lambda: forward(model, batches),
        "scan": lambda: timed_scan(model, tokenizer, texts),
    }
    rows = []
    for i in range(rounds):
        order = list(turns)[i % 3 :] + list(turns)[: i % 3]
        row = {name: turns[name]() for name in order}
        rows.append([row[name] for name in turns])
    seconds = np.array(rows)  # (rounds, what, clock)
    middle = np.median(seconds, axis=0)
    ratios = np.median(seconds[:, 2:] / seconds[:, :2], axis=0)
    return {
        "model": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": tokens,
        "rounds": rounds,
        **{f"{what}_s": middle[k].tolist() for k, what in enumerate(turns)},
        "ratio_to_body": ratios[0].tolist(),
        "ratio_to_whole_model": ratios[1].tolist(),
        "all_s": seconds.tolist(),
        "note": "pairs are (wall, processor) seconds, medians over rounds; all_s is (rounds, body/whole/scan, pair)",
    }


def peak_memory(name: str, n_texts: int, to_disk: bool) -> dict[str, Any]:
    """Peak resident size, in MB, of a fresh process that scans; in MB above what it had before the scan."""
    command = [sys.executable, __file__, "--child", name, str(n_texts), "disk" if to_disk else "memory"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def peak_mb() -> float:
    """Largest resident size of this process so far (getrusage would count the parent's before exec too)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("/proc/self/status has no VmHWM: measure memory on Linux")


def child(name: str, n_texts: int, where: str) -> None:
    """In the fresh process."""
    model, tokenizer, texts = MODELS[name](n_texts)
    texts = [texts[i % len(texts)] for i in range(n_texts)]
    lb.scan(model, tokenizer, texts[:8])
    before = peak_mb()
    with tempfile.TemporaryDirectory() as folder:
        scans = lb.scan(model, tokenizer, texts, out=folder if where == "disk" else None)
    peak = peak_mb()
    tokens = sum(scan.n_tokens for scan in scans)
    facts = {"model": name, "where": where, "tokens": tokens, "peak_mb": peak, "above_start_mb": peak - before}
    print(json.dumps(facts))


def measure_time(quick: bool) -> list[dict[str, Any]]:
    """Print and return the ratios."""
    counts = {"stories260K": 40 if quick else 100, "random Llama, 100M": 8 if quick else 24}
    times = [time_ratio(name, n, rounds=3) for name, n in counts.items()]
    print("| model | tokens | body alone | whole model | scan | scan / body | scan / whole model |")
    print("|---|---|---|---|---|---|---|")
    for t in times:
        cells = [f"{t[k][0]:.2f} ({t[k][1]:.2f}) s" for k in ("body_s", "whole_model_s", "scan_s")]
        cells += [f"{t[k][0]:.2f} ({t[k][1]:.2f})" for k in ("ratio_to_body", "ratio_to_whole_model")]
        print(f"| {t['model']} | {t['tokens']:,} | {' | '.join(cells)} |")
    print("Wall time (processor time), medians of 3 rounds.\n")
    return times


def measure_memory(quick: bool) -> list[dict[str, Any]]:
    """Print and return the peaks."""
    sizes = [("disk", 50), ("disk", 200), ("memory", 50), ("memory", 200)] + [("disk", 400)] * (not quick)
    memory = [peak_memory("stories260K", n, where == "disk") for where, n in sorted(sizes)]
    print("| kept | tokens | peak memory above the start |\n|---|---|---|")
    for m in memory:
        kept = "on disk" if m["where"] == "disk" else "in memory"
        print(f"| {kept} | {m['tokens']:,} | {m['above_start_mb']:.0f} MB |")
    return memory


def main() -> None:
    """Measure, print tables, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer tokens; writes nothing")
    parser.add_argument("--only", choices=("time", "memory"), help="keep the stored result of the other")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # texts longer than the context: known
    if options.child:
        child(options.child[0], int(options.child[1]), options.child[2])
        return
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if options.only != "memory":
        results["time"] = measure_time(options.quick)
    if options.only != "time":
        results["memory"] = measure_memory(options.quick)
    if options.quick:
        return
    results["versions"] = {
        "torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine(),
        "threads": torch.get_num_threads(), "llmbrain": lb.__version__,
    }  # fmt: skip
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

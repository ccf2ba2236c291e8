"""Peak memory of ``prune --offload`` against the cut in memory: ``python benchmarks/offload.py [--blocks N]``.

A Llama of random float32 weights (hidden 2,048, MLP 4,096; 20 blocks are 0.73 billion parameters, 2.9 GB) in files of
at most 200 MB; 30% of its neurons go by magnitude, without a repair and with the repair
``least-squares``, on 1,024 tokens. Each cut is a process of its own; its peak is the kernel's (VmHWM, Linux), what
Python and its libraries take before the model is opened stands beside it. Both write the same weights, which is
compared. Rows are written as they come to ``benchmarks/results/offload.json``; a second call, also with another number
of blocks, goes on from there; ``offload.md`` is made from it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import llmbrain as lb
from llmbrain.checkpoints.saving import save_pruned

RESULTS = Path(__file__).parent / "results"
SIZES = {"hidden_size": 2048, "intermediate_size": 4096, "num_attention_heads": 16, "num_key_value_heads": 4,
         "vocab_size": 4096, "max_position_embeddings": 512}  # fmt: skip
REPAIRS = (None, "least-squares")
WINDOW, TOKENS = 256, 1024


def peak() -> float:
    """Largest memory of this process so far, in bytes (Linux)."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return float(line.split()[1]) * 1024


def make(folder: Path, blocks: int) -> None:
    """The model in its folder; in a process of its own, so that its memory is gone."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(num_hidden_layers=blocks, **SIZES)).save_pretrained(folder, max_shard_size="200MB")


def cut(folder: Path, out: Path, offload: bool, compensate: str | None) -> dict[str, float]:
    """One cut, and what it took."""
    from transformers import AutoConfig, AutoModelForCausalLM

    del AutoConfig, AutoModelForCausalLM  # imported: they count as libraries
    base, start = peak(), time.process_time()
    from llmbrain.checkpoints.loading import _load  # the model has no tokenizer
    from llmbrain.checkpoints.placing import Placement

    model = _load(str(folder), None, Placement(offload=offload), False)
    plan = lb.plan_pruning(model, ratio=0.3, method="magnitude")
    windows = torch.randint(3, 4000, (TOKENS // WINDOW, WINDOW), generator=torch.Generator().manual_seed(0))
    how: dict[str, Any] = {"compensate": compensate}
    if compensate is not None:
        how["calibration"] = windows
    if offload:
        lb.prune_offloaded(model, plan, out, **how)
    else:
        small = lb.prune(model, plan, **how)
        save_pruned(small, None, out)
    return {"base": base, "peak": peak(), "seconds": time.process_time() - start}


def same(one: Path, other: Path) -> bool:
    """Whether two folders hold the same weights, read tensor by tensor."""
    from safetensors import safe_open

    found: list[dict[str, Any]] = [{}, {}]
    for where, folder in zip(found, (one, other)):
        for file in sorted(folder.glob("*.safetensors")):
            opened = safe_open(file, framework="pt")
            where |= dict.fromkeys(opened.keys(), opened)
    shared = found[0].keys() & found[1].keys()
    return len(shared) >= len(found[1]) - 1 and all(
        torch.equal(found[0][name].get_tensor(name), found[1][name].get_tensor(name)) for name in shared
    )


def table(rows: dict[str, Any]) -> list[str]:
    """Peaks of both ways, and what lies between them."""
    lines = [
        "GB; 'above libraries' is the peak less what Python and its libraries took before.", "",
        "| blocks | repair | in memory, peak | above libraries | block by block, peak | above libraries | share "
        "| weights |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for blocks in sorted(rows, key=int):
        for repair in REPAIRS:
            one, other = rows[blocks].get(f"{repair} memory"), rows[blocks].get(f"{repair} offload")
            if one is None or other is None:
                continue
            above = [row["peak"] - row["base"] for row in (one, other)]
            lines.append(
                f"| {blocks} | {repair or 'none'} | {one['peak'] / 1e9:.2f} | {above[0] / 1e9:.2f} | "
                f"{other['peak'] / 1e9:.2f} | {above[1] / 1e9:.2f} | {above[1] / above[0]:.2f} | "
                f"{'equal' if other['same'] else 'DIFFER'} |"
            )
    return lines


def main() -> None:
    """Cut in processes, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=20)
    parser.add_argument("--repair", choices=[str(repair) for repair in REPAIRS], help="one of the repairs; default all")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--part", nargs="+", default=[], help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.part and args.part[0] == "make":
        make(Path(args.part[1]), args.blocks)
        return
    if args.part:
        source, out, way, repair = args.part[1:]
        print(json.dumps(cut(Path(source), Path(out), way == "offload", None if repair == "None" else repair)))
        return
    file = args.out / "offload.json"
    every: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    rows: dict[str, Any] = every.setdefault(str(args.blocks), {})

    def run(*part: str) -> str:
        command = [sys.executable, __file__, "--blocks", str(args.blocks), "--part", *part]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout

    with tempfile.TemporaryDirectory() as folder:
        run("make", f"{folder}/model")
        for repair in [repair for repair in REPAIRS if args.repair in (None, str(repair))]:
            for way in ("memory", "offload"):
                key, out = f"{repair} {way}", Path(folder) / f"{repair}-{way}"
                if key not in rows or (way == "offload" and "same" not in rows[key]):
                    rows[key] = json.loads(run("cut", f"{folder}/model", str(out), way, str(repair)).splitlines()[-1])
                if way == "offload" and out.exists() and (Path(folder) / f"{repair}-memory").exists():
                    rows[key]["same"] = same(Path(folder) / f"{repair}-memory", out)
                print(key, rows[key], flush=True)
                file.write_text(json.dumps(every, indent=1) + "\n")
    said = "`python benchmarks/offload.py --blocks ... --repair ...`, a row each."
    text = ["# Memory of a cut, whole and block by block", "", said, "", *table(every), ""]
    (args.out / "offload.md").write_text("\n".join(text))


if __name__ == "__main__":
    main()

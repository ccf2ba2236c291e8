"""What a GPU does with the sizes of a 7B model: ``python benchmarks/gpu.py`` (about ten minutes on one GPU of 80 GB).

Each step stands apart, and is written to ``benchmarks/results/gpu.json`` when it is done, or with its error, where it
failed, and what lay on which device then; the next step that can go on without it goes on. ``gpu.md`` is made from it.
Group ICA: 8 drawn runs of 4,096 tokens x 352,256 neurons. Model: a Llama of 32 x 11,008 with random weights in
bfloat16: 128 texts of 2,048 tokens are scanned (in groups, of which two are kept: all of them are 185 GB), networks
found in what is kept, a plan, repair and saving on 128 windows. Then SmolLM2's quick rows (`benchmarks/real.py`).
``--tiny`` is the same in small, on any machine: it shows that the steps run. ``--only REGEX`` picks steps.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import shutil
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import llmbrain as lb
from llmbrain.datasets import load_demo

RESULTS = Path(__file__).parent / "results"
FULL = {"neurons": 352_256, "tokens": 4096, "runs": 8, "k": 32, "hidden": 4096, "width": 11_008, "layers": 32,
        "heads": 32, "vocabulary": 32_000, "texts": 128, "length": 2048, "group": 8, "kept": 2}  # fmt: skip
TINY = {"neurons": 2048, "tokens": 128, "runs": 2, "k": 4, "hidden": 64, "width": 96, "layers": 2, "heads": 4,
        "vocabulary": 300, "texts": 4, "length": 64, "group": 2, "kept": 2}  # fmt: skip


class Bench:
    """Steps that share what earlier ones made.

    Parameters
    ----------
    sizes : dict
    device : torch.device
    file : Path
        Where rows go.
    folder : Path
        For scans and models.
    """

    def __init__(self, sizes: dict[str, int], device: torch.device, file: Path, folder: Path) -> None:
        self.sizes, self.device, self.file, self.folder = sizes, device, file, folder
        self.made: dict[str, Any] = {}
        self.rows: list[dict[str, Any]] = []
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        self.machine = {
            "device": name, "torch": torch.__version__, "cuda": torch.version.cuda,
            "transformers": transformers.__version__, "python": sys.version.split()[0], "sizes": sizes,
            "command": " ".join(["python", "benchmarks/gpu.py", *sys.argv[1:]]),
        }  # fmt: skip

    def step(self, name: str, needs: list[str], run: Callable[[], dict[str, Any] | None]) -> None:
        """Run one step, and write how it went."""
        missing = [n for n in needs if n not in self.made]
        row: dict[str, Any] = {"step": name}
        if missing:
            self.rows.append({**row, "skipped": f"needs {', '.join(missing)}"})
            return self.write()
        cuda = self.device.type == "cuda"
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        start = time.perf_counter()
        try:
            found = run() or {}
            if cuda:
                torch.cuda.synchronize(self.device)
            row |= {"seconds": round(time.perf_counter() - start, 2), **found}
        except Exception as error:
            row |= {"seconds": round(time.perf_counter() - start, 2), "error": f"{type(error).__name__}: {error}"[:600]}
            row["where"] = [line.strip() for line in traceback.format_exc().splitlines() if "llmbrain/" in line][-6:]
            row["tensors"] = tensors()
        if cuda:
            row["peak_GB"] = round(torch.cuda.max_memory_allocated(self.device) / 1e9, 2)
        self.rows.append(row)
        print(json.dumps(row, indent=None), flush=True)
        return self.write()

    def write(self) -> None:
        """All rows so far."""
        self.file.write_text(json.dumps({"machine": self.machine, "rows": self.rows}, indent=1) + "\n")
        texts = f"{self.sizes['texts']} texts of {self.sizes['length']:,} tokens"
        lines = [f"# Steps on {self.machine['device']}", "", f"`{self.machine['command']}`: {texts}", "",
                 "| step | seconds | peak of the device, GB | |", "|---|---|---|---|"]  # fmt: skip
        for row in self.rows:
            what = row.get("error") or row.get("skipped") or ", ".join(
                f"{k} {v}" for k, v in row.items() if k not in ("step", "seconds", "peak_GB")
            )  # fmt: skip
            lines.append(f"| {row['step']} | {row.get('seconds', '')} | {row.get('peak_GB', '')} | {what} |")
        self.file.with_suffix(".md").write_text("\n".join(lines) + "\n")

    # -- steps ------------------------------------------------------------

    def draw(self) -> dict[str, Any]:
        """Runs with planted sources, in float16, made on the device."""
        s = self.sizes
        generator = torch.Generator(device=self.device).manual_seed(0)

        def drawn(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=self.device)

        maps = drawn(s["k"], s["neurons"]) ** 3
        self.made["maps"] = maps.cpu().numpy()
        self.made["runs"] = []
        for _ in range(s["runs"]):
            data = drawn(s["tokens"], s["k"]) @ maps
            for part in data.split(256):
                part += drawn(*part.shape)
            self.made["runs"].append(data.half().cpu().numpy())
        return {"GB": round(sum(r.nbytes for r in self.made["runs"]) / 1e9, 2)}

    def group_ica(self) -> dict[str, Any]:
        """Group ICA of the drawn runs, and whether the sources are found."""
        from llmbrain.stats import match_maps

        ica = lb.GroupICA(self.sizes["k"], random_state=0, standardize="none", device=str(self.device), progress=False)
        fit = ica.fit(self.made["runs"])
        self.made["fit"] = fit
        r = match_maps(fit.components_, self.made["maps"])[1]
        return {"matched_r_least": round(float(np.abs(r).min()), 4), "steps": int(fit.n_iter_)}

    def dual_regression(self) -> dict[str, Any]:
        """Dual regression of two of the runs."""
        found = lb.dual_regression(self.made["fit"], self.made["runs"][:2], device=self.device)
        return {"finite": bool(np.isfinite(found.maps).all())}

    def model(self) -> dict[str, Any]:
        """A Llama with random weights, made on the device."""
        from transformers import LlamaConfig, LlamaForCausalLM

        for name in ("runs", "maps", "fit"):
            self.made.pop(name, None)
        s = self.sizes
        config = LlamaConfig(
            vocab_size=s["vocabulary"], hidden_size=s["hidden"], intermediate_size=s["width"],
            num_hidden_layers=s["layers"], num_attention_heads=s["heads"], max_position_embeddings=s["length"],
        )  # fmt: skip
        with torch.device(self.device):
            torch.manual_seed(0)
            self.made["model"] = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
        return {"parameters": sum(p.numel() for p in self.made["model"].parameters())}

    def scan(self) -> dict[str, Any]:
        """All texts, in groups to the disk; two groups are kept."""
        s, brain = self.sizes, load_demo()
        texts = brain.texts(n=s["texts"], n_tokens=s["length"])
        kept, size, read = [], 0, 0
        for i in range(0, len(texts), s["group"]):
            folder = self.folder / f"scan-{i}"
            found = lb.scan(self.made["model"], brain.tokenizer, texts[i : i + s["group"]], out=folder,
                            n_tokens=s["length"])  # fmt: skip
            read += sum(scan.n_tokens for scan in found)
            size += sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
            if i // s["group"] < s["kept"]:
                kept += found
            else:
                shutil.rmtree(folder)
        self.made |= {"scans": kept, "tokenizer": brain.tokenizer}
        return {"tokens": read, "GB_written": round(size / 1e9, 2)}

    def networks(self) -> dict[str, Any]:
        """Group ICA of the kept scans."""
        fit = lb.GroupICA(self.sizes["k"], random_state=0, device=str(self.device), progress=False).fit(
            self.made["scans"]
        )
        self.made["networks"] = lb.FunctionalNetworks.from_ica(fit, threshold=3.6)
        return {"networks": len(self.made["networks"]), "runs": len(self.made["scans"])}

    def windows(self) -> torch.Tensor:
        """Calibration text: ids of the tokenizer, drawn."""
        s = self.sizes
        top = min(s["vocabulary"], len(self.made["tokenizer"]))
        return torch.randint(3, top, (s["texts"], s["length"]), generator=torch.Generator().manual_seed(0))

    def lesion(self) -> dict[str, Any]:
        """Loss with and without a network."""
        model, windows = self.made["model"], self.windows()[:4]
        before = lb.perplexity(model, self.made["tokenizer"], windows)
        with lb.lesion(model, self.made["networks"][0]):
            after = lb.perplexity(model, self.made["tokenizer"], windows)
        return {"perplexity": round(before, 2), "lesioned": round(after, 2)}

    def plan(self, method: str) -> dict[str, Any]:
        """A plan on all windows."""
        networks = self.made.get("networks") if method == "networks" else None
        how = {"allocation": "uniform"} if method == "networks" else {}
        made = lb.plan_pruning(
            self.made["model"], networks, ratio=0.3, method=method, calibration=self.windows(), max_windows=None, **how
        )
        self.made["plan"] = made
        return {"removed": round(made.removed, 4)}

    def repair(self) -> dict[str, Any]:
        """Least squares, and the cut, in place."""
        model = lb.prune(
            self.made["model"], self.made["plan"], calibration=self.windows(), max_windows=None,
            compensate="least-squares", inplace=True,
        )  # fmt: skip
        self.made["small"] = model
        return {"parameters": sum(p.numel() for p in model.parameters())}

    def save(self) -> dict[str, Any]:
        """To the disk, opened again and compared."""
        folder = lb.save_pruned(self.made["small"], self.made["tokenizer"], self.folder / "small", overwrite=True)
        size = sum(p.stat().st_size for p in folder.iterdir())
        return {"GB": round(size / 1e9, 2)}

    def real(self, data: Path) -> dict[str, Any]:
        """SmolLM2's quick rows, in a process of their own; they are in `real.jsonl`'s place for this device."""
        for name in list(self.made):
            del self.made[name]
        gc.collect()
        out = self.file.with_name(f"{self.file.stem}_real.jsonl")
        command = [sys.executable, str(Path(__file__).with_name("real.py")), "--quick", "--data", str(data),
                   "--device", str(self.device), "--out", str(out)]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"real.py: {' '.join(done.stderr.split())[-400:]}")
        return {"rows": out.name}


def tensors() -> list[str]:
    """What lies where: device and dtype of all tensors that are held, with their number and size."""
    found: Counter[tuple[str, str]] = Counter()
    size: Counter[tuple[str, str]] = Counter()
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter):
            key = (str(thing.device), str(thing.dtype))
            found[key] += 1
            size[key] += thing.numel() * thing.element_size()
    return [f"{d} {t}: {n} tensors, {size[d, t] / 1e9:.2f} GB" for (d, t), n in sorted(found.items())]


def main() -> None:
    """All steps, or those asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="the same in small, on the CPU if there is no GPU")
    parser.add_argument("--texts", type=int, help="texts of 2,048 tokens; default 128")
    parser.add_argument("--device", default="", help="default: CUDA")
    parser.add_argument("--only", default="", help="steps whose name this regular expression finds")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of SmolLM2 and the texts")
    parser.add_argument("--folder", type=Path, default=Path("gpu-out"), help="for scans and models; removed at the end")
    parser.add_argument("--out", type=Path, help="where rows go; default benchmarks/results/gpu.json")
    args = parser.parse_args()
    device = torch.device(args.device or ("cpu" if args.tiny and not torch.cuda.is_available() else "cuda"))
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit(f"torch {torch.__version__} sees no CUDA device: --tiny runs the steps in small on the CPU")
    file = args.out or (args.folder / "gpu.json" if args.tiny else RESULTS / "gpu.json")
    args.folder.mkdir(parents=True, exist_ok=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    sizes = {**(TINY if args.tiny else FULL), **({"texts": args.texts} if args.texts else {})}
    bench = Bench(sizes, device, file, args.folder)
    plans = ("flap", "obs-gradient", "networks")
    steps: list[tuple[str, list[str], Callable[[], dict[str, Any] | None]]] = [
        ("drawn runs", [], bench.draw), ("group ICA", ["runs"], bench.group_ica),
        ("dual regression", ["fit"], bench.dual_regression), ("model", [], bench.model),
        ("scan", ["model"], bench.scan), ("networks", ["scans"], bench.networks),
        ("lesion", ["model", "networks"], bench.lesion),
        *((f"plan ({m})", ["model", "tokenizer"], lambda m=m: bench.plan(m)) for m in plans),
        ("repair", ["model", "plan"], bench.repair), ("save", ["small"], bench.save),
    ]  # fmt: skip
    if not args.tiny:
        steps.append(("SmolLM2", [], lambda: bench.real(args.data)))
    for name, needs, run in steps:
        if re.search(args.only, name):
            bench.step(name, needs, run)
    shutil.rmtree(args.folder / "small", ignore_errors=True)
    for folder in args.folder.glob("scan-*"):
        shutil.rmtree(folder)
    failed = [row["step"] for row in bench.rows if "error" in row]
    print(f"{len(bench.rows)} steps, {len(failed)} failed{': ' if failed else ''}{', '.join(failed)}: {file}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()

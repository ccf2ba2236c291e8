"""Time and memory of each step on a language model that people know: ``python benchmarks/real_steps.py``.

SmolLM2-135M-Instruct (4-bit GGUF) and 16,384 tokens of WikiText-2: a forward pass over them, their scan, group ICA of
the scan beside nilearn's CanICA on the same runs, and plans by four methods. Each step is a process of its own, with
its peak memory; processor seconds stand beside those of the forward passes over the same tokens, measured in the same
process just before (a busy machine slows both). Rows are written to ``benchmarks/results/real_steps.json`` as they
come; ``--only WORDS`` picks steps. CanICA gets a mask, no smoothing and no threshold: its defaults for brains would do
other work.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from real_parts.bench import wikitext

import llmbrain as lb
from llmbrain.evaluation.perplexity import window_losses
from llmbrain.hooks.text import as_windows

RESULTS = Path(__file__).parent / "results"
MODEL = "models/smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf"
TOKENS, RUN, K, RATIO = 16384, 2048, 32, 0.3
STEPS = ("load", "scan", "group ICA", "CanICA, 1 start", "plan flap", "plan obs-gradient", "repair", "plan obs",
         "CanICA, 10 starts", "plan networks")  # fmt: skip


def peak() -> float:
    """Peak memory of this process, GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def clocked(work: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """Wall clock and processor seconds of some work, and what it gave."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = work()
    return {"seconds": time.perf_counter() - wall, "processor_s": time.process_time() - cpu}, found


def canica(runs: list[Any], n_init: int) -> Any:
    """nilearn's CanICA of the same runs, as images of a box."""
    from nibabel import Nifti1Image
    from nilearn.decomposition import CanICA

    n = runs[0].shape[1]
    shape = (n // 48, 48, 1)
    images = [Nifti1Image(np.ascontiguousarray(run.T).reshape(*shape, len(run)), np.eye(4)) for run in runs]
    estimator = CanICA(
        n_components=K, mask=Nifti1Image(np.ones(shape, np.int8), np.eye(4)), smoothing_fwhm=None, detrend=False,
        standardize="zscore_sample", standardize_confounds=False, threshold=None, n_init=n_init, random_state=0,
    )  # fmt: skip
    return estimator.fit(images).components_


def step(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One step, in a process of its own."""
    folder = Path(args.folder)
    if "ICA" in name:
        runs = [np.asarray(scan.data(), dtype=np.float32) for scan in lb.load_scans(folder / "scan")]
        if name == "group ICA":
            spent, _ = clocked(lambda: lb.GroupICA(K, random_state=0, progress=False).fit(runs))
        else:
            spent, _ = clocked(lambda: canica(runs, 10 if "10" in name else 1))
        return {**spent, "peak_GB": peak(), "runs": [list(run.shape) for run in runs]}
    spent, (model, tokenizer) = clocked(lambda: lb.load_model(args.model or args.data / MODEL))
    if name == "load":
        return {**spent, "peak_GB": peak()}
    text = wikitext(args.data / "corpora/wikitext2-valid.tokens")
    windows = as_windows(model, tokenizer, text, args.run, args.tokens // args.run)
    window_losses(model, windows[:1])  # the first is slower
    forward, _ = clocked(lambda: window_losses(model, windows))
    start = peak()
    if name == "scan":
        texts = [tokenizer.decode(window) for window in windows]
        spent, _ = clocked(lambda: lb.scan(model, tokenizer, texts, out=folder / "scan", n_tokens=args.tokens,
                                           run_length=None))  # fmt: skip
    elif name == "repair":
        plan = lb.plan_pruning(model, ratio=RATIO, method="magnitude")
        spent, _ = clocked(lambda: lb.prune(model, plan, calibration=windows, compensate="least-squares"))
    else:
        networks = None
        if "networks" in name:
            scans = lb.load_scans(folder / "scan")
            networks = lb.FunctionalNetworks.from_ica(lb.GroupICA(K, random_state=0, progress=False).fit(scans[:2]))
        spent, _ = clocked(lambda: lb.plan_pruning(
            model, networks, ratio=RATIO, method=name.removeprefix("plan "), calibration=windows, random_state=0
        ))  # fmt: skip
    return {**spent, "peak_GB": peak(), "forward_s": forward["processor_s"], "peak_of_forward_GB": start,
            "passes": spent["processor_s"] / forward["processor_s"]}  # fmt: skip


def page(found: dict[str, Any]) -> str:
    """The table, as Markdown."""
    lines = [
        "# Steps on SmolLM2-135M-Instruct, and what they take", "",
        f"`python benchmarks/real_steps.py`; {found['machine']}. {found['tokens']:,} tokens in runs of "
        f"{found['run']:,}, K = {K}, {RATIO:.0%} of the MLP neurons. Peak memory is that of the whole process, which "
        "holds the model and the text too (ICA: the runs only). In forward passes: processor seconds over those of a "
        "forward pass over the same tokens with its losses, in the same process just before. Steps were measured on "
        "several days, and the machine was not as fast on all of them: compare in forward passes.", "",
        "| step | seconds | processor seconds | a forward pass | in forward passes | peak, GB |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, row in found["rows"].items():
        passes = f"{row['forward_s']:.0f} | {row['passes']:.1f}" if "passes" in row else " | "
        lines.append(f"| {name} | {row['seconds']:.0f} | {row['processor_s']:.0f} | {passes} | {row['peak_GB']:.1f} |")
    ours = found["rows"].get("group ICA")
    for name in ("CanICA, 1 start", "CanICA, 10 starts"):
        if ours and name in found["rows"]:
            theirs = found["rows"][name]["processor_s"] / ours["processor_s"]
            lines += ["", f"nilearn's {name}: {theirs:.1f} times the processor seconds of group ICA."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the steps, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--model", type=Path, help="a GGUF or a folder; default SmolLM2 in --data")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--run", type=int, default=RUN, help="tokens of a run")
    parser.add_argument("--only", default="", help="steps whose name holds this (and the scan, where it is missing)")
    parser.add_argument("--folder", help="where the scan lies; default one that goes away")
    parser.add_argument("--step", help="do this one step and print its row")
    args = parser.parse_args()
    if args.step:
        print(json.dumps(step(args.step, args)))
        return
    file = RESULTS / "real_steps.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"rows": {}}
    threads = torch.get_num_threads()
    found |= {"tokens": args.tokens, "run": args.run, "machine": f"CPU, {threads} threads, torch {torch.__version__}"}
    with tempfile.TemporaryDirectory() as temporary:
        args.folder = args.folder or temporary
        for name in STEPS:
            scanned = (Path(args.folder) / "scan").is_dir()
            if not (args.only in name or (name == "scan" and not scanned)) or (name == "scan" and scanned):
                continue
            command = [sys.executable, "-W", "ignore", __file__, "--step", name, "--data", str(args.data), "--tokens",
                       str(args.tokens), "--run", str(args.run), "--folder", args.folder]  # fmt: skip
            command += ["--model", str(args.model)] if args.model else []
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                print(name, done.stderr[-600:], flush=True)
                continue
            found["rows"][name] = json.loads(done.stdout.splitlines()[-1])
            print(name, found["rows"][name], flush=True)
            found["rows"] = {k: found["rows"][k] for k in STEPS if k in found["rows"]}
            file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            file.with_suffix(".md").write_text(page(found), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Speed and memory of group ICA beside nilearn's CanICA and scikit-learn's FastICA, in one run.

    python benchmarks/decomposition.py [--quick] [--repeats 3] [--only wide narrow ica busy memory gpu] [--out FILE]

Both sides do the same work on the same arrays: z-score over tokens, PCA of every run, canonical correlation over runs,
ICA with the cubic contrast; `GroupICA` also returns the time courses, which costs it another pass over the runs.
CanICA gets a mask, no smoothing and no threshold, because its defaults for brains would do other work.
Measurements of the sides alternate; the ratio is that of their median wall-clock times. The ratio of processor times is
beside it: it hardly depends on what else the machine does. Matched r: |r| of components paired one to one, the worst.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nibabel import Nifti1Image
from scipy.optimize import linear_sum_assignment
from sklearn.decomposition import fastica as sklearn_fastica

from llmbrain.decomposition import GroupICA, fastica
from llmbrain.decomposition.prepare.pca import whiten
from llmbrain.decomposition.solvers.fastica import random_start

RESULTS = Path(__file__).parent / "results" / "decomposition.json"
Row = dict[str, Any]


def planted(n_neurons: int, n_components: int, seed: int) -> np.ndarray:
    """Sparse maps: 3 % of the neurons each, Laplace weights."""
    rng = np.random.default_rng(seed)
    weights = rng.laplace(size=(n_components, n_neurons)).astype(np.float32)
    return np.where(rng.random((n_components, n_neurons)) < 0.03, weights, 0)


def run_of(maps: np.ndarray, n_tokens: int, seed: int) -> np.ndarray:
    """One run of the maps with slow time courses and noise: float32 (n_tokens, n_neurons)."""
    rng = np.random.default_rng(seed)
    courses = rng.normal(size=(n_tokens, len(maps))).astype(np.float32)
    for t in range(1, n_tokens):
        courses[t] = 0.5 * courses[t - 1] + 0.87 * courses[t]
    return 2 * courses @ maps + rng.standard_normal((n_tokens, maps.shape[1]), dtype=np.float32)


def matched(first: np.ndarray, second: np.ndarray) -> float:
    """Smallest |r| of rows paired one to one."""
    r = np.abs(np.corrcoef(first, second)[: len(first), len(first) :])
    return float(r[linear_sum_assignment(-r)].min())


def as_images(runs: list[np.ndarray]) -> tuple[list[Nifti1Image], Nifti1Image]:
    """The runs as 4D images in memory, and the mask of all their voxels."""
    shape = (runs[0].shape[1] // 64, 64, 1)
    mask = Nifti1Image(np.ones(shape, dtype=np.int8), np.eye(4))
    return [Nifti1Image(run.T.reshape(*shape, len(run)), np.eye(4)) for run in runs], mask


def canica(images: list[Any], mask: Any, n_components: int, n_init: int) -> np.ndarray:
    """nilearn's CanICA, doing what `GroupICA` does."""
    from nilearn.decomposition import CanICA

    estimator = CanICA(
        n_components=n_components,
        mask=mask,
        smoothing_fwhm=None,
        detrend=False,
        standardize="zscore_sample",
        standardize_confounds=False,
        threshold=None,
        n_init=n_init,
        random_state=0,
    )
    return estimator.fit(images).components_


def alternate(sides: dict[str, Callable[[], Any]], repeats: int) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
    """Run the sides in turn: their last results, and median wall-clock and processor seconds."""
    wall: dict[str, list[float]] = {name: [] for name in sides}
    processor: dict[str, list[float]] = {name: [] for name in sides}
    results = {}
    for _ in range(repeats):
        for name, side in sides.items():
            start, used = time.perf_counter(), time.process_time()
            results[name] = side()
            wall[name].append(time.perf_counter() - start)
            processor[name].append(time.process_time() - used)
    seconds = {
        name: {"wall_s": float(np.median(wall[name])), "cpu_s": float(np.median(processor[name]))} for name in sides
    }
    return results, seconds


def row(case: str, peer: str, target: str, ours: dict[str, float], theirs: dict[str, float], **more: Any) -> Row:
    """One line of the table."""
    return {
        "case": case,
        "peer": peer,
        "target": target,
        "ours_s": ours["wall_s"],
        "peer_s": theirs["wall_s"],
        "ratio": theirs["wall_s"] / ours["wall_s"],
        "cpu_ratio": theirs["cpu_s"] / ours["cpu_s"],
        **more,
    }


def against_canica(n_neurons: int, n_tokens: int, n_runs: int, starts: dict[int, str], repeats: int) -> Iterator[Row]:
    """Whole fits on the same runs."""
    k = 20
    maps = planted(n_neurons, k, 0)
    runs = [run_of(maps, n_tokens, seed) for seed in range(n_runs)]
    images, mask = as_images(runs)
    ours = GroupICA(k, fun="cube", cca=True, device="cpu")
    sides: dict[str, Callable[[], Any]] = {"ours": lambda: ours.fit(runs).components_}
    for n_init in starts:
        sides[f"{n_init}"] = lambda n_init=n_init: canica(images, mask, k, n_init)
    results, seconds = alternate(sides, repeats)
    for n_init, target in starts.items():
        case = f"{n_neurons:,} neurons x {n_tokens} tokens x {n_runs} runs, K={k}"
        r = matched(results["ours"], results[f"{n_init}"])
        peer = f"nilearn CanICA, {n_init} start{'s' * (n_init > 1)}"
        yield row(case, peer, target, seconds["ours"], seconds[f"{n_init}"], matched_r=r)


def ica_step(n_neurons: int, k: int, repeats: int) -> Row:
    """The ICA step alone, same white data and same start; both sides in their usual precision."""
    maps = planted(n_neurons, k, 1)
    mixed = np.linalg.qr(np.random.default_rng(0).normal(size=(k, k)))[0] @ maps
    mixed += 0.1 * np.random.default_rng(1).normal(size=mixed.shape)
    white = whiten(torch.from_numpy(mixed - mixed.mean(axis=1, keepdims=True))).data.numpy()
    start = random_start(k, 0)
    single = torch.from_numpy(white.astype(np.float32))

    def theirs() -> tuple[np.ndarray, int]:
        _, _, sources, n_iter = sklearn_fastica(
            white.T, whiten=False, fun="cube", w_init=start, max_iter=200, tol=1e-4, return_n_iter=True
        )
        return sources.T, n_iter

    results, seconds = alternate({"ours": lambda: fastica(single, fun="cube", w_init=start), "theirs": theirs}, repeats)
    sources, n_iter = results["theirs"]
    return row(
        f"ICA step, K={k} x {n_neurons:,} neurons",
        "scikit-learn fastica(fun='cube')",
        "3 x",
        seconds["ours"],
        seconds["theirs"],
        matched_r=matched(results["ours"].unmixing @ white, sources),
        note=f"{results['ours'].n_iter} and {n_iter} steps",
    )


def _spin(stop: Any) -> None:
    while not stop.is_set():
        sum(range(10_000))


@contextlib.contextmanager
def busy_core() -> Iterator[None]:
    """One other process that computes all the time."""
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    other = context.Process(target=_spin, args=(stop,))
    other.start()
    time.sleep(1.0)
    try:
        yield
    finally:
        stop.set()
        other.join()


def with_a_busy_core(n_neurons: int, n_tokens: int, repeats: int) -> Row:
    """How much longer a fit takes while one core does something else."""
    maps = planted(n_neurons, 20, 0)
    runs = [run_of(maps, n_tokens, seed) for seed in range(2)]
    images, mask = as_images(runs)
    sides = {
        "ours": lambda: GroupICA(20, fun="cube", cca=True, device="cpu").fit(runs),
        "theirs": lambda: canica(images, mask, 20, 1),
    }
    _, idle = alternate(sides, repeats)
    with busy_core():
        _, busy = alternate(sides, repeats)
    slower = {name: busy[name]["wall_s"] / idle[name]["wall_s"] for name in sides}
    return row(
        f"the first case, K=20, while one of {os.cpu_count()} cores is busy",
        "nilearn CanICA, 1 start",
        "no collapse",
        busy["ours"],
        busy["theirs"],
        note=f"slower than with idle cores: ours {slower['ours']:.2f} x, CanICA {slower['theirs']:.2f} x",
    )


MEMORY = """
import sys, warnings
warnings.simplefilter("ignore")
side, folder, n_runs, k = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
import numpy, torch, nibabel
from nilearn.decomposition import CanICA
from llmbrain.decomposition import GroupICA
from pathlib import Path
files = sorted(Path(folder).glob("run*.nii"))
paths = [str(files[i % len(files)]) for i in range(n_runs)]
mask = folder + "/mask.nii"
def kib(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))
Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports
before = kib("VmRSS")
if side == "ours":
    GroupICA(k, fun="cube", cca=True, mask=mask, device="cpu").fit(paths)
else:
    CanICA(n_components=k, mask=mask, smoothing_fwhm=None, detrend=False, standardize="zscore_sample",
           standardize_confounds=False, threshold=None, n_init=1, random_state=0).fit(paths)
print((kib("VmHWM") - before) / 1024)
"""


def memory(n_neurons: int, n_tokens: int, counts: tuple[int, ...]) -> Row:
    """Peak resident memory above what the imports took, in fresh processes (Linux); runs are read from files."""
    maps = planted(n_neurons, 20, 0)
    peaks: dict[str, list[float]] = {"ours": [], "theirs": []}
    with tempfile.TemporaryDirectory() as folder:
        images, mask = as_images([run_of(maps, n_tokens, seed) for seed in range(4)])
        mask.to_filename(f"{folder}/mask.nii")
        for i, image in enumerate(images):
            image.to_filename(f"{folder}/run{i}.nii")
        for n_runs in counts:
            for side, found in peaks.items():
                command = [sys.executable, "-c", MEMORY, side, folder, str(n_runs), "20"]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found.append(float(done.stdout))
    return {
        "case": f"peak memory, {', '.join(map(str, counts))} runs x {n_neurons:,} x {n_tokens}",
        "peer": "nilearn CanICA, 1 start",
        "target": "independent of the number of runs",
        "counts": list(counts),
        "ours_mib": peaks["ours"],
        "peer_mib": peaks["theirs"],
        "note": "MiB: ours " + ", ".join(f"{x:.0f}" for x in peaks["ours"])
        + "; CanICA " + ", ".join(f"{x:.0f}" for x in peaks["theirs"]),
    }  # fmt: skip


def on_a_gpu(n_neurons: int, n_tokens: int, n_runs: int, k: int) -> Row:
    """A model of seven billion parameters on one GPU, with the time to move the runs (float16) there."""
    line: Row = {
        "case": f"{n_neurons:,} neurons x {n_tokens:,} tokens x {n_runs} runs, K={k}, GPU",
        "peer": "published notebook: 7 min for 40 texts, 6 GPUs",
        "target": "under 30 s",
    }
    if not torch.cuda.is_available():
        return {**line, "note": "not measured"}
    maps = torch.from_numpy(planted(n_neurons, k, 0)).cuda()
    generator = torch.Generator("cuda").manual_seed(0)
    runs = []
    for _ in range(n_runs):
        run = 2 * torch.randn(n_tokens, k, generator=generator, device="cuda") @ maps
        for part in run.split(256):
            part += torch.randn(part.shape, generator=generator, device="cuda")
        runs.append(run.half().cpu().numpy())  # as scans are kept; float32 would be twice as many GB on the host
    del run, part
    GroupICA(k, device="cuda").fit(runs[:1])  # loads the libraries
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    ica = GroupICA(k, fun="cube", device="cuda").fit(runs)
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() / 2**30
    return {
        **line,
        "ours_s": seconds,
        "matched_r": matched(ica.components_, maps.cpu().numpy()),
        "note": f"{torch.cuda.get_device_name()}, {ica.n_iter_} steps, peak {peak:.1f} GiB; matched r with the truth",
    }


HEADER = """\
| case | peer | target | ours | peer's | faster, wall | faster, cpu | matched r | note |
|---|---|---|---|---|---|---|---|---|"""


def as_markdown(line: Row) -> str:
    """One line of the table."""

    def shown(key: str, form: str, unit: str = "") -> str:
        return f"{line[key]:{form}}{unit}" if key in line else ""

    cells = [
        line["case"],
        line["peer"],
        line["target"],
        shown("ours_s", ".2f", " s"),
        shown("peer_s", ".2f", " s"),
        shown("ratio", ".1f", " x"),
        shown("cpu_ratio", ".1f", " x"),
        shown("matched_r", ".4f"),
        line.get("note", ""),
    ]
    return "| " + " | ".join(cells) + " |"


def cases(quick: bool, repeats: int) -> dict[str, Callable[[], list[Row]]]:
    """Everything that is measured, by name."""
    wide, narrow, tokens, k = (8192, 2048, 100, 16) if quick else (131_072, 8192, 500, 64)
    return {
        "wide": lambda: list(against_canica(wide, tokens, 2, {1: "4 x", 10: "8 x"}, repeats)),
        "narrow": lambda: list(against_canica(narrow, tokens, 20, {1: "", 10: "5 x"}, repeats)),
        "ica": lambda: [ica_step(wide, k, repeats)],
        "busy": lambda: [with_a_busy_core(wide, tokens, repeats)],
        "memory": lambda: [memory(narrow, tokens, (4, 8) if quick else (10, 50, 200))],
        "gpu": lambda: [on_a_gpu(4096, 512, 2, 8) if quick else on_a_gpu(352_256, 4096, 8, 128)],
    }


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes: a check that everything runs, no result")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=list(cases(True, 1)), help="some of the cases; writes no JSON")
    parser.add_argument(
        "--out", type=Path, default=None, help=f"JSON file (default {RESULTS}; none with --quick or --only)"
    )
    options = parser.parse_args()
    repeats = 1 if options.quick else options.repeats
    rows: list[Row] = []
    print(HEADER)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nilearn's remarks on defaults that are not used here
        for name, measure in cases(options.quick, repeats).items():
            if options.only and name not in options.only:
                continue
            for line in measure():
                print(as_markdown(line), flush=True)
                rows.append(line)
    record = {
        "command": "python benchmarks/decomposition.py",
        "quick": options.quick,
        "repeats": repeats,
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {
            name: version(name) for name in ("llmbrain", "torch", "numpy", "scipy", "scikit-learn", "nilearn")
        },
        "rows": rows,
    }
    out = options.out or (None if options.quick or options.only else RESULTS)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(f"\nwritten to {out}")


if __name__ == "__main__":
    main()

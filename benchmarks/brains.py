"""How much memory do brains take? A run of the size of the Human Connectome Project's, and a run read by slabs.

    python benchmarks/brains.py [--folder DIR] [--quick]

An HCP-size run (CIFTI, 91,282 grayordinates x 1,200 volumes, float32: 438 MB) is made of five networks and noise,
decomposed into 20 components and dual-regressed; it should fit 4 GB. A NIfTI run of 415 MB is read through a mask that
leaves 52 MB of it, as .nii and as .nii.gz; reading should take at most twice the masked data. Every number is the
largest resident memory of a process of its own, above what it had after the imports. Needs 1.5 GB of disk in DIR
(default: a temporary folder) and takes some minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np

RESULTS = Path(__file__).parent / "results"
HCP = (29696, 29716, 31870)  # vertices of the left and right cortex, voxels below it
N_VOLUMES, N_NETWORKS = 1200, 5
GRID, N_SCANS, SHARE = (64, 64, 36), 703, 8  # 415 MB of float32; a mask of every eighth voxel


def make_hcp(path: Path, shrink: int = 1) -> None:
    """A dense time series with five networks."""
    left, right, below = (n // shrink for n in HCP)
    n_volumes = N_VOLUMES // shrink
    inside = np.zeros((91, 109, 91), dtype=bool)
    inside.ravel()[np.linspace(0, inside.size - 1, below).astype(int)] = True
    axis = nib.cifti2.BrainModelAxis.from_surface(np.arange(left), 32492, "CortexLeft")
    axis += nib.cifti2.BrainModelAxis.from_surface(np.arange(right), 32492, "CortexRight")
    axis += nib.cifti2.BrainModelAxis.from_mask(inside, "Other", np.diag([2.0, 2, 2, 1]))
    rng = np.random.default_rng(0)
    maps = rng.laplace(size=(N_NETWORKS, len(axis))).astype(np.float32)
    data = rng.standard_normal((n_volumes, len(axis)), dtype=np.float32)
    data += rng.standard_normal((n_volumes, N_NETWORKS), dtype=np.float32) @ maps
    image = nib.Cifti2Image(data, header=(nib.cifti2.SeriesAxis(0, 0.72, n_volumes), axis))
    image.nifti_header.set_data_dtype(np.float32)
    image.to_filename(path)


def make_nifti(path: Path, shrink: int = 1) -> None:
    """A run and, beside it, its mask."""
    rng = np.random.default_rng(0)
    inside = (np.arange(np.prod(GRID)) % SHARE == 0).reshape(GRID)
    nib.Nifti1Image(inside.astype(np.uint8), np.eye(4)).to_filename(path.with_name("mask.nii"))
    data = rng.integers(-99, 99, size=(*GRID, N_SCANS // shrink)).astype(np.float32)
    nib.Nifti1Image(data, np.eye(4)).to_filename(path)


def peak() -> float:
    """Largest resident memory so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def decompose(path: Path) -> dict[str, float]:
    """Group ICA and dual regression of one CIFTI run."""
    import torch

    from llmbrain import GroupICA, dual_regression

    torch.set_num_threads(1)
    before, start = peak(), time.process_time()
    ica = GroupICA(20, max_iter=50, tol=1e-3).fit([path])
    middle = peak()
    dual_regression(ica, [path])
    return {"ICA MB": middle - before, "ICA and dual regression MB": peak() - before, "whole process MB": peak(),
            "seconds of a core": time.process_time() - start}  # fmt: skip


def read(path: Path) -> dict[str, float]:
    """Masked data of one NIfTI run."""
    from llmbrain.imaging.brain_mask import BrainMask

    mask = BrainMask(path.with_name("mask.nii"))
    nib.load(path.with_name("mask.nii")).get_fdata()  # what nibabel needs once
    before, start = peak(), time.process_time()
    data = mask.read(path, "run")
    return {"masked MB": data.nbytes / 1e6, "read MB": (peak() - before) * 1.048576,
            "times the masked data": (peak() - before) * 1.048576e6 / data.nbytes,
            "seconds of a core": time.process_time() - start}  # fmt: skip


def alone(task: Callable[[Path], object], *arguments: object) -> object:
    """What a function gives in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(task, arguments)


def main() -> None:
    """Make the runs, measure, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--quick", action="store_true", help="a tenth of the size; nothing is written")
    arguments = parser.parse_args()
    shrink = 10 if arguments.quick else 1
    rows = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        for task, make, file in (
            (decompose, make_hcp, "hcp.dtseries.nii"), (read, make_nifti, "run.nii"), (read, make_nifti, "run.nii.gz"),
        ):  # fmt: skip
            path = Path(name) / file
            alone(make, path, shrink)
            row = {"run": file, "file MB": path.stat().st_size / 1e6, **alone(task, path)}  # type: ignore[dict-item]
            rows.append({key: round(value, 2) if isinstance(value, float) else value for key, value in row.items()})
            print(rows[-1], flush=True)
            path.unlink()
    if not arguments.quick:
        lines = []
        for row in rows:
            facts = "; ".join(f"{key} {value:,}" for key, value in row.items() if key != "run")
            lines.append(f"- `{row['run']}`: {facts}")
        (RESULTS / "brains.json").write_text(json.dumps(rows, indent=1) + "\n")
        (RESULTS / "brains.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

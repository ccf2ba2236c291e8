"""Attacks on everything that the project writes: flips, truncations, kill -9, full and read-only disks.

Small in ``tests/reliability``, in full in ``benchmarks/reliability.py``.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tiny_models import tiny, tiny_tokenizer

import llmbrain as lb
from llmbrain import InputError
from llmbrain.networks import FunctionalNetworks
from llmbrain.study import check, decompose

TEXTS = ["hello there, how are you? ", "the quick brown fox jumps. ", "what is it? a test, not more. "]
TEXTS = [text * 4 for text in TEXTS]
EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")


def scan(folder: Path) -> None:
    lb.scan(tiny("llama"), tiny_tokenizer(), TEXTS, out=folder / "scan", block_size=32)


def networks(folder: Path, seed: int = 0, overwrite: bool = True) -> None:
    decompose(folder, 3, random_state=seed, overwrite=overwrite, progress=False)


def plan(folder: Path, ratio: float = 0.5) -> None:
    lb.plan_pruning(tiny("llama"), ratio=ratio, method="magnitude").save(folder / "plan.json")


def model(folder: Path, ratio: float = 0.5) -> None:
    whole = tiny("llama")
    small = lb.prune(whole, lb.plan_pruning(whole, ratio=ratio, method="magnitude"))
    lb.save_pruned(small, tiny_tokenizer(), folder / "pruned", overwrite=True)


def dualreg(folder: Path) -> None:
    found = FunctionalNetworks.load(folder / "networks")
    lb.dual_regression(found, lb.load_scans(folder / "scan"), out=folder / "dualreg", device="cpu", progress=False)


def lesions(folder: Path) -> None:
    whole, ids = tiny("llama"), torch.arange(16).reshape(2, 8) + 3
    sets = {"a": np.arange(48) < 5, "b": np.arange(48) > 40}
    table = lb.lesion_table(whole, sets, {"x": ids}, n_random=2, out=folder / "lesions", progress=False)
    table.save(folder / "lesions")


def images(folder: Path, value: float = 1.0) -> None:
    space = lb.NeuronSpace([6, 4])
    values = (np.arange(30).reshape(3, 10) * value).astype(np.float32)
    scan_ = lb.Scan.from_array(values, space, name="x")
    scan_.to_nifti(folder / "image.nii")
    scan_.to_nifti(folder / "image.nii.gz")


def bids(folder: Path) -> None:
    lb.export_bids(lb.load_scans(folder / "scan"), folder / "bids", overwrite=True)


WRITERS: dict[str, Callable[[Path], None]] = {
    "scan": scan, "decompose --overwrite": networks, "plan": plan, "prune --overwrite": model, "dualreg": dualreg,
    "lesion": lesions, "nifti": images, "bids": bids,
}  # fmt: skip


def make(folder: Path) -> Path:
    """A study with one of every kind of file."""
    folder.mkdir(parents=True)
    with quiet():
        for write in WRITERS.values():
            write(folder)
    return folder


class quiet:
    """No warnings, no progress on stderr."""

    def __enter__(self) -> None:
        self.warnings = warnings.catch_warnings()
        self.warnings.__enter__()
        warnings.simplefilter("ignore")
        self.stderr, sys.stderr = sys.stderr, open(os.devnull, "w", encoding="utf-8")

    def __exit__(self, *why: object) -> None:
        sys.stderr.close()
        sys.stderr = self.stderr
        self.warnings.__exit__(*why)


# -- what a study says -------------------------------------------------------------------------------------------------


def _scans(folder: Path) -> Any:
    return [(s.name, s.text, s.data().tobytes(), s.token_ids.tolist()) for s in lb.load_scans(folder / "scan")]


def _networks(folder: Path) -> Any:
    found = FunctionalNetworks.load(folder / "networks")
    courses = [run.tobytes() for run in found.time_courses]
    return found.maps.tobytes(), found.cutoffs.tobytes(), found.names, found.poles, found.space, courses


def _ica(folder: Path) -> Any:
    ica = lb.read_ica(folder / "networks" / "ica")
    return ica.components_.tobytes(), [m.tobytes() for m in ica.mixing_], str(ica.get_params()), ica.n_iter_


def _model(folder: Path) -> Any:
    small, tokenizer = lb.load_pruned(folder / "pruned")
    with torch.no_grad():
        said = small(torch.arange(3, 20)[None]).logits
    cuts = str(small.llmbrain_pruning)
    return said.numpy().tobytes(), tokenizer("hello, you").input_ids, cuts


def _dualreg(folder: Path) -> Any:
    courses, maps = lb.imaging.interchange.read_dual_regression(folder / "dualreg")
    found = FunctionalNetworks.load(folder / "networks")
    again = lb.dual_regression(
        found, lb.load_scans(folder / "scan"), out=folder / "dualreg", device="cpu", progress=False
    )
    return [c.tobytes() for c in courses], maps.tobytes(), np.asarray(again.maps).tobytes()


def _lesions(folder: Path) -> Any:
    table = lb.intervention.table.LesionTable.load(folder / "lesions")
    lesions(folder)
    return table.frame.to_csv(), table.draws.to_csv()


def _image(name: str) -> Callable[[Path], Any]:
    def read(folder: Path) -> Any:
        values, space = lb.read_nifti(folder / name)
        return values.tobytes(), space

    return read


READERS: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "scan": (_scans, ("scan/manifest.json", "scan/runs.jsonl", "scan/SHA256SUMS", "scan/shards/0000.safetensors")),
    "networks": (_networks, ("networks/networks.safetensors", "networks/networks.json", "networks/SHA256SUMS")),
    "ica": (_ica, ("networks/ica/ica.safetensors", "networks/ica/ica.json", "networks/ica/SHA256SUMS")),
    "plan": (lambda f: str(lb.PruningPlan.load(f / "plan.json").to_dict()), ("plan.json",)),
    "model": (_model, ("pruned/model.safetensors", "pruned/config.json", "pruned/pruning.json",
                       "pruned/tokenizer.json", "pruned/tokenizer_config.json", "pruned/SHA256SUMS")),
    "dual regression": (_dualreg, ("dualreg/dr_maps.npy", "dualreg/dual_regression.json",
                                   "dualreg/dr_stage1_subject00000.txt", "dualreg/dr_stage2_subject00000.nii.gz",
                                   "dualreg/SHA256SUMS")),
    "lesions": (_lesions, ("lesions/lesion_table.tsv", "lesions/lesions.json", "lesions/network-0000.safetensors",
                           "lesions/lesion_table_provenance.json", "lesions/SHA256SUMS")),
    "image": (_image("image.nii"), ("image.nii",)),
    "image, compressed": (_image("image.nii.gz"), ("image.nii.gz", "image.json")),
}  # fmt: skip


def outcome(read: Callable[[Path], Any], folder: Path, right: Any) -> str:
    """``found`` (one line), ``harmless`` (the right content), ``silent`` (another one) or ``traceback: ...``."""
    try:
        with quiet():
            content = read(folder)
    except (InputError, FileNotFoundError, FileExistsError) as error:
        return "found" if "\n" not in str(error) else "found, in many lines"
    except Exception as error:
        return f"traceback: {type(error).__name__}"
    return "harmless" if content == right else "silent"


def flips(study: Path, n: int, seed: int = 0, only: Sequence[str] | None = None) -> pd.DataFrame:
    """Flip one bit, or cut the file, `n` times each for every kind of file; counts of what reading it says."""
    rng, rows = np.random.default_rng(seed), []
    for read, names in (READERS[reader] for reader in only or READERS):
        with quiet():
            right = read(study)
        for name in names:
            path = study / name
            whole = path.read_bytes()
            for how in ("flip", "cut"):
                counts: Counter[str] = Counter()
                for at in rng.integers(len(whole) * 8, size=n):
                    content = bytearray(whole)
                    if how == "flip":
                        content[at // 8] ^= 1 << (at % 8)
                    else:
                        content = content[: at // 8]
                    copies = keep(path.parent)
                    path.write_bytes(content)
                    counts[outcome(read, study, right)] += 1
                    restore(path.parent, copies)
                rows.append({"file": name, "damage": how, "tries": n, **counts})
    return pd.DataFrame(rows).fillna(0)


def keep(folder: Path) -> dict[Path, bytes]:
    """The files of a folder: readers that go on where they were stopped write into it."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def restore(folder: Path, copies: dict[Path, bytes]) -> None:
    for path in folder.rglob("*"):
        if path.is_file() and path not in copies:
            path.unlink()
    for path, content in copies.items():
        path.write_bytes(content)


# -- kill -9, full and read-only disks ---------------------------------------------------------------------------------


def in_child(work: Callable[[], None], hook: Callable[[str, tuple[Any, ...]], None]) -> tuple[int, str]:
    """Run `work` in a forked process under an audit hook; its signal or exit code, and what it said."""
    read, write = os.pipe()
    child = os.fork()
    if child:
        os.close(write)
        with os.fdopen(read) as pipe:
            said = pipe.read()
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said
    code = 0
    try:
        torch.set_num_threads(1)
        sys.addaudithook(hook)
        with quiet():
            work()
    except InputError as error:
        os.write(write, str(error).encode())
        code = 2
    except BaseException as error:
        os.write(write, f"traceback: {type(error).__name__}: {error}".encode())
        code = 1
    finally:
        os._exit(code)


def kills(root: Path, n: int, seed: int = 0, only: Sequence[str] | None = None) -> pd.DataFrame:
    """kill -9 at `n` random write events of every writer: the same call again gives what an unbroken one gives."""
    rng, rows = np.random.default_rng(seed), []
    base = make(root / "whole")
    right = {name: digest(base, name) for name in only or WRITERS}
    for name in only or WRITERS:
        write = WRITERS[name]
        trial = root / "trial"
        counts: Counter[str] = Counter()
        events = _events(base, trial, write)
        for at in rng.integers(events, size=n):
            shutil.rmtree(trial, ignore_errors=True)
            shutil.copytree(base, trial)
            if name in ("scan", "dualreg", "lesion"):
                shutil.rmtree(trial / {"scan": "scan", "dualreg": "dualreg", "lesion": "lesions"}[name])
            left = iter(range(int(at)))

            def kill(event: str, args: tuple[Any, ...], left: Any = left, trial: Path = trial) -> None:
                if event in EVENTS and str(trial) in str(args) and next(left, None) is None:
                    os.kill(os.getpid(), signal.SIGKILL)

            code, said = in_child(partial(write, trial), kill)
            if code not in (0, -signal.SIGKILL):
                counts[f"failed: {said}"[:80]] += 1
                continue
            try:
                with quiet():
                    write(trial)
                same = digest(trial, name) == right[name] and _clean(trial)
                counts["equal" if same else "other result"] += 1
            except Exception as error:
                counts[f"refused: {type(error).__name__}: {error}"[:120]] += 1
        rows.append({"writer": name, "tries": n, **counts})
    shutil.rmtree(root / "trial", ignore_errors=True)
    return pd.DataFrame(rows).fillna(0)


def _events(base: Path, trial: Path, write: Callable[[Path], None]) -> int:
    """How many write events an unbroken call has."""
    shutil.rmtree(trial, ignore_errors=True)
    shutil.copytree(base, trial)
    report = trial.parent / "events"

    def work() -> None:
        write(trial)
        report.write_text(str(len(seen)))

    seen: list[str] = []

    def count(event: str, args: tuple[Any, ...]) -> None:
        if event in EVENTS and str(trial) in str(args):
            seen.append(event)

    in_child(work, count)
    return max(1, int(report.read_text()))


def _bids(folder: Path) -> Any:
    return {p.name: p.read_bytes() for p in sorted((folder / "bids").rglob("*.tsv"))}


def digest(folder: Path, name: str) -> str:
    """Of what a writer made, as its reader says it."""
    readers = {"scan": [_scans], "decompose --overwrite": [_networks, _ica], "prune --overwrite": [_model],
               "dualreg": [_dualreg], "lesion": [_lesions], "nifti": [_image("image.nii"), _image("image.nii.gz")],
               "plan": [READERS["plan"][0]],
               "bids": [_bids]}[name]  # fmt: skip
    with quiet():
        return hashlib.sha256(repr([read(folder) for read in readers]).encode()).hexdigest()


def _clean(folder: Path) -> bool:
    return not [p for p in folder.rglob(".*") if p.name != ".bidsignore"]


def disks(root: Path, only: Sequence[str] | None = None) -> pd.DataFrame:
    """A full and a read-only disk at the first, a middle and the last write event of every writer."""
    rows = []
    base = make(root / "whole")
    for code in (errno.ENOSPC, errno.EROFS):
        for name in only or WRITERS:
            write, counts = WRITERS[name], Counter[str]()
            events = _events(base, root / "trial", write)
            places = sorted({0, events // 2, events - 1})
            for at in places:
                trial = root / "trial"
                shutil.rmtree(trial, ignore_errors=True)
                shutil.copytree(base, trial)
                left = iter(range(at))

                def full(
                    event: str, args: tuple[Any, ...], left: Any = left, code: int = code, trial: Path = trial
                ) -> None:
                    if event not in EVENTS or str(trial) not in str(args) or next(left, None) is not None:
                        return
                    if event == "open" and not (isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)):
                        return
                    if event in ("os.remove", "os.rmdir") and code == errno.ENOSPC:
                        return
                    raise OSError(code, os.strerror(code))

                exit_code, said = in_child(partial(write, trial), full)
                if exit_code == 0:
                    counts["done"] += 1
                elif exit_code == 2 and "\n" not in said:
                    counts["one line"] += 1
                else:
                    counts[said[:100]] += 1
                try:
                    digest(trial, name)
                except Exception as error:
                    counts[f"then: {type(error).__name__}: {error}"[:100]] += 1
            rows.append({"writer": name, "disk": errno.errorcode[code], "tries": len(places), **counts})
    return pd.DataFrame(rows).fillna(0)


def checked(study: Path) -> pd.DataFrame:
    """What `llmbrain check` says of it."""
    with quiet():
        return check(study)

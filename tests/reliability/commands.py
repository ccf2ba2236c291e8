"""Every command attacked in a process of its own: kill -9, Ctrl-C, full and read-only disks, several at once."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from reliability.campaign import EVENTS, checked
from tiny_models import CHARACTERS, tiny, tiny_tokenizer

from llmbrain.cli import CTRL_C, main

Hook = Callable[[str, tuple[Any, ...]], None]
FAST = ["--device", "cpu"]
SECONDS = 10  # of the processor, that a command may take
SHARED = Path(os.environ.get("LLMBRAIN_TEST_DATA", "../shared/data")).resolve()

# What is typed, `@` for the folder that it happens in; all that is written goes into `@/made` (or has its name).
COMMANDS: dict[str, str] = {
    "scan": "scan @/model --text @/text.json --out @/made --nifti --device cpu",
    "decompose": "decompose @/study --components 3 --out @/made --device cpu",
    "decompose --overwrite": "decompose @/study --components 3 --seed 1 --overwrite --out @/study/networks "
    "--device cpu",
    "decompose --images": "decompose @/study --images @/brain.nii.gz --mask @/mask.nii.gz --components 2 --out @/made "
    "--device cpu",
    "dualreg": "dualreg @/study --out @/made",
    "networks": "networks @/study --out @/made --permutations 9",
    "lesion": "lesion @/model --text @/text.json --networks @/study --out @/made --n-random 2 --window 32 "
    "--max-windows 2 --device cpu",
    "plan": "plan @/model --text @/text.json --method magnitude --out @/made/plan.json --device cpu",
    "prune": "prune @/model --study @/study --ratio 0.4 --out @/made --device cpu",
    "prune --overwrite": "prune @/model --text @/text.json --method magnitude --ratio 0.2 --overwrite "
    "--out @/study/pruned --device cpu",
    "recover": "recover @/model --text @/text.json --steps 2 --rank 2 --out @/made --device cpu",
    "export": "export @/stories --format gguf --out @/made.gguf",
    "benchmark": "benchmark @/model --text @/text.json --methods magnitude --ratios 0.3 --draws 1 --window 32 "
    "--max-windows 4 --test-windows 4 --out @/made/benchmark.csv --device cpu",
    "run": "run @/model --text @/text.json --components 3 --method magnitude --out @/made --device cpu",
    "run --overwrite": "run @/model --text @/text.json --components 2 --method magnitude --overwrite --out @/job "
    "--device cpu",
    "compare": "compare @/model --fmri @/fmri --words @/words.tsv --tr 1.5 --components 2 --n-null 9 --no-encoding "
    "--out @/made --device cpu",
    "latency": "latency @/model --batch 1 --prompt 4 --new-tokens 2 --repeats 1 --out @/made/latency.tsv",
}  # fmt: skip


def typed(name: str, folder: Path) -> list[str]:
    """The words of a command."""
    return COMMANDS[name].replace("@", str(folder)).split()


def names() -> list[str]:
    """The commands that can be tried here: the one for GGUF needs a model with a tokenizer of its kind."""
    able = (SHARED / "models/stories260K").is_dir() and find_spec("gguf") is not None
    return [name for name in COMMANDS if name != "export" or able]


def make(folder: Path) -> Path:
    """A model, texts, brains, and studies that the commands made of them; all of them are imported by then."""
    torch.set_num_threads(1)
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    tiny("llama", seed=3, intermediate_size=40).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    if "export" in names():
        shutil.copytree(SHARED / "models/stories260K", folder / "stories")
    letters = np.array(list(CHARACTERS))
    (folder / "text.json").write_text(json.dumps(["".join(rng.choice(letters, 300)) for _ in range(4)]))
    rows, onset = [], 3.0
    for _ in range(160):
        word = "".join(rng.choice(list("abcdeghinorstu"), rng.integers(2, 7)))
        rows.append((word, round(onset, 3), round(onset + 0.3, 3)))
        onset += 0.3 + rng.gamma(1.0, 0.3)
    pd.DataFrame(rows, columns=["word", "onset", "offset"]).to_csv(folder / "words.tsv", sep="\t", index=False)
    (folder / "fmri").mkdir()
    for subject in range(2):
        np.save(folder / "fmri" / f"sub-{subject}.npy", rng.standard_normal((80, 6)))
    mask = np.zeros((4, 4, 3), np.float32)
    mask[1:3] = 1
    nib.save(nib.Nifti1Image(mask, np.eye(4)), folder / "mask.nii.gz")
    nib.save(nib.Nifti1Image(rng.standard_normal((4, 4, 3, 40)).astype(np.float32), np.eye(4)), folder / "brain.nii.gz")
    for arguments in (
        f"scan @/model --text @/text.json --out @/study/scan {' '.join(FAST)}",
        "decompose @/study --components 3 --device cpu",
        "prune @/model --text @/text.json --method magnitude --out @/study/pruned --device cpu",
        "plan @/model --text @/text.json --method magnitude --out @/study/plan.json --device cpu",
        "run @/model --text @/text.json --components 3 --method magnitude --out @/job --device cpu",
        "export @/stories --format gguf --out @/study/small.gguf" if "export" in names() else "--version",
        "dualreg @/study", COMMANDS["compare"], COMMANDS["networks"].replace("@/made", "@/tables"),
        COMMANDS["decompose --images"].replace("@/made", "@/brains"),
    ):  # fmt: skip
        code, said = within(arguments.replace("@", str(folder)).split(), folder)
        assert code == 0, f"{arguments}: {said}"
    for name in ("made", "tables"):
        shutil.rmtree(folder / name)
    return folder


def within(arguments: Sequence[str], folder: Path) -> tuple[int, str]:
    """A command in this process: what it imports is there for the processes that are forked from it."""
    before, streams = sys.argv, (sys.stdout, sys.stderr)
    with tempfile.TemporaryFile("w+") as said:
        sys.argv, sys.stdout, sys.stderr = ["llmbrain", *arguments], said, said
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            sys.argv, (sys.stdout, sys.stderr) = before, streams
        said.seek(0)
        return code, said.read()


def start(
    arguments: Sequence[str], folder: Path, hook: Hook | None = None, *, largest: int | None = None,
    after: Callable[[], None] | None = None,
) -> tuple[int, Any]:  # fmt: skip
    """Fork a process that runs a command; its number and the file that it speaks into.

    Parameters
    ----------
    hook : callable, optional
        An audit hook.
    largest : int, optional
        Bytes that a file may have: beyond it, the disk refuses, whoever writes.
    after : callable, optional
        Called in the process when the command has ended.
    """
    if largest is None:
        said = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  # closed by `ended`
        told = os.dup(said.fileno())
    else:  # what it says is no file that may not be large
        heard, told = os.pipe()
        said = os.fdopen(heard, errors="replace")
    child = os.fork()
    if child:
        os.close(told)
        return child, said
    code = 1
    try:
        for stream in (1, 2):
            os.dup2(told, stream)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.alarm(300)
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        os.chdir(folder)
        sys.argv = ["llmbrain", *arguments]
        if largest is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
        if hook is not None:
            sys.addaudithook(hook)
        main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        if after is not None:
            after()
        try:  # whatever happens, the process ends here: what called `start` is the parent's
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def ended(child: int, said: Any) -> tuple[int, str]:
    """Wait for a process: its exit code (negative: its signal), and what it said."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if said.seekable():
        said.seek(0)
    text = said.read()
    said.close()
    return code, text


def call(arguments: Sequence[str], folder: Path, hook: Hook | None = None, **options: Any) -> tuple[int, str]:
    """Run a command in a process of its own."""
    return ended(*start(arguments, folder, hook, **options))


def fresh(base: Path, trial: Path) -> Path:
    """The same folder at the same place."""
    shutil.rmtree(trial, ignore_errors=True)
    shutil.copytree(base, trial)
    return trial


STAMP = re.compile(rb"20\d\d-\d\d-\d\d[ T]\d\d:\d\d(:\d\d)?(\.\d+)?")


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file, whenever it was made: dates are taken out, and what checksums say of files with dates."""
    raw = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    dated = {path for path, content in raw.items() if path.suffix in (".html", ".json") and STAMP.search(content)}
    for path in raw:
        if path in dated:
            raw[path] = STAMP.sub(b"", raw[path])
        elif path.name == "SHA256SUMS":
            ours = [f"  {other.relative_to(path.parent).as_posix()}".encode() for other in dated
                    if path.parent in other.parents]  # fmt: skip
            raw[path] = b"\n".join(
                name if (name := next((o for o in ours if line.endswith(o)), None)) else line
                for line in raw[path].split(b"\n")
            )
    return {path.as_posix(): hashlib.sha256(content).hexdigest() for path, content in raw.items()}


class Right:
    """What a command makes when nothing happens, and in how many write events."""

    def __init__(self, name: str, base: Path, trial: Path) -> None:
        self.name, self.base, self.trial = name, base, trial
        both, seen, report = [], list[str](), trial.parent / "events"

        def after() -> None:
            report.write_text(str(len(seen)))

        for _ in range(2):
            code, said = call(typed(name, fresh(base, trial)), trial, _counting(seen, trial), after=after)
            assert code == 0, f"{name}: {said}"
            both.append(contents(trial))
        self.events = int(report.read_text())
        self.files = both[0]
        # What says when it was made, or how fast, differs from run to run: only that it is there is compared.
        self.differ = {path for path in both[0] if both[0][path] != both[1].get(path)}

    def same(self) -> str:
        """Whether the folder holds it: ``equal``, or what is otherwise."""
        found = contents(self.trial)
        if found.keys() != self.files.keys():
            return f"files: {sorted(found.keys() ^ self.files.keys())[:3]}"
        other = sorted(p for p in found if found[p] != self.files[p] and p not in self.differ)
        if other:
            return f"content: {other[:3]}"
        table = checked(self.trial)
        bad = table[table["state"] != "ok"]
        return "equal" if bad.empty else f"check: {bad['file'].iloc[0]}: {bad['state'].iloc[0]}"


def _counting(seen: list[str], trial: Path) -> Hook:
    def count(event: str, args: tuple[Any, ...]) -> None:
        if event in EVENTS and _touches(trial, event, args):
            seen.append(event)

    return count


def _touches(trial: Path, event: str, args: tuple[Any, ...]) -> bool:
    """Whether something in `trial` is written, renamed or removed."""
    if str(trial) not in str(args):
        return False
    writes = os.O_WRONLY | os.O_RDWR
    return event != "open" or bool(isinstance(args[2], int) and args[2] & writes)


def _at(events: int, trial: Path, strike: Callable[[str], None]) -> Hook:
    """Strike at a write event of this number; events before pass."""
    left = iter(range(events))

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in EVENTS and _touches(trial, event, args) and next(left, None) is None:
            strike(event)

    return hook


def kills(base: Path, trial: Path, n: int, seed: int = 0, only: Sequence[str] | None = None) -> pd.DataFrame:
    """kill -9 at `n` random write events of every command; the same command again, and the result is compared."""
    return _struck(base, trial, n, seed, only, signal.SIGKILL, -signal.SIGKILL)


def interrupts(base: Path, trial: Path, n: int, seed: int = 0, only: Sequence[str] | None = None) -> pd.DataFrame:
    """Ctrl-C in the same way: exit code 130 and one line about it."""
    return _struck(base, trial, n, seed, only, signal.SIGINT, CTRL_C)


def _struck(
    base: Path, trial: Path, n: int, seed: int, only: Sequence[str] | None, sign: signal.Signals, expected: int
) -> pd.DataFrame:
    rng, rows = np.random.default_rng(seed), []
    for name in only or names():
        right = Right(name, base, trial)
        counts: Counter[str] = Counter()
        for at in rng.integers(right.events, size=n):
            fresh(base, trial)
            hook = _at(int(at), trial, lambda event: os.kill(os.getpid(), sign))
            code, said = call(typed(name, trial), trial, hook)
            if code != expected and not (code == 0 and sign == signal.SIGINT):  # it may come after the last step
                counts[f"exit {code}: {last(said)}"[:120]] += 1
                continue
            if code == CTRL_C and "interrupted: what was written is kept" not in said:
                counts[f"said: {last(said)}"[:120]] += 1
                continue
            code, said = call(typed(name, trial), trial)
            counts[right.same() if code == 0 else f"again: {last(said)}"[:120]] += 1
        rows.append({"command": name, "tries": n, **counts})
    return pd.DataFrame(rows).fillna(0)


def last(said: str) -> str:
    """The last line that was said."""
    lines = [line for line in said.splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""


def disks(base: Path, trial: Path, only: Sequence[str] | None = None) -> pd.DataFrame:
    """A full and a read-only disk at the first, a middle and the last write event, and files that may not be large."""
    rows = []
    for name in only or names():
        right = Right(name, base, trial)
        before = contents(base)
        for what in ("ENOSPC", "EROFS", "EFBIG"):
            counts: Counter[str] = Counter()
            places = [600] if what == "EFBIG" else sorted({0, right.events // 2, right.events - 1})
            for at in places:
                fresh(base, trial)
                if what == "EFBIG":
                    code, said = call(typed(name, trial), trial, largest=at)
                else:
                    code, said = call(typed(name, trial), trial, _full(at, trial, getattr(errno, what)))
                counts[_failed(code, said)] += 1
                if "--overwrite" not in name and any(contents(trial).get(p) != d for p, d in before.items()):
                    counts["what stood before is changed"] += 1
                code, said = call(typed(name, trial), trial)
                again = right.same() if code == 0 else f"again: {last(said)}"
                if again != "equal":
                    counts[again[:120]] += 1
            rows.append({"command": name, "disk": what, "tries": len(places), **counts})
    return pd.DataFrame(rows).fillna(0)


def _failed(code: int, said: str) -> str:
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    if code == 2 and len(errors) == 1 and "Traceback" not in said:
        return "one line"
    return "done" if code == 0 else f"exit {code}: {last(said)}"[:120]


def _full(at: int, trial: Path, code: int) -> Hook:
    """From a write event on, nothing can be written; of a full disk, files can be removed."""
    left = iter(range(at))

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event not in EVENTS or not _touches(trial, event, args) or next(left, None) is not None:
            return
        if event in ("os.remove", "os.rmdir") and code == errno.ENOSPC:
            return
        raise OSError(code, os.strerror(code))

    return hook


def processes(base: Path, trial: Path, n: int = 4, only: Sequence[str] | None = None) -> pd.DataFrame:
    """The same command `n` times at once: each does it, or is told who does; then once more, and it is compared."""
    rows = []
    for name in only or names():
        right = Right(name, base, trial)
        fresh(base, trial)
        counts: Counter[str] = Counter()
        for child, said in [start(typed(name, trial), trial) for _ in range(n)]:
            code, text = ended(child, said)
            busy = code == 2 and any(w in last(text) for w in ("in use by process", "holds a model already", "exists"))
            counts["done" if code == 0 else "told" if busy else f"exit {code}: {last(text)}"[:120]] += 1
        code, text = call(typed(name, trial), trial)
        counts[right.same() if code == 0 else f"again: {last(text)}"[:120]] += 1
        rows.append({"command": name, "tries": n + 1, **counts})
    return pd.DataFrame(rows).fillna(0)

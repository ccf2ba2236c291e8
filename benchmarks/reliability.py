"""What becomes of a study that is attacked: flips, kills, full disks, several processes, bad input, mutations.

python benchmarks/reliability.py                             # hours on one core, one of them mutations
python benchmarks/reliability.py --jobs 16                   # on sixteen
python benchmarks/reliability.py --parts files loading       # some parts; what is known of the others stays
python benchmarks/reliability.py --small                     # minutes: does it run?

Each piece of work is a line of the log (`--log`; the page is beside it) as soon as it is done; with the log of a run
that was stopped, the same command does what is left.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import shutil
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT / "tests")  # not this folder: its file has the name of a folder there

import pandas as pd  # noqa: E402
import torch  # noqa: E402
from reliability import campaign, commands, fuzz, inputs  # noqa: E402
from tiny_models import tiny  # noqa: E402

import llmbrain as lb  # noqa: E402
from llmbrain import InputError  # noqa: E402
from llmbrain._files import read_json, write_json, write_text  # noqa: E402

LOG = ROOT / "benchmarks" / "results" / "reliability.jsonl"
PARTS = ("files", "commands", "inputs", "mutations", "again", "loading")
# A section: its part, title, what is said of it, and the outcomes that are right.
SECTIONS: dict[str, tuple[str, str, str, tuple[str, ...]]] = {
    "flips": ("files", "Bit flips and truncations of what the package wrote", "`found`: one line that names the file. "
              "`harmless`: the right content all the same, also since what was damaged was made anew.",
              ("found", "harmless")),
    "kills of writers": ("files", "kill -9 of writers in Python", "At random write events; `equal`: the same call "
                         "again gives what an unbroken one gives.", ("equal",)),
    "disks of writers": ("files", "Full and read-only disks, writers in Python", "At the first, a middle and the last "
                         "write event; what stood before still reads.", ("one line", "done")),
    "kills": ("commands", "kill -9 of commands", "At random write events. `equal`: the same command again, exit code "
              "0, the same files (of those that say when or how fast, that they are there), `llmbrain check` ok, none "
              "left over.", ("equal",)),
    "interrupts": ("commands", "Ctrl-C in commands", "At random write events: exit code 130 and one line that says "
                   "what stands; then the same command again.", ("equal",)),
    "disks": ("commands", "Full and read-only disks, files that may not be large, commands", "At the first, a middle "
              "and the last write event; `one line`: exit code 2; then the same command again, with room, gives the "
              "same.", ("one line", "done")),
    "processes": ("commands", "Four processes, the same command, at once", "`told`: one line that says who is at "
                  "work; `equal`: then once more, and compared.", ("done", "told", "equal")),
    "bad options": ("inputs", "Command lines with one bad value", "`one line`: exit code 2; `done`: a value that can "
                    f"be meant. A hang is more than {commands.SECONDS} s of the processor.", ("one line", "done")),
    "bad files": ("inputs", "Files in wrong forms, through the commands", "Empty, cut, noise, zeros, flipped, other "
                  "JSON, not UTF-8, deeply nested, a folder; `done`: the file is not needed, or reads.",
                  ("one line", "done")),
    "mutations": ("mutations", "Random mutations of every kind of file that is read", "`read`: the change did no harm "
                  "to what is read, or is data.", ("read", "one line")),
    "again": ("again", "Those mutations that were not, again", "By their seeds, after what they showed was mended.",
              ("read", "one line")),
    "loading": ("loading", "Loading", "`verified`: by the fast checksum, as all of 4 MiB and more; `not verified`: "
                "without `SHA256SUMS`. A plain load only maps the file, and reads its weights when it first reads a "
                "text; two threads.", ()),
}  # fmt: skip
Unit = tuple[str, str, Callable[[Path], pd.DataFrame]]  # section, name, what it does in a folder of its own


# -- loading -----------------------------------------------------------------------------------------------------------


def forget(folder: Path) -> None:
    """Take the files of a folder out of the system's memory, as after a restart."""
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def loading(folder: Path, n: int = 15) -> pd.DataFrame:
    """Seconds to load a model of some 100 MB with and without its checksums, as for the first time in a process.

    The plain load only maps the file: the weights are read when the model first reads a text, so that is timed too.
    """
    whole = tiny("llama", hidden_size=512, intermediate_size=4096, num_hidden_layers=4)
    for name in ("sums", "none", "sha256"):
        lb.save_pruned(whole, None, folder / name)
    (folder / "none" / "SHA256SUMS").unlink()
    sums = folder / "sha256" / "SHA256SUMS"  # as `sha256sum *.*` writes it
    sums.write_text("".join(line for line in sums.open() if not line.startswith("#")))
    size = (folder / "sums" / "model.safetensors").stat().st_size
    seen = sys.modules["llmbrain._files.reading"]._verified
    said = {"none": "not verified", "sums": "verified", "sha256": "verified by SHA-256 alone"}
    ids, rows = torch.arange(3, 35)[None], []
    warnings.simplefilter("ignore")
    for state in ("in memory", "on disk"):
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in said}
        for _ in range(n):
            for name, own in times.items():
                seen.clear()
                if state == "on disk":
                    forget(folder / name)
                begin = time.perf_counter()
                model, _ = lb.load_pruned(folder / name)
                loaded = time.perf_counter()
                with torch.no_grad():
                    model(ids)
                own.append((loaded - begin, time.perf_counter() - begin))
                del model
        for k, what in enumerate(("load", "load, and read 32 tokens")):
            medians = {name: statistics.median(t[k] for t in own) for name, own in times.items()}
            rows += [{"timed": what, "file": f"{size / 1e6:.0f} MB {state}", "": said[name],
                      f"seconds (median of {n})": f"{m:.4f}", "of not verified": f"{m / medians['none']:.2f}"}
                     for name, m in medians.items()]  # fmt: skip
    return pd.DataFrame(rows)


# -- what there is to do -----------------------------------------------------------------------------------------------


def units(parts: Sequence[str], root: Path, how: argparse.Namespace, known: set[str]) -> list[Unit]:
    """The pieces of work of some parts that are not in the log yet; what they attack is made once, in `root`."""
    made: dict[str, Path] = {}
    makers = {"commands": commands.make, "inputs": commands.make, "mutations": _fuzzed, "again": _fuzzed}
    todo: list[Unit] = []
    for section, name, work in _all(parts, how.small, how):
        make = makers.get(SECTIONS[section][0])
        if f"{section}/{name}" in known:
            continue
        if make is None:
            todo.append((section, name, work))
            continue
        place = root / make.__name__
        if make.__name__ not in made and place.with_suffix(".whole").exists():  # `--work` of a run before
            import_all()
        elif make.__name__ not in made:
            shutil.rmtree(place, ignore_errors=True)
            make(place)
            place.with_suffix(".whole").touch()
        made[make.__name__] = place
        todo.append((section, name, partial(_in_trial, work, made[make.__name__])))
    return todo


def import_all() -> None:
    """What the commands import, before they are forked."""
    import matplotlib.pyplot  # noqa: F401
    import nibabel  # noqa: F401
    import sklearn.decomposition  # noqa: F401

    for module in pkgutil.walk_packages(lb.__path__, "llmbrain."):
        if not module.name.endswith("__main__"):
            with suppress(ImportError):
                importlib.import_module(module.name)


def _fuzzed(folder: Path) -> Path:
    return fuzz.make(campaign.make(folder))


def _in_trial(work: Callable[[Path, Path], pd.DataFrame], base: Path, folder: Path) -> pd.DataFrame:
    return work(base, folder / "trial")


def _all(parts: Sequence[str], few: bool, how: argparse.Namespace) -> Iterator[tuple[str, str, Any]]:
    known = ["plan", "decompose"] if few else sorted(commands.names(), key=commands.names().index)
    if "commands" in parts:
        for name in known:
            yield "kills", name, partial(commands.kills, n=1 if few else 6, only=[name])
        for name in known:
            yield "interrupts", name, partial(commands.interrupts, n=1 if few else 2, only=[name])
            yield "processes", name, partial(commands.processes, only=[name])
        for name in known:
            yield "disks", name, partial(commands.disks, only=[name])
    if "inputs" in parts:
        each = 300 if few else 64  # of every eighth command line
        for i in range(0, 4 if few else each, 2 if few else 8):
            yield "bad options", f"every {each}th from {i}", partial(inputs.bad_options, part=slice(i, None, each))
        for i, (file, _) in enumerate(inputs.of_files()[: 2 if few else None]):
            yield "bad files", file, partial(inputs.bad_files, seed=i, part=slice(i, i + 1))
    if "files" in parts:
        for name in campaign.READERS:
            yield "flips", name, partial(_flips, name, 2 if few else 24)
        for name in campaign.WRITERS:
            yield "kills of writers", name, partial(_apart, partial(campaign.kills, n=1 if few else 14, only=[name]))
            yield "disks of writers", name, partial(_apart, partial(campaign.disks, only=[name]))
    if "mutations" in parts:
        for job in range(how.jobs):
            name = f"{how.minutes:g} minutes, {job}"  # other mutations than those of another name, which add up
            yield "mutations", name, partial(
                fuzz.mutations, seconds=5 if few else 60 * how.minutes / how.jobs, begin=crc32(name.encode()) << 16
            )  # fmt: skip
    if "again" in parts:
        for line in how.lines:
            if line["section"] == "mutations" and any("(seed " in said for row in line["rows"] for said in row):
                yield "again", f"{line['unit']}, {len(how.lines)}", partial(fuzz.again, rows=line["rows"])
    if "loading" in parts:
        yield "loading", "load_pruned", partial(loading, n=3 if few else 15)


def _flips(name: str, n: int, folder: Path) -> pd.DataFrame:
    return campaign.flips(campaign.make(folder / "study"), n, only=[name])


def _apart(work: Callable[[Path], pd.DataFrame], folder: Path) -> pd.DataFrame:
    return work(folder / "root")


def done(unit: Unit, root: Path) -> dict[str, Any]:
    """Do a piece of work; its line of the log."""
    section, name, work = unit
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(dir=root) as place:
        try:
            rows = json.loads(work(Path(place)).to_json(orient="records"))
        except Exception as error:  # the campaign itself failed: said in the table
            traceback.print_exc()
            rows = [{"what": name, "tries": 1, f"campaign: {type(error).__name__}: {error}"[:300]: 1}]
    return {"unit": f"{section}/{name}", "section": section, "rows": rows, "seconds": round(time.monotonic() - begin)}


def do(todo: Sequence[Unit], root: Path, jobs: int, stop: float, keep: Callable[[dict[str, Any]], None]) -> None:
    """Do pieces of work, several at once, each in a process of its own; timings alone, at the end."""
    running: dict[int, tuple[Unit, Path]] = {}

    def collect() -> None:
        child, status = os.wait()
        (section, name, _), path = running.pop(child)
        try:
            keep(read_json(path))
        except (OSError, InputError):
            died = {"what": name, "tries": 1, f"campaign: ended by {os.waitstatus_to_exitcode(status)}": 1}
            keep({"unit": f"{section}/{name}", "section": section, "rows": [died], "seconds": 0})

    for number, unit in enumerate(sorted(todo, key=lambda unit: unit[0] == "loading")):
        if time.monotonic() > stop:
            break
        while len(running) >= (1 if unit[0] == "loading" else jobs):
            collect()
        path = root / f"{number}.json"
        child = os.fork()
        if not child:
            try:
                torch.set_num_threads(2 if unit[0] == "loading" else 1)
                write_json(path, done(unit, root))
            finally:
                os._exit(0)
        running[child] = (unit, path)
    while running:
        collect()


# -- the page ----------------------------------------------------------------------------------------------------------


def table(frame: pd.DataFrame) -> str:
    """A frame as a Markdown table; whole numbers without a point."""
    rows = [[str(int(v)) if isinstance(v, float) else str(v) for v in row] for row in frame.itertuples(index=False)]
    lines = [list(map(str, frame.columns)), ["---"] * frame.shape[1], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def page(lines: Sequence[dict[str, Any]]) -> str:
    """All that the log says: one table of everything, what should not be, and a table a section."""
    summary, bodies, bad = [], [], []
    for section, (_, title, said, right) in SECTIONS.items():
        rows = [row for line in lines if line["section"] == section for row in line["rows"]]
        if not rows:
            continue
        if not right:
            bodies.append(f"## {title}\n\n{said}\n\n{table(pd.DataFrame(rows))}")
            continue
        first = next(iter(rows[0]))
        merged: dict[str, dict[str, float]] = {}
        for row in rows:
            own = merged.setdefault(" ".join(str(v) for v in row.values() if isinstance(v, str)), {"tries": 0})
            for key, value in row.items():
                if not isinstance(value, str) and value:
                    own[key] = own.get(key, 0) + value
        good = [c for c in right if any(c in own for own in merged.values())]
        frame = pd.DataFrame(
            [{first: name, "tries": own["tries"], **{c: own.get(c, 0) for c in good},
              "other": sum(v for k, v in own.items() if k not in ("tries", *right))} for name, own in merged.items()]
        )  # fmt: skip
        bad += [f"- {title}, {name}: {k} ({v:.0f})" for name, own in merged.items() for k, v in own.items()
                if k not in ("tries", *right)]  # fmt: skip
        summary.append({"attack": title, "tries": int(frame["tries"].sum()),
                        "as it should be": ", ".join(f"{c} {int(frame[c].sum())}" for c in good),
                        "other": int(frame["other"].sum())})  # fmt: skip
        bodies.append(f"## {title}\n\n{said}\n\n{table(frame)}")
    head = [table(pd.DataFrame(summary))] if summary else []
    head += ["What is not as it should be:\n\n" + "\n".join(bad) + "\n"] if bad else []
    return "\n".join(["# Reliability\n", *head, *bodies])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=60, help="of mutations, all jobs together")
    parser.add_argument("--jobs", type=int, default=1, help="pieces of work at once")
    parser.add_argument("--stop-after", type=float, default=1e9, help="seconds; what is not begun by then is left")
    parser.add_argument("--log", type=Path, help=f"default: {LOG.relative_to(ROOT)}; with --small none")
    parser.add_argument("--work", type=Path, help="where what is attacked is made, and stays for the next run")
    parser.add_argument("--page", action="store_true", help="only print what the log says")
    how = parser.parse_args()
    stop = time.monotonic() + how.stop_after
    log = how.log or (None if how.small else LOG)
    lines = [json.loads(line) for line in log.open(encoding="utf-8")] if log and log.is_file() else []

    def keep(line: dict[str, Any]) -> None:
        lines.append(line)
        print(f"{line['seconds']:5d} s  {line['unit']}", file=sys.stderr, flush=True)
        if log:
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    how.lines = list(lines)
    with ExitStack() as stack:
        place = how.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        place.mkdir(parents=True, exist_ok=True)
        todo = [] if how.page else units(how.parts, place, how, {line["unit"] for line in lines})
        do(todo, place, how.jobs, stop, keep)
    text = page(lines)
    print(text)
    if log:
        write_text(log.with_suffix(".md"), text)


if __name__ == "__main__":
    main()

"""What becomes of a study that is attacked: flips, kills, full disks, several processes, bad input, mutations.

python benchmarks/reliability.py                             # two hours on one core, one of them mutations
python benchmarks/reliability.py --parts files loading       # some parts; the others of the page of results stay
python benchmarks/reliability.py --small                     # minutes: does it run?
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT / "tests")  # not this folder: its file has the name of a folder there

import pandas as pd  # noqa: E402
from reliability import campaign, commands, fuzz, inputs  # noqa: E402
from tiny_models import tiny  # noqa: E402

import llmbrain as lb  # noqa: E402
from llmbrain._files import write_text  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "reliability.md"


def table(frame: pd.DataFrame) -> str:
    """A frame as a Markdown table; whole numbers without a point."""
    rows = [[str(int(v)) if isinstance(v, float) else str(v) for v in row] for row in frame.itertuples(index=False)]
    lines = [list(map(str, frame.columns)), ["---"] * frame.shape[1], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def seconds(works: Sequence[Callable[[], object]], before: Callable[[], object], n: int = 15) -> list[float]:
    """Median seconds of several pieces of work, done in turn."""
    times: list[list[float]] = [[] for _ in works]
    for _ in range(n):
        for work, own in zip(works, times):
            before()
            begin = time.perf_counter()
            work()
            own.append(time.perf_counter() - begin)
    return [statistics.median(own) for own in times]


def forget(folder: Path) -> None:
    """Take the files of a folder out of the system's memory, as after a restart."""
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def loading(folder: Path) -> pd.DataFrame:
    """Seconds to load a model of some 100 MB with and without its checksums, as for the first time in a process."""
    whole = tiny("llama", hidden_size=512, intermediate_size=4096, num_hidden_layers=4)
    for name in ("sums", "none", "sha256"):
        lb.save_pruned(whole, None, folder / name)
    (folder / "none" / "SHA256SUMS").unlink()
    sums = folder / "sha256" / "SHA256SUMS"  # as `sha256sum *.*` writes it
    sums.write_text("".join(line for line in sums.open() if not line.startswith("#")))
    size = (folder / "sums" / "model.safetensors").stat().st_size
    seen = sys.modules["llmbrain._files.reading"]._verified

    def load(name: str) -> None:
        lb.load_pruned(folder / name)

    rows = []
    for state in ("in memory", "on disk"):

        def before(state: str = state) -> None:
            seen.clear()
            if state == "on disk":
                forget(folder)

        warnings.simplefilter("ignore")
        medians = seconds([partial(load, name) for name in ("none", "sums", "sha256")], before)
        names = ("not verified", "verified", "verified by SHA-256 alone")
        rows += [{"load_pruned": name, "MB": f"{size / 1e6:.0f}", "file": state, "seconds (median of 15)": f"{m:.3f}",
                  "of not verified": f"{m / medians[0]:.2f}"} for name, m in zip(names, medians)]  # fmt: skip
    return pd.DataFrame(rows)


def of_files(root: Path, few: bool) -> str:
    """Bit flips, truncations, kills and full disks of every writer, in Python."""
    study = campaign.make(root / "flips" / "study")
    ok = campaign.checked(study)
    flips = campaign.flips(study, 2 if few else 24)
    kills = campaign.kills(root / "kills", 1 if few else 14)
    disks = campaign.disks(root / "disks")
    summary = pd.DataFrame(
        [("bit flips and truncations", int(flips["n"].sum()), _sum(flips, "silent"), _sum(flips, "traceback")),
         ("kill -9", int(kills["kills"].sum()), _sum(kills, "other"), _sum(kills, "refused") + _sum(kills, "failed")),
         ("full and read-only disk", int(disks.drop(columns=["disk", "writer"]).to_numpy().sum()), _sum(disks, "then"),
          _sum(disks, "traceback"))],
        columns=["attack", "tries", "wrong without a word", "traceback, or a manual step"],
    )  # fmt: skip
    return "\n".join([
        table(summary),
        f"`llmbrain check` of the study before: {int((ok['state'] == 'ok').sum())} of {len(ok)} files ok.\n",
        "### Bit flips and truncations\n",
        "`found`: one line that names the file. `harmless`: the right content all the same, also since what was "
        "damaged was made anew. `silent`: other content without a word.\n", table(flips),
        "### kill -9\n", "At random write events; `equal`: the same call again gives what an unbroken one gives.\n",
        table(kills), "### Full and read-only disks\n",
        "At the first, a middle and the last write event. `one line`: what stood before still reads.\n", table(disks),
    ])  # fmt: skip


def of_commands(root: Path, few: bool) -> str:
    """Kills, Ctrl-C, disks and several processes, of every command."""
    base, trial = commands.make(root / "base"), root / "trial"
    only = ["plan", "decompose"] if few else None
    return "\n".join([
        "`equal`: the same command again, exit code 0, the same files (of those that say when or how fast, that they "
        "are there), `llmbrain check` ok, nothing left over.\n",
        "### kill -9\n", table(commands.kills(base, trial, 1 if few else 7, only=only)),
        "### Ctrl-C\n", "Exit code 130, and a line that says what stands.\n",
        table(commands.interrupts(base, trial, 1 if few else 2, only=only)),
        "### Full and read-only disks, files that may not be large\n",
        "`one line`: exit code 2; then the same command again with room.\n", table(commands.disks(base, trial, only)),
        "### Four processes at once\n", "`told`: one line that says who is at work.\n",
        table(commands.processes(base, trial, only=only)),
    ])  # fmt: skip


def of_inputs(root: Path, few: bool) -> str:
    """Bad values of every option, and every file that a command reads in wrong forms."""
    base, trial = commands.make(root / "base"), root / "trial"
    tries = len(inputs.hostile())
    options = inputs.bad_options(base, trial, slice(0, None, 300 if few else 8))
    damaged = inputs.bad_files(base, trial, part=slice(0, None, 10 if few else 1))
    return "\n".join([
        f"Every {300 if few else 8}th of {tries} command lines with one bad value each. `one line`: exit code 2; "
        f"`done`: a value that can be meant. A hang is more than {commands.SECONDS} s of the processor.\n",
        table(options),
        "### Files\n", table(damaged),
    ])  # fmt: skip


def of_mutations(root: Path, seconds: float) -> str:
    """Random mutations of every kind of file."""
    study = fuzz.make(campaign.make(root / "study"))
    found = fuzz.mutations(study, seconds)
    return f"{seconds / 60:.0f} minutes; `read`: the change did no harm to what is read, or is data.\n\n" + table(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=60, help="of mutations")
    how = parser.parse_args()
    seconds = 5 if how.small else 60 * how.minutes
    for part in how.parts:
        with tempfile.TemporaryDirectory() as place:
            root = Path(place)
            match part:
                case "files":
                    made = of_files(root, how.small)
                case "commands":
                    made = of_commands(root, how.small)
                case "inputs":
                    made = of_inputs(root, how.small)
                case "mutations":
                    made = of_mutations(root, seconds)
                case _:
                    made = table(loading(root))
        text = f"## {PARTS[part]}\n\n{made.rstrip()}\n"
        print(text)
        if not how.small:
            put(part, text)


PARTS = {
    "files": "Files and writers", "commands": "Commands", "inputs": "Bad input", "mutations": "Mutated files",
    "loading": "Loading",
}  # fmt: skip


def put(part: str, text: str) -> None:
    """Replace one part of the page of results, and leave the others."""
    there = RESULT.read_text(encoding="utf-8") if RESULT.is_file() else ""
    found = {title: f"## {title}\n{body}" for title, _, body in (p.partition("\n") for p in there.split("\n## ")[1:])}
    found[PARTS[part]] = text
    pages = [found[title].rstrip() + "\n" for title in PARTS.values() if title in found]
    write_text(RESULT, "\n".join(["# Reliability\n", *pages]))


def _sum(frame: pd.DataFrame, begins: str) -> int:
    return int(frame[[c for c in frame.columns if str(c).startswith(begins)]].to_numpy().sum())


if __name__ == "__main__":
    main()

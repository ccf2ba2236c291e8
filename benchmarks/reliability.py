"""What becomes of a study that is attacked: bit flips, truncations, kill -9, full and read-only disks.

python benchmarks/reliability.py            # minutes on one core
python benchmarks/reliability.py --small    # seconds: does it run?
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
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "reliability")]

import campaign  # noqa: E402
import pandas as pd  # noqa: E402
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true")
    small = parser.parse_args().small
    n_flips, n_kills = (2, 1) if small else (24, 14)
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        study = campaign.make(root / "flips" / "study")
        ok = campaign.checked(study)
        flips = campaign.flips(study, n_flips)
        kills = campaign.kills(root / "kills", n_kills)
        disks = campaign.disks(root / "disks")
        times = loading(root)
    summary = pd.DataFrame(
        [("bit flips and truncations", int(flips["n"].sum()), _sum(flips, "silent"), _sum(flips, "traceback")),
         ("kill -9", int(kills["kills"].sum()), _sum(kills, "other"), _sum(kills, "refused") + _sum(kills, "failed")),
         ("full and read-only disk", int(disks.drop(columns=["disk", "writer"]).to_numpy().sum()), _sum(disks, "then"),
          _sum(disks, "traceback"))],
        columns=["attack", "tries", "wrong without a word", "traceback, or a manual step"],
    )  # fmt: skip
    parts = [
        "# Reliability\n", table(summary),
        f"`llmbrain check` of the study before: {int((ok['state'] == 'ok').sum())} of {len(ok)} files ok.\n",
        "## Bit flips and truncations\n",
        "`found`: one line that names the file. `harmless`: the right content all the same, also since what was "
        "damaged was made anew. `silent`: other content without a word.\n", table(flips),
        "## kill -9\n", "At random write events; `equal`: the same command again gives what an unbroken one gives.\n",
        table(kills), "## Full and read-only disks\n",
        "At the first, a middle and the last write event. `one line`: exit code 2, and what stood before still "
        "reads.\n",
        table(disks), "## Loading\n", table(times),
    ]  # fmt: skip
    text = "\n".join(parts)
    print(text)
    if not small:
        write_text(RESULT, text)


def _sum(frame: pd.DataFrame, begins: str) -> int:
    return int(frame[[c for c in frame.columns if str(c).startswith(begins)]].to_numpy().sum())


if __name__ == "__main__":
    main()

"""Every tutorial runs, from start to end, without a display and without a network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "tutorials"
SCRIPTS = sorted(FOLDER.glob("plot_*.py"))
WRITING = {"03", "07", "08", "12", "13", "14"}  # those that make studies or models, in temporary folders

# Runs a tutorial; its temporary folders stay, and each is checked at the end.
CHECKED = """
import os, runpy, sys, tempfile

class Kept:
    def __init__(self, *args, **options):
        self.name = tempfile.mkdtemp(dir=os.environ["KEPT"])

    def __enter__(self):
        return self.name

    def __exit__(self, *why):
        pass

    cleanup = __exit__

tempfile.TemporaryDirectory = Kept
runpy.run_path(sys.argv[1], run_name="__main__")
import llmbrain as lb
n, bad = 0, []
for name in os.listdir(os.environ["KEPT"]):
    try:
        found = lb.check(os.path.join(os.environ["KEPT"], name))
    except lb.InputError as error:
        assert "holds nothing with checksums" in str(error), error
        continue
    n += len(found)
    bad += found.loc[found["state"] != "ok", ["file", "state"]].values.tolist()
assert not bad, bad
print("checked", n)
"""


def test_there_are_tutorials():
    assert SCRIPTS, f"no tutorial in {FOLDER}"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_tutorial_says_what_to_conclude_and_what_not(script):
    text = script.read_text(encoding="utf-8")
    assert "# What to conclude\n" in text
    assert "# What not to conclude\n" in text


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_tutorial_runs(script, tmp_path):
    left_out = {"MODEL", "TEXT", "OUT"}  # a tutorial reads them: a user's own model is not for a test
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    environment |= {"MPLBACKEND": "Agg", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    kept, place = tmp_path / "kept", tmp_path / "place"
    kept.mkdir()
    place.mkdir()
    environment["KEPT"] = str(kept)
    environment.setdefault("LLMBRAIN_TEST_DATA", str(FOLDER.parents[1] / "shared" / "data"))  # used where it exists
    done = subprocess.run(
        [sys.executable, "-c", CHECKED, str(script)], cwd=place, env=environment, capture_output=True, text=True,
        timeout=900,
    )  # fmt: skip
    shutil.rmtree(kept)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not list(place.iterdir()), "a tutorial left files behind"
    for line in done.stdout.splitlines():
        if line.startswith("not run: "):  # a real model's tutorial, where its file or llama.cpp is absent
            pytest.skip(line)
    n_checked = int(done.stdout.rpartition("checked ")[2])
    assert (n_checked > 0) == (script.stem.split("_")[1] in WRITING)

"""Every tutorial runs, from start to end, without a display and without a network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "tutorials"
SCRIPTS = sorted(FOLDER.glob("plot_*.py"))


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
    environment.setdefault("LLMBRAIN_TEST_DATA", str(FOLDER.parents[1] / "shared" / "data"))  # used where it exists
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert not list(tmp_path.iterdir()), "a tutorial left files behind"

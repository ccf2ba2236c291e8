"""Mutated files of every kind that is read: they are read, or refused in one line; the same mutations every time."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reliability import campaign, fuzz


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    return fuzz.make(campaign.make(tmp_path_factory.mktemp("fuzz") / "study"))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in fuzz.LOADERS if not name.startswith("GGUF")])
def test_mutated_files(study: Path, name: str) -> None:
    assert fuzz.outcome(name, study) == "read"
    path = study / fuzz.LOADERS[name][0]
    whole = path.read_bytes()

    @settings(max_examples=12, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(seed=st.integers(0, 2**32 - 1))
    def refused_or_read(seed: int) -> None:
        path.write_bytes(fuzz.mutated(whole, np.random.default_rng(seed)))
        assert fuzz.outcome(name, study) in ("read", "one line")

    try:
        refused_or_read()
    finally:
        path.write_bytes(whole)


NEW = ("events", "rows to unlearn", "labels of an atlas, table", "labels of an atlas, JSON", "regions")
LONG = b"[" + b"1" * 5000 + b"]"  # more digits than Python reads
EVENTS = b"onset\tduration\ttrial_type\n1\t1e300\ta\ninf\t2\ta\n"
LABELS = b"1" * 400 + b"\tregion\n"


@pytest.mark.parametrize("name", ["confounds", "FSL design", "texts, JSON", "plan", "settings", *NEW])
def test_damaged_files_are_one_line(tmp_path: Path, name: str) -> None:
    file, _ = fuzz.LOADERS[name]
    (tmp_path / "folder").mkdir()
    for content in (
        b"",
        b"\xff\xfe\xff",
        b"[" * 100_000,
        b"{}",
        b"null",
        b"/NumWaves\n/Matrix\nx\n",
        LONG,
        EVENTS,
        LABELS,
    ):
        (tmp_path / file).write_bytes(content)
        assert fuzz.outcome(name, tmp_path) in ("one line", "read")
    (tmp_path / file).unlink()
    shutil.move(tmp_path / "folder", tmp_path / file)
    assert fuzz.outcome(name, tmp_path).startswith(("one line", "IsADirectoryError"))


@pytest.mark.parametrize("name", ["texts, JSON", "confounds", "FSL design", "plan"])
def test_a_device_is_no_file(tmp_path: Path, name: str) -> None:
    (tmp_path / fuzz.LOADERS[name][0]).symlink_to("/dev/zero")
    assert fuzz.outcome(name, tmp_path) == "one line"

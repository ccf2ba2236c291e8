"""Shared fixtures: where the test data lie, and models small enough to be made on the spot."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches for a network
os.environ.setdefault("MPLBACKEND", "Agg")
if "PYTEST_XDIST_WORKER" in os.environ:  # several processes share the cores: one thread each
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the shared test data (``$LLMBRAIN_TEST_DATA`` or ``../shared/data``), or skip."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("LLMBRAIN_TEST_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"shared test data not found at {folder}: set LLMBRAIN_TEST_DATA")
    return folder

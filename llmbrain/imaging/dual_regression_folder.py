"""A dual regression on disk: written run by run in FSL's names, continued where it was stopped."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmbrain.imaging.interchange import write_components_over_runs, write_stages_of_run

RECORD, MAPS, Z_MAPS = "dual_regression.json", "dr_maps.npy", "dr_z_maps.npy"


class MemoryStore:
    """Keeps the results of all runs."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.done = 0
        self.time_courses: list[NDArray[np.float64]] = []
        self.maps: NDArray[Any] = np.empty(0)
        self.z_maps: NDArray[Any] = np.empty(0)

    def add(self, course: NDArray[Any], maps: NDArray[Any], z_maps: NDArray[Any], dtype: Any, geometry: Any) -> None:
        """Take one more run."""
        if not self.maps.size:
            self.maps, self.z_maps = self._allocate(MAPS, dtype), self._allocate(Z_MAPS, dtype)
        self.maps[self.done], self.z_maps[self.done] = maps, z_maps
        self.time_courses.append(course)
        self.done += 1

    def _allocate(self, name: str, dtype: Any) -> NDArray[Any]:
        return np.empty(self.shape, dtype=dtype)

    def finish(self, geometry: Any) -> None:
        """Called once all runs are in."""


class FolderStore(MemoryStore):
    """Keeps results in a folder, memory-mapped, and beside that in FSL's files.

    The record holds how many runs are whole and a digest of the settings: the same call on the same folder goes on
    with the next run, another call is refused.
    """

    def __init__(self, folder: Path, shape: tuple[int, ...], settings: dict[str, Any]) -> None:
        super().__init__(shape)
        self.folder = folder
        self.settings = settings
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / RECORD).exists():
            return
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if record["settings"] != settings:
            differ = sorted(k for k in settings if record["settings"].get(k) != settings[k])
            raise FileExistsError(f"{folder} holds another dual regression (other {', '.join(differ)}): choose another")
        self.done = record["runs_done"]
        self.maps, self.z_maps = (np.load(folder / name, mmap_mode="r+") for name in (MAPS, Z_MAPS))
        tables = [folder / f"dr_stage1_subject{i:05d}.txt" for i in range(self.done)]
        self.time_courses = [np.loadtxt(table, ndmin=2) for table in tables]

    def add(self, course: NDArray[Any], maps: NDArray[Any], z_maps: NDArray[Any], dtype: Any, geometry: Any) -> None:
        """Take one more run, and write its files; the record is last, so that a killed call repeats at most one run."""
        write_stages_of_run(self.folder, self.done, course, maps, z_maps, geometry)
        super().add(course, maps, z_maps, dtype, geometry)
        for mapped in (self.maps, self.z_maps):
            assert isinstance(mapped, np.memmap)
            mapped.flush()
        record = {"settings": self.settings, "runs_done": self.done}
        temporary = self.folder / f".{RECORD}.partial"
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, self.folder / RECORD)

    def _allocate(self, name: str, dtype: Any) -> NDArray[Any]:
        return np.lib.format.open_memmap(self.folder / name, mode="w+", dtype=dtype, shape=self.shape)

    def finish(self, geometry: Any) -> None:
        """Write each component's maps of all runs."""
        write_components_over_runs(self.folder, self.maps, geometry)


def array_digest(array: NDArray[Any] | None) -> str | None:
    """A short hash of an array's numbers."""
    return None if array is None else hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]

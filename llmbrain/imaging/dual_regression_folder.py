"""A dual regression on disk: written run by run in FSL's names, continued where it was stopped."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmbrain._files import (
    DamagedError,
    FileError,
    clear_damage,
    clear_errors,
    discard_sum,
    file_sha256,
    read_json,
    refuse_other,
    settle,
    transaction,
    write_json,
    writing,
)
from llmbrain.imaging.interchange import write_components_over_runs, write_stages_of_run

RECORD, MAPS, Z_MAPS = "dual_regression.json", "dr_maps.npy", "dr_z_maps.npy"
COURSES, DATA = "dr_stage1", "data"  # checksums of a run's time courses, and of what was read
ANEW = "remove the folder, and run the dual regression again"


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

    The record holds the settings and the checksums of every run that is whole: the same call on the same folder goes on
    with the next run, another call is refused. A run whose numbers are damaged is made anew, with those after it.
    `digest` says what a run is: a run of the same name with other data is another one.
    """

    def __init__(
        self, folder: Path, shape: tuple[int, ...], settings: dict[str, Any], digest: Callable[[int], str]
    ) -> None:
        super().__init__(shape)
        self.digest = digest
        self.folder = folder
        self.settings = settings
        self.sums: list[dict[str, str]] = []
        settle(folder)
        refuse_other(folder, "a dual regression")
        if not (folder / RECORD).exists():
            return
        record = read_json(folder / RECORD, anew=ANEW)
        before = record.get("settings")
        if before != settings:
            known = before if isinstance(before, dict) else {}
            differ = sorted(k for k in settings if known.get(k) != settings[k])
            raise FileExistsError(f"{folder} holds another dual regression (other {', '.join(differ)}): choose another")
        with clear_damage(folder / RECORD, "the record of a dual regression", ANEW):
            runs = [{name: str(run[name]) for name in (MAPS, Z_MAPS, COURSES, DATA)} for run in record["runs"]]
        for i, run in enumerate(runs[: shape[0]]):
            if run[DATA] != digest(i):
                raise FileExistsError(f"{folder} holds another dual regression (other data in run {i}): choose another")
        try:
            self._open(runs)
        except DamagedError as error:
            warnings.warn(f"{error}. Runs from {self.done} on are made anew", UserWarning, stacklevel=3)

    def _open(self, runs: list[dict[str, str]]) -> None:
        """Take the runs that are there and whole."""
        mapped = [_mapped(self.folder / name, self.shape) for name in (MAPS, Z_MAPS)]
        self.maps, self.z_maps = mapped
        for i, sums in enumerate(runs[: self.shape[0]]):
            for name, array in zip((MAPS, Z_MAPS), mapped):
                if array_sum(array[i]) != sums[name]:
                    raise DamagedError(f"{self.folder / name} does not match the checksum of run {i}")
            table = self.folder / f"dr_stage1_subject{i:05d}.txt"
            if not table.is_file() or file_sha256(table) != sums[COURSES]:
                raise DamagedError(f"{table} is missing or does not match its checksum")
            with clear_damage(table, "a table of numbers"):
                self.time_courses.append(np.loadtxt(table, ndmin=2))
            self.sums.append(sums)
            self.done += 1

    def add(self, course: NDArray[Any], maps: NDArray[Any], z_maps: NDArray[Any], dtype: Any, geometry: Any) -> None:
        """Take one more run, and write its files; they and the record are one set."""
        run = self.done
        if not self.folder.is_dir():
            raise FileError(f"{self.folder} is gone: it was removed while the dual regression wrote into it")
        super().add(course, maps, z_maps, dtype, geometry)
        with clear_errors(self.folder):
            for mapped in (self.maps, self.z_maps):
                assert isinstance(mapped, np.memmap)
                mapped.flush()
        with transaction(self.folder) as new:
            write_stages_of_run(new, run, course, maps, z_maps, geometry)
            table = new / f"dr_stage1_subject{run:05d}.txt"
            sums = {MAPS: array_sum(self.maps[run]), Z_MAPS: array_sum(self.z_maps[run]), COURSES: file_sha256(table)}
            sums[DATA] = self.digest(run)
            record = {"settings": self.settings, "runs": [*self.sums, sums], "shape": list(self.shape)}
            write_json(new / RECORD, record, seal=True)
        self.sums.append(sums)

    def _allocate(self, name: str, dtype: Any) -> NDArray[Any]:
        """Room on the disk for all runs now: a mapped file that finds the disk full later kills the process."""
        path = self.folder / name
        needed = int(np.prod(self.shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        with writing(path, needed=needed) as temporary:
            array = np.lib.format.open_memmap(temporary, mode="w+", dtype=dtype, shape=self.shape)
            with temporary.open("rb+") as file:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, temporary.stat().st_size)
                else:
                    array[:] = 0
        discard_sum(self.folder, name)  # it is filled in place: its checksums are in the record, one a run
        return array

    def finish(self, geometry: Any) -> None:
        """Write each component's maps of all runs."""
        with transaction(self.folder, replaces=["dr_stage2_ic*"]) as new:
            write_components_over_runs(new, self.maps, geometry)


def check_dual_regression(folder: Path) -> dict[str, str]:
    """What is wrong with the arrays that are filled in place: file and reason."""
    found: dict[str, str] = {}
    record = read_json(folder / RECORD, anew=ANEW)
    with clear_damage(folder / RECORD, "the record of a dual regression", ANEW):
        shape = tuple(int(n) for n in record["shape"])
        runs = [dict(run) for run in record["runs"]]
        if not shape or len(runs) > shape[0]:
            raise ValueError(f"it names {len(runs)} runs of an array of shape {shape}")
    for name in (MAPS, Z_MAPS):
        try:
            array = _mapped(folder / name, shape)
        except (DamagedError, FileNotFoundError) as error:
            found[name] = str(error)
            continue
        bad = [i for i, run in enumerate(runs) if array_sum(array[i]) != run.get(name)]
        if bad:
            found[name] = f"does not match the checksum of run {bad[0]}"
    return found


def _mapped(path: Path, shape: tuple[int, ...]) -> NDArray[Any]:
    """An array on disk, mapped for reading and writing; one that was cut short is refused, not filled with zeros."""
    with clear_damage(path, "the array of a dual regression", ANEW):
        found = np.load(path, mmap_mode="r", allow_pickle=False)  # a file that is too short raises here
        if found.shape != shape:
            raise ValueError(f"it has shape {found.shape}, not {shape}")
        mapped: NDArray[Any] = np.load(path, mmap_mode="r+" if os.access(path, os.W_OK) else "c", allow_pickle=False)
        return mapped


def array_sum(array: NDArray[Any]) -> str:
    """SHA-256 of an array's numbers, and of how they are to be read."""
    digest = hashlib.sha256(f"{array.dtype.str} {array.shape} ".encode())
    digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def array_digest(array: NDArray[Any] | None) -> str | None:
    """A short hash of an array's numbers."""
    return None if array is None else hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]

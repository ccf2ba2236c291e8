"""A set of files: all of it in its place, or none."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from llmbrain._files.errors import FileError, check_space, clear_damage, clear_errors
from llmbrain._files.parts import (
    SUMS,
    flush,
    flush_folder,
    flush_folders,
    is_temporary,
    locked,
    read_sums,
    sweep,
    temporary_of,
    write_sums,
)
from llmbrain._validation import InputError

COMMIT = ".llmbrain-commit"  # a set that is decided on, and partly moved into its place
_REMOVED = ".removed"  # within it: names of the old set that go


@contextmanager
def transaction(
    folder: str | os.PathLike[str], *, replaces: Iterable[str] = (), needed: int | None = None,
    free: Callable[[Path], object] | None = None,
) -> Iterator[Path]:  # fmt: skip
    """Write files that belong together: all of them, or none.

    Parameters
    ----------
    folder : path
        Where they go. Other files in it stay, subfolders too.
    replaces : names or patterns (as ``*.safetensors``) relative to the folder
        Files of the old set that go when the new one does not hold them.
    needed : int, optional
        Bytes the set will take; checked before, and said if the disk is full.
    free : callable, optional
        Called with the folder, if it is there, when the set is whole and no other can come: it raises what forbids to
        put the set there.

    Yields
    ------
    Path
        A hidden folder on the same disk to write into. What is in it at the end, subfolders too, is the set; an error
        inside leaves `folder` as it was.

    Raises
    ------
    FileError
        If the disk is full or read-only, or the folder vanished: what stood there is unchanged.

    Examples
    --------
    >>> with transaction("study/networks", replaces=["networks.*"]) as new:  # doctest: +SKIP
    ...     write_tensors(new / "networks.safetensors", arrays)
    ...     write_json(new / "networks.json", record)
    """
    folder = Path(folder)
    there = folder.is_dir()
    stood = "; what stood there is unchanged" if there else ""
    prepared = temporary_of(folder / "set") if there else temporary_of(folder)
    with clear_errors(folder, needed=needed, stands=stood):
        if needed is not None:
            check_space(folder, needed)
        folder.parent.mkdir(parents=True, exist_ok=True)
        sweep(prepared.parent, None if there else folder.name)
        prepared.mkdir()
        try:
            yield prepared
            names = sorted(p.relative_to(prepared).as_posix() for p in prepared.rglob("*") if p.is_file())
            if any(name.rpartition("/")[2] == SUMS for name in names):
                raise InputError(f"{SUMS} is made by the transaction and cannot be written into it")
            odd = [n for n in names if not n.isprintable() or "\\" in n]
            if odd:
                raise InputError(f"file name {odd[0]!r} cannot stand in {SUMS}")
            sums = {name: flush(prepared / name, digest=True) for name in names}
            _commit(folder, prepared, sums, list(replaces), free)
        finally:
            shutil.rmtree(prepared, ignore_errors=True)


def _commit(
    folder: Path, prepared: Path, sums: dict[str, str], replaces: list[str], free: Callable[[Path], object] | None
) -> None:
    if prepared.parent != folder:  # a new folder
        write_sums(prepared, sums)
        flush_folders(prepared)
        try:
            prepared.rename(folder)
            flush_folder(folder.parent)
            return
        except OSError:
            if not folder.is_dir():
                raise
            inside = temporary_of(folder / "set")  # another process was faster: into its folder
            prepared.rename(inside)
            try:
                _commit(folder, inside, sums, replaces, free)
            finally:
                shutil.rmtree(inside, ignore_errors=True)
            return
    if not folder.is_dir():
        raise FileError(f"{folder} is gone: it was removed while the files for it were written")
    with locked(folder, exclusive=True):
        _roll_forward(folder)
        if free is not None:
            free(folder)
        known = read_sums(folder, strict=False)
        names = set(known) | {p.name for p in folder.iterdir() if p.is_file()} - {SUMS}
        gone = [n for n in names if n not in sums and any(fnmatch(n, pattern) for pattern in replaces)]
        merged = {name: digest for name, digest in known.items() if name not in gone} | sums
        if merged:
            write_sums(prepared, merged)
        else:
            gone.append(SUMS)
        (prepared / _REMOVED).write_text(json.dumps(gone), encoding="utf-8")
        flush(prepared / _REMOVED)
        flush_folders(prepared)
        prepared.rename(folder / COMMIT)  # from here on the new set counts
        flush_folder(folder)
        _roll_forward(folder)


def _roll_forward(folder: Path) -> None:
    """Move the files of a decided set to their places; may be begun again at any point. Needs the exclusive lock."""
    decided = folder / COMMIT
    if not decided.is_dir():
        return
    removed = decided / _REMOVED
    if removed.is_file():
        with clear_damage(removed, "the list of files that a save replaces", f"remove {decided}, and save again"):
            names = [Path(name) for name in json.loads(removed.read_text(encoding="utf-8"))]
            if not all(not name.is_absolute() and ".." not in name.parts for name in names):
                raise ValueError("it names files outside of the folder")
        for name in names:
            (folder / name).unlink(missing_ok=True)
        removed.unlink()
    for source in sorted(p for p in decided.rglob("*") if p.is_file() and p.name != SUMS):
        target = folder / source.relative_to(decided)
        target.parent.mkdir(parents=True, exist_ok=True)
        source.replace(target)
    if (decided / SUMS).is_file():
        (decided / SUMS).replace(folder / SUMS)
    flush_folder(folder)
    shutil.rmtree(decided)


def settle(folder: str | os.PathLike[str]) -> None:
    """Finish what a killed writer had decided on in `folder`; does nothing where there is nothing to finish.

    Raises
    ------
    FileError
        If the folder is read-only, so that it cannot be finished.
    """
    folder = Path(folder)
    if (folder / COMMIT).is_dir():
        stands = "; a save was interrupted there and must be finished first"
        with clear_errors(folder, stands=stands), locked(folder, exclusive=True):
            _roll_forward(folder)


def discard_file(path: str | os.PathLike[str]) -> None:
    """Remove one file, with its line in the ``SHA256SUMS`` beside it; nothing where it is not there."""
    path = Path(path)
    if not path.is_file():
        return
    if path.name in read_sums(path.parent, strict=False) and not is_temporary(path.parent):
        discard(path.parent, [path.name])
    else:
        with clear_errors(path):
            path.unlink(missing_ok=True)


def remove_folder(folder: str | os.PathLike[str]) -> None:
    """Remove a folder at once: it goes aside in one step, then its files go; what a kill leaves is swept later."""
    folder = Path(folder)
    with clear_errors(folder):
        aside = temporary_of(folder)
        folder.rename(aside)
        flush_folder(folder.parent)
        shutil.rmtree(aside)


def discard(folder: str | os.PathLike[str], names: Iterable[str]) -> None:
    """Remove files (or patterns) of a folder and their lines in its ``SHA256SUMS``, at once."""
    folder = Path(folder)
    if folder.is_dir():
        with transaction(folder, replaces=list(names)):
            pass

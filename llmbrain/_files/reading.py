"""Reading back: every file against its checksum, what is wrong in one line."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmbrain._files.digests import file_pages, is_same
from llmbrain._files.errors import DamagedError, FileError, bytes_text, clear_damage, hint, refuse_device, what_happened
from llmbrain._files.one import SEAL, seal_of
from llmbrain._files.parts import SUMS, locked, read_sums
from llmbrain._files.sets import settle
from llmbrain._validation import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

AGAIN = f"copy that file along; or, if you know that all is whole, in the folder: sha256sum *.* > {SUMS}"
LONGEST_JSON = 1 << 28  # bytes: no record of this project comes near
_SMALL = 1 << 22  # bytes that are not worth a thread
_verified: dict[str, tuple[int, int, int, str]] = {}


class UnverifiedWarning(UserWarning):
    """A folder that should have a ``SHA256SUMS`` has none."""


class StoredFiles:
    """The files of a folder with a ``SHA256SUMS``; see `reading`."""

    def __init__(self, folder: Path, sums: dict[str, str], anew: str) -> None:
        self.folder, self.sums, self.anew = folder, sums, anew

    def __contains__(self, name: str) -> bool:
        return name in self.sums if self.sums else (self.folder / name).is_file()

    def path(self, name: str) -> Path:
        """Path of a file, verified.

        Raises
        ------
        FileNotFoundError
            If it is in neither the folder nor its ``SHA256SUMS``.
        DamagedError
            If it is missing, or does not match its checksum.
        """
        path = self.folder / name
        if self.sums:
            if name in self.sums:
                reason = _compare(path, self.sums[name])
            else:
                reason = f"is not listed in {SUMS}" if path.is_file() else None
            if reason:
                raise DamagedError(f"{path} {reason}{hint(self.anew)}")
        if not path.is_file():
            raise FileNotFoundError(f"{self.folder} holds no {name}{hint(self.anew)}")
        return path

    def json(self, name: str, *, format: str | None = None, version: int | None = None) -> dict[str, Any]:
        """A record, verified; see `read_json`."""
        return read_json(self.path(name), anew=self.anew, format=format, version=version)

    def tensors(self, name: str) -> dict[str, NDArray[Any]]:
        """Arrays of a safetensors file, verified; see `read_tensors`."""
        path = self.folder / name
        if not self.sums:
            return read_tensors(self.path(name), anew=self.anew)
        if name not in self.sums:
            self.path(name)
        with verifying({path: self.sums.get(name, "")}, anew=self.anew):
            return read_tensors(path, anew=self.anew)


@contextmanager
def reading(folder: str | os.PathLike[str], *, anew: str = "", required: bool = False) -> Iterator[StoredFiles]:
    """Read files that were written by `transaction`.

    Parameters
    ----------
    folder : path
        A save that was killed in it is finished first.
    anew : str
        What the user does to make the files anew; ends the messages.
    required : bool
        Warn where there is no ``SHA256SUMS`` (the files are then not verified).

    Yields
    ------
    StoredFiles
        No writer of this project changes the files until the context ends.

    Raises
    ------
    FileNotFoundError
        If the folder does not exist.
    DamagedError
        If ``SHA256SUMS`` is damaged; while reading, if a file is.
    """
    folder = Path(folder)
    settle(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist" if not folder.exists() else f"{folder} is not a folder")
    with locked(folder, exclusive=False):
        sums = read_sums(folder, anew=anew)
        if required and not sums:
            warnings.warn(
                f"{folder} holds no {SUMS}: its files are not verified ({AGAIN})", UnverifiedWarning, stacklevel=3
            )
        yield StoredFiles(folder, sums, anew)


def damages(folder: str | os.PathLike[str]) -> dict[str, str]:
    """Name and reason of every file listed in ``SHA256SUMS`` that is missing or altered; reads every byte.

    A folder without ``SHA256SUMS`` has no damages that could be known; one that cannot be read is named itself.
    """
    folder = Path(folder)
    settle(folder)
    with locked(folder, exclusive=False):
        try:
            sums = read_sums(folder)
        except DamagedError as error:
            return {SUMS: str(error).removeprefix(f"{folder / SUMS} ")}
        found = {name: _compare(folder / name, digest, fresh=True) for name, digest in sums.items()}
        for name, digest in sums.items():
            pages = digest.partition("+")[2]
            if pages and not found[name] and file_pages(folder / name) != pages:
                found[SUMS] = f"has a damaged line: the fast checksum of {name}"
    return {name: reason for name, reason in found.items() if reason}


def read_json(
    path: str | os.PathLike[str],
    *,
    anew: str = "",
    format: str | None = None,
    version: int | None = None,
    longest: int = LONGEST_JSON,
) -> dict[str, Any]:
    """Read a JSON record; a seal in it is compared and taken out.

    Parameters
    ----------
    anew : str
        What the user does to make the file anew; ends the messages.
    format, version : optional
        What its entries ``format`` and ``format_version`` must be.
    longest : int
        Bytes beyond which the file is refused unread.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    DamagedError
        If it is not UTF-8, not JSON, no object, altered after it was sealed, or of another format.
    InputError
        If a newer llmbrain wrote it.
    FileError
        If the system cannot read it.
    """
    path = Path(path)
    refuse_device(path)
    try:
        size = path.stat().st_size
        if size > longest:
            raise DamagedError(f"{path} is too large for a record ({bytes_text(size)}){hint(anew)}")
        content = path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist") from None
    except OSError as error:
        raise FileError(f"{path} cannot be read: {what_happened(error, path)}") from None
    try:
        record = json.loads(content.decode("utf-8", "surrogatepass"))
    except UnicodeDecodeError as error:
        raise DamagedError(f"{path} is damaged: not UTF-8 at byte {error.start}{hint(anew)}") from None
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path} is not JSON: it was truncated or edited ({error}){hint(anew)}") from None
    if not isinstance(record, dict):
        raise DamagedError(f"{path} holds a {type(record).__name__} where a record is expected{hint(anew)}")
    if SEAL in record:
        if record[SEAL] != seal_of(record):
            raise DamagedError(
                f"{path} does not match its checksum: it was edited or damaged after it was written{hint(anew)} "
                f"(an edit that you mean: take its entry {SEAL!r} out)"
            )
        del record[SEAL]
    if format is not None and record.get("format") != format:
        raise DamagedError(f"{path} has format {record.get('format')!r}, not {format!r}{hint(anew)}")
    refuse_newer(record, path, version or 1)
    if version is not None and record.get("format_version") != version:
        raise DamagedError(
            f"{path} has format version {record.get('format_version')!r}; this version of llmbrain reads {version}"
            + hint(anew)
        )
    return record


def refuse_newer(record: Mapping[str, Any], path: object, version: int = 1) -> None:
    """Refuse a record that a newer llmbrain wrote: it says ``format_version``; without one it is of the first.

    Raises
    ------
    InputError
        If its version is above `version`. It is not damaged, and nothing makes it anew.
    """
    there = record.get("format_version")
    if isinstance(there, (int, float)) and not isinstance(there, bool) and there > version:
        raise InputError(f"{path} has format version {there!r}; this version of llmbrain reads {version}: "
                         "update llmbrain")  # fmt: skip


def read_tensors(path: str | os.PathLike[str], *, anew: str = "") -> dict[str, NDArray[Any]]:
    """Arrays of a safetensors file; what is wrong with it is a `DamagedError`."""
    from safetensors.numpy import load_file

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    with clear_damage(path, "a safetensors file", anew):
        arrays: dict[str, NDArray[np.generic]] = load_file(path)
    return arrays


def verify(path: str | os.PathLike[str], digest: str, *, anew: str = "") -> None:
    """Compare a file with its checksum, as `file_digest` gives it; once a process where it has not changed since.

    Raises
    ------
    DamagedError
        If it is missing or differs.
    """
    reason = _compare(Path(path), digest)
    if reason:
        raise DamagedError(f"{path} {reason}{hint(anew)}")


def verify_listed(path: str | os.PathLike[str], *, anew: str = "") -> None:
    """Compare a file with its line in the ``SHA256SUMS`` beside it, where there is one.

    Raises
    ------
    DamagedError
        If it is missing or differs.
    """
    path = Path(path)
    sums = read_sums(path.parent, strict=False)
    if path.name in sums:
        verify(path, sums[path.name], anew=anew)


def read_listed(path: str | os.PathLike[str], *, anew: str = "") -> dict[str, Any]:
    """A JSON record, compared with its line in the ``SHA256SUMS`` beside it, where there is one; see `read_json`."""
    verify_listed(path, anew=anew)
    return read_json(path, anew=anew)


@contextmanager
def verifying(sums: Mapping[Path, str], *, anew: str = "") -> Iterator[None]:
    """Compare files with their checksums while they are read: large ones in threads beside the reader.

    Raises
    ------
    DamagedError
        At the latest when the context ends; also in place of what the reader raised on a damaged file.
    """
    small = sum(path.stat().st_size for path in sums if path.is_file()) < _SMALL
    pool = None if small else ThreadPoolExecutor(min(len(sums), os.cpu_count() or 1, 4))
    try:
        jobs = {} if pool is None else {path: pool.submit(_compare, path, digest) for path, digest in sums.items()}
        failed: Exception | None = None
        try:
            yield
        except Exception as error:
            failed = error
        for path, digest in sums.items():
            if reason := jobs[path].result() if jobs else _compare(path, digest):
                said = f" ({failed})" if isinstance(failed, InputError) else ""
                raise DamagedError(f"{path} {reason}{said}{hint(anew)}") from failed
        if failed is not None:
            raise failed
    finally:
        if pool is not None:
            pool.shutdown()


def _compare(path: Path, digest: str, *, fresh: bool = False) -> str | None:
    """What is wrong with a file, or None."""
    try:
        facts = path.stat()
        known = (facts.st_size, facts.st_mtime_ns, facts.st_ino, digest)
        if not fresh and _verified.get(os.fspath(path.absolute())) == known:
            return None
        same = is_same(path, digest, fully=fresh)
    except FileNotFoundError:
        return "is missing, but its checksum is there"
    except OSError as error:
        return f"cannot be read: {what_happened(error, path)}"
    if not same:
        return "does not match its checksum: it was truncated, edited or damaged after it was written"
    if time.time_ns() - facts.st_mtime_ns > 2_000_000_000:  # a younger time stamp may hide a change
        _verified[os.fspath(path.absolute())] = known
    return None

"""What writing and reading share: temporary names, flushing, locks, lines of checksums."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from llmbrain._files.digests import file_digest
from llmbrain._files.errors import DamagedError, hint

try:
    import fcntl
except ImportError:  # Windows: checksums still tell a set that changed while it was read
    fcntl = None  # type: ignore[assignment]

SUMS = "SHA256SUMS"
HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:6]
_TEMPORARY = re.compile(r"\.tmp-([0-9a-f]{6})-(\d+)-\d+-")
_FOREIGN_AGE = 86400.0  # seconds until the leftover of another host counts as one
_numbers = count()


# A line of `sha256sum`; one of the fast checksum of a large file is a comment to it, before the file's own line.
_LINE = re.compile(r"(# pages )?([0-9a-f]{64}) [ *]([^/\\\x00-\x1f\ufffd][^\\\x00-\x1f\ufffd]*)")


def read_sums(folder: Path, *, strict: bool = True, anew: str = "") -> dict[str, str]:
    """Digest of each file, as `file_digest` gives it; empty without the file.

    With `strict`, a line that is none is an error.
    """
    path = folder / SUMS
    if not path.is_file():
        return {}
    sums: dict[str, str] = {}
    pages: dict[str, str] = {}
    for line in path.read_bytes().decode("utf-8", "replace").split("\n"):
        found = _LINE.fullmatch(line)
        if found and ".." not in found[3].split("/"):
            if found[1]:
                pages[found[3]] = f"+{found[2]}"
            else:  # the line before, if it is there: another writer may have left one of an older file
                sums[found[3]] = found[2] + pages.pop(found[3], "")
        elif line and strict:
            raise DamagedError(f"{path} is damaged: {line[:40]!r} is no line of checksums{hint(anew)}")
    if strict and not sums:
        raise DamagedError(f"{path} is damaged: it lists no file{hint(anew)}")
    return sums


def _lines(name: str, digest: str) -> str:
    sha256, _, pages = digest.partition("+")
    return (f"# pages {pages}  {name}\n" if pages else "") + f"{sha256}  {name}\n"


def write_sums(folder: Path, sums: Mapping[str, str]) -> None:
    """One line a file, as ``sha256sum -c`` reads it."""
    text = "".join(_lines(name, digest) for name, digest in sorted(sums.items()))
    with (folder / SUMS).open("wb") as file:
        file.write(text.encode("utf-8"))
        file.flush()
        os.fsync(file.fileno())


def replace_sums(folder: Path, sums: Mapping[str, str]) -> None:
    """Write ``SHA256SUMS`` anew, whole or not at all."""
    with locked(folder, exclusive=True):
        temporary = temporary_of(folder / "sums")
        temporary.mkdir()
        try:
            write_sums(temporary, sums)
            (temporary / SUMS).replace(folder / SUMS)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        flush_folder(folder)


def discard_sum(folder: Path, name: str) -> None:
    """Take the line of a file out of ``SHA256SUMS``: it will change in place, and is checked otherwise."""
    sums = read_sums(folder, strict=False)
    if sums.pop(name, None) is not None:
        replace_sums(folder, sums)


def append_sum(folder: Path, name: str, digest: str) -> None:
    """Add a line to ``SHA256SUMS``; one that a kill cut short before it does not swallow it."""
    with locked(folder, exclusive=True), (folder / SUMS).open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(_lines(name, digest).encode())
        file.flush()
        os.fsync(file.fileno())


def temporary_of(path: Path) -> Path:
    """A hidden name beside `path` with the same ending, which says whose it is."""
    return path.with_name(f".tmp-{HOST}-{os.getpid()}-{next(_numbers)}-{path.name}")


def is_temporary(path: Path) -> bool:
    """Whether a path lies in a set that is being prepared."""
    return any(_TEMPORARY.match(part) for part in path.parts)


def sweep(folder: Path, name: str | None = None) -> None:
    """Remove temporary files of dead processes; `name` limits it to those for one place."""
    with suppress(OSError):
        for entry in list(os.scandir(folder)):
            found = _TEMPORARY.match(entry.name)
            if found is None or (name is not None and entry.name[found.end() :] != name):
                continue
            if not is_alive(found[1], int(found[2]), Path(entry.path)):
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path, ignore_errors=True)
                else:
                    os.unlink(entry.path)


def is_alive(host: str, pid: int, path: Path) -> bool:
    """Whether the process that made a leftover may still run; beyond this host it counts as dead after a day."""
    if host != HOST or os.name != "posix":  # elsewhere signal 0 is no question but Ctrl-C
        return time.time() - path.stat().st_mtime < _FOREIGN_AGE
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


@contextmanager
def locked(folder: Path, *, exclusive: bool) -> Iterator[None]:
    """Hold the folder while a set is read, or moved into place; a disk without locks goes without."""
    descriptor = None
    if fcntl is not None:
        with suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def flush(path: Path, *, digest: bool = False) -> str:
    """Bring a file to the disk; with `digest`, give its checksums. A file in a prepared set waits for the set's end."""
    if not digest and is_temporary(path.parent):
        return ""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    return file_digest(path) if digest else ""


def flush_folder(folder: Path) -> None:
    """Make a rename last; only POSIX systems can open a folder."""
    if os.name == "posix" and not is_temporary(folder):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def flush_folders(prepared: Path) -> None:
    """Bring the names in a prepared set to the disk."""
    if os.name == "posix":
        for folder in (prepared, *(p for p in prepared.rglob("*") if p.is_dir())):
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

"""One owner at a time: a folder that a process (or the ranks of one job) writes into step by step."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llmbrain._files.errors import FileError, clear_errors
from llmbrain._files.parts import fcntl, sweep
from llmbrain._files.sets import settle

LOCK = ".llmbrain-lock"
SIGNING = 1.0  # seconds that the first of several ranks may take to sign a lock that they share
_held: dict[Path, int] = {}


class BusyError(FileError):
    """Another process writes into the folder now; the message says which."""


@contextmanager
def owner(folder: str | os.PathLike[str], command: str | None = None, *, among: int | None = None) -> Iterator[Path]:
    """Own a folder while a command writes into it step by step; made where it is missing.

    The system's own lock is held on the file ``.llmbrain-lock``, so that one of a process that was killed is free at
    once; what stands in it (host, process, command, time) is for the message. A save that was killed in the folder is
    finished, and temporary files of dead processes are removed. A process may own a folder several times over. One
    that was made here and is empty at the end goes again. Systems without such locks (Windows) go without.

    Parameters
    ----------
    folder : path
    command : str, optional
        What the message of others calls this; default: the command line.
    among : int, optional
        Own it together with the other ranks of one job, of which there are so many. What they write must not be in
        each other's way; jobs of another number of ranks, and single processes, are kept out.

    Raises
    ------
    BusyError
        If another process owns it.
    FileError
        If it cannot be written.
    """
    folder = Path(folder)
    new = not folder.exists()
    with clear_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    key = folder.resolve()
    if _held.get(key):
        _held[key] += 1
        try:
            yield folder
        finally:
            _held[key] -= 1
        return
    command = command or " ".join([Path(sys.argv[0] or "python").name, *sys.argv[1:]])
    descriptor = _take(folder, command) if among is None else _share(folder, command, among)
    _held[key] = 1
    try:
        settle(folder)
        sweep(folder)
        yield folder
    finally:
        del _held[key]
        if descriptor is not None:
            with suppress(OSError):  # the folder may be gone, which is for the writers to say
                if among is not None:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the last of the ranks removes it
                (folder / LOCK).unlink()
            os.close(descriptor)
        if new:  # nothing came of it
            with suppress(OSError):
                folder.rmdir()


def _take(folder: Path, command: str) -> int | None:
    if fcntl is None:
        return None
    while True:
        descriptor = _open(folder)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            said = os.read(descriptor, 4096)
            os.close(descriptor)
            raise BusyError(f"{folder} is in use by {_who(said)}: wait until it has ended, or give another") from None
        except OSError:  # a disk without locks
            os.close(descriptor)
            return None
        if _is_there(folder, descriptor):
            break
        os.close(descriptor)
    _sign(descriptor, command)
    return descriptor


def _share(folder: Path, command: str, among: int) -> int | None:
    """A lock that the ranks of one job hold together: whoever is first signs it for all."""
    if fcntl is None:
        return None
    until = time.monotonic() + SIGNING
    while True:
        descriptor = _open(folder)
        try:
            with suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _sign(descriptor, command, among)
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:  # one process owns it; or the first of the ranks is just signing
            said = os.read(descriptor, 4096)
            os.close(descriptor)
            if time.monotonic() < until:
                time.sleep(SIGNING / 20)
                continue
            raise BusyError(f"{folder} is in use by {_who(said)}: wait until it has ended, or give another") from None
        except OSError:  # a disk without locks
            os.close(descriptor)
            return None
        os.lseek(descriptor, 0, os.SEEK_SET)
        said = os.read(descriptor, 4096)
        if not _is_there(folder, descriptor):
            os.close(descriptor)
            continue
        if _ranks_of(said) != among:
            os.close(descriptor)
            raise BusyError(
                f"{folder} is in use by {_who(said)}, one of {_ranks_of(said)} ranks, and this is one of {among}: wait "
                "until they have ended, or give another"
            )
        return descriptor


def _open(folder: Path) -> int:
    with clear_errors(folder):
        return os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)


def _is_there(folder: Path, descriptor: int) -> bool:
    """Whether a lock that was taken is still the one in the folder, not one that its owner just removed."""
    with suppress(FileNotFoundError):
        return os.path.samestat((folder / LOCK).stat(), os.fstat(descriptor))
    return False


def _sign(descriptor: int, command: str, among: int | None = None) -> None:
    record = {"host": socket.gethostname(), "pid": os.getpid(), "command": command[:500], "since": _now()}
    if among is not None:
        record["ranks"] = among
    os.truncate(descriptor, 0)
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.write(descriptor, json.dumps(record).encode())


def _ranks_of(said: bytes) -> int | None:
    try:
        found = json.loads(said).get("ranks")
    except (ValueError, AttributeError):
        return None
    return found if isinstance(found, int) else None


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")


def _who(said: bytes) -> str:
    try:
        record = json.loads(said)
        return f"process {record['pid']} on {record['host']} since {record['since']} ({record['command']})"
    except (ValueError, KeyError, TypeError):
        return "another process"

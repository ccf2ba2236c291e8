"""One owner at a time: a folder that a process writes into step by step."""

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
_held: dict[Path, int] = {}


class BusyError(FileError):
    """Another process writes into the folder now; the message says which."""


@contextmanager
def owner(folder: str | os.PathLike[str], command: str | None = None) -> Iterator[Path]:
    """Own a folder while a command writes into it step by step; made where it is missing.

    The system's own lock is held on the file ``.llmbrain-lock``, so that one of a process that was killed is free at
    once; what stands in it (host, process, command, time) is for the message. A save that was killed in the folder is
    finished, and temporary files of dead processes are removed. A process may own a folder several times over. Systems
    without such locks (Windows) go without.

    Parameters
    ----------
    folder : path
    command : str, optional
        What the message of others calls this; default: the command line.

    Raises
    ------
    BusyError
        If another process owns it.
    FileError
        If it cannot be written.
    """
    folder = Path(folder)
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
    descriptor = _take(folder, command or " ".join([Path(sys.argv[0] or "python").name, *sys.argv[1:]]))
    _held[key] = 1
    try:
        settle(folder)
        sweep(folder)
        yield folder
    finally:
        del _held[key]
        if descriptor is not None:
            with suppress(OSError):  # the folder may be gone, which is for the writers to say
                (folder / LOCK).unlink()
            os.close(descriptor)


def _take(folder: Path, command: str) -> int | None:
    if fcntl is None:
        return None
    path = folder / LOCK
    while True:
        with clear_errors(folder):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            said = os.read(descriptor, 4096)
            os.close(descriptor)
            raise BusyError(f"{folder} is in use by {_who(said)}: wait until it has ended, or give another") from None
        except OSError:  # a disk without locks
            os.close(descriptor)
            return None
        with suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(descriptor)):  # not one that its owner just removed
                break
        os.close(descriptor)
    record = {"host": socket.gethostname(), "pid": os.getpid(), "command": command[:500], "since": _now()}
    os.truncate(descriptor, 0)
    os.write(descriptor, json.dumps(record).encode())
    return descriptor


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")


def _who(said: bytes) -> str:
    try:
        record = json.loads(said)
        return f"process {record['pid']} on {record['host']} since {record['since']} ({record['command']})"
    except (ValueError, KeyError, TypeError):
        return "another process"

"""A GGUF file opened, or one line about what it is instead."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING

from llmbrain._files import DamagedError, file_pages
from llmbrain._validation import InputError

if TYPE_CHECKING:
    import gguf

MAGIC = b"GGUF"
CHECKSUM = "llmbrain.checksum"  # of the whole file, with zeros where it stands itself
EMPTY = "0" * 64
_HEAD = 1 << 20  # bytes within which its key stands


def open_gguf(path: Path) -> gguf.GGUFReader:
    """The reader of a file; raises `InputError` where it is none, truncated or damaged."""
    import gguf

    with path.open("rb") as file:
        head = file.read(4)
    if head != MAGIC:
        raise InputError(f"{path} is not a GGUF file: it begins with {head!r}, not {MAGIC!r}")
    check_gguf(path)
    try:
        return gguf.GGUFReader(path)
    except (ValueError, KeyError, IndexError, struct.error, UnicodeDecodeError, OverflowError, MemoryError) as error:
        raise InputError(f"{path} is truncated or damaged: {first_line(error)}") from error


def seal_gguf(path: Path) -> None:
    """Put the checksum of a file that was just written into its own entry `CHECKSUM`."""
    place = _place(path)
    if place is None:
        raise InputError(f"{path} has no entry {CHECKSUM!r}")
    digest = file_pages(path, place)
    with path.open("rb+") as file:
        file.seek(place.start)
        file.write(digest.encode())


def check_gguf(path: Path) -> bool:
    """Compare a file with the checksum in it; False where it has none, as those of other programs.

    Raises
    ------
    DamagedError
        If they differ.
    """
    place = _place(path)
    if place is None:
        return False
    with path.open("rb") as file:
        file.seek(place.start)
        written = file.read(len(EMPTY))
    if file_pages(path, place).encode() != written:
        raise DamagedError(
            f"{path} does not match its checksum: it was truncated, edited or damaged after it was written. Save the "
            "model again, or copy it again"
        )
    return True


def _place(path: Path) -> slice | None:
    """Where the checksum stands: behind its key, the type of its value (4 bytes) and the length (8 bytes)."""
    with path.open("rb") as file:
        found = file.read(_HEAD).find(CHECKSUM.encode())
    start = found + len(CHECKSUM) + 12
    return None if found < 0 else slice(start, start + len(EMPTY))


def first_line(error: BaseException) -> str:
    """The first line of an error that says anything, else its class."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)

"""A GGUF file opened, or one line about what it is instead."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING

from llmbrain._validation import InputError

if TYPE_CHECKING:
    import gguf

MAGIC = b"GGUF"


def open_gguf(path: Path) -> gguf.GGUFReader:
    """The reader of a file; raises `InputError` where it is none, truncated or damaged."""
    import gguf

    with path.open("rb") as file:
        head = file.read(4)
    if head != MAGIC:
        raise InputError(f"{path} is not a GGUF file: it begins with {head!r}, not {MAGIC!r}")
    try:
        return gguf.GGUFReader(path)
    except (ValueError, KeyError, IndexError, struct.error, UnicodeDecodeError, OverflowError, MemoryError) as error:
        raise InputError(f"{path} is truncated or damaged: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """The first line of an error that says anything, else its class."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)

"""A GGUF file opened, or one line about what it is instead."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmbrain._files import DamagedError, clear_damage, file_pages
from llmbrain._validation import InputError

if TYPE_CHECKING:
    import gguf
    from numpy.typing import DTypeLike, NDArray

MAGIC = b"GGUF"
CHECKSUM = "llmbrain.checksum"  # of the whole file, with zeros where it stands itself, and the file's size
EMPTY = "0" * 64 + "-" + "0" * 16
_HEAD = 1 << 20  # bytes within which its key stands


def open_gguf(path: Path) -> gguf.GGUFReader:
    """The reader of a file; raises `InputError` where it is none, truncated or damaged."""
    with path.open("rb") as file:
        head = file.read(4)
    if head != MAGIC:
        raise InputError(f"{path} is not a GGUF file: it begins with {head!r}, not {MAGIC!r}")
    check_gguf(path)
    reader = _reader(path)
    with clear_damage(path, "a GGUF file"):
        kind = reader.fields.get("general.architecture")
        blocks = None if kind is None else reader.fields.get(f"{kind.contents()}.block_count")
        if blocks is not None and reader.tensors and int(blocks.contents()) > len(reader.tensors):
            raise ValueError(f"it says {blocks.contents()} blocks, and has {len(reader.tensors)} tensors")
    return reader


def _reader(path: Path) -> gguf.GGUFReader:
    with clear_damage(path, "a GGUF file"):
        return _bounded()(path)


@cache
def _bounded() -> type[gguf.GGUFReader]:
    """gguf's reader, that takes what is beyond the end of a file as empty, and goes on counting."""
    import gguf

    class Bounded(gguf.GGUFReader):
        def _get(self, offset: int, dtype: DTypeLike, count: int = 1, *how: Any, **more: Any) -> NDArray[Any]:
            if int(offset) + np.dtype(dtype).itemsize * int(count) > len(self.data):
                raise ValueError("it ends within an entry, or an entry says more than there is")
            return super()._get(offset, dtype, count, *how, **more)

    return Bounded


def seal_gguf(path: Path) -> None:
    """Put the checksum of a file that was just written into its own entry `CHECKSUM`."""
    place = _place(path)
    if place is None:
        raise InputError(f"{path} has no entry {CHECKSUM!r}")
    seal = _seal(path, place)
    with path.open("rb+") as file:
        file.seek(place.start)
        file.write(seal)


def check_gguf(path: Path) -> bool:
    """Compare a file with the checksum in it; False where it has none of its own.

    Files of other programs have none, and a file that one of them made of ours (``llama-quantize``, ``gguf-split``)
    still holds the checksum of the old one: it is whole, and of another size.

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
    if written[64:] != _size(path) and _is_whole(path):
        return False
    if _seal(path, place) != written:
        raise DamagedError(
            f"{path} does not match its checksum: it was truncated, edited or damaged after it was written. Save the "
            "model again, or copy it again"
        )
    return True


def _seal(path: Path, place: slice) -> bytes:
    return file_pages(path, place).encode() + _size(path)


def _size(path: Path) -> bytes:
    return f"-{path.stat().st_size:016x}".encode()


def _is_whole(path: Path) -> bool:
    """Whether a file can be read and ends where its last tensor does."""
    reader = _reader(path)
    end = max((int(t.data_offset) + int(t.n_bytes) for t in reader.tensors), default=0)
    return end <= path.stat().st_size < end + int(reader.alignment)


def _place(path: Path) -> slice | None:
    """Where the checksum stands: behind its key, the type of its value (4 bytes) and the length (8 bytes)."""
    with path.open("rb") as file:
        found = file.read(_HEAD).find(CHECKSUM.encode())
    start = found + len(CHECKSUM) + 12
    return None if found < 0 else slice(start, start + len(EMPTY))


def first_line(error: BaseException) -> str:
    """The first line of an error that says anything, else its class."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)

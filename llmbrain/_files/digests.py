"""Checksums of files: SHA-256, and for large files a second one that is as fast as memory is read.

The second one (*pages*) adds up the 64-bit words of each 4 KiB, and takes the SHA-256 of these sums and of the length.
A word that changed changes the sum of its page, so that no flipped bit escapes, and no page that was lost, zeroed or
exchanged; only changes within one page that cancel each other do, which chance does not make.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LARGE = 1 << 22  # bytes from which the fast checksum is kept beside SHA-256
PAGE = 4096
_PIECE = 1 << 30  # bytes that are added up at once: of a mapped file, nothing is held


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, read piece by piece."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_pages(path: str | os.PathLike[str], blank: slice = slice(0, 0)) -> str:
    """The fast checksum of a file; see the top of this module.

    Parameters
    ----------
    path : path
    blank : slice
        Bytes that count as 0: where a file holds this checksum itself.
    """
    import numpy as np  # not needed by commands that only say what they do

    digest, size = hashlib.sha256(), Path(path).stat().st_size
    with Path(path).open("rb") as file:
        # Mapped, not read: nothing is copied, and Python's lock is not asked for between the pieces of it.
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
    head = min(size, -(-blank.stop // PAGE) * PAGE)
    for start, stop in pairwise((*([0] if head else []), *range(head, size, _PIECE), size)):
        piece = np.frombuffer(content, dtype=np.uint8, count=stop - start, offset=start)
        if start < head:
            piece = piece.copy()
            piece[blank] = 0
        whole = len(piece) // PAGE * PAGE
        digest.update(_sums(piece[:whole]))
        if whole < len(piece):
            digest.update(_sums(np.pad(piece[whole:], (0, PAGE - len(piece) + whole))))
    digest.update(size.to_bytes(8, "little"))
    return digest.hexdigest()


def _sums(pages: NDArray[np.uint8]) -> bytes:
    """Sum of the 64-bit words of each page, modulo 2**64."""
    import numpy as np

    return np.add.reduce(pages.view("<u8").reshape(-1, PAGE // 8), axis=1).astype("<u8").tobytes()


def file_digest(path: str | os.PathLike[str]) -> str:
    """What ``SHA256SUMS`` keeps of a file: its SHA-256, and ``+`` the fast checksum where it is large."""
    path = Path(path)
    return file_sha256(path) + (f"+{file_pages(path)}" if path.stat().st_size >= LARGE else "")


def is_same(path: str | os.PathLike[str], digest: str, *, fully: bool = False) -> bool:
    """Whether a file is what `file_digest` said of it.

    Parameters
    ----------
    fully : bool
        By SHA-256 also where there is a fast checksum. Without it, SHA-256 decides only where the fast one differs: it
        may be its own line that is damaged.
    """
    sha256, _, pages = digest.partition("+")
    return (bool(pages) and not fully and file_pages(path) == pages) or file_sha256(path) == sha256

"""How work says what it is doing: lines on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable

Say = Callable[[str], None]


def say(message: str = "") -> None:
    """Tell the user what is going on, on stderr; results go to stdout."""
    print(message, file=sys.stderr, flush=True)


def speaker(progress: bool | Say) -> Say:
    """What `progress` means everywhere: True says lines on stderr, False nothing, a callable is told them."""
    if callable(progress):
        return progress
    return say if progress else lambda message: None

"""Who has frozen: torch's own calls wait for a rank that does nothing any more, and nothing can interrupt them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Store

End = Callable[[str], None]  # what is done with the message


class Watch:
    """Looks after the other ranks while torch waits for them, from the thread that gives this rank's signs of life.

    Parameters
    ----------
    store : Store
        Where ranks give their signs of life.
    rank, size : int
    pace, limit : float
        Seconds between two signs of life, and without one until a rank counts as gone.
    """

    def __init__(self, store: Store, rank: int, size: int, pace: float, limit: float) -> None:
        self.store, self.rank, self.size, self.pace, self.limit = store, rank, size, pace, limit
        self.end: End | None = None
        self._what: str | None = None
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._asking, self._stop = 0, threading.Event()

    @contextmanager
    def over(self, what: str) -> Iterator[None]:
        """Within the block this process waits in torch's own calls."""
        before, self._what = self._what, what
        try:
            yield
        finally:
            self._what = before

    def tell(self, count: int) -> None:
        """Give a sign of life, and see whether the others do."""
        self._asking = count
        try:
            self.store.set(f"beat/{self.rank}", str(count))
            if self.end is not None:
                self._look()
        finally:
            self._asking = 0

    def _look(self) -> None:
        what, now, keys = self._what, time.monotonic(), [f"beat/{rank}" for rank in range(self.size)]
        if what is None or not self.store.check(keys):
            self._seen.clear()
            return
        for rank, beat in enumerate(self.store.multi_get(keys)):
            before, since = self._seen.get(rank, (b"", now))
            if beat != before:
                self._seen[rank] = beat, now
            elif rank != self.rank and now - since > self.limit and self.end is not None:
                self.end(
                    f"{what}: rank {rank} of {self.size} is gone: no sign of life for {self.limit:.0f} s. What was "
                    "written is kept: the same command goes on from there"
                )

    def start(self, end: End) -> None:
        """From now on what is found ends this process by `end`; also that the store no longer answers."""
        self.end = end
        threading.Thread(target=self._wait, daemon=True, name="llmbrain-watch").start()

    def _wait(self) -> None:
        waited, asked = 0.0, 0
        while not self._stop.wait(self.pace):  # counted, so that one who was frozen himself does not count that time
            waited = waited + self.pace if self._asking and self._asking == asked else 0.0
            asked = self._asking
            if waited > self.limit and self.end is not None:
                self.end(
                    f"rank {self.rank} of {self.size} lost the others: what they meet at (MASTER_ADDR, MASTER_PORT) "
                    f"does not answer for {self.limit:.0f} s. What was written is kept: the same command goes on from "
                    "there"
                )

    def stop(self) -> None:
        """Look no longer."""
        self.end = None
        self._stop.set()

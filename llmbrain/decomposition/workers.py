"""Work on blocks of neurons: every core takes its own block, so that a block stays in that core's cache.

One OpenMP team per small operation stalls at its barrier whenever one core is busy with something else. Here each
worker runs single-threaded torch on whole blocks and takes the next when it is done, so a busy core only takes fewer.
Results come back in block order: sums do not depend on who was first.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")
_CACHE_BYTES = 512 * 1024  # half of a common L2 cache: the block and what is computed from it
_GPU_BYTES = 256 * 1024**2
_LANES = 32  # partial sums: fixed, so that a sum is the same on any number of cores
_state = threading.local()


class Workers:
    """Maps a function over blocks of columns on one device."""

    def __init__(self, device: torch.device, pool: ThreadPoolExecutor | None, n_threads: int) -> None:
        self.device, self.pool, self.n_threads = device, pool, n_threads

    def _blocks(self, n_columns: int, rows: int, width: int) -> list[slice]:
        if not width:
            budget = _GPU_BYTES if self.device.type != "cpu" else _CACHE_BYTES
            width = max(256, budget // (max(rows, 1) * 4))
        return [slice(start, min(start + width, n_columns)) for start in range(0, n_columns, width)]

    def map(self, function: Callable[[slice], T], n_columns: int, *, rows: int = 1, width: int = 0) -> Iterator[T]:
        """Yield ``function(block)`` in order for consecutive slices of ``n_columns``.

        Blocks have `width` columns, or as many as keep `rows` of them in cache.
        """
        blocks = self._blocks(n_columns, rows, width)
        if self.pool is None or len(blocks) == 1:
            return map(function, blocks)
        return self.pool.map(function, blocks)

    def sum(
        self, function: Callable[[slice], tuple[torch.Tensor, ...]], n_columns: int, *, rows: int = 1, width: int = 0
    ) -> tuple[torch.Tensor, ...]:
        """Sum of the tensors that ``function(block)`` returns, in float64, over consecutive slices of ``n_columns``."""
        blocks = self._blocks(n_columns, rows, width)
        lanes = [blocks[i::_LANES] for i in range(min(_LANES, len(blocks)))]

        def lane(part: list[slice]) -> tuple[torch.Tensor, ...]:
            totals = tuple(value.double() for value in function(part[0]))
            for block in part[1:]:
                for total, value in zip(totals, function(block)):
                    total += value
            return totals

        parts = map(lane, lanes) if self.pool is None else self.pool.map(lane, lanes)
        result = next(iter(parts))
        for part in parts:
            for total, value in zip(result, part):
                total += value
        return result

    @contextmanager
    def all_threads(self) -> Iterator[None]:
        """Let the calling thread use every core again, for one large dense operation."""
        torch.set_num_threads(self.n_threads)
        try:
            yield
        finally:
            torch.set_num_threads(1 if self.pool is not None else self.n_threads)


@contextmanager
def workers(device: torch.device) -> Iterator[Workers]:
    """The workers of `device`; nested uses share one pool, and torch's thread count is put back at the end."""
    active = getattr(_state, "workers", None)
    if active is not None and active.device == device:
        yield active
        return
    n_threads = torch.get_num_threads()
    if device.type != "cpu" or n_threads == 1:
        yield Workers(device, None, n_threads)
        return
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(n_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            _state.workers = Workers(device, pool, n_threads)
            yield _state.workers
    finally:
        _state.workers = None
        torch.set_num_threads(n_threads)

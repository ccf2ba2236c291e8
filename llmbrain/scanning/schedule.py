"""What the scanner will write: which blocks are read together, and which go into which shard."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from llmbrain.hooks.text import Block

SHARD_BYTES = 16 * 2**20  # a shard is closed when it has this much; also what is lost when a run is killed
BATCH_BYTES = 2**30  # fewer texts are read at once where their signals would take more than this


@dataclass(frozen=True)
class Schedule:
    """Which blocks go into which shard: ``shards[i]`` is (first block, last block + 1).

    With `even`, blocks that are read at once are of one length: for models that do not obey the padding mask.
    """

    blocks: Sequence[Block]
    shards: Sequence[tuple[int, int]]
    per_token: int
    even: bool = False

    @classmethod
    def make(cls, blocks: Sequence[Block], per_token: int, batch_size: int) -> Schedule:
        """Whole batches a shard, until it is large enough."""
        shards, first, held = [], 0, 0
        whole = cls(blocks, [], per_token)
        for low, high in whole.batches(0, len(blocks), batch_size):
            held += per_token * sum(len(block) for block in blocks[low:high])
            if held >= SHARD_BYTES or high == len(blocks):
                shards.append((first, high))
                first, held = high, 0
        return cls(blocks, shards, per_token)

    @property
    def rows(self) -> list[int]:
        """First token of each shard, counted over all runs, and the total."""
        lengths = [sum(len(block) for block in self.blocks[low:high]) for low, high in self.shards]
        return list(accumulate(lengths, initial=0))

    def batches(self, first: int, last: int, batch_size: int) -> Iterator[tuple[int, int]]:
        """Blocks that are read at once."""
        while first < last:
            stop = min(first + batch_size, last)
            longest = 0
            for stop_here in range(first, stop):
                length = len(self.blocks[stop_here])
                longest = max(longest, length)
                large = longest * (stop_here + 1 - first) * self.per_token > BATCH_BYTES
                if stop_here > first and (large or (self.even and length != len(self.blocks[first]))):
                    stop = stop_here
                    break
            yield first, stop
            first = stop

    def most_padded(self, batch_size: int) -> Sequence[Block]:
        """The batch in which the shortest block is padded most."""
        batches = [self.blocks[low:high] for low, high in self.batches(0, len(self.blocks), batch_size)]
        return max(batches, key=lambda batch: max(map(len, batch)) - min(map(len, batch)))

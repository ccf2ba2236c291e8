"""The ranks of a job, and what they tell each other: JSON through a store, tensors through gloo on the CPU.

Nothing is pickled. Whoever waits looks whether the others still live: a rank that is gone is named, and so is one that
failed.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmbrain._files import plain
from llmbrain._validation import InputError
from llmbrain.distributed.watch import Watch
from llmbrain.distributed.wire import Json, bytes_of, empty, line_of, shapes_of, short, wide, words_of_gone

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup, Store

TIMEOUT = 300.0  # seconds without a sign of life until a rank counts as gone; LLMBRAIN_RANK_TIMEOUT changes it
FAREWELL = 5.0  # seconds that a rank which fails waits for the others to say so too
SLOWEST_LOOK = 0.05  # seconds between two looks of one that waits


@dataclass
class Parcel:
    """What one rank gives to others.

    Attributes
    ----------
    tensors : dict of Tensor
    record : JSON values
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    record: Json = None


class RankError(InputError):
    """A rank is gone, failed, or does something else than the others; the message names it."""


class Ranks:
    """The processes of a job.

    Parameters
    ----------
    rank : int
        Number of this one.
    size : int
        How many there are.
    store : Store, optional
        Where they tell each other facts; none for a process that is alone.
    group : ProcessGroup, optional
        Carries tensors by gloo; default the world.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, store: Store | None = None, group: ProcessGroup | None = None
    ) -> None:
        self.rank, self.size = rank, size
        self._store, self._group = store, group
        self._job, self._depth, self._step = 0, 0, 0
        self._stop = threading.Event()
        if store is not None:
            self.watch = Watch(store, rank, size, _pace(), timeout())
            self._pulse = threading.Thread(target=self._beat, daemon=True, name="llmbrain-rank")
            self._pulse.start()

    def __repr__(self) -> str:
        return f"Ranks({self.rank} of {self.size})"

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which decides and writes where one has to."""
        return self.rank == 0

    def mine(self, n: int) -> range:
        """Which of n pieces of work are this rank's: every `size`-th."""
        return range(self.rank, n, self.size)

    # -- a job -------------------------------------------------------------------------------------------------------

    @contextmanager
    def job(self, what: str, **facts: Json) -> Iterator[Ranks]:
        """A stretch of work that all ranks do together; an error of one ends it for all.

        Parameters
        ----------
        what : str
            Its name, for messages.
        **facts
            What must be the same on all ranks.

        Raises
        ------
        RankError
            If facts differ, a rank failed, is gone or does something else: the same message on all.
        """
        if self._store is None:
            yield self
            return
        if self._depth == 0:
            self._job, self._step = self._job + 1, 0
        self._depth += 1
        try:
            self.agree(what, **facts)
            yield self
        except BaseException as error:
            if self._depth == 1 and not isinstance(error, RankError):
                self._say_failed(f"failed/{self._job}", error)
            raise
        finally:
            self._depth -= 1

    def agree(self, what: str, **facts: Json) -> None:
        """Refuse ranks that were given different things: see `job`."""
        if self._store is None:
            return
        told = self.gather(what, facts)
        for rank, other in enumerate(told):
            differ = [name for name in told[0] if other.get(name) != told[0][name]]
            if differ:
                name = differ[0]
                raise RankError(
                    f"{what}: rank {rank} of {self.size} was given other {' and other '.join(differ)} than rank 0 "
                    f"({short(other.get(name))}, not {short(told[0][name])}): all ranks must be given the same"
                )

    def gather(self, what: str, value: Json) -> list[Json]:
        """What every rank says here, in order, on all ranks."""
        if self._store is None:
            return [value]
        if self._depth == 0:
            self._job, self._step = self._job + 1, 0
        self._step += 1
        self._post(str(self.rank), what, value)
        told = [self._hear(str(rank), rank, what) for rank in range(self.size)]
        if self._step > 2:  # all have read what was said two steps ago
            with suppress(RuntimeError):
                self._store.delete_key(f"{self._job}/{self._step - 2}/{self.rank}")
        return told

    def meet(self, what: str) -> None:
        """Wait until all ranks are here."""
        self.gather(what, None)

    def found_by(self, owner: int, what: str, find: Callable[[], Parcel]) -> Parcel:
        """What the rank `owner` finds, on all ranks; the others wait for it.

        While `find` runs, the owner is by itself: what it calls does not wait for other ranks.
        """
        if self._store is None:
            return find()
        parcel = Parcel()
        if owner == self.rank:
            with alone():
                parcel = find()
        return self._broadcast(owner, what, parcel)

    def told(self, what: str, find: Callable[[], Json]) -> Json:
        """What rank 0 finds, as JSON, on all ranks."""
        return self.found_by(0, what, lambda: Parcel(record=find())).record

    def each(self, n: int, what: str, find: Callable[[int], Parcel]) -> Iterator[Parcel]:
        """Pieces of work 0 to n - 1 in order, each found by the rank whose it is, on all ranks.

        Every rank finds one, then they are handed round: no rank ever holds more than two.
        """
        for first in range(0, n, self.size):
            own = Parcel()
            if first + self.rank < n:
                with alone() if self._store is not None else nullcontext():
                    own = find(first + self.rank)
            for owner in range(min(self.size, n - first)):
                yield own if self._store is None else self._broadcast(owner, what, own)

    # -- tensors -----------------------------------------------------------------------------------------------------

    def sum(self, tensors: Sequence[Tensor], what: str, to: int | None = None) -> list[Tensor]:
        """Sums over ranks of tensors that have the same shapes everywhere.

        Parameters
        ----------
        tensors : sequence of Tensor
        what : str
        to : int, optional
            The rank that gets them (others get their own back); default all.

        Returns
        -------
        list of Tensor
            On the devices they were on.
        """
        if self._store is None:
            return list(tensors)
        import torch.distributed as dist

        self.meet(what)
        sums = []
        with self._carrying(what):
            for tensor in tensors:
                moved = tensor.detach().to("cpu", wide(tensor.dtype), copy=True).contiguous()
                if to is None:
                    dist.all_reduce(moved, group=self._group)
                else:
                    dist.reduce(moved, self._global(to), group=self._group)
                sums.append(moved.to(tensor.device, tensor.dtype) if to in (None, self.rank) else tensor)
        return sums

    def send(self, to: int, what: str, parcel: Parcel) -> None:
        """Give a parcel to one other rank, which receives it."""
        import torch.distributed as dist

        self._post(f"to-{to}-of-{self.rank}", what, [parcel.record, shapes_of(parcel.tensors)])
        self._hear(f"ready-{to}-{self.rank}", to, what)
        with self._carrying(what):
            for tensor in parcel.tensors.values():
                if tensor.numel():
                    dist.send(bytes_of(tensor), self._global(to), group=self._group)

    def receive(self, source: int, what: str) -> Parcel:
        """Take the parcel that another rank sends."""
        import torch
        import torch.distributed as dist

        record, shapes = self._hear(f"to-{self.rank}-of-{source}", source, what)
        self._post(f"ready-{self.rank}-{source}", what, None)
        tensors = empty(shapes)
        with self._carrying(what):
            for name, tensor in tensors.items():
                content = torch.empty(tensor.numel() * tensor.element_size(), dtype=torch.uint8)
                if not len(content):
                    continue
                dist.recv(content, self._global(source), group=self._group)
                tensors[name] = content.view(tensor.dtype).reshape(tensor.shape)
        return Parcel(tensors, record)

    def collect(self, part: Tensor, shapes: Sequence[Sequence[int]], what: str, to: int | None = None) -> list[Tensor]:
        """What every rank has of something, in the order of ranks.

        Parameters
        ----------
        part : Tensor
            This rank's, of the dtype that all have.
        shapes : sequence of shape
            Of each rank's part.
        what : str
        to : int, optional
            The rank that gets them (others get an empty list); default all.

        Returns
        -------
        list of Tensor
            On the CPU.
        """
        if self._store is None:
            return [part]
        import torch
        import torch.distributed as dist

        found: list[Tensor] = []
        with self._carrying(what):
            for owner, shape in enumerate(shapes):
                own = owner == self.rank
                if to is not None and to != self.rank:
                    if own and part.numel():
                        dist.send(bytes_of(part), self._global(to), group=self._group)
                    continue
                room = part if own else torch.empty(list(shape), dtype=part.dtype)
                content = bytes_of(room)
                if len(content) and to is None:
                    dist.broadcast(content, self._global(owner), group=self._group)
                elif len(content) and not own:
                    dist.recv(content, self._global(owner), group=self._group)
                found.append(room)
        return found

    @contextmanager
    def watching(self, what: str) -> Iterator[None]:
        """Within the block the ranks talk to each other by means of torch's own: who dies meanwhile is named."""
        try:
            with self.watch.over(what) if self._store is not None else nullcontext():
                yield
        except RuntimeError as error:
            gone = self._silent() if self._store is not None else []
            if not gone:
                raise
            raise RankError(words_of_gone(what, gone, self.size, error)) from error

    def _broadcast(self, owner: int, what: str, parcel: Parcel) -> Parcel:
        import torch.distributed as dist

        said = [parcel.record, shapes_of(parcel.tensors)] if owner == self.rank else None
        record, shapes = self.gather(what, said)[owner]
        tensors = dict(parcel.tensors) if owner == self.rank else empty(shapes)
        with self._carrying(what):
            for name, tensor in tensors.items():
                content = bytes_of(tensor)
                if not len(content):
                    continue
                dist.broadcast(content, self._global(owner), group=self._group)
                if owner != self.rank:
                    tensors[name] = content.view(tensor.dtype).reshape(tensor.shape)
        return Parcel(tensors, record)

    def _global(self, rank: int) -> int:
        import torch.distributed as dist

        return rank if self._group is None else dist.get_global_rank(self._group, rank)

    # -- the store ---------------------------------------------------------------------------------------------------

    def _post(self, name: str, what: str, value: Json) -> None:
        with self._reaching():
            assert self._store is not None
            self._store.set(f"{self._job}/{self._step}/{name}", json.dumps([what, value], default=plain))

    def _hear(self, name: str, source: int, what: str) -> Json:
        """What `source` said under a name in this step; waits for it while it lives."""
        self._await(f"{self._job}/{self._step}/{name}", source, what)
        with self._reaching():
            assert self._store is not None
            said, value = json.loads(self._store.get(f"{self._job}/{self._step}/{name}"))
        if said != what:
            first, second = sorted([(source, said), (self.rank, what)])
            raise RankError(
                f"rank {first[0]} is at {first[1]!r} while rank {second[0]} is at {second[1]!r}: all ranks must do the "
                "same, in the same order"
            )
        return value

    def _await(self, key: str, source: int, what: str) -> None:
        store, pause, limit = self._store, 0.0005, timeout()
        assert store is not None
        seen, changed = b"", time.monotonic()
        while True:
            with self._reaching():
                if store.check([key]):
                    return
                self._raise_failed()
                if time.monotonic() - changed > min(1.0, limit / 4):
                    beat = store.get(f"beat/{source}") if store.check([f"beat/{source}"]) else b""
                    if beat != seen:
                        seen, changed = beat, time.monotonic()
            if time.monotonic() - changed > limit:
                raise RankError(
                    f"{what}: rank {source} of {self.size} is gone: no sign of life for {limit:.0f} s. What was "
                    "written is kept: the same command goes on from there"
                )
            time.sleep(pause)
            pause = min(1.5 * pause, SLOWEST_LOOK)

    def _raise_failed(self) -> None:
        """Raise what another rank said when it failed."""
        store = self._store
        assert store is not None
        for failed in (f"failed/{self._job}", "failed/all"):
            if store.check([failed]):
                rank, said = json.loads(store.get(failed))
                raise RankError(f"{said} (rank {rank} of {self.size})")

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        """The store may be gone with the process that held it."""
        try:
            yield
        except RankError:
            raise
        except RuntimeError as error:
            raise RankError(
                f"rank {self.rank} of {self.size} lost the others: what they meet at (MASTER_ADDR, MASTER_PORT) is "
                f"gone. What was written is kept: the same command goes on from there ({line_of(error)})"
            ) from error

    @contextmanager
    def _carrying(self, what: str) -> Iterator[None]:
        """Tensors under way: who has died breaks the connection, and is looked for."""
        try:
            with self.watch.over(what):
                yield
        except RuntimeError as error:
            with suppress(RuntimeError):
                self._raise_failed()  # it said why, and went
            raise RankError(words_of_gone(what, self._silent(), self.size, error)) from error

    def _silent(self) -> list[int]:
        """Ranks that give no sign of life for some seconds."""
        store = self._store
        assert store is not None
        with suppress(RuntimeError):
            before = [store.get(f"beat/{r}") if store.check([f"beat/{r}"]) else b"" for r in range(self.size)]
            time.sleep(3 * _pace())
            after = [store.get(f"beat/{r}") if store.check([f"beat/{r}"]) else b"" for r in range(self.size)]
            return [r for r in range(self.size) if before[r] == after[r] and r != self.rank]
        return [0]  # with whom the store went

    def _say_failed(self, key: str, error: BaseException) -> None:
        said = " ".join(str(error).split()) or type(error).__name__
        if not isinstance(error, InputError):
            said = f"{type(error).__name__}: {said}"
        with suppress(RuntimeError):
            assert self._store is not None
            if not self._store.check([key]):
                self._store.set(key, json.dumps([self.rank, said]))

    def _beat(self) -> None:
        """A sign of life now and then, for as long as the process runs."""
        count = 0
        with suppress(RuntimeError):
            while not self._stop.wait(_pace() if count else 0.0):
                count += 1
                self.watch.tell(count)

    def leave(self, error: BaseException | None) -> None:
        """Say good-bye; who fails waits a little, so that all can say why before they are stopped."""
        store = self._store
        if store is None:
            return
        with suppress(RuntimeError, InputError):
            if error is not None:
                self._say_failed("failed/all", error)
            store.set(f"left/{self.rank}", "")
            until = time.monotonic() + (FAREWELL if error is not None else timeout())
            left = [f"left/{rank}" for rank in range(self.size)]
            while (error is not None or self.leads) and time.monotonic() < until:
                if store.check(left) or (error is None and store.check(["failed/all"])):
                    break
                time.sleep(SLOWEST_LOOK)
        self._stop.set()
        self.watch.stop()
        self._pulse.join(timeout=1.0)


ALONE = Ranks()


class _Depth(threading.local):
    depth = 0


_alone = _Depth()
known: list[tuple[ProcessGroup, Ranks]] = []


@contextmanager
def alone() -> Iterator[None]:
    """Within the block this process counts as the only one."""
    before = _alone.depth
    _alone.depth = before + 1
    try:
        yield
    finally:
        _alone.depth = before


def ranks() -> Ranks:
    """The ranks of the process group that this process is in; `ALONE` where there is none.

    Every rank must call what uses them, in the same order.
    """
    if "torch.distributed" not in sys.modules or _alone.depth:
        return ALONE
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return ALONE
    world = dist.group.WORLD
    assert world is not None
    if not known or known[-1][0] is not world:
        gloo = None if "gloo" in str(dist.get_backend_config()) else dist.new_group(backend="gloo")
        from torch.distributed.distributed_c10d import _get_default_store

        store = dist.PrefixStore("llmbrain", _get_default_store())
        known[:] = [(world, Ranks(dist.get_rank(), dist.get_world_size(), store, gloo))]
    return known[-1][1]


def timeout() -> float:
    """Seconds without a sign of life until a rank counts as gone (the variable ``LLMBRAIN_RANK_TIMEOUT``)."""
    said = os.environ.get("LLMBRAIN_RANK_TIMEOUT", "")
    try:
        found = float(said or TIMEOUT)
    except ValueError:
        found = 0.0
    if not 0 < found < 1e9:
        raise InputError(f"LLMBRAIN_RANK_TIMEOUT={said!r} must be seconds above 0")
    return found


def _pace() -> float:
    return min(1.0, timeout() / 10)

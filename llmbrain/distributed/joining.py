"""Processes become ranks: who is there, where they meet, and who never arrives."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from llmbrain._progress import muted
from llmbrain._validation import InputError
from llmbrain.distributed.team import ALONE, SLOWEST_LOOK, RankError, Ranks, known, timeout
from llmbrain.distributed.wire import line_of

if TYPE_CHECKING:
    from torch.distributed import Store

T = TypeVar("T")
GLOO_TIMEOUT = timedelta(hours=2)  # of tensors under way: who is gone is found out otherwise


@contextmanager
def joined() -> Iterator[Ranks]:
    """Within the block, the processes that torchrun started are ranks of one process group.

    Who is which stands in ``RANK`` and ``WORLD_SIZE``, where they meet in ``MASTER_ADDR`` and ``MASTER_PORT``. Without
    these variables, or with one process, nothing happens. Each rank takes its own GPU where there are several
    (``LOCAL_RANK``). Only rank 0 says what it does. Where torch waits for a rank that gives no sign of life, which
    nothing can interrupt, the process says so and ends.

    Raises
    ------
    RankError
        If a rank does not arrive in time, by its number; if the port is in use; if ranks cannot talk to each other.
    InputError
        If the variables make no sense.
    """
    place = _place()
    if place is None:
        yield ALONE
        return
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # what it reports stands in our own error
    import torch
    import torch.distributed as dist

    rank, size, host, port, local = place
    if host in ("127.0.0.1", "localhost") and sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = _meeting_place(rank, size, host, port)
    _arrive(store, rank, size)
    # Tensors of GPUs are only those of a model that is spread over them; NCCL starts with the first of these.
    backends = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    try:
        dist.init_process_group(
            backends, store=dist.PrefixStore("group", store), rank=rank, world_size=size, timeout=GLOO_TIMEOUT
        )
    except (RuntimeError, ValueError) as error:
        raise RankError(
            f"rank {rank} of {size} met the others at {host}:{port}, but they cannot talk to each other "
            f"({line_of(error)}): is GLOO_SOCKET_IFNAME the name of a network that all machines share?"
        ) from error
    if torch.cuda.is_available():
        torch.cuda.set_device(local % torch.cuda.device_count())
    os.environ.setdefault("LOCAL_RANK", str(local))  # by which transformers takes a device
    team = Ranks(rank, size, dist.PrefixStore("llmbrain", store))
    team.watch.start(_end)
    world = dist.group.WORLD
    assert world is not None
    known[:] = [(world, team)]
    failure: BaseException | None = None
    try:
        with muted() if rank else nullcontext():
            yield team
    except BaseException as error:
        failure = None if isinstance(error, SystemExit) and not error.code else error
        raise
    finally:
        team.leave(failure)
        known.clear()
        with suppress(RuntimeError):
            dist.destroy_process_group()


def _end(said: str) -> None:
    """Say it, and end the process: it hangs in a call that nothing interrupts."""
    print(f"error: {said}", file=sys.stderr, flush=True)
    os._exit(2)


def _place() -> tuple[int, int, str, int, int] | None:
    """Rank, size, host, port and number on this machine that the variables say; None for a single process."""
    said = {name: os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    if not said["RANK"] or not said["WORLD_SIZE"] or said["WORLD_SIZE"] == "1":
        return None
    shown = ", ".join(f"{name}={value!r}" for name, value in said.items())
    if not said["MASTER_ADDR"]:
        raise InputError(f"{shown}: ranks need MASTER_ADDR and MASTER_PORT to meet (torchrun sets them)")
    try:
        rank, size, port = (int(said[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    except ValueError:
        raise InputError(f"{shown}: RANK, WORLD_SIZE and MASTER_PORT must be whole numbers") from None
    if not 0 <= rank < size or not 0 < port < 65536:
        raise InputError(f"{shown}: RANK must be in 0 to WORLD_SIZE - 1, MASTER_PORT in 1 to 65535")
    local = os.environ.get("LOCAL_RANK", "") or os.environ.get("SLURM_LOCALID", "") or str(rank)
    if not local.isdecimal():
        raise InputError(f"LOCAL_RANK={local!r} must be a whole number, from 0")
    return rank, size, said["MASTER_ADDR"], port, int(local)


def _meeting_place(rank: int, size: int, host: str, port: int) -> Store:
    """The store that all ranks reach: torchrun's own, or that of rank 0."""
    import torch.distributed as dist

    limit = timedelta(seconds=timeout())
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    serves = rank == 0 and not agent
    try:
        store: Store = in_time(
            lambda: dist.TCPStore(host, port, None, serves, limit, wait_for_workers=False), limit.total_seconds()
        )
    except RuntimeError as error:
        said = str(error)
        if serves and ("EADDRINUSE" in said or "in use" in said):
            raise RankError(
                f"MASTER_PORT={port}: the port is in use by another program on {host}: give another (torchrun "
                "--master-port, or --standalone, which takes a free one)"
            ) from error
        if serves:
            raise RankError(f"MASTER_ADDR={host!r}: rank 0 cannot listen there ({line_of(error)})") from error
        raise RankError(
            f"rank 0 of {size} never arrived: rank {rank} found nobody of this job at {host}:{port} in "
            f"{limit.total_seconds():.0f} s"
        ) from error
    if agent:
        return dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    return store


def in_time(find: Callable[[], T], seconds: float) -> T:
    """What `find` gives, within a time; torch itself waits for ever for a program that takes a connection and is mute.

    Raises
    ------
    RuntimeError
        If it takes longer; it is left behind.
    """
    found: list[T] = []
    failed: list[Exception] = []

    def look() -> None:
        try:
            found.append(find())
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=look, daemon=True, name="llmbrain-meeting")
    thread.start()
    thread.join(seconds + 1.0)
    if failed:
        raise failed[0]
    if not found:
        raise RuntimeError("no answer")
    return found[0]


def _arrive(store: Store, rank: int, size: int) -> None:
    """All ranks say that they are there; who does not in time is named, and none waits for gloo's own time-out."""
    limit, began = timeout(), time.monotonic()
    try:
        if store.add(f"came/{rank}", 1) > 1:
            raise RankError(f"RANK={rank}: another process of this job has the same rank")
        store.set(f"arrived/{rank}", str(size))
        while True:
            missing = [r for r in range(size) if not store.check([f"arrived/{r}"])]
            if not missing:
                break
            if time.monotonic() - began > limit:
                who = f"rank {missing[0]}" if len(missing) == 1 else f"ranks {', '.join(map(str, missing))}"
                raise RankError(f"{who} of {size} never arrived: waited {limit:.0f} s for it")
            time.sleep(SLOWEST_LOOK)
        others = {r: int(store.get(f"arrived/{r}")) for r in range(size)}
    except RankError:
        raise
    except RuntimeError as error:
        raise RankError(
            f"rank {rank} of {size} lost rank 0 while it waited for the others ({line_of(error)})"
        ) from error
    wrong = [r for r, said in others.items() if said != size]
    if wrong:
        raise RankError(f"WORLD_SIZE={size} for rank {rank}, but {others[wrong[0]]} for rank {wrong[0]}")

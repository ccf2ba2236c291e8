"""Rows shared out over processes, the most valuable first; each is written when it is done."""

from __future__ import annotations

import json
import multiprocessing as mp
import time
import traceback
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from real_parts.bench import Bench
from real_parts.rows import Task

Need = tuple[str, int, int]


def work(bench: Bench, device: str, pipe: Connection, piqa: Callable[[Task, float], bool]) -> None:
    """Do what comes through the pipe."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(True)
    bench.to(device)
    machine = f"{'CPU' if device == 'cpu' else torch.cuda.get_device_name(0)}, torch {torch.__version__}"
    while (asked := pipe.recv()) is not None:
        began = time.perf_counter()
        try:
            if asked == "dense":
                pipe.send(("row", {"dense": bench.dense(), "machine": machine}))
            elif isinstance(asked, Task):
                for row in bench.rows(asked, piqa):
                    pipe.send(("row", {**row, "machine": machine}))
            else:
                bench.shared(*asked)
                pipe.send(("row", {"made": asked, "seconds": round(time.perf_counter() - began, 1)}))
        except Exception as error:
            what = asked.row.label if isinstance(asked, Task) else asked
            where = [line.strip() for line in traceback.format_exc().splitlines() if "line" in line][-4:]
            said = f"{type(error).__name__}: {error}"[:300]
            pipe.send(("row", {"error": said, "at": where, "task": what}))
        pipe.send(("done", None))
        if device != "cpu":
            torch.cuda.empty_cache()


def share_out(
    bench: Bench,
    tasks: Iterable[Task],
    *,
    device: str,
    processes: int,
    seconds: float,
    keep: Callable[[dict[str, Any]], None],
    piqa: Callable[[Task, float], bool],
    dense: bool = True,
) -> None:
    """Give tasks to processes, in order, as soon as what they need is there; `keep` gets every row as it comes.

    Parameters
    ----------
    seconds : float
        After which all stop.
    """
    began = time.monotonic()
    waiting: list[Any] = list(tasks)
    needed = list(dict.fromkeys(need for task in waiting for need in task.needs))
    ready: set[Need] = set()
    asked: set[Need] = set()
    first: list[Any] = ["dense"] if dense else []
    context = mp.get_context("fork")  # the model is loaded once
    workers: dict[Connection, Any] = {}
    pipes: dict[Connection, mp.process.BaseProcess] = {}
    for _ in range(processes):
        here, there = context.Pipe()
        process = context.Process(target=work, args=(bench, device, there, piqa), daemon=True)
        process.start()
        there.close()
        workers[here], pipes[here] = None, process

    def wanted() -> Any:
        """The next thing to do: the first task that can run, else what the first that cannot waits for."""
        if first:
            return first.pop(0)
        for i, task in enumerate(waiting):
            missing = [need for need in task.needs if need not in ready]
            if not missing:
                return waiting.pop(i)
            for need in missing:
                if need not in asked:
                    asked.add(need)
                    return need
        return None

    try:
        while time.monotonic() - began < seconds:
            for pipe, at in workers.items():
                if at is None and (task := wanted()) is not None:
                    workers[pipe] = task
                    pipe.send(task)
            busy = [pipe for pipe, at in workers.items() if at is not None]
            if not busy:
                break
            for pipe in wait(busy, timeout=min(3600.0, max(0.1, seconds - (time.monotonic() - began)))):
                try:
                    kind, value = pipe.recv()  # type: ignore[union-attr]
                except EOFError:  # the process is gone: out of memory, say
                    lost = workers.pop(pipe)  # type: ignore[arg-type]
                    keep({"error": "a process ended", "task": str(lost)})
                    if isinstance(lost, tuple):
                        ready.add(lost)
                    if not workers:
                        return
                    continue
                if kind == "row":
                    keep(value)
                    continue
                if isinstance(workers[pipe], tuple):  # type: ignore[index]
                    ready.add(workers[pipe])  # type: ignore[index]
                workers[pipe] = None  # type: ignore[index]
        left = len(waiting) + sum(at is not None for at in workers.values())
        keep({"ended": round(time.monotonic() - began, 1), "left": left, "needs": len(needed)})
    finally:
        for process in pipes.values():
            process.kill()


def append(file: Path) -> Callable[[dict[str, Any]], None]:
    """A function that writes a row to the end of a file at once."""

    def keep(row: dict[str, Any]) -> None:
        with file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(row) + "\n")
        if "scores" in row:
            scores = ", ".join(f"{t} {s.get('perplexity', s.get('acc')):.2f}" for t, s in row["scores"].items())
            told = f"{row['ratio']:.0%}  {row['label']}, {row['tokens']:,} tokens, draw {row['draw']}: {scores}"
            print(f"{told}  ({row['seconds']:.0f} s)", flush=True)
        else:
            print(json.dumps(row)[:400], flush=True)

    return keep

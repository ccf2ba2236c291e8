"""How work says what it is doing: lines on stderr, bars where a person watches, and a log file.

On a terminal, `bar` is tqdm's. Anywhere else (a file, a batch system) a line says what is going on at least every 30 s
while a job that `watched` runs is at work; so does its log file, always.
"""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

from llmbrain._validation import InputError

Say = Callable[[str], None]
T = TypeVar("T")
EVERY = 30.0  # seconds between two lines
STILL = "    ... "  # begins a line that says no more than that the work goes on


def say(message: str = "") -> None:
    """Tell the user what is going on, on stderr; results go to stdout."""
    _desk.tell(message)


def speaker(progress: bool | Say) -> Say:
    """What `progress` means everywhere: True says lines on stderr, False nothing, a callable is told them."""
    if callable(progress):
        return progress
    return say if progress else lambda message: None


def span(seconds: float) -> str:
    """A time as people say it: ``40 s``, ``3 min``, ``2 h 5 min``."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


class _Desk:
    """Who is told, what is going on, and when something was last said."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.logs: list[Path] = []
        self.bars: list[bar[Any]] = []
        self.last = self.began = time.monotonic()
        self.step = "at work"
        self.watchers = 0
        self.muted = 0

    def tell(self, message: str, *, aloud: bool = True) -> None:
        """A line on stderr and in the logs."""
        with self.lock:
            self.last = time.monotonic()
            if not message.startswith(STILL) and message.strip():
                self.step, self.began = message.strip().splitlines()[-1], self.last
            if aloud and not self.muted:
                print(message, file=sys.stderr, flush=True)
            stamp = time.strftime("%H:%M:%S")
            for path in self.logs:
                with path.open("a", encoding="utf-8") as file:
                    file.writelines(f"{stamp} {line}\n" for line in message.splitlines() if line.strip())

    def beat(self) -> None:
        """Say where the work is, if nothing was said for long."""
        with self.lock:
            if time.monotonic() - self.last < EVERY or not self.watchers:
                return
            where = str(self.bars[-1]) if self.bars else f"{self.step} (for {span(time.monotonic() - self.began)})"
            self.tell(f"{STILL}{where}", aloud=not sys.stderr.isatty())


_desk = _Desk()


@contextmanager
def muted() -> Iterator[None]:
    """While the block runs nothing is said and no bar is shown: another process speaks for this one."""
    _desk.muted += 1
    try:
        yield
    finally:
        _desk.muted -= 1


@contextmanager
def watched(log: Path | None = None) -> Iterator[None]:
    """While the block runs, something is said at least every 30 s where stderr is a file, and in `log`.

    Parameters
    ----------
    log : path, optional
        File that the lines are added to, each with its time.
    """
    stop = threading.Event()

    def beating() -> None:
        while not stop.wait(1.0):
            _desk.beat()

    thread = threading.Thread(target=beating, daemon=True, name="llmbrain-progress")
    with _desk.lock:
        if not _desk.watchers:
            _desk.bars.clear()  # of work that broke off before: it would be named as what goes on now
        _desk.watchers += 1
        _desk.logs += [log] if log is not None else []
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        with _desk.lock:
            _desk.watchers -= 1
            if log is not None:
                _desk.logs.remove(log)


class bar(Generic[T]):
    """How far the work is: a tqdm bar on a terminal, elsewhere what `watched` says every 30 s.

    Parameters
    ----------
    iterable, total, desc, unit, leave
        As for tqdm; ``update``, ``close``, iteration and ``with`` work as there.
    show : bool
        False shows no bar.
    """

    def __init__(
        self, iterable: Iterable[T] | None = None, *, total: float | None = None, desc: str = "", unit: str = "it",
        show: bool = True, leave: bool = True,
    ) -> None:  # fmt: skip
        self.iterable, self.desc, self.n, self.start = iterable, desc, 0.0, time.monotonic()
        self.total = len(iterable) if total is None and isinstance(iterable, Sized) else total
        self.shown: Any = None
        if show and not _desk.muted and sys.stderr.isatty():
            from tqdm.auto import tqdm

            self.shown = tqdm(total=self.total, desc=desc, unit=unit, unit_scale=unit == "token", leave=leave)
        with _desk.lock:
            _desk.bars.append(self)

    def __str__(self) -> str:
        if not self.total:
            return f"{self.desc} {self.n:,.0f}"
        spent = time.monotonic() - self.start
        left = f", about {span(spent / self.n * (self.total - self.n))} left" if self.n else ""
        return f"{self.desc} {self.n:,.0f} of {self.total:,.0f}{left}"

    def __iter__(self) -> Iterator[T]:
        try:
            for item in self.iterable or ():
                yield item
                self.update()
        finally:
            self.close()

    def update(self, n: float = 1) -> None:
        """So much more is done."""
        self.n += n
        if self.shown is not None:
            self.shown.update(n)

    def close(self) -> None:
        """The work is over."""
        with _desk.lock:
            if any(b is self for b in _desk.bars):
                _desk.bars.remove(self)
        if self.shown is not None:
            self.shown.close()

    def __enter__(self) -> bar[T]:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def seconds_of(value: float | str) -> float:
    """A time as people type it, in seconds: ``90``, ``"45s"``, ``"10m"``, ``"1.5h"``, ``"1h30m"``.

    Raises
    ------
    InputError
        If it is none, or not above 0.
    """
    text = str(value).strip().lower()
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*(h|min|m|s|)", text)
    factor = {"h": 3600.0, "m": 60.0, "min": 60.0, "s": 1.0, "": 1.0}
    found = sum(float(number) * factor[unit] for number, unit in parts)
    if not re.fullmatch(r"(?:\d+(?:\.\d+)?\s*(?:h|min|m|s|)\s*)+", text) or not 0 < found < 1e9:
        raise InputError(f"budget={value!r} is no time: give seconds, or such as '45s', '10m', '1h30m'")
    return found

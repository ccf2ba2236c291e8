"""A study that several ranks write: each its own shards, every one of which is what a single process would write.

::

    study/
      manifest.json, runs.jsonl, shards/    as always
      ranks/                 while shards are missing
        job.json             how many ranks there are, and how they read
        1-of-4/SHA256SUMS    the shards that this rank has finished

Rank r of n takes every n-th shard. Ranks need not talk: the last one to finish writes the ``SHA256SUMS`` of the whole
and removes ``ranks/``. What is finished counts, whoever made it: another number of ranks, or one process, goes on.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmbrain._files import (
    FileError,
    clear_errors,
    owner,
    read_json,
    read_sums,
    remove_folder,
    replace_sums,
    write_json,
)
from llmbrain._validation import InputError, check_whole
from llmbrain.distributed import ALONE, Ranks, ranks

RANKS, JOB = "ranks", "job.json"
SEEN = 3.0  # seconds that a file of one machine may take to be seen by another
_taken: list[tuple[int, int]] = []


@dataclass(frozen=True)
class Share:
    """Which shards a process makes.

    Attributes
    ----------
    rank, size : int
        This is rank `rank` of `size`.
    team : Ranks
        The process group, where ranks talk to each other.
    """

    rank: int = 0
    size: int = 1
    team: Ranks = ALONE

    @classmethod
    def now(cls) -> Share:
        """The share of this process: as `taking` says, or its place in a process group."""
        team = ranks()
        if not _taken:
            return cls(team.rank, team.size, team)
        if team.size > 1:
            raise InputError(f"rank={_taken[-1][0]}, of={_taken[-1][1]}: this process has a rank already, {team!r}")
        return cls(*_taken[-1])

    @classmethod
    def together(cls) -> Share:
        """All ranks make every shard together, as a model that is spread over them does; rank 0 writes."""
        here = cls.now()
        if here.team is ALONE and here.size > 1:
            raise InputError(
                f"rank={here.rank}, of={here.size}: a model that is spread over ranks is read by all of them"
            )
        return cls(0, 1, here.team)

    def mine(self, n: int) -> range:
        """Which of n shards."""
        return range(self.rank, n, self.size)

    def folder(self, study: Path) -> Path:
        """Where the checksums of finished shards stand until the study is whole."""
        return study if self.size == 1 else study / RANKS / f"{self.rank}-of-{self.size}"

    @contextmanager
    def owning(self, study: str | Path) -> Iterator[None]:
        """Own a study, alone or together with the other ranks; no rank twice."""
        if self.size == 1:
            with owner(study) if self.team.leads else nullcontext():
                yield
            return
        with owner(study, among=self.size), owner(self.folder(Path(study))):
            yield

    def meet_at(self, study: Path) -> None:
        """See that all ranks of a process group have the folder of rank 0, not one of that name on their own disks.

        Raises
        ------
        InputError
            If this rank has another.
        """
        if self.team.size == 1:
            return
        sign = study / RANKS / f"sign-{self.team.told('scan: folder', lambda: secrets.token_hex(8))}"
        try:
            if self.team.leads:
                with clear_errors(study):
                    sign.parent.mkdir(exist_ok=True)
                    sign.touch()
            self.team.meet("scan: sign")
            until = time.monotonic() + SEEN
            while not (seen := sign.exists()) and time.monotonic() < until:
                time.sleep(SEEN / 20)
            self.team.meet("scan: seen")
        finally:
            if self.team.leads:
                sign.unlink(missing_ok=True)
        if not seen:
            raise InputError(
                f"out={str(study)!r}: rank {self.team.rank} does not see what rank 0 wrote there: give a folder that "
                "all machines share, or scan with --rank and --of on each and join the folders with llmbrain merge"
            )

    def note(self, study: Path, done: int, **how: Any) -> None:
        """Write down how ranks read; those that go on, of however many, must read alike.

        Raises
        ------
        InputError
            If they do not.
        """
        before = how_read(study) if self.team.leads else {}
        if before and done:
            _check_alike(study, before, how)
        record = {"of": self.size, **how}
        if self.size > 1 and self.team.leads and before != record:
            write_json(study / RANKS / JOB, record)

    def check(self, study: Path, **how: Any) -> None:
        """The same once more, before a shard is written: ranks that do not talk may have begun at the same time."""
        if self.size > 1 and self.team is ALONE:
            _check_alike(study, how_read(study), how)


@contextmanager
def taking(rank: int, of: int) -> Iterator[None]:
    """Within the block `scan` makes the shards of one rank of several that need not talk to each other.

    As in an array of batch jobs. They write into one folder, or each into its own, which `merge` joins.

    Parameters
    ----------
    rank : int
        From 0.
    of : int
        How many ranks there are.

    Raises
    ------
    InputError
        If there is no such rank.
    """
    check_whole("of", of, 1)
    if check_whole("rank", rank, 0) >= of:
        raise InputError(f"rank={rank} of={of}: ranks are counted from 0, the last is {of - 1}")
    _taken.append((int(rank), int(of)))
    try:
        yield
    finally:
        _taken.pop()


def known_sums(study: Path) -> dict[str, str]:
    """Checksums of all shards that were finished, by whichever rank.

    Those of ranks are read first: another one may just settle the study, and remove them when it has written its own.
    """
    of_ranks = [read_sums(part, strict=False) for part in sorted((study / RANKS).glob("*-of-*"))]
    sums = read_sums(study, strict=False)
    for part in of_ranks:
        sums |= part
    return sums


def how_read(study: Path) -> dict[str, Any]:
    """How the ranks that write a study read, and how many there are; empty where that is not known."""
    try:
        return read_json(study / RANKS / JOB)
    except FileNotFoundError:
        return {}


def _check_alike(study: Path, before: Mapping[str, Any], how: Mapping[str, Any]) -> None:
    for name, value in how.items():
        if name in before and before[name] != value:
            raise InputError(
                f"out={str(study)!r}: {name}={value!r}, but the ranks that wrote there had {before[name]!r}: all ranks "
                "must read alike"
            )


def say_missing(study: Path, missing: Sequence[int]) -> str:
    """Whose the missing shards are, where several ranks write the study: `` (those of rank 1 of 4)``, or nothing."""
    size = None
    with suppress(InputError):
        size = how_read(study).get("of")
    if not isinstance(size, int) or size < 2:
        return ""
    who = sorted({index % size for index in missing})
    return f" (those of rank{'s' if len(who) > 1 else ''} {', '.join(map(str, who))} of {size})"


def settle_ranks(study: Path, names: Sequence[str], sums: Mapping[str, str]) -> None:
    """Make a study that is whole what a single process leaves."""
    replace_sums(study, {name: sums[name] for name in names})
    with suppress(FileError):
        if (study / RANKS).is_dir():
            remove_folder(study / RANKS)

"""Praat TextGrids, long and short: both hold the same values in the same order."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from llmbrain._validation import InputError
from llmbrain.brains.plain import read_plain

SILENCE = {
    "", "sp", "sil", "spn", "<sil>", "<p>", "<s>", "</s>", "<eps>", "{sl}", "{ns}", "{lg}", "{br}", "#", "-",
    "silence", "pau",
}  # fmt: skip
WORD_TIERS = ("word", "words")
_NUMBER = re.compile(r"[-+]?(\d+([.,]\d*)?|[.,]\d+)([eE][-+]?\d+)?")
# Praat reads quoted text, flags and free-standing numbers; "!" opens a comment; the rest is for people.
_PIECES = re.compile(r'!([^\n]*)|"((?:[^"]|"")*)"|<(\w+)>|([^\s"=!<]+)')


@dataclass
class Tier:
    """One interval tier."""

    name: str
    intervals: list[tuple[float, float, str]]


def read_textgrid(path: Path, tier: str | None = None) -> pd.DataFrame:
    """Words of one interval tier, without silences: ``word``, ``onset``, ``offset`` in seconds.

    Parameters
    ----------
    path : Path
    tier : str, optional
        Name of the tier, or its number as Praat shows it (from 1, point tiers counted). Default: the one called word or
        words, else the only interval tier.

    Raises
    ------
    InputError
        If the file is no TextGrid, is cut off, or the tier is missing or not the only one of its name.
    """
    tiers = _tiers(path)
    intervals = {number: found for number, found in tiers.items() if found is not None}
    if not intervals:
        raise InputError(f"words: there is no interval tier in {path.name}")
    chosen = _choose(intervals, tier, path.name)
    rows = [(word, a, b) for a, b, word in chosen.intervals if word.lower() not in SILENCE]
    return pd.DataFrame(rows, columns=["word", "onset", "offset"])


def _choose(tiers: dict[int, Tier], tier: str | None, file: str) -> Tier:
    if tier is not None:
        named = {number: t for number, t in tiers.items() if t.name == tier}
        if not named and tier.isdigit() and int(tier) in tiers:
            return tiers[int(tier)]
    else:
        named = {number: t for number, t in tiers.items() if t.name.strip().lower() in WORD_TIERS}
        if not named and len(tiers) == 1:
            named = tiers
    if not named:
        raise InputError(f"tier={tier!r}: {file} has the interval tiers {[t.name for t in tiers.values()]}")
    first, *others = named.values()
    if any(other.intervals != first.intervals for other in others):
        listed = ", ".join(f"{number}: {t.name!r}" for number, t in named.items())
        raise InputError(
            f"tier={tier!r}: {file} has {len(named)} such tiers ({listed}): choose one by its number, as "
            f"tier='{next(iter(named))}' (--tier {next(iter(named))})"
        )
    return first


def _tiers(path: Path) -> dict[int, Tier | None]:
    """Tiers by number; None for a tier of points."""
    if path.read_bytes()[:12] == b"ooBinaryFile":
        raise InputError(f"words: {path.name} is a binary Praat file: save it as text")
    text = read_plain(path, "words")
    values: list[tuple[str, str]] = []
    for match in _PIECES.finditer(text):
        _, quoted, flag, word = match.groups()
        if quoted is not None:
            values.append(("text", quoted.replace('""', '"')))
        elif flag is not None:
            values.append(("flag", flag))
        elif word is not None and _NUMBER.fullmatch(word):
            values.append(("number", word.replace(",", ".")))
    if not values or values[0][0] != "text" or not values[0][1].startswith("ooTextFile"):
        raise InputError(f"words: {path.name} is not a Praat text file: its first line is {text.split(chr(10))[:1]}")
    if len(values) < 2 or not values[1][1].startswith("TextGrid"):
        raise InputError(f"words: {path.name} holds a Praat {values[1:2]}, not a TextGrid")
    at = 2

    def take(kind: str, where: str) -> str:
        nonlocal at
        if at >= len(values):
            raise InputError(f"words: {path.name} ends earlier than it says: {where} is missing")
        found, value = values[at]
        if found != kind:
            raise InputError(f"words: {path.name}: {where} should be a {kind}, it is {value!r}")
        at += 1
        return value

    for where in ("its start", "its end"):
        take("number", where)
    tiers: dict[int, Tier | None] = {}
    if take("flag", "<exists>") != "exists":
        return tiers
    for number in range(1, int(float(take("number", "the number of tiers"))) + 1):
        kind, name = take("text", f"the kind of tier {number}"), take("text", f"the name of tier {number}")
        for _ in range(2):
            take("number", f"a time of tier {name!r}")
        count = int(float(take("number", f"the size of tier {name!r}")))
        if kind not in ("IntervalTier", "TextTier"):
            raise InputError(f"words: {path.name}: tier {name!r} is a {kind}: IntervalTier or TextTier is expected")
        intervals = []
        for i in range(1, count + 1):
            where = f"interval {i} of {count} of tier {name!r}"
            start = float(take("number", f"a time of {where}"))
            end = float(take("number", f"a time of {where}")) if kind == "IntervalTier" else start
            intervals.append((start, end, take("text", f"the label of {where}").strip()))
        tiers[number] = Tier(name, intervals) if kind == "IntervalTier" else None
    return tiers

"""Settings that fit a time: what is given up, one step after the other, until the job fits."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

from llmbrain._progress import span
from llmbrain._validation import InputError
from llmbrain.study.cost import OWN, Cost, plan_passes
from llmbrain.study.settings import Settings

LITTLE = 0.01  # of the time: what saves less is not given up
SAFE = 0.8  # share of the time that may be planned: machines are not always idle
AS_MUCH = "as much as is given"
LADDER: tuple[tuple[str, Any], ...] = (
    ("eval_tokens", 16384), ("passes", 12.0), ("n_tokens", 16384), ("passes", 6.0), ("eval_tokens", 8192),
    ("n_tokens", 8192), ("method", "obs-gradient"), ("self_text", AS_MUCH), ("eval_tokens", 4096), ("method", "flap"),
    ("n_tokens", 4096), ("self_text", 0), ("eval_tokens", 2048), ("n_tokens", 2048), ("n_tokens", 1024),
    ("eval_tokens", 1024), ("n_tokens", 512),
)  # fmt: skip
"""What is given up first: exactness of the perplexities, then of the search, then text, then the method."""


def fit(
    seconds: float,
    how: Settings,
    cost: Callable[[Settings], Cost],
    *,
    pinned: Collection[str] = (),
    least: int = 1,
    ends: tuple[int, ...] = (),
    window: int = 1,
) -> tuple[Settings, list[str]]:
    """Settings whose cost fits a time, and what was given up for it.

    Parameters
    ----------
    seconds : float
    how : Settings
        What is wanted.
    cost : callable
        Cost of settings, with a measured time.
    pinned : names
        Settings that were asked for, and stay.
    least : int
        Tokens that calibration needs.
    ends : tuple of int
        Layers that the method protects by itself: another one goes on doing so.
    window : int
        Tokens of a window of text that the model writes.

    Raises
    ------
    InputError
        If nothing fits: the message says how long the least takes.
    """
    gave_up: dict[str, str] = {}  # by setting: once each, from what was wanted to what it is
    wanted = how
    for name, value in LADDER:
        if (cost(how).seconds or 0.0) <= SAFE * seconds:
            return how, list(gave_up.values())
        if name in pinned or (name == "n_tokens" and value < least):
            continue
        if value == AS_MUCH:
            value = -(-(how.n_tokens or 0) // window)
        changed = _smaller(how, name, value, pinned, ends)
        if changed is not None and (cost(how).seconds or 0.0) - (cost(changed).seconds or 0.0) > LITTLE * seconds:
            gave_up[name] = _line(wanted, name, value)
            how = changed
    needed = cost(how).seconds or 0.0
    if needed <= SAFE * seconds:
        return how, list(gave_up.values())
    raise InputError(
        f"budget={span(seconds)!r} is too small: the least that can be done here (method {how.method}, {how.n_tokens} "
        f"tokens of text) takes about {span(needed / SAFE)}; give at least that, or fewer things to do"
    )


def _line(wanted: Settings, name: str, value: Any) -> str:
    """What was wanted, and what it is."""
    words = {"eval_tokens": "tokens for the perplexities", "n_tokens": "tokens of calibration text",
             "self_text": "text that the model writes itself"}  # fmt: skip
    before = getattr(wanted, name)
    shown = f"{before:,.0f}" if isinstance(before, (int, float)) else before or "all"
    now = f"{value:,.0f}" if isinstance(value, (int, float)) else value
    if name == "self_text":
        shown, now = f"{OWN} times as much as is given", AS_MUCH if value else "none"
    return f"{words.get(name, name)}: {now} instead of {shown}"


def given_up(wanted: Settings, how: Settings) -> list[str]:
    """What `fit` said of the same settings when they were chosen, in the order of `LADDER`."""
    names = dict.fromkeys(name for name, _ in LADDER)
    return [_line(wanted, name, getattr(how, name)) for name in names if getattr(how, name) != getattr(wanted, name)]


def _smaller(how: Settings, name: str, value: Any, pinned: Collection[str], ends: tuple[int, ...]) -> Settings | None:
    """The settings with less of one thing; None where that is no less."""
    if name == "method":
        if "allocation" in pinned or how.forget or how.keep or how.expert_ratio is not None:
            return None
        drop = how.drop or ()
        now = plan_passes(how.method, how.allocation, how.passes, drop=drop)
        fewer = plan_passes(value, None, how.passes, drop=drop) < now
        protect = (ends or None) if how.protect is None and "protect" not in pinned else how.protect
        return replace(how, method=value, allocation=None, protect=protect) if fewer else None
    before = getattr(how, name)
    if name == "passes" and not how.drop:
        if how.allocation not in (None, "search", "sensitivity"):
            return None
        if how.allocation is None and how.method != "networks":
            return None
    return replace(how, **{name: value}) if before is None or value < before else None

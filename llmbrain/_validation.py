"""Checks shared by every room: one wording for bad input, optional packages and devices."""

from __future__ import annotations

import importlib
import operator
import secrets
import sys
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch


MANY = 10_000_000
LARGEST = 2**63  # whole numbers from here on fit no array


class InputError(ValueError):
    """What the user passed cannot be used; the message names the parameter, its value and what is allowed."""


def shown(value: object) -> str:
    """A value as messages quote it: one line, and not a long one."""
    said = " ".join(repr(value).split())
    return said if len(said) <= 200 else f"{said[:200]}..."


def check_option(name: str, value: Any, allowed: Iterable[Any]) -> Any:
    """Return `value` if it is one of `allowed`, else raise `InputError` naming all three."""
    options = list(allowed)
    if getattr(value, "ndim", 0) or value not in options:
        raise InputError(f"{name}={shown(value)} is not known: allowed are {', '.join(map(repr, options))}")
    return value


def check_range(
    name: str,
    value: float,
    low: float | None = None,
    high: float | None = None,
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> float:
    """Return `value` if it is a finite number within the given bounds, else raise `InputError`."""
    number = isinstance(value, (int, float)) or (hasattr(value, "__float__") and getattr(value, "ndim", 0) == 0)
    inside = number and not isinstance(value, bool) and value == value and abs(value) <= sys.float_info.max
    if inside and low is not None:
        inside = value > low if open_low else value >= low
    if inside and high is not None:
        inside = value < high if open_high else value <= high
    if not inside:
        left = "(-inf" if low is None else f"{'(' if open_low else '['}{low}"
        right = "inf)" if high is None else f"{high}{')' if open_high else ']'}"
        raise InputError(f"{name}={shown(value)} must be a number in {left}, {right}")
    return value


def seed_of(random_state: Any) -> int:
    """A seed from what users give: a whole number is itself, a generator draws one, None draws a fresh one.

    Parameters
    ----------
    random_state : int, None, numpy.random.Generator or numpy.random.RandomState

    Raises
    ------
    InputError
        If it is anything else, below 0, or 2**32 and more.
    """
    if random_state is None:
        return secrets.randbits(31)
    if hasattr(random_state, "integers"):
        return int(random_state.integers(2**31))
    if hasattr(random_state, "randint"):
        return int(random_state.randint(2**31 - 1))
    number = hasattr(random_state, "__index__") and not isinstance(random_state, bool)
    if not number or getattr(random_state, "shape", None) or not 0 <= random_state < 2**32:
        raise InputError(
            f"random_state={shown(random_state)} must be a whole number of at least 0 and below 2**32, a numpy "
            "generator, or None"
        )
    return int(random_state)


def legacy_generator(random_state: Any) -> np.random.RandomState:
    """What scikit-learn's algorithms draw from, of all that `seed_of` takes; a `RandomState` is itself."""
    import numpy as np

    return (
        random_state
        if isinstance(random_state, np.random.RandomState)
        else np.random.RandomState(seed_of(random_state))
    )


def check_whole(name: str, value: object, low: int | None = None, high: int | None = None) -> int:
    """Return `value` as an int if it is a whole number (no bool, no 1.9) within the given bounds."""
    try:
        number, whole = operator.index(value), not isinstance(value, bool)  # type: ignore[arg-type]
    except TypeError:
        number, whole = 0, False
    whole = whole and abs(number) < LARGEST
    if not whole or (low is not None and number < low) or (high is not None and number > high):
        bounds = f"{'' if low is None else f', at least {low}'}{'' if high is None else f', at most {high}'}"
        raise InputError(f"{name}={shown(value)} must be a whole number{bounds}")
    return number


def check_names(name: str, value: object) -> tuple[str, ...]:
    """Names as a tuple, each once: one alone, or several; None is none."""
    if value is None or isinstance(value, str):
        return () if value is None else (value,)
    given = list(value) if isinstance(value, Iterable) and not isinstance(value, (bytes, Mapping)) else [None]
    names = [item for item in given if isinstance(item, str)]
    if len(names) < len(given):
        raise InputError(f"{name}={shown(value)} must be a name, or a list of names")
    return tuple(dict.fromkeys(names))


def numbers(name: str, values: Any) -> list[Any]:
    """A list of what should be numbers, each of which is still to be checked; one number alone is no list."""
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable) or getattr(values, "ndim", 1) != 1:
        raise InputError(f"{name}={shown(values)} must be a list of numbers")
    return list(values)


def check_count(name: str, value: object, low: int = 0) -> int:
    """`check_whole` of how often something is done: beyond `MANY` times no one would see the end."""
    return check_whole(name, value, low, MANY)


def soft_import(module: str, extra: str, purpose: str) -> ModuleType:
    """Import an optional package, or say which extra of llmbrain installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"{purpose} needs {module.split('.')[0]}: pip install 'llmbrain[{extra}]'") from error


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """Turn ``"auto"`` into CUDA when it is there, else CPU; any other name is checked by torch."""
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"device={device!r} is not a device: use 'auto', 'cpu', 'cuda' or 'cuda:0'") from error
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device={device!r} was asked for, but torch {torch.__version__} sees no CUDA device")
    return resolved

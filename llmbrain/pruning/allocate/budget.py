"""What an allocation must respect: the exact budget, no empty layer, none of the protected ones cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmbrain._validation import InputError, check_range, check_whole, numbers


@dataclass(frozen=True)
class Budget:
    """What an allocation must respect.

    Attributes
    ----------
    widths : tuple of int
        Units a layer before.
    keep : int
        Units that stay in all layers together.
    protect : tuple of int
        Layers that keep all.
    multiple_of : int
        Widths of cut layers are multiples of it.
    """

    widths: tuple[int, ...]
    keep: int
    protect: tuple[int, ...] = ()
    multiple_of: int = 1

    @classmethod
    def of(
        cls,
        widths: Sequence[int],
        ratio: float,
        protect: Sequence[int] = (),
        multiple_of: int = 1,
        *,
        name: str = "ratio",
    ) -> Budget:
        """The budget of a share `ratio` removed; `name` is what errors call it.

        Raises
        ------
        InputError
            If the ratio is outside (0, 1), or what may be cut is too little for it.
        """
        check_range(name, ratio, 0, 1, open_low=True, open_high=True)
        check_multiple(multiple_of)
        total = sum(widths)
        budget = cls(tuple(widths), total - round(ratio * total), tuple(protect), int(multiple_of))
        low, high = budget.low.sum(), budget.high.sum()
        if not low <= budget.keep:
            raise InputError(
                f"{name}={ratio} leaves {budget.keep} of {total} units, but {low} must stay (protect={list(protect)}, "
                f"multiple_of={multiple_of}, at least one unit a layer): the largest ratio is {1 - low / total:.3f}"
            )
        return budget if budget.keep <= high else cls(budget.widths, int(high), budget.protect, budget.multiple_of)

    @property
    def low(self) -> NDArray[np.int64]:
        """Least units a layer must keep; one narrower than `multiple_of` keeps all."""
        w = np.array(self.widths)
        return np.where(self.fixed, w, np.minimum(w, self.multiple_of))

    @property
    def high(self) -> NDArray[np.int64]:
        """Most units a layer may keep; a width that is no multiple may stay whole."""
        return np.array(self.widths)

    @property
    def fixed(self) -> NDArray[np.bool_]:
        """Layers that keep all."""
        w = np.array(self.widths)
        return np.isin(np.arange(len(w)), self.protect) | (w < self.multiple_of)

    def fit(self, wanted: ArrayLike) -> tuple[int, ...]:
        """Whole widths nearest to the wanted ones that use up the budget.

        The sum is `keep` exactly; with `multiple_of` it is the largest reachable sum that does not exceed it.
        """
        wanted = np.asarray(wanted, dtype=float)
        low, high, m = self.low, self.high, self.multiple_of
        free = np.flatnonzero(~self.fixed)
        widths = high.copy()
        widths[free] = np.clip(np.floor(wanted[free] / m) * m, low[free], high[free] // m * m).astype(int)
        while True:  # one step a turn: give to the layer that lacks most, or take from the one that has most too much
            spare = self.keep - int(widths.sum())
            lack = wanted - widths
            if spare >= m and (room := free[widths[free] + m <= high[free]]).size:
                times = max(1, spare // (m * room.size) // 2)
                order = room[np.argsort(-lack[room], kind="stable")][: max(1, min(room.size, spare // (m * times)))]
                widths[order] = np.minimum(widths[order] + m * times, high[order] // m * m)
            elif spare < 0 and (room := free[widths[free] - m >= low[free]]).size:
                widths[room[np.argmin(lack[room])]] -= m
            else:
                return tuple(int(w) for w in widths)


def check_multiple(multiple_of: int) -> None:
    """Refuse what is no whole number, or below 1."""
    check_whole("multiple_of", multiple_of, 1)
    if multiple_of != int(multiple_of):
        raise InputError(f"multiple_of={multiple_of!r} must be a whole number, at least 1")


def given_widths(
    allocation: Sequence[int],
    widths: Sequence[int],
    ratio: float | None,
    protect: Sequence[int] = (),
    multiple_of: int = 1,
    *,
    whole: bool = False,
) -> tuple[int, ...]:
    """Widths that the user wrote down, where they are those of a cut that `ratio`, `protect` and `multiple_of` allow.

    Parameters
    ----------
    allocation : sequence of int
        One a layer.
    widths : sequence of int
        Before.
    ratio : float, optional
        Share that they must remove, up to the rounding of each layer's width.
    whole : bool
        Whether they may remove nothing.

    Raises
    ------
    InputError
        Naming the layer, or the ratio that would fit.
    """
    given: Sequence[int] = numbers("allocation", allocation)
    if len(given) != len(widths) or any(
        isinstance(w, bool) or not isinstance(w, Integral) or not 1 <= w <= b for w, b in zip(given, widths)
    ):
        raise InputError(f"allocation={given} must give each layer 1 to {list(widths)} neurons, in whole numbers")
    check_multiple(multiple_of)
    for i, (width, before) in enumerate(zip(given, widths)):
        if i in protect and width != before:
            raise InputError(f"allocation={given} cuts layer {i} to {width} neurons, but protect={list(protect)}")
        if width % multiple_of and width != before:
            raise InputError(f"allocation={given}: {width} neurons of layer {i} are no multiple_of={multiple_of}")
    if sum(given) == sum(widths) and not whole:
        raise InputError(f"allocation={given} removes nothing")
    if ratio is not None:
        check_range("ratio", ratio, 0, 1, open_low=True, open_high=True)
        keep = sum(widths) - round(ratio * sum(widths))
        if abs(sum(given) - keep) > max(0, multiple_of * len(given) - 1) / 2:
            raise InputError(
                f"allocation={given} keeps {sum(given)} of {sum(widths)} neurons, ratio={ratio} asks for {keep}: leave "
                f"ratio away (it would be {1 - sum(given) / sum(widths):.4f}), or give other widths"
            )
    return tuple(int(w) for w in given)

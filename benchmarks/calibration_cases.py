"""What `calibration.py` runs: a test of the package under its null hypothesis, and the situations it is run in.

`register` adds a case, from the files beside or from outside.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Cell = Mapping[str, object]
Draw = Callable[..., float]


@dataclass(frozen=True)
class Case:
    """A test under its null hypothesis.

    Attributes
    ----------
    name : str
        What is tested, as the table calls it.
    draw : callable ``(rng, **cell) -> p``
        Makes data in which there is nothing to find; the smallest corrected p, where the test has several.
    cells : list of mapping
        Situations.
    note : str
        What the table says about it.
    at_most : bool
        Whether only too many findings count: for what is no p, such as a number of components.
    """

    name: str
    draw: Draw
    cells: Sequence[Cell]
    note: str = ""
    at_most: bool = False


CASES: dict[str, Case] = {}


def register(name: str, note: str = "", *, at_most: bool = False, **grid: Sequence[object]) -> Callable[[Draw], Draw]:
    """Add a case; every combination of the values in `grid` is a cell."""

    def add(draw: Draw) -> Draw:
        cells = [dict(zip(grid, values)) for values in itertools.product(*grid.values())]
        CASES[name] = Case(name, draw, cells, note, at_most)
        return draw

    return add

"""The rows: what is pruned how, and in which order they are worth measuring."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

ENDS = "ends kept"  # the first 3 and last 2 layers are not cut
LORA = "10 steps of LoRA"


@dataclass(frozen=True)
class Row:
    """One way to prune.

    Attributes
    ----------
    method : str
        Of `plan_pruning`, or ``"nothing"`` to cut.
    widths_of : str, optional
        Take the widths that another method's plan gives.
    own : str
        Text that the model writes: ``""`` none, ``"half"`` of the calibration tokens, ``"beside"`` half as many more,
        ``"as much"`` as many more (what `run` does by default with deep models), ``"twice"`` as many, ``"only"``.
    balance : float
        How much tokens that networks leave unexplained count more (``token_balance``; by default 0 with deep models).
    propagation : float
        Share of the error of earlier layers that a repair takes on (by default .5 with deep models).
    spare : str
        Of the neurons that are chosen, those of massive activation (``"massive"``: over 1,000 times the median of their
        layer) stay, or as many others of the same layers (``"others"``), the control of that.
    tune : int
        Steps of LoRA afterwards, on 256 windows of the calibration text.
    quick : bool
        Whether ``--quick`` measures it.
    draws : bool
        Whether it is measured with every draw of calibration text.
    sizes : bool
        Whether it is measured with less and more calibration text.
    """

    label: str
    method: str
    allocation: str | None = None
    compensate: str | None = "least-squares"
    networks: str | None = None
    ends: bool = False
    widths_of: str | None = None
    own: str = ""
    balance: float = 0.5
    propagation: float = 0.0
    spare: str = ""
    tune: int = 0
    quick: bool = False
    draws: bool = False
    sizes: bool = False


def _uniform(label: str, method: str, compensate: str | None = "least-squares") -> Row:
    return Row(label, method, "uniform", compensate)


DEFAULT = Row(
    "ours, as by default: networks covered, ends kept, twice as much own text, errors propagated", "networks",
    "uniform", networks="real", ends=True, own="twice", balance=0.0, propagation=0.5, draws=True, sizes=True,
)  # fmt: skip
UNIFORM = Row(
    "ours, uniform: OBS with gradients, ends kept, own text beside", "obs-gradient", "uniform", ends=True, own="beside",
    quick=True, draws=True, sizes=True,
)  # fmt: skip
FLAP = Row("FLAP, uniform", "flap", "uniform", quick=True, draws=True)
FLAP_ENDS = replace(FLAP, label=f"FLAP, uniform, {ENDS}", ends=True, sizes=True)
OBS = Row("OBS with gradients, uniform", "obs-gradient", "uniform")
PUBLISHED = Row("published rule", "published", quick=True, draws=True)
ROWS = (
    DEFAULT,
    replace(DEFAULT, label="the same without networks", method="obs-gradient", networks=None),
    replace(DEFAULT, label="the same with phase-randomized networks", networks="null", draws=False, sizes=False),
    replace(DEFAULT, label="the same, tokens balanced by networks", balance=0.5),
    replace(DEFAULT, label="the same, tokens balanced by phase-randomized networks", networks="null", balance=0.5),
    replace(DEFAULT, label="the same by FLAP", method="flap", networks=None),
    replace(DEFAULT, label="the same with random neurons", method="random", networks=None),
    replace(DEFAULT, label="the same, widths by measured sensitivity", allocation="sensitivity", draws=False,
            sizes=False),
    replace(DEFAULT, label="the same, widths by measured sensitivity, ends too", allocation="sensitivity", ends=False,
            draws=False, sizes=False),
    replace(DEFAULT, label="the same, widths searched", allocation="search", draws=False, sizes=False),
    replace(DEFAULT, label="the same, cut only", compensate=None, propagation=0.0, draws=False, sizes=False),
    replace(DEFAULT, label="the same by FLAP, cut only", method="flap", networks=None, compensate=None, propagation=0.0,
            draws=False, sizes=False),
    replace(DEFAULT, label=f"the same, then {LORA}", tune=10, draws=False, sizes=False),
    replace(FLAP_ENDS, label=f"FLAP, uniform, {ENDS}, then {LORA}", tune=10, quick=False, draws=False, sizes=False),
    Row(f"nothing removed, {LORA}", "nothing", compensate=None, tune=10),
    UNIFORM,
    replace(UNIFORM, label="ours, uniform, as much own text", own="as much", quick=False),
    replace(UNIFORM, label="ours, uniform, with networks, twice as much own text", method="networks", networks="real",
            own="twice", quick=False, draws=False),
    replace(UNIFORM, label="ours, uniform, with networks", method="networks", networks="real", quick=False),
    replace(UNIFORM, label="ours, uniform, with phase-randomized networks", method="networks", networks="null",
            quick=False, sizes=False),
    replace(FLAP_ENDS, label=f"FLAP, uniform, {ENDS}, own text beside", own="beside"),
    replace(FLAP_ENDS, label=f"FLAP, uniform, {ENDS}, as much own text", own="as much", draws=False, sizes=False),
    FLAP_ENDS,
    Row("FLAP at the published rule's widths", "flap", widths_of="published", quick=True, draws=True, sizes=True),
    PUBLISHED,
    Row("random at the published rule's widths", "random", widths_of="published", quick=True, draws=True),
    replace(PUBLISHED, label="published rule, cut only", compensate=None),
    Row("FLAP, global", "flap", "global", quick=True, draws=True),
    FLAP,
    Row("random, uniform", "random", "uniform", quick=True, draws=True),
    Row("random, uniform, massive neurons kept", "random", "uniform", spare="massive", draws=True),
    Row("random, uniform, as many others kept", "random", "uniform", spare="others", draws=True),
    Row(f"random, uniform, {ENDS}", "random", "uniform", ends=True, draws=True),
    replace(OBS, label=f"OBS with gradients, uniform, {ENDS}", ends=True, quick=True, draws=True, sizes=True),
    replace(OBS, label="OBS with gradients, global", allocation="global", quick=True, draws=True),
    Row("ours, global, nothing kept, with networks", "networks", "global", networks="real", draws=True),
    Row("ours, global, nothing kept, with phase-randomized networks", "networks", "global", networks="null"),
    replace(UNIFORM, label="ours, uniform, half own text", own="half", quick=False),
    replace(UNIFORM, label="ours, uniform, own text only", own="only", quick=False),
    replace(UNIFORM, label=f"OBS with gradients, global, {ENDS}, own text beside", allocation="global", quick=False,
            draws=False, sizes=False),
    replace(FLAP, label="FLAP, widths by measured sensitivity", allocation="sensitivity", quick=False, draws=False),
    replace(FLAP_ENDS, label=f"FLAP, global, {ENDS}", allocation="global", quick=False, draws=False, sizes=False),
    replace(FLAP_ENDS, label=f"FLAP, global, {ENDS}, own text beside", allocation="global", quick=False, draws=False,
            own="beside"),
    replace(OBS, label="OBS with gradients at the published rule's widths", allocation=None, widths_of="published"),
    OBS,
    _uniform("OBS, uniform", "obs"),
    _uniform("Wanda-sp, uniform", "wanda-sp"),
    _uniform("magnitude, uniform", "magnitude"),
    replace(FLAP, label="FLAP, uniform, bias only", compensate="bias", quick=False, draws=False),
    replace(FLAP, label="FLAP, uniform, cut only", compensate=None, quick=False, draws=False),
    _uniform("Wanda-sp, uniform, cut only", "wanda-sp", None),
    _uniform("magnitude, uniform, cut only", "magnitude", None),
    _uniform("random, uniform, cut only", "random", None),
    _uniform("OBS, uniform, cut only", "obs", None),
    _uniform("OBS with gradients, uniform, cut only", "obs-gradient", None),
    replace(UNIFORM, label="ours, uniform, cut only", compensate=None, quick=False, draws=False, sizes=False),
)  # fmt: skip


def written_beside(own: str, tokens: int) -> int:
    """Tokens that the model writes for a row with so many of calibration text."""
    return 2 * tokens if own == "twice" else tokens


@dataclass(frozen=True)
class Task:
    """A row at some ratios; what they share is done once."""

    row: Row
    tokens: int
    draw: int
    ratios: tuple[float, ...]

    @property
    def needs(self) -> tuple[tuple[str, int, int], ...]:
        """What must have been found before: kind, calibration tokens, draw."""
        kinds = [f"networks {self.row.networks}"] if self.row.networks else []
        kinds += ["published"] if "published" in (self.row.method, self.row.widths_of) else []
        found = [(kind, self.tokens, self.draw) for kind in kinds]
        return (*found, ("own", written_beside(self.row.own, self.tokens), self.draw)) if self.row.own else tuple(found)


def tasks(ratios: tuple[float, ...], draws: int, tokens: int, others: tuple[int, ...], main: float) -> Iterator[Task]:
    """All rows, the most valuable first: one ratio, then other sizes and draws of it, then the other ratios."""
    rest = tuple(r for r in ratios if r != main)
    if main in ratios:
        yield from (Task(row, tokens, 0, (main,)) for row in ROWS)
        yield from (Task(row, size, 0, (main,)) for size in others for row in ROWS if row.sizes)
        yield from (Task(row, tokens, draw, (main,)) for draw in range(1, draws) for row in ROWS if row.draws)
    yield from (Task(row, tokens, 0, rest) for row in ROWS if rest)
    yield from (Task(row, tokens, draw, rest) for draw in range(1, draws) for row in ROWS if row.draws and rest)
    yield from (Task(row, size, 0, rest) for size in others for row in ROWS if row.sizes and rest)

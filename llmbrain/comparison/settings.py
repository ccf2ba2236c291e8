"""What `compare` does with a story unless it is told otherwise; one table, of names, types and defaults."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias, TypedDict, cast

from numpy.typing import ArrayLike

from llmbrain._validation import InputError
from llmbrain.comparison.clock import WINDOWS
from llmbrain.stats.nulls import CORRECTIONS, NULLS

if TYPE_CHECKING:
    from nibabel.spatialimages import SpatialImage

    from llmbrain.brains.regions import Wanted
    from llmbrain.imaging.atlas import Labels

Path: TypeAlias = str | os.PathLike[str]


class Settings(TypedDict, total=False):
    """Keywords of `compare` that have a good default.

    Attributes
    ----------
    text : str or None
        The story as running text; default: the words of the table, joined by spaces.
    series : array ``(n_tokens, K)`` or None
        Time courses on the scan's tokens, in place of networks.
    columns, regions, atlas, atlas_labels, rois
        Passed on to `load_words` and `load_fmri`.
    isc : float or None
        Compare only the regions whose inter-subject correlation reaches this in every second listener, in the listeners
        that are left: a choice that has not seen what is tested.
    rule, aggregate, hrf, high_pass, drop
        See `align`; the brain gets the same filter. "offset", "mean", "spm", 128 s and no volume.
    window : {"stimulus", "all"}
        Leave out what comes before the first word (and 16 s more, while the response rises) and after the last one.
    null, n_permutations, correction
        See `couple`. "circular", all shifts, "max". Encoding models use at most 99 draws, 39 for more than 20 regions.
    run_length : int or None
        Group ICA finds networks in pieces of a longer story, of at most so many tokens; None never cuts. 2,048.
    encoding : bool or None
        Default: where himalaya is installed and the brain has at most 100 regions (each draw fits all of them again).
    """

    text: str | None
    series: ArrayLike | None
    columns: Mapping[str, str | int] | None
    regions: Sequence[str] | None
    atlas: Path | SpatialImage | None
    atlas_labels: Labels | None
    rois: Wanted | None
    isc: float | None
    rule: str
    aggregate: str
    hrf: str
    high_pass: float | None
    drop: int
    window: str
    null: str
    n_permutations: int | None
    correction: str
    run_length: int | None
    encoding: bool | None


class Tests(TypedDict):
    """How everything is tested."""

    null: str
    n_permutations: int | None
    correction: str
    random_state: int


DEFAULTS: Settings = {
    "text": None, "series": None, "columns": None, "regions": None, "atlas": None, "atlas_labels": None, "rois": None,
    "isc": None, "rule": "offset", "aggregate": "mean", "hrf": "spm", "high_pass": 128.0, "drop": 0,
    "window": WINDOWS[0], "null": NULLS[0], "n_permutations": None, "correction": CORRECTIONS[0],
    "run_length": 2048, "encoding": None,
}  # fmt: skip


def complete(given: Settings) -> Settings:
    """With the defaults of what is not given; a name that is not known is an error."""
    unknown = sorted(set(given) - set(DEFAULTS))
    if unknown:
        raise InputError(f"{unknown[0]}= is no setting of compare: allowed are {', '.join(DEFAULTS)}")
    return cast(Settings, {**DEFAULTS, **given})

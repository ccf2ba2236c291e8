"""The functional localizer of a brain: BIDS events in seconds, through the haemodynamic response."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from llmbrain._files import clear_damage
from llmbrain._validation import InputError, check_count, check_option
from llmbrain.brains.hrf import HRFS, hrf_weights
from llmbrain.brains.series import check_tr, cosine_basis
from llmbrain.networks.localizer import NOISE, PERMUTE, Design, Localizer, contrast_weights, find_responses
from llmbrain.scanning.inputs import Runs

if TYPE_CHECKING:
    from llmbrain.imaging.confounds import Confounds
    from llmbrain.networks.functional import FunctionalNetworks
    from llmbrain.scanning.inputs import RunLike

    Contrasts: TypeAlias = Mapping[str, str | Mapping[str, float]] | Sequence[str]

Array = NDArray[np.float64]
TICK = 0.1  # seconds between the sticks that make a boxcar
LONGEST = 1e6  # seconds, 11 days: what is more is no second
COLUMNS = 8192  # voxels that are tested at once


def read_events(events: pd.DataFrame | str | Path) -> pd.DataFrame:
    """A table of events: onset and duration in seconds, trial_type.

    Parameters
    ----------
    events : DataFrame or path
        BIDS ``*_events.tsv`` (or .csv). Rows without a trial_type are left out; a duration of ``n/a`` is 0.

    Raises
    ------
    InputError
        If a column is missing, an onset is no number, or nothing is left.
    """
    if isinstance(events, pd.DataFrame):
        table, name = events, "events"
    else:
        path = Path(events)
        if not path.is_file():
            raise FileNotFoundError(f"events: no file at {path}")
        separator = "," if path.suffix == ".csv" else "\t"
        with clear_damage(path, "a table of events"):
            table, name = pd.read_csv(path, sep=separator, na_values=["n/a"], keep_default_na=False), path.name
    missing = [column for column in ("onset", "duration", "trial_type") if column not in table.columns]
    if missing:
        raise InputError(f"events: {name} has no column {missing[0]!r}, but {list(table.columns)}")
    table = table[table["trial_type"].notna() & (table["trial_type"].astype(str) != "")]
    frame = pd.DataFrame({"trial_type": table["trial_type"].astype(str)})
    for column in ("onset", "duration"):
        frame[column] = pd.to_numeric(table[column], errors="coerce")
    frame["duration"] = frame["duration"].fillna(0.0)
    far = frame[["onset", "duration"]].abs().max(axis=1)
    if (far > LONGEST).any():
        row = int(np.argmax(far > LONGEST))
        raise InputError(f"events: {name}: row {row} says {far.iloc[row]:g}, and times are seconds, up to {LONGEST:g}")
    bad = frame["onset"].isna() | (frame["duration"] < 0)
    if bad.any() or frame.empty:
        row = int(np.argmax(bad)) if bad.any() else 0
        raise InputError(f"events: {name} has no event, or row {row} has no onset or a negative duration")
    return frame.reset_index(drop=True)


def brain_localizer(
    images: RunLike | Sequence[RunLike],
    events: pd.DataFrame | str | Path | Sequence[pd.DataFrame | str | Path],
    contrasts: Contrasts | None = None,
    *,
    mask: RunLike | None = None,
    networks: FunctionalNetworks | None = None,
    t_r: float | None = None,
    hrf: str = "spm",
    high_pass: float | None = 128.0,
    confounds: Sequence[Confounds] | None = None,
    noise_model: str = "ols",
    n_permutations: int = 200,
    permute: str = "shift",
    random_state: int | None = 0,
) -> Localizer:
    """Which voxels, parcels or networks of a brain respond to which condition: `localizer` for fMRI.

    Parameters
    ----------
    images : image, path, array ``(n_volumes, n_voxels)``, or a sequence of them
        Runs, as for `GroupICA.fit`.
    events : DataFrame or path, or a sequence of them
        One a run: see `read_events`. Times in seconds from the first volume.
    contrasts : as for `localizer`
    mask : NIfTI image or path, optional
        Brain mask, for images that are NIfTI.
    networks : FunctionalNetworks, optional
        Test their time courses (dual regression) in place of every voxel.
    t_r : float, optional
        Seconds; default what the headers say.
    hrf : {"spm", "glover"}
    high_pass : float or None
        Seconds; cosines in the design.
    confounds : sequence, optional
        One table a run, regressed out of it: as for `GroupICA.fit`.
    noise_model, n_permutations, permute, random_state
        As for `localizer`; conditions are shifted by at least 20 s.

    Returns
    -------
    Localizer
        ``to_networks()`` makes regions of it that save as images.

    Raises
    ------
    InputError
        If there is no TR, tables and runs differ in number, or no run can estimate a contrast.
    """
    check_option("hrf", hrf, HRFS)
    check_option("noise_model", noise_model, NOISE)
    check_option("permute", permute, PERMUTE)
    check_count("n_permutations", n_permutations, 0)
    runs = Runs(images, mask_img=mask, confounds=confounds)
    given = [events] if isinstance(events, (pd.DataFrame, str, Path)) else list(events)
    tables = [read_events(table) for table in given]
    if len(tables) != len(runs):
        raise InputError(f"events has {len(tables)} tables for {len(runs)} runs: one each is needed")
    data = [run.astype(np.float32, copy=False) for run in runs]
    known = getattr(runs.mask, "t_r", None) or getattr(runs.surface, "t_r", None)
    seconds = check_tr(t_r if t_r is not None else known)
    conditions = sorted({kind for table in tables for kind in table["trial_type"]})
    designs = [BrainDesign(len(run), table, conditions, seconds, hrf, high_pass) for run, table in zip(data, tables)]

    def parts() -> Iterator[list[Array]]:
        if networks is not None:
            from llmbrain.decomposition import dual_regression

            found = dual_regression(networks, images, mask_img=mask, confounds=confounds)
            yield [np.asarray(course, dtype=np.float64) for course in found.time_courses]
            return
        for start in range(0, data[0].shape[1], COLUMNS):
            yield [run[:, start : start + COLUMNS].astype(np.float64) for run in data]

    weights = contrast_weights(conditions, contrasts)
    shift = max(1, int(np.ceil(20.0 / seconds)))
    found = find_responses(designs, parts(), weights, noise_model, n_permutations, permute, shift, random_state)
    return Localizer(
        list(weights), *found, names=None if networks is None else networks.names,
        brain=None if networks is not None else runs.mask or runs.surface,
    )  # fmt: skip


class BrainDesign(Design):
    """Conditions of one run after the response, and slow cosines."""

    def __init__(
        self, n_volumes: int, events: pd.DataFrame, conditions: Sequence[str], t_r: float, hrf: str,
        high_pass: float | None,
    ) -> None:  # fmt: skip
        self.n_tokens, self.conditions = n_volumes, list(conditions)
        self.kinds = np.array([self.conditions.index(kind) for kind in events["trial_type"]], dtype=int)
        volumes = t_r * np.arange(n_volumes)
        responses = []
        for onset, duration in events[["onset", "duration"]].itertuples(index=False):
            ticks = onset + TICK * np.arange(max(1, round(duration / TICK)))
            responses.append(TICK * np.asarray(hrf_weights(ticks, volumes, hrf).sum(axis=1)).ravel())
        self.responses = np.array(responses)
        self.nuisance = np.ones((n_volumes, 1)) if high_pass is None else cosine_basis(n_volumes, t_r, high_pass)
        self.boxcars = self.boxcars_of(self.kinds)

    def boxcars_of(self, kinds: NDArray[np.int64]) -> Array:
        """Response to each condition; ``(n_volumes, n_conditions)``."""
        return np.column_stack([self.responses[kinds == k].sum(axis=0) for k in range(len(self.conditions))])

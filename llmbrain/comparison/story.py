"""A model and people who heard the same story, compared from files to tables: what the command `compare` does."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, Unpack

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from llmbrain._validation import InputError, seed_of
from llmbrain.brains.fmri import FMRI, load_fmri
from llmbrain.brains.series import check_tr
from llmbrain.brains.words import check_words, load_words
from llmbrain.comparison.ceilings import isc_split, nanmean
from llmbrain.comparison.clock import Clock
from llmbrain.comparison.coupling import Coupling, DeadSeriesWarning, couple, group_mean
from llmbrain.comparison.encoding import Encoding, encode
from llmbrain.comparison.result import Comparison, cautions
from llmbrain.comparison.settings import Settings, Tests, complete
from llmbrain.comparison.similarity import compare_similarity
from llmbrain.comparison.sources import (
    control_series,
    expected_volumes,
    mirror,
    network_series,
    read_story,
    story_of,
    untrained_copy,
)
from llmbrain.comparison.timing import timing_cautions
from llmbrain.scanning import Scan
from llmbrain.stats.bootstrap import bootstrap_mean

if TYPE_CHECKING:
    from llmbrain.comparison.sources import Networks, Source

    StrPath: TypeAlias = str | os.PathLike[str]

Array = NDArray[np.float64]
NEAR_SECONDS = 10.0  # pairs of volumes nearer than this are left out of CKA
FEW_REGIONS, MANY_REGIONS = 20, 100  # encoding models of fewer take seconds, of more take many minutes
MOST_LAGS = 2000  # pairs whose lag profile is written
MOST_PLACED = 2000  # regions whose coordinates stand in every table, not only in that of the regions


def compare(
    scan_or_model: Source,
    fmri: FMRI | StrPath | Sequence[StrPath],
    words: pd.DataFrame | StrPath,
    *,
    tr: float | None = None,
    offset: float = 0.0,
    networks: Networks | None = None,
    n_components: int | float | str = 20,
    controls: Mapping[str, ArrayLike] | None = None,
    untrained: bool = False,
    out: StrPath | None = None,
    random_state: int | None = 0,
    progress: Callable[[str], None] | None = None,
    **settings: Unpack[Settings],
) -> Comparison:
    """Compare the networks of a language model with fMRI of people who heard the same words.

    Parameters
    ----------
    scan_or_model : Scan, list of Scan, (model, tokenizer), or path of a model or a scan
        A model reads the story. Of several runs, the one that reads the words is taken.
    fmri : FMRI or path
        See `load_fmri`; a file or a folder of subjects.
    words : DataFrame or path
        See `load_words`.
    tr : float, optional
        Seconds; may be left out where a NIfTI header says it.
    offset : float
        Stimulus time of the first volume, in seconds.
    networks : FunctionalNetworks, GroupICA or path of networks, optional
        Networks that were found before, on whatever text; dual regression gives their time courses here. Default:
        `n_components` networks found in this scan by group ICA.
    n_components : int, float or "auto"
        See `GroupICA`.
    controls : mapping of name to array ``(n_volumes,)``, optional
        Sound power and the like, at the volumes, already convolved. Word rate, position in the model's context, and log
        frequency (where the word table has it) are added.
    untrained : bool
        Also with the same architecture and random weights, and the trained model beyond that; needs a model.
    out : path, optional
        Folder for the tables.
    random_state : int or None
        None: another seed every time, recorded in the report.
    progress : callable, optional
        Told in a line what begins.
    **settings
        Fields of `llmbrain.comparison.settings.Settings`: ``text``, ``series``, ``columns``, ``regions``, ``atlas``,
        ``atlas_labels``, ``rois``, ``isc``, ``rule``, ``aggregate``, ``hrf``, ``high_pass``, ``drop``, ``window``,
        ``null``, ``n_permutations``, ``correction``, ``run_length``, ``encoding``.

    Returns
    -------
    Comparison

    Raises
    ------
    InputError
        If words, brains and text do not belong together, or a setting is not known.
    """
    say = progress or (lambda message: None)
    chosen, seed = complete(settings), seed_of(random_state)
    table = check_words(words) if isinstance(words, pd.DataFrame) else load_words(words, columns=chosen["columns"])
    brain = _people(fmri, table, tr, offset, chosen)
    clock = Clock.of_story(
        table, window=chosen["window"], drop=chosen["drop"], tr=check_tr(brain.tr if tr is None else tr),
        n_volumes=brain.n_volumes, offset=offset, rule=chosen["rule"], aggregate=chosen["aggregate"],
        hrf=chosen["hrf"], high_pass=chosen["high_pass"],
    )  # fmt: skip
    tests: Tests = {
        "null": chosen["null"], "n_permutations": chosen["n_permutations"], "correction": chosen["correction"],
        "random_state": seed,
    }  # fmt: skip
    people = clock.prepare(clock.cut(brain.data))
    if chosen["isc"] is not None:
        brain, people, said = _by_isc(brain, people, chosen["isc"])
        say(said)
    clock.rate(table)  # wrong times are said before the scan
    say(f"brain: {len(brain.subjects)} subjects, {brain.n_volumes} volumes, {len(brain.regions)} regions; model: scan")
    if clock.left_out:
        say(f"{clock.left_out} are not used: they are before or after the story, or dropped")
    model, scan = story_of(scan_or_model, table, chosen["text"])
    known, missing = control_series(scan, table, controls, clock)
    if not known:
        raise InputError(f"words: the word rate is constant over the scan: is offset={offset:g} s right?")
    nuisance = np.column_stack(list(known.values()))

    say(f"controls ({', '.join(known)}) and the story mirrored in time, with every region")
    controls_coupling = _couple(nuisance, people, networks=list(known), regions=brain.regions, **tests)
    backwards = clock.prepare(clock.rate(mirror(table, clock.rule)))
    mirrored = _couple(backwards, people, networks=["word rate, mirrored"], regions=brain.regions, **tests)
    job = _Job(people, nuisance, brain.regions, table, clock, tests,
               _encoding_draws(chosen["encoding"], len(brain.regions), tests["n_permutations"]))  # fmt: skip
    say(f"networks of {scan.n_tokens:,} tokens")
    found = network_series(scan, networks, chosen["series"], n_components, seed, chosen["run_length"])
    side = job.side(scan, found)
    coupling, encoded, similar = job.run(side, say)
    tables = {
        "coupling": coupling.to_frame(), "matches": coupling.matches, "lags": _lag_table(coupling),
        "controls": controls_coupling.to_frame(), "mirrored": mirrored.to_frame(), "similarity": similar,
    }  # fmt: skip
    if coupling.ceilings is not None:
        tables["ceilings"] = coupling.ceilings
    if brain.places is not None:
        tables["regions"] = brain.places
        if len(brain.places) <= MOST_PLACED:
            for name in ("coupling", "controls"):
                tables[name] = tables[name].merge(brain.places, on="region", how="left")
    if encoded is not None:
        tables["encoding"] = _with_subjects(encoded, people)
    summaries = {"trained": _summary(coupling, encoded, similar)}
    if untrained:
        if model is None:
            raise InputError("untrained=True needs a model (or its path), not a scan")
        say("the same with random weights")
        blank_scan = read_story((untrained_copy(model[0], seed), model[1]), scan.text)
        blank = job.side(blank_scan, network_series(blank_scan, None, None, found.shape[1], seed, chosen["run_length"]))
        summaries["untrained"] = _summary(*job.run(blank, say))
        say("trained beyond untrained")
        more = job.run(side, say, beyond=blank)
        summaries["trained beyond untrained"] = _summary(*more)
        tables["coupling_beyond_untrained"] = more[0].to_frame()
        if more[1] is not None:
            tables["encoding_beyond_untrained"] = _with_subjects(more[1], people)
    tables["summary"] = pd.DataFrame(summaries).T.rename_axis("weights").reset_index()
    report = {
        "model": scan.model_id, "run": scan.name, "n_tokens": scan.n_tokens, "n_networks": found.shape[1],
        "n_subjects": len(brain.subjects), "n_regions": len(brain.regions), "excluded": brain.excluded,
        "dead": brain.dead, "n_volumes": len(nuisance), "words": side.counts, "controls": list(known),
        "controls_missing": missing, "threshold": coupling.threshold, "threshold_controls":
        controls_coupling.threshold, "n_permutations": coupling.n_permutations, "null": tests["null"], "correction":
        tests["correction"], "left_out": clock.left_out,
        "settings": {**clock.settings(), "window": chosen["window"], "drop": chosen["drop"], "isc": chosen["isc"],
                     "random_state": seed},
    }  # fmt: skip
    report["cautions"] = cautions(report) + timing_cautions(table, brain.data, clock, seed)
    if job.draws == 0 and chosen["encoding"] is None:
        why = f"they take long with {len(brain.regions)} regions" if _himalaya() else "himalaya is not installed"
        report["cautions"].append(f"encoding models were left out: {why}")
    result = Comparison(tables, report, coupling, controls_coupling, encoded, brain)
    if out is not None:
        result.save(out)
    return result


def _couple(*series: Array, **settings: Any) -> Coupling:
    """`couple` without a word about dead series: the cautions say it once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeadSeriesWarning)
        return couple(*series, **settings)


def _people(
    fmri: FMRI | StrPath | Sequence[StrPath], words: pd.DataFrame, tr: float | None, offset: float, chosen: Settings
) -> FMRI:
    if isinstance(fmri, FMRI):
        return fmri
    expected = expected_volumes(words, tr, offset)
    return load_fmri(
        fmri, atlas=chosen["atlas"], atlas_labels=chosen["atlas_labels"], regions=chosen["regions"],
        rois=chosen["rois"], tr=tr, expected=expected,
    )  # fmt: skip


def _by_isc(brain: FMRI, people: Array, least: float) -> tuple[FMRI, Array, str]:
    """The regions that half of the listeners choose, and the other half."""
    keep, rest = isc_split(people, least)
    if not keep.any():
        raise InputError(f"isc={least:g}: no region reaches it in the {len(people) - len(rest)} listeners that choose")
    said = (
        f"{int(keep.sum())} of {len(keep)} regions reach an ISC of {least:g} in {len(people) - len(rest)} listeners; "
        f"they are compared in the other {len(rest)}"
    )
    return brain.only(np.flatnonzero(keep), rest), people[rest][..., keep], said


def _himalaya() -> bool:
    return importlib.util.find_spec("himalaya") is not None


def _encoding_draws(wanted: bool | None, n_regions: int, n_permutations: int | None) -> int:
    """Null draws of encoding models: each costs a fit of every region; 0 is no encoding."""
    if wanted is False or (wanted is None and (n_regions > MANY_REGIONS or not _himalaya())):
        return 0
    most = 99 if n_regions <= FEW_REGIONS else 39
    return most if n_permutations is None else min(n_permutations, most)


@dataclass
class _Side:
    """A model's networks at the volumes: after the response, and raw for delays."""

    x: Array
    raw: Array
    counts: dict[str, int]


@dataclass
class _Job:
    """What is done alike with the trained and the untrained model."""

    people: Array
    nuisance: Array
    regions: list[str]
    words: pd.DataFrame
    clock: Clock
    tests: Tests
    draws: int

    def side(self, scan: Scan, networks: Array) -> _Side:
        after, counts = self.clock.of_tokens(scan, self.words, networks)
        raw, _ = self.clock.of_tokens(scan, self.words, networks, convolve=False)
        return _Side(self.clock.prepare(after), self.clock.prepare(raw), counts)

    def run(
        self, side: _Side, say: Callable[[str], None], beyond: _Side | None = None
    ) -> tuple[Coupling, Encoding | None, pd.DataFrame]:
        """Coupling, encoding and similarity, beyond the controls and, if given, another model's networks."""
        tr, seed = self.clock.tr, self.tests["random_state"]
        nuisance = self.nuisance if beyond is None else np.column_stack([self.nuisance, _living(beyond.x)])
        say(f"coupling of {side.x.shape[1]} networks with {len(self.regions)} regions, and similarity")
        coupling = _couple(side.x, self.people, nuisance=nuisance, regions=self.regions, **self.tests)
        group = group_mean(self.people) if len(self.people) > 1 else self.people[0]
        near = min(int(np.ceil(NEAR_SECONDS / tr)), len(side.x) - 4)
        alive = group[:, np.isfinite(group).all(axis=0)]
        pair = (_living(side.x), alive)
        rows = []
        for name, known in (("nothing", None), ("controls", nuisance)):
            found = compare_similarity(
                *pair, nuisance=known, exclude=near, null=self.tests["null"], n_permutations=199, random_state=seed
            )
            rows.append({"measure": "cka", "beyond": name, "value": found.value, "p": found.p, "n_permutations":
                         len(found.null)})  # fmt: skip
        encoded = None
        if self.draws:
            say(f"encoding models: {self.draws} null draws")
            ceiling = None if coupling.ceilings is None else coupling.ceilings["ceiling"].to_numpy()
            rate = self.clock.prepare(self.clock.rate(self.words, convolve=False))
            bands = {"controls": np.column_stack([rate, self.nuisance])}
            if beyond is not None:
                bands["untrained"] = _living(beyond.raw)
            encoded = encode(
                {**bands, "networks": _living(side.raw)}, group, tr=tr, null=self.tests["null"],
                n_permutations=self.draws, correction=self.tests["correction"], ceiling=ceiling,
                names=self.regions, random_state=seed,
            )  # fmt: skip
        return coupling, encoded, pd.DataFrame(rows)


def _living(series: Array) -> Array:
    return series[:, np.isfinite(series).all(axis=0)]


def _with_subjects(encoded: Encoding, people: Array, n_boot: int = 2000) -> pd.DataFrame:
    """The table, with the networks' gain in single subjects and its 95% interval over subjects (bootstrap)."""
    frame = encoded.to_frame()
    if len(people) > 2:
        gains = encoded.subject_gain(people, "networks")
        frame["subject_gain"] = nanmean(gains)
        frame["subject_gain_low"], frame["subject_gain_high"] = bootstrap_mean(
            gains, n_boot, 0.95, np.random.default_rng(0)
        )
    return frame


def _summary(coupling: Coupling, encoded: Encoding | None, similar: pd.DataFrame) -> dict[str, float]:
    """One line a model."""
    row = {
        "largest_r": float(np.nanmax(np.abs(coupling.r))), "threshold": coupling.threshold,
        "smallest_p_corrected": float(np.nanmin(coupling.p_corrected)), "n_significant":
        int(coupling.significant.sum()), "cka": float(similar["value"].iloc[-1]), "cka_p": float(similar["p"].iloc[-1]),
    }  # fmt: skip
    if encoded is not None:
        row["encoding_r"] = float(np.nanmean(encoded.r))
        row["gain_networks"] = float(np.nanmean(encoded.gain["networks"]))
        row["gain_smallest_p"] = float(np.nanmin(encoded.gain_p_corrected["networks"]))
    return row


def _lag_table(coupling: Coupling) -> pd.DataFrame:
    """Lag profiles, of the strongest pairs where pairs are very many."""
    pairs = np.argsort(-np.abs(np.nan_to_num(coupling.r)).ravel(), kind="stable")[:MOST_LAGS]
    k, r = np.unravel_index(np.sort(pairs), coupling.r.shape)
    n = len(coupling.lags)
    return pd.DataFrame({
        "network": np.tile(np.array(coupling.networks)[k], n), "region": np.tile(np.array(coupling.regions)[r], n),
        "lag": np.repeat(coupling.lags, len(k)), "r": coupling.lag_r[:, k, r].ravel(),
    })  # fmt: skip

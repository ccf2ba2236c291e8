"""A model and people who heard the same story, compared from files to tables: what the command `compare` does."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from llmbrain._validation import InputError, check_range
from llmbrain.brains.alignment import align, word_regressor
from llmbrain.brains.fmri import FMRI, load_fmri
from llmbrain.brains.series import check_tr, prepare
from llmbrain.brains.words import check_words, load_words
from llmbrain.comparison.ceilings import nanmean
from llmbrain.comparison.coupling import Coupling, couple, group_mean
from llmbrain.comparison.encoding import Encoding, encode
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
from llmbrain.scanning import Scan
from llmbrain.stats.bootstrap import bootstrap_mean

Array = NDArray[np.float64]
NEAR_SECONDS = 10.0  # pairs of volumes nearer than this are left out of CKA
FEW_REGIONS, MANY_REGIONS = 20, 100  # encoding models of fewer take seconds, of more take many minutes
FEW_WORDS, FEW_VOLUMES, TOKENS_PER_NETWORK = 200, 100, 50
LAGS = range(-5, 6)
ALPHA = 0.05
MOST_LAGS = 2000  # pairs whose lag profile is written


@dataclass
class Comparison:
    """Result of `compare`.

    Attributes
    ----------
    tables : dict of DataFrame
        ``coupling`` (every network with every region, beyond the controls), ``matches``, ``lags``, ``controls`` (word
        rate and the other controls with every region), ``mirrored`` (the word rate of the story read backwards in
        time: should couple with nothing), ``ceilings`` (several subjects), ``encoding`` (with himalaya),
        ``similarity``; with `untrained`, ``coupling_beyond_untrained`` and ``encoding_beyond_untrained`` (with the
        networks of the model with random weights among the controls); ``summary`` has one row a model.
    report : dict
        What was used and what was left out, with the settings; ``cautions`` are sentences to read before concluding.
    coupling, controls : Coupling
    """

    tables: dict[str, pd.DataFrame]
    report: dict[str, Any]
    coupling: Coupling = field(repr=False)
    controls: Coupling = field(repr=False)
    encoding: Encoding | None = field(default=None, repr=False)

    def findings(self) -> list[str]:
        """The answers in sentences: controls first, then the networks, then the networks beyond an untrained copy."""
        controls, n_regions = self.tables["controls"], len(self.coupling.regions)
        rate = controls[controls["network"] == "word rate"]
        mirrored = self.tables["mirrored"]
        said = []
        if len(rate):
            said.append(
                f"Control: the word rate couples with {int(rate['significant'].sum())} of {n_regions} regions (r "
                f"{_span(rate['r'])}; |r| beyond {self.controls.threshold:.3f} is significant), the story mirrored in "
                f"time with {int(mirrored['significant'].sum())} (largest |r| {mirrored['r'].abs().max():.3f})."
            )
        table = self.tables["coupling"]
        said.append(
            f"Beyond {', '.join(self.controls.networks)}, {int(table['significant'].sum())} of {len(table)} pairs of "
            f"network and region couple (largest |r| {table['r'].abs().max():.3f}, smallest corrected p "
            f"{table['p_corrected'].min():.3f}; |r| beyond {self.coupling.threshold:.3f} is significant)."
        )
        for name, what in (("encoding", "the controls"), ("encoding_beyond_untrained", "controls and untrained copy")):
            if name in self.tables:
                frame = self.tables[name]
                p = frame["gain_networks_p_corrected"]
                said.append(
                    f"In encoding models the networks add {frame['gain_networks'].mean():+.3f} to the held-out r of "
                    f"{what} (mean over regions; significant in {int((p <= ALPHA).sum())} of {n_regions}, smallest "
                    f"corrected p {p.min():.3f})."
                )
        if "untrained" in set(self.tables["summary"]["weights"]):
            row = self.tables["summary"].set_index("weights").to_dict("index")["untrained"]
            said.append(
                f"An untrained copy: {int(row['n_significant'])} pairs couple (largest |r| {row['largest_r']:.3f}, "
                f"smallest corrected p {row['smallest_p_corrected']:.3f})."
            )
        return said

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write every table as TSV and the report as JSON; returns the folder."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        for name, table in self.tables.items():
            table.to_csv(path / f"{name}.tsv", sep="\t", index=False, na_rep="n/a", float_format="%.6g")
        (path / "comparison.json").write_text(json.dumps(self.report, indent=1, default=str) + "\n", encoding="utf-8")
        return path


def compare(
    scan_or_model: Any,
    fmri: Any,
    words: Any,
    *,
    tr: float | None = None,
    offset: float = 0.0,
    out: str | os.PathLike[str] | None = None,
    text: str | None = None,
    series: ArrayLike | None = None,
    networks: Any = None,
    n_components: int | float | str = 20,
    controls: Mapping[str, ArrayLike] | None = None,
    columns: Mapping[str, str | int] | None = None,
    regions: Sequence[str] | None = None,
    atlas: Any = None,
    rule: str = "offset",
    aggregate: str = "mean",
    hrf: str = "spm",
    high_pass: float | None = 128.0,
    drop: int = 0,
    null: str = "circular",
    n_permutations: int | None = None,
    correction: str = "max",
    encoding: bool | None = None,
    untrained: bool = False,
    random_state: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Comparison:
    """Compare the networks of a language model with fMRI of people who heard the same words.

    Parameters
    ----------
    scan_or_model : Scan, list of Scan, (model, tokenizer), or path of a model or a scan
        A model reads `text` (default: the words of the table, joined by spaces). Of several runs, the one that reads
        the words is taken.
    fmri : FMRI or path
        See `load_fmri`; a file or a folder of subjects.
    words : DataFrame or path
        See `load_words`.
    tr : float, optional
        Seconds; may be left out where a NIfTI header says it.
    offset : float
        Stimulus time of the first volume, in seconds.
    out : path, optional
        Folder for the tables.
    series : array ``(n_tokens, K)``, optional
        Time courses on the scan's tokens; default: those of `n_components` networks found in this scan by group ICA.
    networks : FunctionalNetworks, GroupICA or path of networks, optional
        Networks that were found before, on whatever text; dual regression gives their time courses here.
    controls : mapping of name to array ``(n_volumes,)``, optional
        Sound power and the like, at the volumes, already convolved. Word rate, position in the model's context, and log
        frequency (where the word table has it) are added.
    columns, regions, atlas
        Passed on to `load_words` and `load_fmri`.
    rule, aggregate, hrf, high_pass, drop
        See `align`; the brain gets the same filter.
    null, n_permutations, correction
        See `couple`. Encoding models use at most 99 draws, 39 for more than 20 regions.
    encoding : bool, optional
        Default: where himalaya is installed and the brain has at most 100 regions (each draw fits all of them again).
    untrained : bool
        Also with the same architecture and random weights, and the trained model beyond that; needs a model.
    random_state : int
    progress : callable, optional
        Told in a line what begins.

    Returns
    -------
    Comparison
    """
    say = progress or (lambda message: None)
    table = check_words(words) if isinstance(words, pd.DataFrame) else load_words(words, columns=columns)
    if isinstance(fmri, FMRI):
        brain = fmri
    else:
        brain = load_fmri(fmri, atlas=atlas, regions=regions, tr=tr, expected=expected_volumes(table, tr, offset))
    seconds = check_tr(brain.tr if tr is None else tr)
    check_range("drop", drop, 0, brain.n_volumes - 3)
    clock: dict[str, Any] = {"tr": seconds, "n_volumes": brain.n_volumes, "offset": offset}
    clock |= {"rule": rule, "drop": int(drop)}
    filters: dict[str, Any] = {"high_pass": high_pass}
    tests: dict[str, Any] = {
        "null": null,
        "n_permutations": n_permutations,
        "correction": correction,
        "random_state": random_state,
    }
    people = prepare(brain.data, seconds, drop=drop, **filters)
    rate = prepare(word_regressor(table, hrf=hrf, **clock), seconds, **filters)  # wrong times are said before the scan
    say(f"brain: {len(brain.subjects)} subjects, {brain.n_volumes} volumes, {len(brain.regions)} regions; model: scan")
    model, scan = story_of(scan_or_model, table, text)
    known, missing = control_series(scan, table, controls, clock, hrf)
    known = {name: prepare(values, seconds, **filters)[:, 0] for name, values in known.items()}
    if not known:
        raise InputError(f"words: the word rate is constant over the scan: is offset={offset:g} s right?")
    nuisance = np.column_stack(list(known.values()))

    say(f"controls ({', '.join(known)}) and the story mirrored in time, with every region")
    controls_coupling = couple(nuisance, people, networks=list(known), regions=brain.regions, **tests)
    backwards = prepare(word_regressor(mirror(table, rule), hrf=hrf, **clock), seconds, **filters)
    mirrored = couple(backwards, people, networks=["word rate, mirrored"], regions=brain.regions, **tests)
    job = _Job(people, nuisance, brain.regions, table, clock, filters, tests, aggregate, hrf,
               _encoding_draws(encoding, len(brain.regions), n_permutations))  # fmt: skip
    say(f"networks of {scan.n_tokens:,} tokens")
    found = network_series(scan, networks, series, n_components, random_state)
    side = job.side(scan, found)
    coupling, encoded, similar = job.run(side, say)
    tables = {
        "coupling": coupling.to_frame(), "matches": coupling.matches, "lags": _lag_table(coupling),
        "controls": controls_coupling.to_frame(), "mirrored": mirrored.to_frame(), "similarity": similar,
    }  # fmt: skip
    if coupling.ceilings is not None:
        tables["ceilings"] = coupling.ceilings
    if encoded is not None:
        tables["encoding"] = _with_subjects(encoded, people)
    summaries = {"trained": _summary(coupling, encoded, similar)}
    if untrained:
        if model is None:
            raise InputError("untrained=True needs a model (or its path), not a scan")
        say("the same with random weights")
        blank_scan = read_story((untrained_copy(model[0], random_state), model[1]), scan.text)
        blank = job.side(blank_scan, network_series(blank_scan, None, None, found.shape[1], random_state))
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
        controls_coupling.threshold, "n_null": coupling.n_permutations, "null": null, "correction": correction,
        "settings": {**clock, **filters, "hrf": hrf, "aggregate": aggregate, "random_state": random_state},
    }  # fmt: skip
    group = group_mean(people) if len(people) > 1 else people[0]
    report["cautions"] = cautions(report, couple(rate, group, n_permutations=min(n_permutations or 99, 99), lags=LAGS))
    if job.draws == 0 and encoding is None:
        why = f"they take long with {len(brain.regions)} regions" if _himalaya() else "himalaya is not installed"
        report["cautions"].append(f"encoding models were left out: {why}")
    result = Comparison(tables, report, coupling, controls_coupling, encoded)
    if out is not None:
        result.save(out)
    return result


def _himalaya() -> bool:
    return importlib.util.find_spec("himalaya") is not None


def _encoding_draws(wanted: bool | None, n_regions: int, n_permutations: int | None) -> int:
    """Null draws of encoding models: each costs a fit of every region; 0 is no encoding."""
    if wanted is False or (wanted is None and (n_regions > MANY_REGIONS or not _himalaya())):
        return 0
    most = 99 if n_regions <= FEW_REGIONS else 39
    return most if n_permutations is None else min(n_permutations, most)


def cautions(report: Mapping[str, Any], rate: Coupling) -> list[str]:
    """What a reader must know before believing the numbers.

    Parameters
    ----------
    report : mapping
        `Comparison.report`.
    rate : Coupling
        Word rate with every region, for its lag profile.
    """
    said = [f"subject {name} is left out: {reason}" for name, reason in report["excluded"].items()]
    said += [f"subject {name}: {len(names)} dead series ({', '.join(names[:5])}) are left out of the means"
             for name, names in report["dead"].items()]  # fmt: skip
    words, tr = report["words"], report["settings"]["tr"]
    lost = {"have no times": words["untimed"], "are not in the text": words["not_in_text"],
            "fall outside the scan": words["outside_scan"]}  # fmt: skip
    said += [f"{count} of {words['n_words']} words {what}" for what, count in lost.items() if count]
    if words["used"] < FEW_WORDS:
        said.append(f"only {words['used']} words reach the brain: too few for more than a demonstration")
    if report["n_tokens"] < TOKENS_PER_NETWORK * report["n_networks"]:
        said.append(f"{report['n_tokens']} tokens for {report['n_networks']} networks: their time courses are unstable")
    if report["n_volumes"] < FEW_VOLUMES:
        said.append(f"{report['n_volumes']} volumes: only strong coupling can be seen")
    if report["n_subjects"] < 2:
        said.append("one subject: no noise ceiling, and nothing about other people")
    if report["n_null"] < 99:
        said.append(f"{report['n_null']} null draws: no p is below {1 / (report['n_null'] + 1):.3f}")
    if report["controls_missing"]:
        said.append(f"without the controls {' and '.join(report['controls_missing'])}: coupling may be theirs")
    profile = np.nanmean(rate.lag_r[:, 0], axis=1)
    best = int(rate.lags[np.argmax(profile)])
    if abs(best * tr) >= 2.5 and profile.max() > rate.threshold and profile.max() > 1.3 * profile[rate.lags == 0][0]:
        said.append(
            f"the word rate fits best when the brain is read {abs(best) * tr:g} s {'later' if best > 0 else 'earlier'}:"
            f" is offset={report['settings']['offset']:g} s right?"
        )
    return said


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
    clock: dict[str, Any]
    filters: dict[str, Any]
    tests: dict[str, Any]
    aggregate: str
    hrf: str
    draws: int

    def side(self, scan: Scan, networks: Array) -> _Side:
        how: dict[str, Any] = {"aggregate": self.aggregate, "series": networks, **self.clock}
        aligned = align(scan, self.words, hrf=self.hrf, **how)
        raw = align(scan, self.words, hrf=None, **how)
        tr = self.clock["tr"]
        return _Side(prepare(aligned, tr, **self.filters), prepare(raw, tr, **self.filters), aligned.report)

    def run(
        self, side: _Side, say: Callable[[str], None], beyond: _Side | None = None
    ) -> tuple[Coupling, Encoding | None, pd.DataFrame]:
        """Coupling, encoding and similarity, beyond the controls and, if given, another model's networks."""
        tr, seed = self.clock["tr"], self.tests["random_state"]
        nuisance = self.nuisance if beyond is None else np.column_stack([self.nuisance, _living(beyond.x)])
        say(f"coupling of {side.x.shape[1]} networks with {len(self.regions)} regions, and similarity")
        coupling = couple(side.x, self.people, nuisance=nuisance, regions=self.regions, **self.tests)
        group = group_mean(self.people) if len(self.people) > 1 else self.people[0]
        near = min(int(np.ceil(NEAR_SECONDS / tr)), len(side.x) - 4)
        settings: dict[str, Any] = {
            "exclude": near,
            "null": self.tests["null"],
            "n_permutations": 199,
            "random_state": seed,
        }
        alive = group[:, np.isfinite(group).all(axis=0)]
        pair = (_living(side.x), alive)
        rows = []
        for name, known in (("nothing", None), ("controls", nuisance)):
            found = compare_similarity(*pair, nuisance=known, **settings)
            rows.append({"measure": "cka", "beyond": name, "value": found.value, "p": found.p, "n_null":
                         len(found.null)})  # fmt: skip
        encoded = None
        if self.draws:
            say(f"encoding models: {self.draws} null draws")
            ceiling = None if coupling.ceilings is None else coupling.ceilings["ceiling"].to_numpy()
            rate = prepare(word_regressor(self.words, hrf=None, **self.clock), tr, **self.filters)
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


def _span(values: pd.Series) -> str:
    return f"{values.min():.3f} to {values.max():.3f}"


def _lag_table(coupling: Coupling) -> pd.DataFrame:
    """Lag profiles, of the strongest pairs where pairs are very many."""
    pairs = np.argsort(-np.abs(np.nan_to_num(coupling.r)).ravel(), kind="stable")[:MOST_LAGS]
    k, r = np.unravel_index(np.sort(pairs), coupling.r.shape)
    n = len(coupling.lags)
    return pd.DataFrame({
        "network": np.tile(np.array(coupling.networks)[k], n), "region": np.tile(np.array(coupling.regions)[r], n),
        "lag": np.repeat(coupling.lags, len(k)), "r": coupling.lag_r[:, k, r].ravel(),
    })  # fmt: skip

"""A model and people who heard the same story, compared from files to tables: what the command `compare` does."""

from __future__ import annotations

import importlib.util
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from llmbrain._validation import InputError, check_range
from llmbrain.comparison.alignment import align, word_regressor
from llmbrain.comparison.coupling import Coupling, couple, group_mean
from llmbrain.comparison.encoding import Encoding, encode
from llmbrain.comparison.fmri import FMRI, load_fmri
from llmbrain.comparison.series import check_tr, prepare, remove, standardize
from llmbrain.comparison.similarity import compare_similarity
from llmbrain.comparison.words import check_words, load_words
from llmbrain.scanning import Scan

Array = NDArray[np.float64]
FREQUENCY_NAMES = ("logfreq", "logfrequency", "wordfrequency", "freq", "frequency", "zipf")
NEAR_SECONDS = 10.0  # pairs of volumes nearer than this are left out of CKA


@dataclass
class Comparison:
    """Result of `compare`.

    Attributes
    ----------
    tables : dict of DataFrame
        ``coupling`` (every network with every region, beyond the controls), ``matches``, ``lags``, ``controls`` (word
        rate and the other controls with every region), ``mirrored`` (the word rate of the story read backwards in
        time: should couple with nothing), ``ceilings`` (several subjects), ``encoding`` (with himalaya),
        ``similarity``; with `untrained`, ``untrained`` tells the same numbers of the model with random weights.
    report : dict
        What was used and what was left out, with the settings.
    coupling, controls : Coupling
    """

    tables: dict[str, pd.DataFrame]
    report: dict[str, Any]
    coupling: Coupling = field(repr=False)
    controls: Coupling = field(repr=False)
    encoding: Encoding | None = field(default=None, repr=False)

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
    n_components: int = 20,
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
    n_null: int | None = None,
    correction: str = "max",
    encoding: bool | None = None,
    untrained: bool = False,
    random_state: int = 0,
) -> Comparison:
    """Compare the networks of a language model with fMRI of people who heard the same words.

    Parameters
    ----------
    scan_or_model : Scan, (model, tokenizer), or path of a model or of a study with one run
        A model reads `text` (default: the words of the table, joined by spaces).
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
    controls : mapping of name to array ``(n_volumes,)``, optional
        Sound power and the like, at the volumes, already convolved. Word rate, position in the model's context, and log
        frequency (where the word table has it) are added.
    columns, regions, atlas
        Passed on to `load_words` and `load_fmri`.
    rule, aggregate, hrf, high_pass, drop
        See `align`; the brain gets the same filter.
    null, n_null, correction
        See `couple`. Encoding models use at most 99 draws.
    encoding : bool, optional
        Default: where himalaya is installed.
    untrained : bool
        Also with the same architecture and random weights; needs a model.

    Returns
    -------
    Comparison
    """
    brain = fmri if isinstance(fmri, FMRI) else load_fmri(fmri, atlas=atlas, regions=regions, tr=tr)
    seconds = check_tr(brain.tr if tr is None else tr)
    table = check_words(words) if isinstance(words, pd.DataFrame) else load_words(words, columns=columns)
    model, scan = _open(scan_or_model, table, text)
    clock: dict[str, Any] = {"tr": seconds, "n_volumes": brain.n_volumes, "offset": offset}
    clock |= {"rule": rule, "drop": int(drop)}
    filters: dict[str, Any] = {"high_pass": high_pass}
    tests: dict[str, Any] = {"null": null, "n_null": n_null, "correction": correction, "random_state": random_state}
    check_range("drop", drop, 0, brain.n_volumes - 3)
    people = prepare(brain.data, seconds, drop=drop, **filters)
    known, missing = _controls(scan, table, controls, clock, hrf)
    known = {name: prepare(values, seconds, **filters)[:, 0] for name, values in known.items()}
    nuisance = np.column_stack(list(known.values()))

    controls_coupling = couple(nuisance, people, networks=list(known), regions=brain.regions, **tests)
    mirrored = couple(
        prepare(word_regressor(_mirror(table, clock), hrf=hrf, **clock), seconds, **filters), people,
        networks=["word rate, mirrored"], regions=brain.regions, **tests,
    )  # fmt: skip
    wanted = importlib.util.find_spec("himalaya") is not None if encoding is None else encoding
    job = _Job(people, nuisance, brain.regions, table, clock, filters, tests, aggregate, hrf, wanted)
    networks = _series(scan, series, n_components, random_state)
    coupling, encoded, similar, counts = job.run(scan, networks)
    tables = {
        "coupling": coupling.to_frame(), "matches": coupling.matches, "lags": _lag_table(coupling),
        "controls": controls_coupling.to_frame(), "mirrored": mirrored.to_frame(), "similarity": similar,
    }  # fmt: skip
    if coupling.ceilings is not None:
        tables["ceilings"] = coupling.ceilings
    if encoded is not None:
        tables["encoding"] = encoded.to_frame()
    summaries = {"trained": _summary(coupling, encoded, similar)}
    if untrained:
        if model is None:
            raise InputError("untrained=True needs a model (or its path), not a scan")
        blank = _untrained(model[0], random_state)
        blank_scan = _scan((blank, model[1]), scan.text)
        again = job.run(blank_scan, _series(blank_scan, None, networks.shape[1], random_state))
        summaries["untrained"] = _summary(*again[:3])
    tables["summary"] = pd.DataFrame(summaries).T.rename_axis("weights").reset_index()
    report = {
        "model": scan.model_id, "n_tokens": scan.n_tokens, "n_networks": networks.shape[1], "n_subjects":
        len(brain.subjects), "excluded": brain.excluded, "dead": brain.dead, "n_volumes": len(nuisance), "words":
        counts, "controls": list(known), "controls_missing": missing, "threshold": coupling.threshold,
        "threshold_controls": controls_coupling.threshold, "n_null": coupling.n_null, "null": null,
        "correction": correction, "settings": {**clock, **filters, "hrf": hrf, "aggregate": aggregate},
    }  # fmt: skip
    result = Comparison(tables, report, coupling, controls_coupling, encoded)
    if out is not None:
        result.save(out)
    return result


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
    encoding: bool

    def run(self, scan: Scan, networks: Array) -> tuple[Coupling, Encoding | None, pd.DataFrame, dict[str, int]]:
        tr = self.clock["tr"]
        aligned = align(scan, self.words, hrf=self.hrf, aggregate=self.aggregate, series=networks, **self.clock)
        x = prepare(aligned, tr, **self.filters)
        coupling = couple(x, self.people, nuisance=self.nuisance, regions=self.regions, **self.tests)
        group = group_mean(self.people) if len(self.people) > 1 else self.people[0]
        near = min(int(np.ceil(NEAR_SECONDS / tr)), len(x) - 4)
        settings: dict[str, Any] = {"exclude": near, "null": self.tests["null"], "n_null": 199}
        rows = []
        for beyond, series in (("nothing", (x, group)), ("controls", [remove(s, self.nuisance) for s in (x, group)])):
            found = compare_similarity(*series, random_state=self.tests["random_state"], **settings)
            rows.append(
                {"measure": "cka", "beyond": beyond, "value": found.value, "p": found.p, "n_null": len(found.null)}
            )
        similar = pd.DataFrame(rows)
        encoded = None
        if self.encoding:
            raw = align(scan, self.words, hrf=None, aggregate=self.aggregate, series=networks, **self.clock)
            ceiling = None if coupling.ceilings is None else coupling.ceilings["ceiling"].to_numpy()
            rate = prepare(word_regressor(self.words, hrf=None, **self.clock), tr, **self.filters)
            encoded = encode(
                {"controls": np.column_stack([rate, self.nuisance]), "networks": prepare(raw, tr, **self.filters)},
                group, tr=tr, null=self.tests["null"], n_null=min(self.tests["n_null"] or 99, 99),
                correction=self.tests["correction"], ceiling=ceiling, names=self.regions,
                random_state=self.tests["random_state"],
            )  # fmt: skip
        return coupling, encoded, similar, aligned.report


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


def _open(source: Any, words: pd.DataFrame, text: str | None) -> tuple[tuple[Any, Any] | None, Scan]:
    """The model, if there is one, and its scan of the story."""
    if isinstance(source, Scan):
        return None, source
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if (path / "manifest.json").is_file():
            from llmbrain.scanning import load_scans

            scans = load_scans(path)
            if len(scans) != 1:
                raise InputError(f"{path} holds {len(scans)} runs: the story must be one run; pass that Scan")
            return None, scans[0]
        from llmbrain.checkpoints import load_model

        source = load_model(os.fspath(path))
    try:
        model, tokenizer = source
    except (TypeError, ValueError):
        raise InputError(f"model of type {type(source).__name__}: pass a Scan, (model, tokenizer) or a path") from None
    return (model, tokenizer), _scan((model, tokenizer), " ".join(words["word"]) if text is None else text)


def _scan(model: tuple[Any, Any], text: str) -> Scan:
    from llmbrain.scanning import scan

    return scan(model[0], model[1], [text])[0]


def _untrained(model: Any, seed: int) -> Any:
    """The same architecture with random weights."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return type(model)(model.config).eval().to(next(model.parameters()).device)


def _series(scan: Scan, series: ArrayLike | None, n_components: int, random_state: int) -> Array:
    if series is not None:
        return np.asarray(series, dtype=np.float64)
    from llmbrain.decomposition import GroupICA

    ica = GroupICA(n_components=n_components, random_state=random_state).fit([scan])
    return np.asarray(ica.mixing_[0], dtype=np.float64)


def _controls(
    scan: Scan, words: pd.DataFrame, given: Mapping[str, ArrayLike] | None, clock: dict[str, Any], hrf: str
) -> tuple[dict[str, Array], list[str]]:
    """Control series at the volumes (before the filter), and the usual ones that are missing."""
    n, drop = clock["n_volumes"], clock["drop"]
    found = {"word rate": word_regressor(words, hrf=hrf, **clock)}
    if len(np.unique(scan.positions)) > 1:
        place = scan.positions[:, None].astype(np.float64)
        found["position"] = align(scan, words, hrf=hrf, series=place, **clock).data
    plain = {"".join(c for c in str(column).lower() if c.isalnum()): column for column in words.columns}
    column = next((plain[name] for name in FREQUENCY_NAMES if name in plain), None)
    if column is not None and pd.api.types.is_numeric_dtype(words[column]):
        frequency = words[column].to_numpy(float)  # centred: what is left beside the word rate
        found["log frequency"] = word_regressor(words, values=frequency - np.nanmean(frequency), hrf=hrf, **clock)
    for name, values in (given or {}).items():
        array = np.asarray(values, dtype=np.float64).reshape(-1, 1)
        if len(array) != n:
            raise InputError(f"controls[{name!r}] has {len(array)} values for {n} volumes")
        found[name] = array[drop:]
    for name in [name for name, values in found.items() if np.isnan(standardize(values)).any()]:
        warnings.warn(f"control {name!r} is constant or NaN: left out", stacklevel=3)
        del found[name]
    return found, [name for name in ("log frequency", "sound power") if name not in found]


def _mirror(words: pd.DataFrame, clock: dict[str, Any]) -> pd.DataFrame:
    """The words as if the story ran backwards, within the same span of time."""
    timed = words.dropna(subset=["onset", "offset"])
    total = timed["onset"].min() + timed["offset"].max()
    times = {"midpoint": (timed["onset"] + timed["offset"]) / 2}.get(clock["rule"], timed.get(clock["rule"]))
    mirrored = timed.assign(onset=total - times, offset=total - times)
    return mirrored.sort_values("onset", kind="stable").reset_index(drop=True)


def _lag_table(coupling: Coupling) -> pd.DataFrame:
    n_lags, k, r = coupling.lag_r.shape
    return pd.DataFrame({
        "network": np.tile(np.repeat(coupling.networks, r), n_lags), "region": np.tile(coupling.regions, n_lags * k),
        "lag": np.repeat(coupling.lags, k * r), "r": coupling.lag_r.ravel(),
    })  # fmt: skip

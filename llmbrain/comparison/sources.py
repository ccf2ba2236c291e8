"""What `compare` starts from: the run in which a model reads the story, its networks, and the control series."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from llmbrain._validation import InputError
from llmbrain.brains.finding import find_words, join_words
from llmbrain.brains.series import check_tr, standardize
from llmbrain.comparison.clock import Clock
from llmbrain.scanning import Scan

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llmbrain.decomposition import GroupICA
    from llmbrain.networks import FunctionalNetworks

    Model: TypeAlias = tuple[PreTrainedModel, PreTrainedTokenizerBase]
    Source: TypeAlias = Scan | Sequence[Scan] | Model | str | os.PathLike[str]
    Networks: TypeAlias = FunctionalNetworks | GroupICA | str | os.PathLike[str]

Array = NDArray[np.float64]
FREQUENCY_NAMES = ("logfreq", "logfrequency", "logwordfreq", "lgfreq", "zipf", "wordfrequency", "freq", "frequency")
KEPT = 2**30  # bytes of a scan that are kept in memory
COUNTED = 50.0  # no logarithm of a frequency is larger: such a column holds counts


def expected_volumes(words: pd.DataFrame, tr: float | None, offset: float = 0.0) -> float | None:
    """About how many volumes the words take; None without a TR."""
    last = words["offset"].max()
    return None if tr is None or not np.isfinite(last) else float(last - offset) / check_tr(tr)


def story_of(source: Source, words: pd.DataFrame, text: str | None) -> tuple[Model | None, Scan]:
    """The model, if there is one, and its scan of the story.

    Parameters
    ----------
    source : Scan, list of Scan, (model, tokenizer), or path of a model or a scan
        Of several runs, the one that holds the words is taken.
    """
    if isinstance(source, Scan):
        return None, source
    if isinstance(source, (list, tuple)) and source and all(isinstance(s, Scan) for s in source):
        return None, _story(source, words, "the list of scans")
    if isinstance(source, (str, os.PathLike)):
        if (Path(source) / "manifest.json").is_file():
            from llmbrain.scanning import load_scans

            return None, _story(load_scans(source), words, os.fspath(source))
        from llmbrain.checkpoints import load_model

        source = load_model(os.fspath(source))
    if not isinstance(source, (list, tuple)) or len(source) != 2:
        raise InputError(f"model of type {type(source).__name__}: pass a Scan, (model, tokenizer) or a path")
    model = (source[0], source[1])
    return model, read_story(model, join_words(words["word"]) if text is None else text)


def _story(scans: Sequence[Scan], words: pd.DataFrame, where: str) -> Scan:
    """The run whose text holds most of the words, if it holds half of them."""
    shares = [float(np.mean(find_words(scan.text, words["word"])[:, 0] >= 0)) if scan.text else 0.0 for scan in scans]
    best = int(np.argmax(shares))
    if shares[best] < 0.5:
        raise InputError(
            f"{where}: no run reads this story: {scans[best].name!r} holds {shares[best]:.0%} of the words, the most "
            f"of {len(scans)} runs; scan the story (as one run: --run-length 0), or pass the model"
        )
    return scans[best]


def read_story(model: Model, text: str) -> Scan:
    """Scan of one text; where it would take more than `KEPT` bytes the model reads it again when it is asked for."""
    from llmbrain.anatomy.experts import has_experts
    from llmbrain.scanning import live_scans, scan

    if not has_experts(model[0]):
        live = live_scans(model[0], model[1], [text])[0]
        if live.n_tokens * live.n_neurons * 4 > KEPT:
            return live
    return scan(model[0], model[1], [text])[0]


def untrained_copy(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """The same architecture with random weights."""
    import torch

    from llmbrain.hooks.text import evaluation_mode

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return evaluation_mode(type(model)(model.config)).to(next(model.parameters()).device)


def network_series(
    scan: Scan,
    networks: Networks | None,
    series: ArrayLike | None,
    n_components: int | float | str,
    random_state: int,
    run_length: int | None = None,
) -> Array:
    """Time courses on the tokens of the story ``(n_tokens, K)``: given, of given networks, or found in this scan."""
    from llmbrain.decomposition import GroupICA, dual_regression

    if series is not None:
        return np.asarray(series, dtype=np.float64)
    if networks is not None:
        from llmbrain.networks import FunctionalNetworks

        if isinstance(networks, (str, os.PathLike)):
            networks = FunctionalNetworks.load(Path(networks))
        return np.asarray(dual_regression(networks, [scan], standardize=True).time_courses[0], dtype=np.float64)
    runs = scan.cut(run_length)
    ica = GroupICA(n_components=n_components, random_state=random_state).fit(runs)
    if len(runs) == 1:
        return np.asarray(ica.mixing_[0], dtype=np.float64)
    # maps from pieces, whose Gram matrices are small; time courses of the story as the one run that it is
    return np.asarray(dual_regression(ica, [scan], standardize=True).time_courses[0], dtype=np.float64)


def control_series(
    scan: Scan, words: pd.DataFrame, given: Mapping[str, ArrayLike] | None, clock: Clock
) -> tuple[dict[str, Array], list[str]]:
    """Control series at the volumes ``(n_volumes,)``, prepared, and the usual ones that are missing."""
    found = {"word rate": clock.rate(words)}
    if len(np.unique(scan.positions)) > 1:
        found["position"] = clock.of_tokens(scan, words, scan.positions[:, None].astype(np.float64))[0]
    frequency = _log_frequency(words)
    if frequency is not None:  # centered: what is left beside the word rate
        found["log frequency"] = clock.rate(words, frequency - np.nanmean(frequency))
    for name, values in (given or {}).items():
        found[name] = clock.given(name, values)
    for name in [name for name, values in found.items() if np.isnan(standardize(values)).any()]:
        warnings.warn(f"control {name!r} is constant or NaN: left out", stacklevel=3)
        del found[name]
    ready = {name: clock.prepare(values)[:, 0] for name, values in found.items()}
    return ready, [name for name in ("log frequency", "sound power") if name not in found]


def _log_frequency(words: pd.DataFrame) -> Array | None:
    plain = {"".join(c for c in str(column).lower() if c.isalnum()): column for column in words.columns}
    column = next((plain[name] for name in FREQUENCY_NAMES if name in plain), None)
    if column is None or not pd.api.types.is_numeric_dtype(words[column]) or not words[column].notna().any():
        return None
    values = words[column].to_numpy(float)
    return np.log1p(values) if np.nanmin(values) >= 0 and np.nanmax(values) > COUNTED else values


def mirror(words: pd.DataFrame, rule: str) -> pd.DataFrame:
    """The words as if the story ran backwards, within the same span of time."""
    timed = words.dropna(subset=["onset", "offset"])
    total = timed["onset"].min() + timed["offset"].max()
    times = (timed["onset"] + timed["offset"]) / 2 if rule == "midpoint" else timed[rule]
    mirrored = timed.assign(onset=total - times, offset=total - times)
    return mirrored.sort_values("onset", kind="stable").reset_index(drop=True)

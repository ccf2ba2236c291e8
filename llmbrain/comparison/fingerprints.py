"""Is one model made from another? Functional networks of both, over the same text, against models that are not
related."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import rankdata

from llmbrain._validation import InputError, check_range, check_whole, seed_of
from llmbrain.brains.alignment import token_spans
from llmbrain.brains.series import standardize
from llmbrain.scanning import Scan
from llmbrain.stats import PUBLISHED_Z
from llmbrain.stats.matching import best_pairs
from llmbrain.stats.nulls import phase_randomize

Array = NDArray[np.float64]
PUBLISHED_SEED = 666
PUBLISHED_CUT = 0.5
RELATED = "related, or both follow the text better than the references do"


@dataclass
class ModelNetworks:
    """The networks of one model on a set of texts.

    Attributes
    ----------
    time_courses : list of array ``(n_tokens, K)``
        Of the components, one array a text.
    means : list of array ``(n_tokens, K)``
        The published series: mean of what the neurons beyond the threshold did; NaN where there is none.
    spans : list of int array ``(n_tokens, 2)``
        Characters of each token.
    texts : list of str
    """

    time_courses: list[Array]
    means: list[Array]
    spans: list[NDArray[np.int64]]
    texts: list[str]


@dataclass
class Fingerprint:
    """How alike the networks of two models are, as published and with what chance gives.

    Attributes
    ----------
    score : float
        Mean squared canonical correlation of the two sets of time courses on shared pieces of text: the share of one
        model's networks, as a space, that the other has too (0 to 1). It does not depend on which of many equally good
        rotations an ICA ended in, which the matched score does.
    matched_score : float
        Mean over matched networks (Hungarian) of the absolute Spearman correlation, per text, averaged over texts.
    reference : array
        The same score for every pair with a reference model; empty without any.
    p : float
        ``(b + 1) / (n + 1)`` against `reference`: how often models that are not related are as alike. NaN without any.
    p_shared : float
        The same against phase-randomised series: whether both follow the text at all. Two good models of one language
        do, so this says nothing about where they come from.
    verdict : str
    published_score, published_pairs : float, int
        Best pair, and number of pairs above .5, of the published fingerprint (longer series truncated, signed
        Spearman).
    matches : DataFrame
        network_a, network_b, rho (signed), one row a matched pair, best first.
    rho, published_rho : arrays ``(K_a, K_b)``
    """

    score: float
    matched_score: float
    reference: Array
    p: float
    p_shared: float
    verdict: str
    published_score: float
    published_pairs: int
    matches: pd.DataFrame
    rho: Array = field(repr=False)
    published_rho: Array = field(repr=False)


def fingerprint(
    model_a: Any,
    model_b: Any,
    texts: Sequence[str] | None = None,
    *,
    reference: Sequence[Any] = (),
    n_components: int = 20,
    threshold: float = PUBLISHED_Z,
    site: str = "block_out",
    n_permutations: int = 99,
    alpha: float = 0.05,
    random_state: int | None = PUBLISHED_SEED,
) -> Fingerprint:
    """Compare the functional networks of two models (arXiv 2601.22692), with a null.

    Parameters
    ----------
    model_a, model_b : (model, tokenizer), path, list of Scan, or ModelNetworks
        Any two architectures and tokenizers.
    texts : sequence of str, optional
        Read by both (10 in the paper); not needed where scans are passed.
    reference : sequence of the same kinds
        Models that are certainly not related to either: other seeds, other origins, best trained alike. Every pair of
        them, and each with both models, gives one draw; 6 models give 27.
    n_components, threshold, site, random_state
        Of the networks; the paper's are 20 or 64, 3.6, the output of every block, 666. Components are found by FastICA
        (cube) on the texts joined, each neuron z-scored.
    n_permutations : int
        Phase randomisations for `p_shared`.

    Returns
    -------
    Fingerprint
        The verdict is "related, or both follow the text better than the references do" if ``p <= alpha`` (two good
        models of one language are alike in what the text makes them do: take references that are as good), else
        "not told apart from unrelated models"; without a reference it is "undecided".
    """
    check_range("alpha", alpha, 0, 1, open_low=True, open_high=True)
    random_state = seed_of(random_state)
    settings: dict[str, Any] = {
        "n_components": n_components,
        "threshold": threshold,
        "site": site,
        "random_state": random_state,
    }
    a, b, *others = [networks_of(m, texts, **settings) for m in (model_a, model_b, *reference)]
    rho = align_and_correlate(a, b)
    score = shared_space(a, b)
    matched, rows, columns = _matched(rho)
    pairs = [(x, y) for i, x in enumerate(others) for y in (a, b, *others[i + 1 :])]
    drawn = np.array([shared_space(x, y) for x, y in pairs])
    p = (1 + np.sum(drawn >= score)) / (1 + len(drawn)) if len(drawn) else np.nan
    if not len(drawn):
        verdict = "undecided: no reference of unrelated models"
    elif 1 / (1 + len(drawn)) > alpha:
        verdict = f"undecided: {len(drawn)} pairs of unrelated models cannot give p <= {alpha:g}"
    else:
        verdict = RELATED if p <= alpha else "not told apart from unrelated models"
    matches = pd.DataFrame({"network_a": rows, "network_b": columns, "rho": rho[rows, columns]})
    published = published_correlations(a, b)
    best = float(np.nanmax(published)) if np.isfinite(published).any() else float("nan")
    return Fingerprint(
        score=score, matched_score=matched, reference=drawn, p=float(p), p_shared=_p_shared(a, b, score, n_permutations,
        random_state),
        verdict=verdict, published_score=best, published_pairs=int(np.sum(published > PUBLISHED_CUT)),
        matches=matches.sort_values("rho", key=lambda c: -c.abs()).reset_index(drop=True),
        rho=rho, published_rho=published,
    )  # fmt: skip


def networks_of(
    model: Any,
    texts: Sequence[str] | None = None,
    *,
    n_components: int = 20,
    threshold: float = PUBLISHED_Z,
    site: str = "block_out",
    random_state: int | None = PUBLISHED_SEED,
) -> ModelNetworks:
    """Networks of one model and their series; can be made once and passed to many calls of `fingerprint`."""
    if isinstance(model, ModelNetworks):
        return model
    scans = _scans(model, texts, site)
    from llmbrain.decomposition import GroupICA

    chosen = site if site in scans[0].sites else scans[0].site
    data = [scan.data(site=chosen) for scan in scans]
    joined = np.concatenate(data)
    ica = GroupICA(n_components=n_components, fun="cube", max_iter=500, random_state=random_state)
    courses = np.asarray(ica.fit([joined]).mixing_[0], dtype=np.float64)
    masks = np.abs(standardize(ica.components_.T).T) > threshold
    counts = masks.sum(axis=1)
    weights = np.divide(masks, counts[:, None], out=np.full(masks.shape, np.nan), where=counts[:, None] > 0)
    cuts = np.cumsum([len(d) for d in data])[:-1]
    means = [np.asarray(d, dtype=np.float64) @ np.nan_to_num(weights).T for d in data]
    for part in means:
        part[:, counts == 0] = np.nan
    return ModelNetworks(np.split(courses, cuts), means, [token_spans(s) for s in scans], [s.text for s in scans])


def _scans(model: Any, texts: Sequence[str] | None, site: str) -> list[Scan]:
    if isinstance(model, (list, tuple)) and model and all(isinstance(m, Scan) for m in model):
        return list(model)
    if texts is None or isinstance(texts, str) or not len(texts):
        raise InputError(f"texts={texts!r}: a list of texts that both models read is needed")
    from llmbrain.checkpoints import load_model
    from llmbrain.scanning import scan

    if isinstance(model, (str, os.PathLike)):
        model = load_model(os.fspath(model))
    try:
        network, tokenizer = model
    except (TypeError, ValueError):
        raise InputError(f"model of type {type(model).__name__}: pass (model, tokenizer), a path or scans") from None
    return scan(network, tokenizer, list(texts), site=site)


# -- one clock ---------------------------------------------------------------------------------------------------------


def common_units(spans: Sequence[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
    """Pieces of text that end where all tokenizers end a token.

    Parameters
    ----------
    spans : one int array ``(n_tokens, 2)`` a model
        Of the same text, from `token_spans`.

    Returns
    -------
    list of int array ``(n_tokens,)``
        Which piece each token lies in; -1 for tokens without characters. With one tokenizer, a piece is a token.
    """
    ends = spans[0][:, 1]
    for other in spans[1:]:
        ends = np.intersect1d(ends, other[:, 1])
    ends = np.unique(ends[ends > 0])
    units = []
    for span in spans:
        unit = np.searchsorted(ends, span[:, 1], side="left")
        units.append(np.where((span[:, 1] > span[:, 0]) & (unit < len(ends)), unit, -1))
    return units


def to_units(series: Array, unit: NDArray[np.int64], n_units: int) -> Array:
    """Mean of the tokens of each piece ``(n_units, K)``; NaN where a piece has no token."""
    inside = unit >= 0
    total = np.zeros((n_units, series.shape[1]))
    np.add.at(total, unit[inside], series[inside])
    count = np.bincount(unit[inside], minlength=n_units)[:, None]
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


def _on_common_units(models: Sequence[ModelNetworks]) -> list[list[Array]]:
    """Time courses of every model on the pieces that all share; ``[model][text] -> (n_units, K)``."""
    texts = models[0].texts
    if any(m.texts != texts for m in models):
        raise InputError(
            "the models were scanned with different texts: they must read the same ones, in the same order"
        )
    aligned: list[list[Array]] = [[] for _ in models]
    for t in range(len(texts)):
        units = common_units([m.spans[t] for m in models])
        n_units = 1 + max(int(u.max()) for u in units)
        series = [to_units(m.time_courses[t], u, n_units) for m, u in zip(models, units)]
        whole = np.all([np.isfinite(s).all(axis=1) for s in series], axis=0)
        if whole.sum() < 5:
            raise InputError(f"text {t}: the models have {int(whole.sum())} pieces in common: use longer texts")
        for i, s in enumerate(series):
            aligned[i].append(s[whole])
    return aligned


def _spearman(a: Array, b: Array) -> Array:
    """Spearman correlation of every column of `a` with every column of `b`; NaN for constant ones."""
    x, y = (standardize(rankdata(s, axis=0)) for s in (a, b))
    return x.T @ y / len(x)


def align_and_correlate(a: ModelNetworks, b: ModelNetworks) -> Array:
    """Spearman correlation of all pairs of networks on shared pieces of text, mean over texts ``(K_a, K_b)``."""
    left, right = _on_common_units([a, b])
    return np.mean([_spearman(x, y) for x, y in zip(left, right)], axis=0)


def published_correlations(a: ModelNetworks, b: ModelNetworks) -> Array:
    """As published: mean series of each network's neurons, the longer one cut, Spearman per text, mean over texts."""
    values = []
    for x, y in zip(a.means, b.means):
        n = min(len(x), len(y))
        values.append(_spearman(x[:n], y[:n]))
    return np.mean(values, axis=0)


def _matched(rho: Array) -> tuple[float, NDArray[np.int64], NDArray[np.int64]]:
    size = np.abs(np.nan_to_num(rho))
    rows, columns = best_pairs(size)
    return float(size[rows, columns].mean()), rows, columns


def shared_space(a: ModelNetworks, b: ModelNetworks) -> float:
    """Mean squared canonical correlation of the time courses of two models; see `Fingerprint.score`."""
    return _canonical(*_on_common_units([a, b]))


def _canonical(left: list[Array], right: list[Array]) -> float:
    bases = []
    for series in (left, right):
        joined = np.concatenate([s - s.mean(axis=0) for s in series])
        u, size, _ = np.linalg.svd(joined, full_matrices=False)
        bases.append(u[:, size > size[0] * 1e-8])
    overlap = np.linalg.norm(bases[0].T @ bases[1]) ** 2
    return float(overlap / min(basis.shape[1] for basis in bases))


def _p_shared(a: ModelNetworks, b: ModelNetworks, score: float, n_permutations: int, random_state: int) -> float:
    left, right = _on_common_units([a, b])
    rng = np.random.default_rng(random_state)
    null = [_canonical(left, [phase_randomize(y, rng) for y in right]) for _ in range(n_permutations)]
    return float((1 + np.sum(np.array(null) >= score)) / (1 + n_permutations))


def corrmap(
    template: ModelNetworks, models: Sequence[ModelNetworks], network: int, *, threshold: float = 0.5
) -> pd.DataFrame:
    """Find one network of a model in other models, whatever their shape, after EEGLAB's CORRMAP (Campos Viola 2009).

    Time courses stand in for scalp maps. The template's time course is correlated with all of all models; the best of
    each model beyond `threshold` is averaged with it (signs made equal), and the average is the template of a second
    round.

    Returns
    -------
    DataFrame
        One row a model: model (its place), network (best match), rho (signed, with the average), first_rho (with the
        template), found (``|rho| >= threshold``).
    """
    check_range("threshold", threshold, 0, 1)
    check_whole("network", network, 0, template.time_courses[0].shape[1] - 1)
    aligned = _on_common_units([template, *models])
    ranked = [[standardize(rankdata(s, axis=0)) for s in series] for series in aligned]
    target = [s[:, [network]] for s in ranked[0]]

    def correlate(target: list[Array]) -> list[Array]:
        return [np.mean([(t.T @ s)[0] / len(s) for t, s in zip(target, series)], axis=0) for series in ranked[1:]]

    first = correlate(target)
    kept = [(i, int(np.nanargmax(np.abs(r)))) for i, r in enumerate(first)]
    kept = [(i, k) for i, k in kept if abs(first[i][k]) >= threshold]
    average = [
        standardize(t[:, 0] + sum((np.sign(first[i][k]) * ranked[i + 1][j][:, k] for i, k in kept), np.zeros(len(t))))
        for j, t in enumerate(target)
    ]
    rows = []
    for i, r in enumerate(correlate(average)):
        k = int(np.nanargmax(np.abs(r)))
        rows.append({"model": i, "network": k, "rho": r[k], "first_rho": first[i][k], "found": abs(r[k]) >= threshold})
    return pd.DataFrame(rows)

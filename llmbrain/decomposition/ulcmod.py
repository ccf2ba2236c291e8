"""ULCMOD (arXiv 2603.17823): disjoint modules of neurons, found together with topics of the text that drive them.

After the definition in the authors' public program: samples of text are rows, neurons are columns, an entry is how
active the neuron was on the sample. Rows and columns are sorted into as many groups each; group k of the neurons is a
module, group k of the samples its topic.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, ClusterMixin, TransformerMixin
from sklearn.cluster import kmeans_plusplus
from sklearn.utils.validation import check_is_fitted

from llmbrain._validation import InputError, check_whole, legacy_generator
from llmbrain.anatomy.space import NeuronSpace
from llmbrain.decomposition.store import Arrays, Record, Saved
from llmbrain.scanning.inputs import Runs

Array = NDArray[np.float64]
FIRST_STEPS = 100  # of balanced k-means, at most
GAIN = 1e-8  # of the objective that a move must bring, relative
SAVED_ARRAYS = ("components_", "labels_", "topics_", "samples_", "means_", "scales_")
SAVED_VALUES = ("n_components_", "n_features_in_", "objective_", "activation_", "balance_", "n_iter_", "converged_",
                "origin_")  # fmt: skip


class ULCMOD(Saved, ClassNamePrefixFeaturesOutMixin, TransformerMixin, ClusterMixin, BaseEstimator):
    """Modules of neurons and topics of text, disjoint and across layers.

    ``A`` holds the mean absolute activity of each neuron on each sample of text, z-scored over samples. Looked for are
    ``K`` groups of samples ``S_k`` and of neurons ``U_k`` that maximize ``mean of A in the blocks (S_k, U_k)`` times
    the harmonic mean of the blocks' sizes. It starts from balanced k-means of the samples and ends by moving one neuron
    or sample at a time, in random order, to the group that raises the objective most.

    Parameters
    ----------
    n_components : int
        Modules, and topics.
    samples : int, optional
        Tokens in a sample; a run's last one may be shorter. Default: every event of a run is a sample, or the whole run
        where it has none (as published: one question, one sample). Names of conditions are never looked at.
    drop_positions : int
        Tokens at so many first positions of a context block belong to no sample (the attention sink); 0 as published.
    pca : int
        Principal components of the samples that the start is made from.
    n_init : int
        Random starts of its k-means.
    max_iter : int
        Rounds of moves over all neurons, then all samples.
    random_state : int, Generator, RandomState or None

    Attributes
    ----------
    labels_ : int array ``(n_neurons,)``
        Module of each neuron; -1 for one that is constant over samples.
    topics_ : int array ``(n_samples,)``
    samples_ : int array ``(n_samples, 3)``
        Run, first token and end of each sample.
    components_ : float32 array ``(n_components, n_neurons)``
        The modules as maps: in its module, a neuron's mean of A over the topic's samples (standard deviations); else 0.
    mixing_ : list of float32 array ``(n_tokens, n_components)``
        Time courses: how active the neurons of each module are at a token, each in standard deviations of A, on
        average.
    means_, scales_ : float64 array ``(n_neurons,)``
        Mean and standard deviation of each neuron's activity over samples; scale 0 where it is constant.
    objective_, activation_, balance_ : float
        The objective, and its two factors.
    n_iter_ : int
    converged_ : bool
        Whether the last round moved nothing. The publication stops after 5 rounds either way.
    n_components_ : int
    space_ : NeuronSpace or None
    origin_ : dict
        The `Scan.origin` of the runs, where they are of one scan in a store.

    References
    ----------
    Yu et al. 2026, Discovering decoupled functional modules in large language models, AAAI-26.
    """

    # As of `GroupICA`, for what reads both: the signals are of a model, so there is no brain, and no window of layers.
    brain_mask_ = None
    surface_ = None
    component_layers_ = None

    def __init__(
        self,
        n_components: int = 20,
        *,
        samples: int | None = None,
        drop_positions: int = 1,
        pca: int = 16,
        n_init: int = 10,
        max_iter: int = 5,
        random_state: int | np.random.Generator | np.random.RandomState | None = 0,
    ) -> None:
        self.n_components = n_components
        self.samples = samples
        self.drop_positions = drop_positions
        self.pca = pca
        self.n_init = n_init
        self.max_iter = max_iter
        self.random_state = random_state

    def fit(self, runs: Any, y: Any = None, *, space: NeuronSpace | None = None) -> ULCMOD:
        """Find the modules.

        Parameters
        ----------
        runs : list of Scan, array ``(n_tokens, n_neurons)``, NIfTI image or path
            One a run; read one at a time, twice, and never kept.
        y : None
            Ignored.
        space : NeuronSpace, optional
            Where the neurons of plain arrays lie.

        Raises
        ------
        InputError
            For fewer samples, or neurons that change, than modules; and for runs that cannot be read.
        """
        for name in ("n_components", "pca", "n_init", "max_iter"):
            check_whole(name, getattr(self, name), 1)
        check_whole("drop_positions", self.drop_positions, 0)
        if self.samples is not None:
            check_whole("samples", self.samples, 1)
        reader = Runs(runs, space=space)
        rows, self.samples_ = self._rows(reader)
        spread = rows.std(axis=0, ddof=1) if len(rows) > 1 else np.zeros(rows.shape[1])
        live = spread > 1e-8 * np.maximum(np.abs(rows).max(axis=0), 1e-30)
        for what, n in (("samples of text", len(rows)), ("neurons that are not constant over them", int(live.sum()))):
            if n < max(2, self.n_components):
                raise InputError(
                    f"n_components={self.n_components} modules need at least as many {what} (and 2), got {n}"
                )
        scores = (rows[:, live] - rows[:, live].mean(axis=0)) / spread[live]
        generator = legacy_generator(self.random_state)
        found = _Blocks.start(scores, self.n_components, self.pca, self.n_init, generator)
        self.converged_ = False
        for step in range(self.max_iter):
            self.n_iter_ = step + 1
            moved = found.move_neurons(generator) + found.move_samples(generator)
            if not moved:
                self.converged_ = True
                break
        self.labels_ = np.full(rows.shape[1], -1)
        self.labels_[live] = found.modules
        self.topics_ = found.topics
        self.activation_, self.balance_ = found.factors()
        self.objective_ = self.activation_ * self.balance_
        self.components_ = np.zeros((self.n_components, rows.shape[1]), dtype=np.float32)
        means = found.sums_of_neurons() / np.maximum(found.topic_sizes(), 1)[:, None]
        at = np.flatnonzero(live)
        self.components_[found.modules, at] = means[found.modules, np.arange(at.size)]
        self.means_, self.scales_ = rows.mean(axis=0), np.where(live, spread, 0.0)
        self.space_, self.origin_ = reader.space, reader.origin()
        self.n_features_in_, self.n_components_ = rows.shape[1], self.n_components
        self.mixing_ = self._courses(reader)
        return self

    def fit_transform(self, runs: Any, y: Any = None, **fit_params: Any) -> list[NDArray[np.float32]]:
        """Fit, and return ``mixing_``."""
        return self.fit(runs, y, **fit_params).mixing_

    def transform(self, runs: Any) -> list[NDArray[np.float32]]:
        """Time courses of the modules in other runs: a list of float32 arrays ``(n_tokens, n_components)``.

        Activities are scaled as in the samples that were fitted.
        """
        check_is_fitted(self, "components_")
        return self._courses(Runs(runs, space=self.space_))

    def _as_plain(self) -> tuple[Arrays, Record]:
        arrays: Arrays = {name: getattr(self, name) for name in SAVED_ARRAYS}
        record: Record = {
            "estimator": "ULCMOD",
            "parameters": self.get_params(),
            "space": None if self.space_ is None else self.space_.to_dict(),
            **{name: getattr(self, name) for name in SAVED_VALUES},
        }
        return arrays, record

    @classmethod
    def from_plain(cls, arrays: Arrays, record: Record) -> ULCMOD:
        """A fit made again from what `save` wrote."""
        found = cls(**record["parameters"])
        for name in SAVED_VALUES:
            setattr(found, name, record[name])
        for name in SAVED_ARRAYS:
            setattr(found, name, arrays[name])
        found.mixing_ = [arrays[name] for name in sorted(arrays) if name.startswith("mixing_")]
        found.space_ = None if record["space"] is None else NeuronSpace.from_dict(record["space"])
        return found

    @property
    def _n_features_out(self) -> int:
        """For ``get_feature_names_out``."""
        return self.n_components_

    def _courses(self, reader: Runs) -> list[NDArray[np.float32]]:
        """Mean over the neurons of each module of their scaled activity, at every token of every run."""
        at = np.flatnonzero(self.labels_ >= 0)
        weights = np.zeros((self.labels_.size, self.n_components))
        weights[at, self.labels_[at]] = 1 / self.scales_[at]
        weights /= np.maximum(np.bincount(self.labels_[at], minlength=self.n_components), 1)
        found = []
        for run in range(len(reader)):
            data = np.abs(reader[run])
            if data.shape[1] != self.n_features_in_:
                raise InputError(
                    f"X has {data.shape[1]} features, but ULCMOD is expecting {self.n_features_in_} features"
                )
            found.append(((data - self.means_) @ weights).astype(np.float32))
        return found

    def _rows(self, reader: Runs) -> tuple[Array, NDArray[np.int64]]:
        """Mean absolute activity of every sample ``(n_samples, n_neurons)``, and where the samples lie."""
        rows, places = [], []
        for run in range(len(reader)):
            data = np.abs(reader[run])
            positions = reader.positions(run)
            counts = np.ones(len(data), dtype=bool) if positions is None else positions >= self.drop_positions
            for start, stop in self._spans(reader, run, len(data)):
                part = counts[start:stop]
                if part.any():
                    rows.append(data[start:stop][part].mean(axis=0, dtype=np.float64))
                    places.append((run, start, stop))
        if not rows:
            raise InputError("runs hold no token outside the positions that drop_positions leaves out")
        return np.array(rows), np.array(places)

    def _spans(self, reader: Runs, run: int, n: int) -> Iterator[tuple[int, int]]:
        if self.samples is not None:
            yield from ((start, min(start + self.samples, n)) for start in range(0, n, self.samples))
            return
        events = reader.events(run)
        if events is None or not len(events):
            yield 0, n
            return
        for onset, duration in events[["onset", "duration"]].itertuples(index=False):
            yield int(onset), min(int(onset + duration), n)


@dataclass
class _Blocks:
    """A state of the search: groups, and what the objective is made of."""

    scores: Array  # (samples, neurons)
    topics: NDArray[np.int64]
    modules: NDArray[np.int64]
    k: int

    def __post_init__(self) -> None:
        own = self.topics[:, None] == self.modules[None]
        self.total = float(self.scores[own].sum())
        self._count()

    @classmethod
    def start(cls, scores: Array, k: int, pca: int, n_init: int, generator: np.random.RandomState) -> _Blocks:
        values, vectors = np.linalg.eigh(scores @ scores.T)
        order = np.argsort(-values)[: max(1, min(pca, len(scores) - 1))]
        points = vectors[:, order] * np.sqrt(np.maximum(values[order], 0))
        topics = balanced_kmeans(points, k, n_init, generator)
        onehot = np.eye(k)[topics]
        means = (onehot.T @ scores) / onehot.sum(axis=0)[:, None]
        return cls(scores, topics, means.argmax(axis=0), k)

    def _count(self) -> None:
        self.sizes = self.topic_sizes() * np.bincount(self.modules, minlength=self.k)

    def topic_sizes(self) -> NDArray[np.int64]:
        return np.bincount(self.topics, minlength=self.k)

    def sums_of_neurons(self) -> Array:
        """Sum of each neuron's scores over the samples of each topic ``(k, neurons)``."""
        return np.eye(self.k)[self.topics].T @ self.scores

    def factors(self) -> tuple[float, float]:
        """Mean score in the blocks, and harmonic mean of the sizes of those that are not empty."""
        return self.total / max(1, self.sizes.sum()), _harmonic(self.sizes)

    def move_neurons(self, generator: np.random.RandomState) -> int:
        return self._move(self.modules, self.sums_of_neurons(), self.topic_sizes(), generator)

    def move_samples(self, generator: np.random.RandomState) -> int:
        sums = np.eye(self.k)[self.modules].T @ self.scores.T
        return self._move(self.topics, sums, np.bincount(self.modules, minlength=self.k), generator)

    def _move(
        self, labels: NDArray[np.int64], sums: Array, weights: NDArray[np.int64], generator: np.random.RandomState
    ) -> int:
        """Every item once, to the group that raises the objective most; the number that moved.

        `sums` ``(k, items)`` is what an item adds to the total in each group, `weights` ``(k,)`` to the group's size.
        """
        moved, sizes = 0, self.sizes.astype(np.float64)
        for item in generator.permutation(labels.size):
            now = labels[item]
            inverse = np.divide(1.0, sizes, out=np.zeros(self.k), where=sizes > 0)
            left = sizes[now] - weights[now]
            grown = sizes + weights
            # sums of 1 / size, and counts of blocks that are not empty, after a move to each group
            after = inverse.sum() - inverse[now] + (1 / left if left > 0 else 0) - inverse
            after += np.divide(1.0, grown, out=np.zeros(self.k), where=grown > 0)
            count = (sizes > 0).sum() - (sizes[now] > 0) + (left > 0) - (sizes > 0) + (grown > 0)
            total = self.total - sums[now, item] + sums[:, item]
            size = sizes.sum() - weights[now] + weights
            with np.errstate(divide="ignore", invalid="ignore"):
                objective = np.where((size > 0) & (after > 0), total / size * count / after, 0.0)
            held = self.total / max(sizes.sum(), 1.0) * _harmonic(sizes)
            objective[now] = held
            best = int(objective.argmax())
            if best != now and objective[best] > held + GAIN * abs(held):
                self.total += sums[best, item] - sums[now, item]
                sizes[now] -= weights[now]
                sizes[best] += weights[best]
                labels[item] = best
                moved += 1
        self._count()
        return moved


def _harmonic(sizes: NDArray[Any]) -> float:
    some = sizes[sizes > 0]
    return float(some.size / (1 / some).sum()) if some.size else 0.0


def balanced_kmeans(points: Array, k: int, n_init: int, generator: np.random.RandomState) -> NDArray[np.int64]:
    """k-means with groups of equal size (they differ by one point at most): the best of some starts.

    Parameters
    ----------
    points : array ``(n, dimensions)``
        At least k.

    Returns
    -------
    labels : int array ``(n,)``
    """
    n = len(points)
    least, extra = n // k, n % k
    # places in groups: the first `least` of each must be taken, one more may be
    places = np.tile(np.arange(k), least + bool(extra))
    must = np.arange(places.size) < k * least
    best, lowest = np.zeros(n, dtype=np.int64), np.inf
    for _ in range(n_init):
        centers = kmeans_plusplus(points, k, random_state=generator.randint(2**31 - 1))[0]
        labels = np.full(n, -1)
        for _ in range(FIRST_STEPS):
            distance = ((points[:, None] - centers[None]) ** 2).sum(axis=2)
            cost = distance[:, places] - np.where(must, distance.max() * n + 1.0, 0.0)
            taken = places[linear_sum_assignment(cost)[1]]
            if np.array_equal(taken, labels):
                break
            labels = taken
            centers = np.array([points[labels == j].mean(axis=0) for j in range(k)])
        error = float(((points - centers[labels]) ** 2).sum())
        if error < lowest:
            best, lowest = labels, error
    return best

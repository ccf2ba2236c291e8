"""Runs of a mixture of experts: stored by visit, read as if they were dense.

A token visits few of a layer's experts. So its neurons are stored for those alone, beside their numbers and gates (see
`llmbrain.hooks.sites.BY_VISIT`), and put where they belong when they are read; all others are 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmbrain._validation import InputError
from llmbrain.anatomy.experts import ExpertAnatomy
from llmbrain.anatomy.space import NeuronSpace
from llmbrain.scanning.scans import Signals


@dataclass(frozen=True)
class Mixture:
    """What a store must know of a mixture of experts to be read.

    Attributes
    ----------
    sites : tuple of str
        What was asked for.
    shared : tuple of int
        Neurons that every token passes, by layer.
    counts, widths, visits : tuple of int
        Routed experts of each layer, neurons of each of them, and how many a token calls; 0 in dense layers.
    """

    sites: tuple[str, ...]
    shared: tuple[int, ...]
    counts: tuple[int, ...]
    widths: tuple[int, ...]
    visits: tuple[int, ...]

    @classmethod
    def of(cls, body: ExpertAnatomy, sites: Sequence[str], visits: Mapping[int, int]) -> Mixture:
        """Of a model, and how many experts a token was seen to call in each layer."""
        routed = dict(body.routed)
        layers = range(len(body.layers))
        return cls(
            tuple(sites),
            tuple(sum(mlp.width for mlp in layer.shared) for layer in body.layers),
            tuple(routed[i].count if i in routed else 0 for i in layers),
            tuple(routed[i].width if i in routed else 0 for i in layers),
            tuple(visits.get(i, 0) for i in layers),
        )

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Mixture:
        """Rebuild one from `to_record`."""
        try:
            mixture = cls(**{name: tuple(value) for name, value in record.items()})
            numbers = (mixture.shared, mixture.counts, mixture.widths, mixture.visits)
            right = len({len(n) for n in numbers}) == 1 and all(type(v) is int and v >= 0 for n in numbers for v in n)
        except TypeError:
            right = False
        if not right:
            raise InputError("mixture of manifest.json does not hold what a scan of experts says: it was edited")
        return mixture

    def to_record(self) -> dict[str, Any]:
        """For JSON."""
        return {name: list(getattr(self, name)) for name in self.__dataclass_fields__}

    @property
    def experts(self) -> list[tuple[int, ...]]:
        """Widths of the experts of each layer, shared ones first."""
        parts = zip(self.shared, self.counts, self.widths)
        return [(*([shared] if shared else []), *[width] * count) for shared, count, width in parts]

    def space(self, site: str) -> NeuronSpace:
        """Where the units of a site lie."""
        if site == "router":
            return NeuronSpace(self.counts)
        return NeuronSpace([sum(layer) for layer in self.experts], experts=self.experts)

    def stored(self) -> dict[str, list[int]]:
        """How wide each kind of `BY_VISIT` is in each layer."""
        kinds = {"visited": list(self.visits), "weight": list(self.visits)}
        if "neuron" in self.sites:
            kinds["shared"] = list(self.shared)
            kinds["routed"] = [k * width for k, width in zip(self.visits, self.widths)]
        return {kind: widths for kind, widths in kinds.items() if any(widths)}


class MixtureSignals:
    """Neurons or gates of a run, put where they belong; see `llmbrain.scanning.scans.Signals`."""

    def __init__(self, mixture: Mixture, site: str, parts: Mapping[str, Signals], n_tokens: int) -> None:
        self.mixture, self.site, self.parts, self.n_tokens = mixture, site, parts, n_tokens
        self.space = mixture.space(site)

    def read(self, layers: Sequence[int], start: int, stop: int) -> NDArray[np.float32]:
        """See `Signals`."""
        columns = np.cumsum([0, *(self.space.widths[layer] for layer in layers)])
        values = np.zeros((stop - start, int(columns[-1])), dtype=np.float32)
        for layer, first, last in zip(layers, columns, columns[1:]):
            self._fill(values[:, first:last], layer, start, stop)
        return values

    def _fill(self, into: NDArray[np.float32], layer: int, start: int, stop: int) -> None:
        mixture, neurons = self.mixture, self.site == "neuron"
        shared = mixture.shared[layer] if neurons else 0
        if shared:
            into[:, :shared] = self.parts["shared"].read([layer], start, stop)
        if not mixture.counts[layer]:
            return
        width = mixture.widths[layer] if neurons else 1
        called = self.parts["visited"].read([layer], start, stop).astype(np.int64)
        found = self.parts["routed" if neurons else "weight"].read([layer], start, stop)
        routed = np.zeros((len(into), mixture.counts[layer], width), dtype=np.float32)
        row, place = np.nonzero(called >= 0)
        routed[row, called[row, place]] = found.reshape(*called.shape, width)[row, place]
        into[:, shared:] = routed.reshape(len(into), -1)


class VisitSignals:
    """Which routed experts were called, 1 or 0; see `llmbrain.scanning.scans.Signals`."""

    def __init__(self, mixture: Mixture, visited: Signals, n_tokens: int) -> None:
        self.mixture, self.visited, self.n_tokens = mixture, visited, n_tokens
        self.space = mixture.space("router")

    def read(self, layers: Sequence[int], start: int, stop: int) -> NDArray[np.float32]:
        """See `Signals`."""
        read = []
        for layer in layers:
            values = np.zeros((stop - start, self.mixture.counts[layer]), dtype=np.float32)
            if values.shape[1]:
                called = self.visited.read([layer], start, stop).astype(np.int64)
                row, place = np.nonzero(called >= 0)
                values[row, called[row, place]] = 1
            read.append(values)
        return np.concatenate(read, axis=1) if read else np.empty((stop - start, 0), dtype=np.float32)

"""`Scan`: what every neuron did at every token of one text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from llmbrain._validation import InputError, check_option, check_whole
from llmbrain.anatomy.space import NeuronSpace
from llmbrain.hooks.text import Run, cut_runs
from llmbrain.scanning.stimuli import EVENT_COLUMNS, check_events

Layers = int | Sequence[int] | NDArray[np.int64] | None
Tokens = int | slice | Sequence[int] | NDArray[Any] | None


class Signals(Protocol):
    """Where the recorded numbers of one run and one site come from: memory, or a store."""

    space: NeuronSpace
    n_tokens: int

    def read(self, layers: Sequence[int], start: int, stop: int) -> NDArray[np.float32]:
        """The units of `layers`, in that order, at tokens ``start..stop``; ``(stop - start, units)``."""


class ArraySignals:
    """Numbers that are already an array ``(n_tokens, n_neurons)``."""

    def __init__(self, array: NDArray[Any], space: NeuronSpace) -> None:
        self.array, self.space, self.n_tokens = array, space, len(array)

    def read(self, layers: Sequence[int], start: int, stop: int) -> NDArray[np.float32]:
        """See `Signals`."""
        rows = self.array[start:stop]
        if list(layers) == list(range(self.space.n_layers)):
            return rows.astype(np.float32)
        parts = [rows[:, self.space.layer_slice(layer)] for layer in layers]
        return np.concatenate(parts, axis=1, dtype=np.float32)


class JoinedSignals:
    """The units of several sites as one: all layers of the first, then all layers of the second, and so on."""

    def __init__(self, parts: Sequence[Signals]) -> None:
        self.parts = list(parts)
        self.space = NeuronSpace([width for part in parts for width in part.space.widths])
        self.n_tokens = parts[0].n_tokens
        self._places = [(part, layer) for part in parts for layer in range(part.space.n_layers)]

    def read(self, layers: Sequence[int], start: int, stop: int) -> NDArray[np.float32]:
        """See `Signals`."""
        if list(layers) == list(range(self.space.n_layers)):
            read = [part.read(range(part.space.n_layers), start, stop) for part in self.parts]
        else:
            read = [self._places[i][0].read([self._places[i][1]], start, stop) for i in layers]
        return np.concatenate(read, axis=1) if read else np.empty((stop - start, 0), dtype=np.float32)


class PartSignals:
    """Some of the tokens of a run."""

    def __init__(self, whole: Signals, start: int, stop: int) -> None:
        self.whole, self.start = whole, start
        self.space, self.n_tokens = whole.space, stop - start

    def read(self, layers: Sequence[int], start: int, stop: int) -> NDArray[np.float32]:
        """See `Signals`."""
        return self.whole.read(layers, self.start + start, self.start + stop)


class Scan:
    """One run: every neuron of a model at every token of one text.

    Made by `llmbrain.scan`, `llmbrain.load_scans` or `Scan.from_array`. The numbers stay where they are (on disk, or in
    memory in the model's dtype) until `data` or `iter_data` asks for them.

    Attributes
    ----------
    space : NeuronSpace
        Where the units of the first site lie; `spaces` has that of every site.
    sites : tuple of str
        What was recorded; `site` is the first.
    n_tokens, n_neurons : int
        Number of tokens (volumes), and of units of the first site (voxels).
    token_ids : int64 array ``(n_tokens,)``
    tokens : list of str
        Each token, decoded alone.
    offsets : int64 array ``(n_tokens, 2)`` or None
        Where in `text` the characters of each token lie; ``(0, 0)`` for special tokens. None where not known.
    positions : int64 array ``(n_tokens,)``
        Position of each token in the block that the model read.
    events : DataFrame
        ``onset``, ``duration`` (in tokens) and ``trial_type``; no rows where the text has no conditions.
    text, name, model_id : str
    origin : dict of str
        Of a scan in a store: digests of what was scanned (``scan``) and of the model's ``weights``, and the ``model``'s
        name. Empty for others.
    """

    def __init__(
        self,
        signals: Mapping[str, Signals],
        *,
        name: str = "run-0001",
        text: str = "",
        token_ids: ArrayLike | None = None,
        tokens: Sequence[str] | None = None,
        offsets: ArrayLike | None = None,
        block_size: int | None = None,
        events: pd.DataFrame | None = None,
        model_id: str = "",
        visits: Signals | None = None,
        origin: Mapping[str, str] | None = None,
    ) -> None:
        self._visits = visits
        self._signals = dict(signals)
        self.sites = tuple(self._signals)
        self.site = self.sites[0]
        self.spaces = {site: part.space for site, part in self._signals.items()}
        self.n_tokens = self._signals[self.site].n_tokens
        n = self.n_tokens
        self.name, self.text, self.model_id = name, text, model_id
        self.origin = dict(origin or {})
        # A study of many tokens holds all its scans: int32, nothing that can be computed, no copies of strings.
        self._ids = (
            np.full(n, -1, np.int32) if token_ids is None else np.asarray(token_ids).astype(np.int32, copy=False)
        )
        self.tokens = [""] * n if tokens is None else tokens if isinstance(tokens, list) else list(tokens)
        self._offsets = None if offsets is None else np.asarray(offsets).reshape(-1, 2).astype(np.int32, copy=False)
        self._block_size, self._first = block_size or max(n, 1), 0  # the first token's place in the run it was cut from
        self._events: pd.DataFrame | None = None
        parts: dict[str, Any] = {"token_ids": self._ids, "tokens": self.tokens, "offsets": self._offsets}
        for what, value in parts.items():
            if value is not None and len(value) != n:
                raise InputError(f"{what} has {len(value)} entries, but the scan has {n} tokens")
        if events is not None:
            self.events = events

    @classmethod
    def from_array(
        cls,
        data: ArrayLike,
        space: NeuronSpace | None = None,
        *,
        site: str = "neuron",
        events: pd.DataFrame | None = None,
        name: str = "run-0001",
        token_ids: ArrayLike | None = None,
        tokens: Sequence[str] | None = None,
        text: str = "",
        model_id: str = "",
    ) -> Scan:
        """A scan of numbers made elsewhere (a phantom, a NIfTI); they are not copied.

        Parameters
        ----------
        data : array ``(n_tokens, n_neurons)``
        space : NeuronSpace, optional
            Default: all neurons in one layer.

        Raises
        ------
        InputError
            If `data` is not two-dimensional or does not fit `space`.
        """
        array = np.asarray(data)
        if array.ndim != 2 or not array.size:
            raise InputError(f"data of shape {array.shape} must be (n_tokens, n_neurons), not empty")
        space = NeuronSpace([array.shape[1]]) if space is None else space
        if array.shape[1] != space.n_neurons:
            raise InputError(f"data of shape {array.shape} does not fit a space of {space.n_neurons} neurons")
        signals = {site: ArraySignals(array, space)}
        known = None if tokens is None else list(tokens)
        return cls(signals, name=name, text=text, token_ids=token_ids, tokens=known, events=events, model_id=model_id)

    def joined(self, *sites: str) -> Scan:
        """The same run with the units of several sites as one, so that networks can span them.

        Parameters
        ----------
        *sites : str
            Two or more of `sites`; ``"neuron", "head"`` gives networks of neurons and heads, which `lesion` and
            `plan_pruning` understand.

        Returns
        -------
        Scan
            With the one site ``"neuron+head"``; "layer" ``n_layers + i`` of its space holds layer i of the second.
            Nothing is copied.

        Raises
        ------
        InputError
            If a site was not recorded, or fewer than two are named.
        """
        if len(set(sites)) != len(sites) or len(sites) < 2:
            raise InputError(f"sites={sites!r} must name at least two different sites")
        signals = JoinedSignals([self._signals[check_option("sites", site, self.sites)] for site in sites])
        scan = copy(self)
        scan._signals = {"+".join(sites): signals}
        scan.sites, scan.site = ("+".join(sites),), "+".join(sites)
        scan.spaces = {scan.site: signals.space}
        return scan

    def cut(self, run_length: int | None) -> list[Scan]:
        """The run as several of about equal length, of at most `run_length` tokens each; nothing is copied.

        Each keeps its tokens, its part of the text and of the events, and the positions that the model gave its tokens.
        """
        if run_length is None or self.n_tokens <= check_whole("run_length", run_length, 1):
            return [self]
        whole = Run(self.name, self.text, self._ids, self.tokens, self._offsets, self._events)
        parts, start = [], 0
        for run in cut_runs([whole], run_length):
            stop = start + len(run.tokens)
            part = Scan(
                {site: PartSignals(signals, start, stop) for site, signals in self._signals.items()}, name=run.name,
                text=run.text, token_ids=run.token_ids, tokens=run.tokens, offsets=run.offsets,
                block_size=self._block_size, events=run.events, model_id=self.model_id,
                visits=None if self._visits is None else PartSignals(self._visits, start, stop),
                origin=self.origin,
            )  # fmt: skip
            part._first = self._first + start
            parts.append(part)
            start = stop
        return parts

    # -- tokens --------------------------------------------------------------------------------------------------------

    @property
    def token_ids(self) -> NDArray[np.int64]:
        """Id of each token; -1 where not known."""
        return self._ids.astype(np.int64)

    @property
    def offsets(self) -> NDArray[np.int64] | None:
        """Where in `text` the characters of each token lie."""
        return None if self._offsets is None else self._offsets.astype(np.int64)

    @property
    def positions(self) -> NDArray[np.int64]:
        """Position of each token in the block that the model read."""
        return (self._first + np.arange(self.n_tokens)) % self._block_size

    @property
    def events(self) -> pd.DataFrame:
        """Which tokens belong to which condition."""
        return pd.DataFrame(columns=list(EVENT_COLUMNS)) if self._events is None else self._events

    @events.setter
    def events(self, events: pd.DataFrame) -> None:
        table = check_events(events)
        ends = table["onset"] + table["duration"]
        if len(ends) and float(ends.max()) > self.n_tokens:
            raise InputError(f"events end at token {ends.max()}, but the scan has {self.n_tokens} tokens")
        self._events = table

    # -- sizes ---------------------------------------------------------------------------------------------------------

    @property
    def space(self) -> NeuronSpace:
        """Where the units of the first site lie."""
        return self.spaces[self.site]

    @property
    def n_neurons(self) -> int:
        """Number of units of the first site."""
        return self.space.n_neurons

    # -- numbers -------------------------------------------------------------------------------------------------------

    def data(self, layers: Layers = None, tokens: Tokens = None, *, site: str | None = None) -> NDArray[np.float32]:
        """Read what is asked for, and nothing else.

        Parameters
        ----------
        layers : int or sequence of int, optional
            Default: all, in order.
        tokens : int, slice or sequence of int, optional
            Default: all. Negative numbers count from the end, as in numpy; a boolean mask works too.
        site : str, optional
            One of `sites`; default: the first.

        Returns
        -------
        float32 array ``(n_tokens, n_neurons)``
            Of the chosen tokens and layers; always two-dimensional, and yours to change.

        Raises
        ------
        InputError
            If a layer, token or site does not exist; `CorruptStoreError` if a file of the store was changed.
        """
        site = self.site if site is None else check_option("site", site, self.sites)
        signals = self._signals[site]
        chosen = self._layers(layers, signals.space)
        if tokens is None:
            return signals.read(chosen, 0, self.n_tokens)
        rows = self._rows(tokens)
        if not len(rows):
            return np.empty((0, sum(signals.space.widths[i] for i in chosen)), dtype=np.float32)
        start, stop = int(rows.min()), int(rows.max()) + 1
        values = signals.read(chosen, start, stop)
        contiguous = len(rows) == stop - start and bool((np.diff(rows) == 1).all())
        return values if contiguous else values[rows - start]

    def visits(self, layers: Layers = None, tokens: Tokens = None) -> NDArray[np.bool_]:
        """Of a mixture of experts: which routed experts each token called.

        Parameters
        ----------
        layers, tokens
            As in `data`.

        Returns
        -------
        bool array ``(n_tokens, n_experts)``
            Of the chosen tokens and layers, in the order of site ``"router"``. Neurons of an expert that was not called
            are 0 in `data`: silent by routing, not measured as 0.

        Raises
        ------
        InputError
            If this is no scan of a mixture of experts, or of its site ``"block_out"`` alone.
        """
        if self._visits is None:
            raise InputError(f"scan {self.name!r} holds no visits: it is none of the experts of a mixture of experts")
        chosen = self._layers(layers, self._visits.space)
        if tokens is None:
            return self._visits.read(chosen, 0, self.n_tokens) > 0
        return self._visits.read(chosen, 0, self.n_tokens)[self._rows(tokens)] > 0

    def iter_data(
        self, max_tokens: int = 512, layers: Layers = None, *, site: str | None = None
    ) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        """Read in pieces of at most `max_tokens` tokens; yields ``(slice of tokens, array)``."""
        check_whole("max_tokens", max_tokens, 1)
        for start in range(0, self.n_tokens, int(max_tokens)):
            part = slice(start, min(start + int(max_tokens), self.n_tokens))
            yield part, self.data(layers, part, site=site)

    def _layers(self, layers: Layers, space: NeuronSpace) -> list[int]:
        if layers is None:
            return list(range(space.n_layers))
        index = np.atleast_1d(np.asarray(layers))
        if index.ndim != 1 or (index.size and index.dtype.kind not in "iu"):
            raise InputError(f"layers={layers!r} must be a layer number or a sequence of them")
        for layer in index.tolist():
            if not 0 <= layer < space.n_layers:
                raise InputError(f"layers={layer} does not exist: allowed are 0 to {space.n_layers - 1}")
        return [int(layer) for layer in index]

    def _rows(self, tokens: Tokens) -> NDArray[np.int64]:
        index = tokens if isinstance(tokens, slice) else np.asarray(tokens)
        if not isinstance(index, slice) and not index.size:
            return np.empty(0, dtype=np.int64)
        try:
            return np.atleast_1d(np.arange(self.n_tokens)[index])
        except IndexError:
            raise InputError(
                f"tokens={tokens!r} must be a slice, whole numbers or a mask within the {self.n_tokens} tokens"
            ) from None

    # -- export --------------------------------------------------------------------------------------------------------

    def to_nifti(self, path: str | Path, *, site: str | None = None) -> Path:
        """Write a 4D NIfTI (column, row, layer, token), float32; ``.nii`` is written piece by piece.

        The space travels in a header extension and in a ``.json`` beside the file; see `llmbrain.read_nifti`.

        Parameters
        ----------
        path : path
            Ends in ``.nii`` or ``.nii.gz``.
        """
        from llmbrain.imaging.nifti import write_nifti

        site = self.site if site is None else check_option("site", site, self.sites)
        blocks = (values for _, values in self.iter_data(site=site))
        facts = {"site": site, "name": self.name, "model_id": self.model_id}
        return write_nifti(path, blocks, self.spaces[site], self.n_tokens, facts)

    def __repr__(self) -> str:
        sites = ", ".join(f"{site} {space.n_neurons}" for site, space in self.spaces.items())
        return f"<Scan {self.name!r}: {self.n_tokens} tokens x {sites}>"

"""Runs and how to prepare them: read again at every pass, one at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from llmbrain._progress import bar
from llmbrain._validation import InputError
from llmbrain.decomposition.prepare.preprocess import PreparedRun, Preprocessing, Statistics, prepare
from llmbrain.distributed import Ranks
from llmbrain.scanning.inputs import Runs, find_non_finite


@dataclass
class Source:
    """Runs and how to prepare them; every iteration reads them again, one at a time.

    Attributes
    ----------
    runs : Runs
    settings : Preprocessing
    device, dtype : torch.device, torch.dtype
    mask : bool array (n_neurons,), optional
        Neurons to use.
    progress : bool
    n_features : int, optional
        Neurons that the maps have, where there are maps already.
    """

    runs: Runs
    settings: Preprocessing
    device: torch.device
    dtype: torch.dtype
    mask: np.ndarray | None = None
    progress: bool = False
    n_features: int | None = None
    _statistics: dict[int, Statistics] = field(default_factory=dict)

    def facts(self, parameters: dict[str, Any], team: Ranks) -> dict[str, Any]:
        """What all ranks must be given alike: plain parameters of the estimator, the mask, the runs."""
        if team.size == 1:
            return {}
        own = ("device", "progress", "random_state", "mask")
        plain = {k: v for k, v in parameters.items() if k not in own and isinstance(v, (int, float, str, type(None)))}
        mask = None if self.mask is None else hashlib.sha256(np.ascontiguousarray(self.mask).tobytes()).hexdigest()[:16]
        return {"parameters": plain, "mask": mask, "runs": [len(self.runs), self.runs.facts()]}

    def prepared(
        self, step: str, limit: int | None = None, *, among: Sequence[int] | None = None
    ) -> Iterator[PreparedRun]:
        """Yield every run (the first `limit`, those `among`), preprocessed; `step` is what the progress bar says."""
        indices = range(len(self.runs))[:limit] if among is None else among
        for index in bar(indices, desc=step, unit="run", show=self.progress):
            yield self.read(index)  # no name here keeps the last run in memory while the next is read

    def read(self, index: int) -> PreparedRun:
        """One run, preprocessed."""
        known = self._statistics.get(index)
        away = self.device.type != "cpu"  # a device converts half precision faster than the CPU
        data = torch.as_tensor(self.runs.read(index, check=False, narrow=away)).to(self.device)
        if known is None:
            find_non_finite(data, self.runs.name(index), self.runs.space)
        width = data.shape[1]
        if self.n_features not in (None, width):
            raise InputError(
                f"{self.runs.name(index)} has {width} neurons, the fit {self.n_features}: X has {width} features, but "
                f"GroupICA is expecting {self.n_features} features as input"
            )
        run = prepare(
            data,
            self.settings,
            device=self.device,
            dtype=self.dtype,
            positions=self.runs.positions(index),
            neurons=self._neurons(data.shape[1]),
            name=self.runs.name(index),
            statistics=known,
        )
        if not bool(run.live.any()):
            raise InputError(f"{self.runs.name(index)} has no variance: all its neurons are constant over tokens")
        # what was measured is kept for the next pass, up to the size of one run: memory does not grow with runs
        if known is None and len(self._statistics) < run.n_tokens // (8 + self.settings.degree):
            self._statistics[index] = run.statistics
        return run

    def _neurons(self, n_neurons: int) -> torch.Tensor | None:
        if self.mask is None:
            return None
        if self.mask.dtype != bool or self.mask.shape != (n_neurons,):
            raise InputError(
                f"mask has shape {self.mask.shape} and dtype {self.mask.dtype}: {n_neurons} bools are needed"
            )
        if not self.mask.any():
            raise InputError("mask removes everything: no neuron is True")
        return torch.from_numpy(self.mask).to(self.device)

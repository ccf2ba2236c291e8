"""Runs in their common principal subspace, reduced once, for everything that repeats an ICA many times."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from llmbrain._validation import InputError
from llmbrain.decomposition.group_ica import GroupICA
from llmbrain.decomposition.prepare.pca import numerical_rank, project, row_signs, whiten
from llmbrain.decomposition.prepare.reduce import Window, default_run_components, group_subspace, reduce_runs
from llmbrain.decomposition.solvers import SOLVERS, unmix
from llmbrain.decomposition.time_courses import Regressor, standardize_maps
from llmbrain.decomposition.workers import workers

if TYPE_CHECKING:
    from llmbrain.anatomy.space import NeuronSpace

Array = NDArray[np.float64]


def estimator(n_components: int, options: dict[str, Any]) -> GroupICA:
    """A checked `GroupICA` of these settings; repeats need spatial ICA over all layers, by fastica or picard."""
    known = GroupICA().get_params()
    for name in options:
        if name not in known or name in ("n_components", "random_state", "n_init"):
            allowed = sorted(set(known) - {"n_components", "random_state", "n_init"})
            raise InputError(f"{name}={options[name]!r} is not an option: allowed are {', '.join(allowed)}")
    ica = GroupICA(n_components, **options)
    ica._check_parameters()
    for name, value in {"axis": "space", "scope": "model"}.items():
        if getattr(ica, name) != value:
            raise InputError(f"{name}={getattr(ica, name)!r} cannot be repeated here: only {value!r}")
    if SOLVERS[ica.method].from_start is None:
        others = " or ".join(repr(name) for name, solver in SOLVERS.items() if solver.from_start)
        raise InputError(f"method={ica.method!r} has no random start to repeat: use {others}")
    return ica


def unmix_once(
    ica: GroupICA, white: torch.Tensor, n_live: int, random_state: np.random.RandomState
) -> tuple[Array, bool, int]:
    """One ICA of white data ``(k, n_neurons)`` from one random start: its unmixing, whether it converged, steps."""
    fit = unmix(white, replace(ica.solver_settings(), n_init=1), random_state, n_live)
    return np.asarray(fit.unmixing, dtype=np.float64), fit.converged, fit.n_iter


@dataclass
class GroupSpace:
    """Runs in their common principal subspace.

    Attributes
    ----------
    ica : GroupICA
        Holds the settings; not fitted.
    basis : Tensor ``(size, n_neurons)``
        White: ``basis @ basis.T / n_live`` is the identity. Any orthonormal rotation of it is white as well, and r of
        two maps in it is the product of their coordinates.
    live : bool Tensor ``(n_neurons,)``
    n_live : int
    tokens : list of array ``(n_tokens, size)``
        Coordinates of every fitted token; empty if they were not asked for.
    space : NeuronSpace or None
    """

    ica: GroupICA
    basis: torch.Tensor
    live: torch.Tensor
    n_live: int
    tokens: list[Array]
    space: NeuronSpace | None

    @classmethod
    def of(cls, scans: Any, n_components: int, size: int, options: dict[str, Any], *, tokens: bool) -> GroupSpace:
        """Read the runs once, or twice for `tokens`; `size` is cut to the rank of what the runs leave."""
        ica = estimator(n_components, options)
        source = ica._source(scans, None)
        rows = 4 * max(size, default_run_components(n_components, ica.cca))
        with workers(source.device):
            window = Window(slice(0, source.runs[0].shape[1]), None, n_components)
            reduced = reduce_runs(
                source, [window], ica.run_components, ica.cca, center=ica.center_tokens, max_rows=rows
            )
            (stack,), live = reduced.stacks, reduced.live
            n_live = int(live.sum())
            rank = numerical_rank(whiten(stack, 1).eigenvalues, stack.dtype)
            if n_components > rank:
                raise InputError(f"n_components={n_components} is more than the rank of the reduced runs, {rank}")
            basis = group_subspace(stack, min(size, rank), live, center=ica.center_tokens).data
            coordinates = []
            if tokens:
                regressor = Regressor(basis)
                for run in source.prepared("project"):
                    coordinates.append(regressor.time_courses(run).cpu().numpy()[run.keep])
        return cls(ica, basis, live, n_live, coordinates, source.runs.space)

    def repeat(
        self, n_components: int, *, start: np.random.RandomState, sample: np.random.RandomState | None
    ) -> tuple[Array, bool, int]:
        """One more ICA from a random `start`, of resampled tokens if there is a `sample` generator.

        Returns the coordinates of its maps in the basis, ``(n_components, size)`` of unit length, whether it
        converged, and its steps.
        """
        size = len(self.basis)
        turn = np.eye(size)[:n_components] if sample is None else self._sampled_axes(n_components, sample)
        white = project(torch.from_numpy(turn).to(self.basis.device), self.basis)
        signs = row_signs(white)
        white, turn = white * signs[:, None], turn * signs.cpu().numpy()[:, None]
        unmixing, converged, steps = unmix_once(self.ica, white, self.n_live, start)
        found = unmixing @ turn
        return found / np.linalg.norm(found, axis=1, keepdims=True), converged, steps

    def _sampled_axes(self, n_components: int, random_state: np.random.RandomState) -> Array:
        """Leading principal axes of runs, and tokens within runs, drawn with replacement."""
        covariance = np.zeros((len(self.basis), len(self.basis)))
        for run in random_state.randint(len(self.tokens), size=len(self.tokens)):
            drawn = self.tokens[run][random_state.randint(len(self.tokens[run]), size=len(self.tokens[run]))]
            drawn = drawn - drawn.mean(axis=0)
            covariance += drawn.T @ drawn
        return np.linalg.eigh(covariance)[1][:, ::-1][:, :n_components].T.copy()

    def maps(self, coordinates: Array) -> NDArray[Any]:
        """Maps ``(k, n_neurons)`` from their coordinates, in the units and sign of ``GroupICA.components_``."""
        with workers(self.basis.device):
            raw = project(torch.from_numpy(coordinates).to(self.basis.device), self.basis)
            return standardize_maps(raw, self.live).cpu().numpy()

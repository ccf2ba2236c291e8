"""The published rule of functional-network pruning (arXiv 2508.05239), from its authors' code.

Per group of texts: the gate and up signals of all tokens are z-scored, an SVD gives the first k left vectors over
signals (not weighted by singular values), FastICA (cube, symmetric) turns them into spatial maps, which are z-scored. A
signal stays if |z| > tau in any map of any group, a neuron if either of its signals does. So the score of a neuron is
the largest |z| it reaches, and tau is the cut-off that leaves exactly the budget.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning

from llmbrain._validation import InputError, check_option
from llmbrain.anatomy.families import Anatomy
from llmbrain.anatomy.units import NEURONS, Units
from llmbrain.decomposition import fastica
from llmbrain.decomposition.prepare.pca import row_signs
from llmbrain.distributed import Parcel, ranks
from llmbrain.hooks.text import input_device
from llmbrain.pruning.calibrate.windows import signals_of_windows
from llmbrain.pruning.criteria.base import Criterion, Evidence, Material, ends, register

SCOPES = ("layer", "window", "model")
WINDOW_LAYERS = 4
GROUP_SIZE = 40  # texts in a group
STEPS, SURE = 60, 1e-9  # power steps for singular vectors on a GPU, and how wrong they may be, relative to the largest


@register("published", "scans", standardize=False, allocation="global")
class Published(Criterion):
    """Largest |z| of a unit in any map of any group (arXiv 2508.05239)."""

    insists = True

    def __init__(self) -> None:
        self._scores: dict[Units, list[NDArray[np.float64]]] = {}

    def sites(self, body: Anatomy) -> tuple[str, ...]:
        """The factors of a gated neuron."""
        return ("gate", "up") if all(layer.gated for layer in body.layers) else ()

    def prepare(self, material: Material, units: Units) -> None:
        """One ICA or more over the scans."""
        self._scores[units] = _of_neurons(material) if units is NEURONS else _of_heads(material, units)

    def score(self, evidence: Evidence) -> torch.Tensor:
        """As prepared."""
        return torch.as_tensor(self._scores[evidence.units][evidence.layer.index])

    def protect(self, n_layers: int, notes: list[str]) -> tuple[int, ...]:
        """The first 3 and last 2 layers, where there are more than 5."""
        if not ends(n_layers):
            rule = "the published rule keeps the first 3 and last 2 layers"
            notes.append(f"{rule}; with {n_layers} layers none is protected")
        return ends(n_layers)

    def facts(
        self, dense: Callable[[], list[NDArray[np.float64]]], kept: Sequence[NDArray[np.int64]], protect: Sequence[int]
    ) -> dict[str, Any]:
        """The cut-off tau between what is kept and what is removed."""
        cut = [
            np.delete(scores, of).max()
            for i, (scores, of) in enumerate(zip(dense(), kept))
            if i not in protect and len(of) < len(scores)
        ]
        return {"threshold": float(max(cut)) if cut else 0.0}


def _of_neurons(material: Material) -> list[NDArray[np.float64]]:
    """Scores of neurons by the published rule."""
    gated = all(layer.gated for layer in material.body.layers)
    sites = material.rule.get("sites") or (("gate", "up") if gated else ("neuron",))
    if not gated and sites == ("neuron",):
        material.notes.append(
            "this model has no gate: the published rule reads the neuron signal instead of gate and up"
        )
    result = _by_rule(material, material.body.widths, **{**material.rule, "sites": sites})
    material.details["published"] = result.details
    return result.scores


def _of_heads(material: Material, units: Units) -> list[NDArray[np.float64]]:
    """Scores of groups by the same rule at the site ``head``: the best head's.

    A layer has too few heads for an ICA of its own, so one ICA takes the heads of all layers.
    """
    widths = material.body.n_heads
    result = _by_rule(material, widths, **{**material.rule, "sites": ("head",), "scope": "model"})
    material.details["published_heads"] = result.details
    material.notes.append("heads by the published rule: one ICA of all heads, a group as high as its best head")
    return [scores.reshape(n, -1).max(1) for scores, n in zip(result.scores, units.counts(material.body))]


def _by_rule(material: Material, widths: Sequence[int], *, sites: Sequence[str], **rule: Any) -> PublishedScores:
    """Scores of units at `sites`, from scans that have them or from the calibration windows."""
    scans = material.scans
    if not scans or any(s not in scan.sites for scan in scans for s in sites):
        if material.windows is None:
            raise InputError(f"method='published' needs scans with the sites {list(sites)}, or calibration texts")
        scans = signals_of_windows(material.model, material.body, material.windows, sites)
    options = {"n_groups": -(-len(scans) // GROUP_SIZE), "random_state": material.random_state,
               "device": input_device(material.model), **rule}  # fmt: skip
    return published_scores(scans, widths, sites=sites, **options)


@dataclass
class PublishedScores:
    """Largest |z| of each neuron, ``(n_neurons,)`` a layer, and what a reader of the plan should know."""

    scores: list[NDArray[np.float64]]
    details: dict[str, Any] = field(default_factory=dict)


def published_scores(
    scans: Sequence[Any],
    widths: Sequence[int],
    *,
    sites: Sequence[str] = ("gate", "up"),
    scope: str = "layer",
    n_components: int = 128,
    n_groups: int = 1,
    max_iter: int = 300,
    tol: float = 1e-4,
    random_state: int | None = 0,
    device: torch.device | str = "cpu",
) -> PublishedScores:
    """Score neurons by the published rule. The ranks of a group share the ICAs.

    Parameters
    ----------
    scans : sequence of Scan
        With the sites `sites` (the publication records ``gate`` and ``up``; a model without a gate has ``neuron``).
    widths : sequence of int
        Neurons per layer.
    sites : sequence of str
    scope : str
        ``"layer"``: an ICA a layer, as published; ``"window"``: one for four layers; ``"model"``: one for all.
    n_components : int
        Maps k in each ICA; fewer where tokens or signals are fewer.
    n_groups : int
        The scans are dealt into so many groups in order, each with its own ICA.
    max_iter, tol : int, float
        Of FastICA.
    random_state : int or None
        Of FastICA's start.
    device : torch.device or str
        Where the singular vectors are computed.

    Returns
    -------
    PublishedScores
        ``details`` says how many ICAs there were and how many did not converge (they are used, as in the publication).
    """
    check_option("scope", scope, SCOPES)
    missing = [s for s in sites if any(s not in scan.sites for scan in scans)]
    if not scans or missing:
        raise InputError(f"the published rule needs scans with the sites {list(sites)}: {missing or 'scans'} missing")
    for scan in scans:
        if any(scan.spaces[s].widths != tuple(widths) for s in sites):
            raise InputError(f"scan {scan.name!r} is of a model with other widths than {list(widths)}")
    n_groups = max(1, min(n_groups, len(scans)))
    groups = [[scans[i] for i in part] for part in np.array_split(np.arange(len(scans)), n_groups)]
    scores = [np.zeros(w) for w in widths]
    failed, n_maps = 0, []
    parts = [(layers, group) for layers in _scopes(scope, len(widths)) for group in groups]

    def find(i: int) -> Parcel:
        layers, group = parts[i]
        read = _reader(group, layers, sites)
        maps, converged = _maps(read().to(device), n_components, max_iter, tol, random_state)
        peak = np.abs(maps).max(axis=0).reshape(len(sites), -1).max(axis=0)
        return Parcel({"peak": torch.from_numpy(peak)}, [bool(converged), len(maps)])

    team = ranks()
    with team.job("published"):
        for (layers, _), parcel in zip(parts, team.each(len(parts), "published", find)):
            converged, n = parcel.record
            failed += not converged
            n_maps.append(n)
            borders = np.cumsum([widths[i] for i in layers])[:-1]
            for layer, part in zip(layers, np.split(parcel.tensors["peak"].numpy(), borders)):
                scores[layer] = np.maximum(scores[layer], part)
    if failed:
        warnings.warn(
            f"{failed} of {len(n_maps)} FastICA runs of the published rule did not converge in {max_iter} steps; their "
            "maps are used, as in the publication",
            ConvergenceWarning,
            stacklevel=2,
        )
    details = {"scope": scope, "sites": list(sites), "groups": n_groups, "ica_runs": len(n_maps),
               "ica_not_converged": failed, "maps_per_ica": [min(n_maps), max(n_maps)]}  # fmt: skip
    return PublishedScores(scores, details)


def _scopes(scope: str, n_layers: int) -> list[list[int]]:
    size = {"layer": 1, "window": WINDOW_LAYERS, "model": n_layers}[scope]
    return [list(range(i, min(i + size, n_layers))) for i in range(0, n_layers, size)]


def _reader(group: Sequence[Any], layers: list[int], sites: Sequence[str]) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        parts = [np.concatenate([scan.data(layers, site=site) for scan in group]) for site in sites]
        return torch.from_numpy(np.concatenate(parts, axis=1))

    return read


def _maps(
    signals: torch.Tensor, n_components: int, max_iter: int, tol: float, random_state: int | None
) -> tuple[NDArray[np.float64], bool]:
    """z-scored spatial maps ``(k, signals)`` of tokens x signals, and whether FastICA converged."""
    x = signals.double()
    x = x - x.mean(0)
    spread = x.std(0, correction=0)
    x = x / torch.where(spread < torch.finfo(torch.float32).eps, torch.ones_like(spread), spread)
    k = min(n_components, x.shape[1] - 1, x.shape[0] - 1)
    if k < 2:
        raise InputError(f"{x.shape[0]} tokens are too few for the published rule: at least 3 are needed")
    # Left singular vectors of X^T by the smaller Gram matrix: tokens or signals.
    if x.shape[0] < x.shape[1]:
        values, vectors = _leading(x @ x.T, k)
        left = x.T @ vectors
        left = left / values.clamp_min(values[-1] * 1e-12).sqrt()
    else:
        left = _leading(x.T @ x, k)[1]
    left = left.flip(1)
    white = _whiten(left * row_signs(left.T)).cpu()
    result = fastica(
        white, fun="cube", random_state=random_state, max_iter=max_iter, tol=tol, n_samples=white.shape[1], warn=False
    )
    maps = result.unmixing @ white.numpy()
    return (maps - maps.mean(1, keepdims=True)) / maps.std(1, keepdims=True), result.converged


def _leading(gram: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest eigenvalues, ascending, and their vectors.

    A GPU takes seconds to find all of them: there block power steps find those that are wanted, all where these are not
    sure.
    """
    if gram.device.type != "cpu" and 6 * k < len(gram):
        generator = torch.Generator().manual_seed(0)
        block = torch.randn(len(gram), 3 * k, generator=generator, dtype=gram.dtype).to(gram.device)
        for _ in range(STEPS):
            block = torch.linalg.qr(gram @ block)[0]
        values, vectors = torch.linalg.eigh(block.T @ gram @ block)
        values, found = values[-k:], block @ vectors[:, -k:]
        if bool((gram @ found - found * values).norm(dim=0).max() <= SURE * values[-1]):
            return values, found
    values, vectors = torch.linalg.eigh(gram)
    return values[-k:], vectors[:, -k:]


def _whiten(left: torch.Tensor) -> torch.Tensor:
    """Centre the k vectors over signals and make them white: ``(k', signals)``, unit variance.

    By the inverse square root of their covariance: their singular values are all but equal, so that the vectors of an
    SVD would be arbitrary, and with them the start of FastICA.
    """
    centred = left - left.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    lost = values < 1e-10 * values[-1]
    if bool(lost.any()):  # a constant vector was among them
        return ((vectors[:, ~lost] / values[~lost].sqrt()).T @ centred.T) * np.sqrt(len(left))
    return (vectors / values.sqrt()) @ vectors.T @ centred.T * np.sqrt(len(left))

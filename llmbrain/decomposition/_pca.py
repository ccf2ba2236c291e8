"""PCA through the Gram matrix of the small side, PCA over runs that grows with neither runs nor tokens, and whitening."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from llmbrain._validation import InputError
from llmbrain.decomposition._chunks import Workers, workers

_GRAM_COLUMNS = 8192  # one block's product in single precision; blocks are added in double


def gram(rows: torch.Tensor) -> torch.Tensor:
    """``rows @ rows.T`` in float64 for (n_rows, n_columns) float32 or float64 `rows`, summed block by block."""
    n_rows, n_columns = rows.shape
    with workers(rows.device) as team:
        total = torch.zeros((n_rows, n_rows), dtype=torch.float64, device=rows.device)
        width = n_columns if rows.device.type != "cpu" else _GRAM_COLUMNS
        for part in team.map(lambda block: rows[:, block] @ rows[:, block].T, n_columns, width=width):
            total += part
    return total


def project(weights: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``weights @ rows`` for (k, n_rows) and (n_rows, n_columns), computed block by block in the dtype of `rows`."""
    weights = weights.to(rows.dtype)
    out = torch.empty((weights.shape[0], rows.shape[1]), dtype=rows.dtype, device=rows.device)

    def block(columns: slice) -> None:
        torch.matmul(weights, rows[:, columns], out=out[:, columns])

    with workers(rows.device) as team:
        for _ in team.map(block, rows.shape[1], rows=rows.shape[0]):
            pass
    return out


def _eigh(matrix: torch.Tensor, team: Workers) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues (falling) and eigenvectors of a symmetric float64 matrix; negative rounding becomes 0."""
    if matrix.shape[0] > 512:
        with team.all_threads():
            values, vectors = torch.linalg.eigh(matrix)
    else:
        values, vectors = torch.linalg.eigh(matrix)
    return values.flip(0).clamp_min(0.0), vectors.flip(1)


@dataclass
class RunPCA:
    """Principal components of one run.

    Attributes
    ----------
    rows : Tensor (k, n_neurons)
        Component maps, each as long as its singular value.
    eigenvalues : float64 Tensor (min(n_tokens, n_neurons),)
        Squared singular values, all of them, falling.
    total : float
        Their sum: the run's whole variance.
    """

    rows: torch.Tensor
    eigenvalues: torch.Tensor
    total: float


def run_pca(data: torch.Tensor, n_components: int | float) -> RunPCA:
    """PCA of one (n_tokens, n_neurons) run, which must be centred already.

    Parameters
    ----------
    data : Tensor (n_tokens, n_neurons)
    n_components : int or float
        How many, or the share of variance to keep; never more than the run's rank.
    """
    n_tokens, n_neurons = data.shape
    with workers(data.device) as team:
        tall = n_neurons < n_tokens
        values, vectors = _eigh(gram(data.T if tall else data), team)
        total = float(values.sum())
        if not total > 0:
            raise InputError("a run has no variance: all of its neurons are constant")
        rank = numerical_rank(values, data.dtype)
        if isinstance(n_components, float):
            share = torch.cumsum(values, 0) / total
            n_components = int(torch.searchsorted(share, n_components)) + 1
        k = min(n_components, rank)
        if tall:
            rows = (vectors[:, :k] * values[:k].sqrt()).T.to(data.dtype).contiguous()
        else:
            rows = project(vectors[:, :k].T.contiguous(), data)
    return RunPCA(rows, values, total)


def numerical_rank(eigenvalues: torch.Tensor, dtype: torch.dtype) -> int:
    """How many eigenvalues of a Gram matrix of `dtype` data rise above its rounding error."""
    return int((eigenvalues > 16 * torch.finfo(dtype).eps * eigenvalues[0]).sum())


class GroupPCA:
    """PCA over runs, one run at a time (MELODIC's incremental group PCA, Smith et al. 2014, NeuroImage 101).

    The reduced runs are stacked; when the stack outgrows `max_rows` it is replaced by its own leading components, each as
    long as its singular value. Up to that point the result is the PCA of all runs together, exactly.

    Parameters
    ----------
    max_rows : int
        Most rows kept between runs: memory is ``max_rows x n_neurons``, whatever the number of runs.
    """

    def __init__(self, max_rows: int) -> None:
        self.max_rows = max_rows
        self._parts: list[torch.Tensor] = []

    @property
    def n_rows(self) -> int:
        """Rows held now."""
        return sum(len(part) for part in self._parts)

    def add(self, rows: torch.Tensor) -> None:
        """Take one reduced run, (k, n_neurons)."""
        self._parts.append(rows)
        if self.n_rows > 2 * self.max_rows:
            stack = self.stack()
            with workers(stack.device) as team:
                _, vectors = _eigh(gram(stack), team)
                self._parts = [project(vectors[:, : self.max_rows].T.contiguous(), stack)]

    def stack(self) -> torch.Tensor:
        """All rows as one (n_rows, n_neurons) tensor."""
        if len(self._parts) > 1:
            self._parts = [torch.cat(self._parts)]
        return self._parts[0]


@dataclass
class Whitened:
    """White data for ICA.

    Attributes
    ----------
    data : Tensor (k, n_columns)
        ``data @ data.T / n_samples`` is the identity.
    eigenvalues : float64 Tensor (n_rows,)
        Squared singular values of what was whitened, falling.
    whitening, dewhitening : float64 Tensor (k, n_rows), (n_rows, k)
        ``data = whitening @ rows`` and ``rows ~ dewhitening @ data``.
    """

    data: torch.Tensor
    eigenvalues: torch.Tensor
    whitening: torch.Tensor
    dewhitening: torch.Tensor


def whiten(rows: torch.Tensor, n_components: int | None = None, *, n_samples: int | None = None) -> Whitened:
    """Leading principal components of (n_rows, n_columns) `rows`, rotated to unit variance and no correlation.

    Parameters
    ----------
    rows : Tensor (n_rows, n_columns)
        Centred over columns; columns are the samples.
    n_components : int, optional
        How many to keep; all rows by default.
    n_samples : int, optional
        Columns that are not constant 0, when some are.

    Raises
    ------
    InputError
        When the data have a lower rank than `n_components`; the message names it. (scikit-learn's own whitening can lose a
        component without a word here: it scales eigenvectors by the sign of an entry that may be 0.)
    """
    n_rows, n_columns = rows.shape
    k = n_rows if n_components is None else n_components
    n_samples = n_columns if n_samples is None else n_samples
    with workers(rows.device) as team:
        values, vectors = _eigh(gram(rows), team)
        rank = numerical_rank(values, rows.dtype) if bool(values[0] > 0) else 0
        if k > rank:
            raise InputError(f"n_components={k} is more than the rank of the data, {rank}: ask for at most {rank}")
        scale = (values[:k] / n_samples).sqrt()
        whitening = (vectors[:, :k] / scale).T.contiguous()
        data = project(whitening, rows)
        # single precision leaves the small components slightly correlated: take out what is left
        rest = gram(data) / n_samples
        lengths, turn = torch.linalg.eigh(rest)
        if bool((lengths < 0.5).any()):
            raise InputError(f"n_components={k}: the data are too close to a lower rank to be whitened in {rows.dtype}")
        correction = (turn / lengths.sqrt()) @ turn.T
        data = project(correction, data)
    whitening = correction @ whitening
    dewhitening = (vectors[:, :k] * scale) @ torch.linalg.inv(correction)
    return Whitened(data, values, whitening, dewhitening)


def split_rows(matrix: np.ndarray, lengths: list[int]) -> list[np.ndarray]:
    """Cut a stacked (sum(lengths), k) array into one array a run."""
    return np.split(matrix, np.cumsum(lengths)[:-1])

"""PCA through the Gram matrix of the small side, PCA over any number of runs, and whitening."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.linalg import eigh
from threadpoolctl import ThreadpoolController

from llmbrain._validation import InputError
from llmbrain.decomposition.prepare.krylov import few, leading_of_matrix, leading_rows
from llmbrain.decomposition.workers import workers

if TYPE_CHECKING:
    from llmbrain.decomposition.prepare.preprocess import PreparedRun

_WIDTH = 1024  # columns of one product in single precision; products are added in double
_TILE = 64
_LARGE = 1024  # from here on, products are large enough for the threads of BLAS itself


def _add_gram(total: torch.Tensor, y: torch.Tensor) -> None:
    """Add the lower triangle of ``y @ y.T``, tile by tile."""
    if y.device.type != "cpu":
        total += y @ y.T
        return
    for start in range(0, len(y), _TILE):
        stop = min(start + _TILE, len(y))
        total[start:stop, :stop] += y[start:stop] @ y[:stop].T


def gram_of_blocks(
    block: Callable[[slice], torch.Tensor], n_rows: int, n_columns: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """``Y @ Y.T`` (n_rows, n_rows) and the row sums of a matrix Y that is read block by block, in float64."""
    with workers(device) as team:

        def part(lane: slice) -> tuple[torch.Tensor, torch.Tensor]:
            total = torch.zeros((n_rows, n_rows), dtype=torch.float64, device=device)
            sums = torch.zeros(n_rows, dtype=torch.float64, device=device)
            width = _WIDTH if device.type == "cpu" else max(_WIDTH, 64 * 1024**2 // n_rows)
            for start in range(lane.start, lane.stop, width):
                y = block(slice(start, min(start + width, lane.stop)))
                _add_gram(total, y)
                sums += y.sum(dim=1)
            return total, sums

        if device.type != "cpu" or n_rows > _LARGE:
            with team.all_threads():
                total, sums = part(slice(0, n_columns))
        else:
            # a fixed number of partial sums, whatever the number of cores
            total, sums = team.sum(part, n_columns, width=max(_WIDTH, -(-n_columns // 16)))
    return total.tril() + total.tril(-1).T, sums


def gram(rows: torch.Tensor) -> torch.Tensor:
    """``rows @ rows.T`` in float64 for (n_rows, n_columns) float32 or float64 `rows`."""
    return gram_of_blocks(lambda part: rows[:, part], rows.shape[0], rows.shape[1], rows.device)[0]


def project_blocks(
    weights: torch.Tensor, block: Callable[[slice], torch.Tensor], n_columns: int, dtype: torch.dtype
) -> torch.Tensor:
    """``weights @ Y`` for (k, n_rows) weights and a matrix Y that is read block by block."""
    weights = weights.to(dtype)
    out = torch.empty((weights.shape[0], n_columns), dtype=dtype, device=weights.device)

    def part(columns: slice) -> None:
        torch.matmul(weights, block(columns), out=out[:, columns])

    with workers(weights.device) as team:
        for _ in team.map(part, n_columns, rows=weights.shape[1]):
            pass
    return out


def project(weights: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``weights @ rows`` for (k, n_rows) and (n_rows, n_columns), block by block in the dtype of `rows`."""
    return project_blocks(weights, lambda part: rows[:, part], rows.shape[1], rows.dtype)


def symmetric_eigen(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues (falling) and eigenvectors of a symmetric float64 matrix; negative rounding becomes 0."""
    with workers(matrix.device) as team:
        if matrix.shape[0] > _LARGE // 2:
            with team.all_threads():
                values, vectors = torch.linalg.eigh(matrix)
        else:
            values, vectors = torch.linalg.eigh(matrix)
    return values.flip(0).clamp_min(0.0), vectors.flip(1)


def leading_eigen(matrix: torch.Tensor, n_components: int | float, n_columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Leading eigenvalues (falling) and eigenvectors of a symmetric float64 matrix: at least `n_components` of them.

    All of them where a share is wanted, or many. Of a large matrix, a few by block Krylov iteration
    (`llmbrain.decomposition.prepare.krylov`): components that stand out of the noise are then as exact as the others'
    rounding; among those that do not, the directions are not unique anyway.

    Parameters
    ----------
    matrix : float64 Tensor (n, n)
    n_components : int or float
    n_columns : int
        Columns of the rows whose products the matrix holds.
    """
    n = len(matrix)
    if isinstance(n_components, float) or 4 * n_components > n:
        return symmetric_eigen(matrix)
    if n <= _LARGE and matrix.device.type == "cpu":
        return _some_eigen(matrix, n_components)
    if n > _LARGE and few(n_components, n):
        found = leading_of_matrix(matrix, n_components, n_columns)
        if found is not None:
            return found.values, found.basis @ found.turn
    return symmetric_eigen(matrix)


def _some_eigen(matrix: torch.Tensor, n_components: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As `leading_eigen`, by LAPACK's syevr: half the time of all eigenvectors. On one thread: more would only spin."""
    n = len(matrix)
    with _blas().limit(limits=1, user_api="blas"):
        values, vectors = eigh(matrix.numpy(), subset_by_index=(n - n_components, n - 1), check_finite=False)
    if len(values) < n_components or not np.isfinite(values).all():  # syevr can give up where values span too much
        return symmetric_eigen(matrix)
    return torch.from_numpy(values[::-1].copy()).clamp_min(0.0), torch.from_numpy(vectors[:, ::-1].copy())


@cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController()


@dataclass
class RunPCA:
    """Principal components of one run.

    Attributes
    ----------
    rows : Tensor (k, n_neurons)
        Component maps, each as long as its singular value.
    eigenvalues : float64 Tensor (n_found,)
        Squared singular values, falling: all, or of the leading components where that saves much (`leading_eigen`).
    total : float
        The sum of all squared singular values: the run's whole variance.
    """

    rows: torch.Tensor
    eigenvalues: torch.Tensor
    total: float


def pca_of_run(run: PreparedRun, columns: slice, n_components: int | float, *, center: bool = True) -> RunPCA:
    """PCA of the kept tokens of one run over some neurons, each token centred over the live ones (if `center`).

    Parameters
    ----------
    run : PreparedRun
    columns : slice
        The neurons.
    n_components : int or float
        How many, or the share of variance to keep; never more than the run's rank.
    """
    n_neurons, live = columns.stop - columns.start, run.live[columns]
    if n_neurons < run.n_kept:
        return run_pca(run.matrix(columns, center=center), n_components)

    def block(part: slice) -> torch.Tensor:
        return run.kept_block(slice(columns.start + part.start, columns.start + part.stop))

    if run.n_kept > _LARGE and few(n_components, run.n_kept):
        found = leading_rows(block, run.n_kept, live, int(n_components), run.dtype, center=center)
        if found is not None:
            size = _size(found.values, n_components, run.dtype)
            return RunPCA(found.rows[:size], found.values, found.total)

    # centring takes n * mean mean' from the Gram matrix: no centred copy is made
    matrix, sums = gram_of_blocks(block, run.n_kept, n_neurons, run.device)
    mean = sums / int(live.sum())
    if center:
        matrix -= torch.outer(mean, sums)
    values, vectors = leading_eigen(matrix, n_components, n_neurons)
    weights = vectors[:, : _size(values, n_components, run.dtype)].T.contiguous()
    rows = project_blocks(weights, block, n_neurons, run.dtype)
    if not center:
        rows *= live
        return RunPCA(rows, values, float(matrix.trace()))
    rows -= (weights @ mean).to(run.dtype)[:, None] * live
    return RunPCA(rows, values, float(matrix.trace()))


def run_pca(data: torch.Tensor, n_components: int | float) -> RunPCA:
    """PCA of one (n_tokens, n_neurons) run that is centred already; `n_components` as in `pca_of_run`."""
    n_tokens, n_neurons = data.shape
    matrix = gram(data.T if n_neurons < n_tokens else data)
    values, vectors = leading_eigen(matrix, n_components, max(data.shape))
    vectors = vectors[:, : _size(values, n_components, data.dtype)]
    if n_neurons < n_tokens:
        rows = (vectors * values[: vectors.shape[1]].sqrt()).T.to(data.dtype).contiguous()
    else:
        rows = project(vectors.T.contiguous(), data)
    return RunPCA(rows, values, float(matrix.trace()))


def _size(eigenvalues: torch.Tensor, n_components: int | float, dtype: torch.dtype) -> int:
    """A number or share of components as a number, at most the rank."""
    if isinstance(n_components, float):
        share = torch.cumsum(eigenvalues, 0) / eigenvalues.sum()  # all are known for a share
        n_components = int((share < n_components).sum()) + 1
    return min(n_components, numerical_rank(eigenvalues, dtype))


def numerical_rank(eigenvalues: torch.Tensor, dtype: torch.dtype) -> int:
    """How many eigenvalues of a Gram matrix of `dtype` data rise above its rounding error."""
    if not eigenvalues.numel() or not bool(eigenvalues[0] > 0):
        return 0
    return int((eigenvalues > 16 * torch.finfo(dtype).eps * eigenvalues[0]).sum())


class GroupPCA:
    """PCA over runs, one run at a time (MELODIC's incremental group PCA, Smith et al. 2014, NeuroImage 101).

    The reduced runs are stacked; when the stack outgrows twice `max_rows` it is replaced by its own leading components,
    each as long as its singular value. Until then the result is the PCA of the stacked runs, exactly.

    Parameters
    ----------
    max_rows : int
        Most rows kept between runs: memory is ``max_rows x n_neurons``, whatever the number of runs.

    Attributes
    ----------
    parts : list of (int, Tensor)
        What is held: the number of a run, or -1 for what stands for several, and rows.
    """

    def __init__(self, max_rows: int) -> None:
        self.max_rows = max_rows
        self.parts: list[tuple[int, torch.Tensor]] = []

    @property
    def n_rows(self) -> int:
        """Rows held now."""
        return sum(len(rows) for _, rows in self.parts)

    def add(self, rows: torch.Tensor, number: int = 0) -> None:
        """Take one reduced run, (k, n_neurons), or a part that another process holds."""
        self.parts.append((number, rows))
        if self.n_rows > 2 * self.max_rows:
            stack = self.stack()
            _, vectors = symmetric_eigen(gram(stack))
            self.parts = [(-1, project(vectors[:, : self.max_rows].T.contiguous(), stack))]

    def stack(self) -> torch.Tensor:
        """All rows as one (n_rows, n_neurons) tensor, in the order of runs."""
        if len(self.parts) > 1:
            ordered = sorted(self.parts, key=lambda part: part[0])
            self.parts = [(-1, torch.cat([rows for _, rows in ordered]))]
        return self.parts[0][1]


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


def row_signs(rows: torch.Tensor) -> torch.Tensor:
    """+1 or -1 for each row: with it, the row's largest entry is positive (scikit-learn's ``svd_flip``).

    An eigenvector has no sign of its own; which one LAPACK gives depends on threads, ranks and device. ICA from a given
    random start must not.
    """
    largest = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True))[:, 0]
    return torch.where(largest < 0, -1.0, 1.0).to(rows.dtype)


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
        When the data have a lower rank than `n_components`; the message names it. (scikit-learn's own whitening can
        lose a component without a word: it scales eigenvectors by the sign of an entry that may be 0.)
    """
    n_rows, n_columns = rows.shape
    k = n_rows if n_components is None else n_components
    n_samples = n_columns if n_samples is None else n_samples
    values, vectors = symmetric_eigen(gram(rows))
    rank = numerical_rank(values, rows.dtype)
    if k > rank:
        raise InputError(f"n_components={k} is more than the rank of the data, {rank}: ask for at most {rank}")
    scale = (values[:k] / n_samples).sqrt()
    whitening = (vectors[:, :k] / scale).T.contiguous()
    data = project(whitening, rows)
    signs = row_signs(data)
    data *= signs[:, None]
    whitening *= signs[:, None]
    vectors = vectors[:, :k] * signs
    # single precision leaves the small components slightly correlated: take out what is left
    lengths, turn = torch.linalg.eigh(gram(data) / n_samples)
    if bool((lengths < 0.5).any()):
        raise InputError(f"n_components={k}: the data are too close to a lower rank to be whitened in {rows.dtype}")
    correction = (turn / lengths.sqrt()) @ turn.T
    data = project(correction, data)
    whitening = correction @ whitening
    dewhitening = (vectors * scale) @ torch.linalg.inv(correction)
    return Whitened(data, values, whitening, dewhitening)

"""Leading components of long runs without their Gram matrix: block Krylov iteration on the data (Musco & Musco 2015).

With n tokens, V neurons and k wanted components, the Gram matrix takes n * n * V multiplications and additions by
symmetry; a basis of 3 k directions, which is what most spectra need, takes 12 k * n * V of both together, in narrow
products that stay in cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from llmbrain.decomposition.workers import workers

Block = Callable[[slice], torch.Tensor]

_STEPS = 10  # most blocks of the basis; spectra that fall like a power of the rank need 5 or 6
_FEWEST = 4  # blocks before it is asked
_NARROWEST = 16
_CHUNK = 1024  # columns whose products are added in single precision before they are added in double
_CACHE_BYTES = 1536 * 1024  # a piece of the data that stays in cache between its two products
_SAMPLE = 8  # one column of so many gives the start
_TOLERANCE = 0.1
_STIR = 0.01  # share of each block that does not follow from the last


@dataclass
class Leading:
    """Leading eigenpairs of a symmetric matrix G, in a basis of blocks.

    Attributes
    ----------
    values : float64 Tensor (k,)
        Falling.
    turn : float64 Tensor (size, k)
        Eigenvectors in the basis.
    basis : float64 Tensor (n, size)
        Orthonormal.
    """

    values: torch.Tensor
    turn: torch.Tensor
    basis: torch.Tensor


def few(n_components: int | float, n: int) -> bool:
    """Whether so few of `n` components are a matter for this module."""
    return not isinstance(n_components, float) and 10 * n_components <= n and n >= 2 * _STEPS * _NARROWEST


def block_size(n_components: int) -> int:
    """Columns of a block: half of what is wanted. Fewer would need fewer products in all, but slower ones."""
    return max(_NARROWEST, -(-n_components // 2))


def start_columns(n_components: int) -> int:
    """Columns that `leading_pairs` starts from: those of a block, and as many to stir the next ones with."""
    return 2 * block_size(n_components)


def leading_pairs(
    product: Callable[[torch.Tensor], torch.Tensor],
    start: torch.Tensor,
    n_components: int,
    total: float,
    n_columns: int,
    dtype: torch.dtype,
) -> Leading | None:
    """Leading eigenpairs of a symmetric positive matrix of which only products are known; None without convergence.

    Parameters
    ----------
    product : callable
        ``G @ block`` in float64 for an orthonormal float64 block (n, size) whose entries are numbers of `dtype`.
    start : float64 Tensor (n, size)
        `start_columns` columns, the nearer to the leading eigenvectors the better.
    n_components : int
        How many, at most n / 10: see `few`.
    total : float
        The trace of G.
    n_columns : int
        Of Y, where ``G = Y @ Y.T``: how much the eigenvalues of noise spread depends on it.
    dtype : torch.dtype
        Of the products: what is below their rounding error counts as nothing.

    Notes
    -----
    The Krylov space grows by a block a step, orthogonalized against all of it. From four blocks on, Ritz
    pairs (t, u) are taken from it, and it is done when every wanted pair that stands above the noise has
    ``|G u - t u| <= 0.1 t``. So near to t there is an eigenvalue (Parlett 1998, The Symmetric Eigenvalue Problem,
    theorem 4.5.1), and where others are a gap away, t is below its own by the square of that over the gap at most
    (theorem 11.7.1). Leading pairs converge first: they are exact to many digits when the last one is to a few percent.
    Noise is what lies below the largest eigenvalue of random data of the variance that is left (Marchenko & Pastur
    1967): its directions are not unique anyway.

    In exact arithmetic a block finds an eigenvalue that repeats as often as it has columns at most, whatever the number
    of steps. Therefore a hundredth of each block comes from a part of the start that is kept apart, which finds the
    others; it costs the leading values a share of 1e-6 at most.
    """
    n, size = len(start), block_size(n_components)
    apart = torch.linalg.qr(start[:, size:])[0]
    floor = 16 * torch.finfo(dtype).eps
    generator = torch.Generator().manual_seed(1)
    basis = images = start.new_empty((n, 0))

    def next_block(block: torch.Tensor) -> torch.Tensor:
        other = apart @ torch.randn((apart.shape[1], size), dtype=torch.float64, generator=generator).to(block.device)
        other -= basis @ (basis.T @ other)
        other /= torch.linalg.vector_norm(other, dim=0).clamp_min(torch.finfo(torch.float64).tiny)
        block = torch.linalg.qr(block - basis @ (basis.T @ block))[0] + _STIR * other
        for _ in range(2):
            block = torch.linalg.qr(block - basis @ (basis.T @ block))[0]
        return block.to(dtype).double()

    # on one thread: a team's barriers would cost more than these small products where a core is busy
    with workers(start.device):
        image = start[:, :size]
        for _ in range(_STEPS):
            block = next_block(image)
            image = product(block)
            basis, images = torch.cat([basis, block], dim=1), torch.cat([images, image], dim=1)
            if basis.shape[1] < _FEWEST * size:
                continue
            small = basis.T @ images
            values, turn = torch.linalg.eigh((small + small.T) / 2)
            values, turn = values.flip(0)[:n_components].clamp_min(0.0), turn.flip(1)[:, :n_components]
            residual = torch.linalg.vector_norm(images @ turn - (basis @ turn) * values, dim=0)
            rest = max(total - float(values.sum()), 0.0) / (n - n_components)
            edge = rest * (1 + math.sqrt((n - n_components) / n_columns)) ** 2
            counts = (values > edge) & (values > floor * values[0])
            if not bool((counts & (residual > _TOLERANCE * values + floor * values[0])).any()):
                return Leading(values, turn, basis)
    return None


def leading_of_matrix(matrix: torch.Tensor, n_components: int, n_columns: int) -> Leading | None:
    """`leading_pairs` of a (n, n) float64 matrix, the products of rows of `n_columns` numbers with each other."""
    generator = torch.Generator().manual_seed(0)  # a fixed start of its own: the same result every time
    start = torch.randn(
        len(matrix), start_columns(n_components), dtype=matrix.dtype, generator=generator
    ).to(matrix.device)  # fmt: skip

    def product(block: torch.Tensor) -> torch.Tensor:
        with workers(matrix.device) as team, team.all_threads():
            return matrix @ block

    return leading_pairs(product, product(start), n_components, float(matrix.trace()), n_columns, matrix.dtype)


def _start(block: Block, parts: list[slice], size: int, mean: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
    """A start (n_rows, size) for `leading_pairs`, in float64, from some columns of the data."""
    sample = torch.cat([block(part) for part in parts], dim=1)
    sample.addr_(mean, torch.cat([used[part] for part in parts]), alpha=-1)
    generator = torch.Generator().manual_seed(0)  # of its own: the same result every time
    mix = torch.randn(sample.shape[1], size, dtype=sample.dtype, generator=generator).to(sample.device)
    with workers(sample.device):
        start = sample @ mix
        for _ in range(2):
            start = sample @ (sample.T @ torch.linalg.qr(start)[0])
    return start.double()


@dataclass
class LeadingRows:
    """Leading principal components of a matrix Y that was read block by block.

    Attributes
    ----------
    rows : Tensor (k, n_columns)
        ``U.T @ Y``: each as long as its singular value.
    values : float64 Tensor (k,)
        Squared singular values, falling.
    total : float
        The sum of all of them.
    """

    rows: torch.Tensor
    values: torch.Tensor
    total: float


def leading_rows(
    block: Block, n_rows: int, live: torch.Tensor, n_components: int, dtype: torch.dtype, *, center: bool
) -> LeadingRows | None:
    """Leading principal components of (n_rows, n_columns) data, each row centred over the live columns if `center`.

    The data are read once a step, and once more before; beside a sample of an eighth no copy of them is made, nor the
    matrix (n_rows, n_rows) of their products. The start is what two steps of power iteration on the sample make of
    random directions: how good it is decides how many steps are needed, no more.

    Parameters
    ----------
    block : callable
        ``Y[:, part]`` in `dtype`, 0 in columns that are not live.
    n_rows : int
    live : bool Tensor (n_columns,)
    n_components : int
    dtype : torch.dtype
        Of the products; a block's are added to the others' in float64.
    center : bool

    Returns
    -------
    LeadingRows or None
        None when `leading_pairs` does not converge.
    """
    device, n_columns = live.device, len(live)
    n_live, used = int(live.sum()), live.to(dtype)
    chunk, width = _CHUNK, min(max(_CACHE_BYTES // (n_rows * dtype.itemsize) // 16 * 16, 64), _CHUNK)
    if device.type != "cpu":
        chunk = width = max(_CHUNK, 64 * 1024**2 // n_rows)

    def pieces(part: slice) -> list[slice]:
        return [slice(first, min(first + width, part.stop)) for first in range(part.start, part.stop, width)]

    def survey(part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        sums, squares = torch.zeros((2, n_rows), dtype=torch.float64, device=device)
        for piece in pieces(part):
            y = block(piece)
            sums += y.sum(dim=1)
            squares += torch.linalg.vector_norm(y, dim=1).double().square()
        return sums, squares

    with workers(device) as team:
        sums, squares = team.sum(survey, n_columns, width=chunk)
        total, mean = float(squares.sum()), sums / n_live
        if center:
            total -= float(mean @ sums)
        share = min(1.0, max(1 / _SAMPLE, n_rows / n_columns))
        taken = math.ceil(share * chunk)
        parts = [slice(at, min(at + taken, n_columns)) for at in range(0, n_columns, chunk)]
        start = _start(block, parts, start_columns(n_components), mean.to(dtype) * center, used)
        products: list[torch.Tensor] = []  # Y.T @ basis, transposed: the components are sums of these

        def product(basis: torch.Tensor) -> torch.Tensor:
            weights = basis.T.to(dtype).contiguous()
            away = (mean @ basis).to(dtype)
            done = torch.empty((basis.shape[1], n_columns), dtype=dtype, device=device)
            products.append(done)

            def step(part: slice) -> tuple[torch.Tensor, torch.Tensor]:
                image = torch.zeros((n_rows, len(weights)), dtype=dtype, device=device)
                for piece in pieces(part):
                    y, t = block(piece), done[:, piece]
                    torch.matmul(weights, y, out=t)
                    if center:
                        t.addr_(away, used[piece], alpha=-1)
                    image.addmm_(y, t.T)
                return image, done[:, part] @ used[part]

            image, along = team.sum(step, n_columns, width=chunk)
            return image - torch.outer(mean, along) if center else image

        found = leading_pairs(product, start, n_components, total, n_live, dtype)
        if found is None:
            return None
        weights = found.turn.T.to(dtype).contiguous()
        rows = torch.empty((len(weights), n_columns), dtype=dtype, device=device)

        def gather(part: slice) -> None:
            torch.matmul(weights, torch.cat([done[:, part] for done in products]), out=rows[:, part])

        for _ in team.map(gather, n_columns, width=chunk):
            pass
    return LeadingRows(rows, found.values, total)

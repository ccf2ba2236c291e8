"""Symmetric FastICA on white data, in torch (Hyvärinen 1999, IEEE Trans. Neural Networks 10(3), eq. 20 and 26).

The nonlinearity and both products of a step are computed block by block while the block is in cache; the small matrices
are summed and orthogonalised in float64, so that single precision costs nothing in the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from llmbrain._validation import InputError, check_option, check_range, check_whole, legacy_generator
from llmbrain.decomposition.solvers.result import Unmixed, warn_not_converged
from llmbrain.decomposition.workers import workers

Step = tuple[torch.Tensor, torch.Tensor]


def _logcosh(y: torch.Tensor) -> Step:
    y.tanh_()
    return y, y.shape[1] - torch.linalg.vector_norm(y, dim=1).double().square()


def _exp(y: torch.Tensor) -> Step:
    square = y.square()
    bell = (square * -0.5).exp_()
    derivative = ((1 - square) * bell).sum(dim=1).double()
    return y.mul_(bell), derivative


def _cube(y: torch.Tensor) -> Step:
    square = y.square()
    derivative = 3 * square.sum(dim=1).double()
    return y.mul_(square), derivative


# each returns g(y), computed in place of y, and the sum of g'(y) over samples
_FUNCTIONS: dict[str, Callable[[torch.Tensor], Step]] = {"logcosh": _logcosh, "exp": _exp, "cube": _cube}
FUNCTIONS = tuple(_FUNCTIONS)
_NORMAL_MEAN = {"logcosh": 0.37456720, "exp": -1 / math.sqrt(2), "cube": 0.75}


def random_start(
    n_components: int, random_state: int | np.random.Generator | np.random.RandomState | None
) -> np.ndarray:
    """A (k, k) standard normal start, as scikit-learn draws it."""
    return legacy_generator(random_state).normal(size=(n_components, n_components))


def _nearest_orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """``(W W^T)^(-1/2) W``, the symmetric decorrelation."""
    left, _, right = torch.linalg.svd(matrix)
    return left @ right


def fastica(
    white: torch.Tensor | np.ndarray,
    *,
    fun: str = "logcosh",
    w_init: np.ndarray | None = None,
    random_state: int | np.random.Generator | np.random.RandomState | None = 0,
    max_iter: int = 200,
    tol: float = 1e-4,
    n_samples: int | None = None,
    warn: bool = True,
) -> Unmixed:
    """Parallel FastICA with symmetric decorrelation.

    Parameters
    ----------
    white : (n_components, n_samples) float32 or float64
        Centred white data, on the device to compute on: see `llmbrain.decomposition.prepare.pca.whiten`.
    fun : {"logcosh", "exp", "cube"}
    w_init : (n_components, n_components), optional
        Start; drawn from `random_state` by default.
    max_iter, tol : int, float
        Stop when no row turns by more than ``1 - |cos| < tol``.
    n_samples : int, optional
        Columns that are not constant 0, when some are.
    warn : bool
        Whether to warn when `max_iter` is reached.
    random_state : int, Generator or None
        What is drawn starts from it; None draws anew.

    Returns
    -------
    Unmixed
    """
    white = torch.as_tensor(white)
    k, n_columns = white.shape
    n_samples = n_columns if n_samples is None else n_samples
    n_zero = n_columns - n_samples  # constant columns: g(0) = 0, but g'(0) is 1 for logcosh and exp
    function = _FUNCTIONS[check_option("fun", fun, FUNCTIONS)]
    check_whole("max_iter", max_iter, 1)
    check_range("tol", tol, 0, open_low=True)
    start = random_start(k, random_state) if w_init is None else np.asarray(w_init, dtype=np.float64)
    if start.shape != (k, k) or not np.isfinite(start).all():
        raise InputError(f"w_init has shape {start.shape}: {(k, k)} finite numbers are needed")
    offset = 0.0 if fun == "cube" else float(n_zero)
    change = math.inf
    with workers(white.device) as team:
        unmixing = _nearest_orthogonal(torch.from_numpy(start.copy()))
        for step in range(1, max_iter + 1):
            w = unmixing.to(white.device, white.dtype)

            def block(columns: slice, w: torch.Tensor = w) -> Step:
                z = white[:, columns]
                g, derivative = function(w @ z)
                return g @ z.T, derivative

            moment, slope = team.sum(block, n_columns, rows=k)
            update = moment.cpu() - (slope.cpu() - offset)[:, None] * unmixing
            if not bool(torch.isfinite(update).all()):
                raise InputError(f"FastICA with fun={fun!r} overflowed in step {step}: use fun='logcosh'")
            turned = _nearest_orthogonal(update / n_samples)
            change = float((torch.einsum("ij,ij->i", turned, unmixing).abs() - 1).abs().max())
            unmixing = turned
            if change < tol:
                break
    converged = change < tol
    if warn and not converged:
        warn_not_converged("FastICA", max_iter, change, tol)
    return Unmixed(unmixing.numpy(), step, converged, change)


def negentropy(sources: torch.Tensor, fun: str = "logcosh", *, n_samples: int | None = None) -> float:
    """How far (k, n) unit-variance `sources` are from Gaussian: sum of ``(E G(y) - E G(normal))^2`` over rows.

    The approximation that FastICA climbs (Hyvärinen 1999, eq. 9); used to compare random starts.
    """
    check_option("fun", fun, FUNCTIONS)
    n_samples = sources.shape[1] if n_samples is None else n_samples

    def block(columns: slice) -> tuple[torch.Tensor]:
        y = sources[:, columns]
        if fun == "logcosh":
            value = y.abs() + torch.nn.functional.softplus(-2 * y.abs()) - math.log(2)  # log cosh without overflow
        elif fun == "exp":
            value = -torch.exp(-0.5 * y.square())
        else:
            value = y.pow(4) / 4
        return (value.sum(dim=1),)

    with workers(sources.device) as team:
        (total,) = team.sum(block, sources.shape[1], rows=sources.shape[0])
    at_zero = {"logcosh": 0.0, "exp": -1.0, "cube": 0.0}[fun] * (sources.shape[1] - n_samples)
    return float((((total - at_zero) / n_samples) - _NORMAL_MEAN[fun]).square().sum())

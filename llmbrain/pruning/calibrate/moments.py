"""Moments of a layer's signals, streamed: tokens are added batch by batch and forgotten.

Memory is of order width squared for the layer at hand.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmbrain.distributed import Ranks


def gram(x: Tensor, weights: Tensor | None = None, y: Tensor | None = None) -> Tensor:
    """``sum_t w_t y_t x_t^T`` over tokens t, ``(len y, len x)``; y is x where not given, weights are 1."""
    y = x if y is None else y
    return (y if weights is None else y * weights[:, None]).T @ x


class Moments:
    """Means, covariance of signals x, and their covariance with targets t, of all tokens added so far.

    Sums are float64 and of deviations from the mean of the first batch, so that a large mean costs no precision
    (Chan, Golub & LeVeque 1983, shifted data). Two sets that share their shift can be added.

    Attributes
    ----------
    n : float
        Number of tokens (the sum of their weights).
    """

    def __init__(self, like: Moments | None = None) -> None:
        self.n = 0.0
        self._shift_x: Tensor | None = like._shift_x if like is not None else None
        self._shift_t: Tensor | None = like._shift_t if like is not None else None
        self._x = self._t = self._xx = self._tx = self._tt = torch.zeros(())

    @classmethod
    def about_zero(cls, units: int, targets: int, device: torch.device) -> Moments:
        """None yet, of signals and targets of these sizes whose means are small: all such sets can be added."""
        found = cls()
        found._shift_x, found._shift_t = torch.zeros(units, device=device), torch.zeros(targets, device=device)
        return found

    def begin(self, shift_x: Tensor, shift_t: Tensor) -> None:
        """Say from what deviations are taken: float32 ``(units,)`` and ``(targets,)``."""
        self._shift_x, self._shift_t = shift_x, shift_t

    def sum_over(self, team: Ranks, to: int | None = None) -> None:
        """Add what the other ranks have; only rank `to` has the sum then (all, for None)."""
        assert self._shift_x is not None
        assert self._shift_t is not None
        if self.n == 0:
            self._zero(self._shift_x, self._shift_t)
        held = [torch.tensor(self.n, dtype=torch.float64), self._x, self._t, self._xx, self._tx, self._tt]
        n, self._x, self._t, self._xx, self._tx, self._tt = team.sum(held, "moments", to)
        self.n = float(n)
        if to not in (None, team.rank):  # nothing of use, and as large as the sum
            self.n, self._xx, self._tx = 0.0, torch.zeros(()), torch.zeros(())

    def _zero(self, x: Tensor, t: Tensor) -> None:
        size, out = x.shape[-1], t.shape[-1]
        self._x, self._t = x.new_zeros(size, dtype=torch.float64), x.new_zeros(out, dtype=torch.float64)
        self._xx = x.new_zeros(size, size, dtype=torch.float64)
        self._tx = x.new_zeros(out, size, dtype=torch.float64)
        self._tt = x.new_zeros(out, dtype=torch.float64)

    def add(self, x: Tensor, t: Tensor | None = None, weights: Tensor | None = None) -> None:
        """Add tokens.

        Parameters
        ----------
        x : (tokens, units)
        t : (tokens, targets), optional
        weights : (tokens,), optional
            How much each token counts; default 1.
        """
        x = x.float()
        t = x[:, :0] if t is None else t.float()
        if self._shift_x is None or self._shift_t is None:
            self._shift_x, self._shift_t = x.mean(0), t.mean(0)
        if self.n == 0:
            self._zero(x, t)
        x, t = x - self._shift_x, t - self._shift_t
        wx, wt = (x, t) if weights is None else (x * weights[:, None], t * weights[:, None])
        self.n += float(len(x) if weights is None else weights.sum())
        self._x += wx.sum(0, dtype=torch.float64)
        self._t += wt.sum(0, dtype=torch.float64)
        self._xx += gram(x, weights)
        self._tx += gram(x, weights, t)
        self._tt += (wt * t).sum(0, dtype=torch.float64)

    def __add__(self, other: Moments) -> Moments:
        total = Moments(self)
        total.n = self.n + other.n
        for name in ("_x", "_t", "_xx", "_tx", "_tt"):
            setattr(total, name, getattr(self, name) + getattr(other, name) if other.n else getattr(self, name))
        return total

    @property
    def mean(self) -> Tensor:
        """Mean signal; float64 ``(units,)``."""
        assert self._shift_x is not None
        return self._shift_x.double() + self._x / self.n

    @property
    def target_mean(self) -> Tensor:
        """Mean target; float64 ``(targets,)``."""
        assert self._shift_t is not None
        return self._shift_t.double() + self._t / self.n

    @property
    def covariance(self) -> Tensor:
        """Of the signals, per token; float64 ``(units, units)``."""
        return self._xx / self.n - torch.outer(self._x, self._x) / self.n**2

    @property
    def variance(self) -> Tensor:
        """Of each signal; float64 ``(units,)``."""
        return self._xx.diagonal() / self.n - (self._x / self.n) ** 2

    @property
    def cross_covariance(self) -> Tensor:
        """Of targets with signals; float64 ``(targets, units)``."""
        return self._tx / self.n - torch.outer(self._t, self._x) / self.n**2

    @property
    def target_variance(self) -> Tensor:
        """Of each target; float64 ``(targets,)``."""
        return self._tt / self.n - (self._t / self.n) ** 2

    @property
    def mean_square(self) -> Tensor:
        """Mean square of each signal, its mean included; float64 ``(units,)``."""
        return self.variance + self.mean**2


class Uncentred(Moments):
    """The same tokens, with products about zero where they were about means: for outputs without a bias.

    A constant that goes is an error there like any other.
    """

    def __init__(self, of: Moments) -> None:
        vars(self).update(vars(of))

    @property
    def covariance(self) -> Tensor:
        """``E[x x^T]``."""
        return self._xx / self.n + self._shifted(self._shift_x, self._x)

    @property
    def variance(self) -> Tensor:
        """``E[x^2]``."""
        return self.covariance.diagonal()

    @property
    def mean_square(self) -> Tensor:
        """``E[x^2]``."""
        return self.variance

    def _shifted(self, shift: Tensor | None, total: Tensor) -> Tensor:
        assert shift is not None
        across = torch.outer(shift.double(), total / self.n)
        return across + across.T + torch.outer(shift.double(), shift.double())

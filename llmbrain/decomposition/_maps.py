"""Units, sign and order of component maps, and the time courses that go with them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from llmbrain.decomposition._chunks import workers
from llmbrain.decomposition._pca import gram, project


def standardize_maps(maps: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    """Maps (K, n_neurons) with zero mean and unit variance (ddof 0) over the live neurons and 0 on the others.

    The sign is the one that makes the largest absolute value positive.
    """
    used = maps.double() * live
    n_live = int(live.sum())
    used = (used - used.sum(dim=1, keepdim=True) / n_live) * live
    used /= (used.square().sum(dim=1, keepdim=True) / n_live).sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    peak = used.gather(1, used.abs().argmax(dim=1, keepdim=True))
    return (used * torch.where(peak < 0, -1.0, 1.0)).to(maps.dtype)


class Regressor:
    """Least squares of tokens on fixed maps, over neurons.

    Parameters
    ----------
    maps : Tensor (K, n_neurons)
    """

    def __init__(self, maps: torch.Tensor) -> None:
        self.maps = maps
        self.gram = gram(maps)
        self.inverse = torch.linalg.pinv(self.gram, hermitian=True)

    def products(self, data: torch.Tensor) -> torch.Tensor:
        """``data @ maps.T`` in float64, (n_tokens, K), summed block by block."""
        with workers(data.device) as team:
            parts = team.map(
                lambda block: (data[:, block] @ self.maps[:, block].T).double(), data.shape[1], rows=data.shape[0]
            )
            return sum(parts, start=torch.zeros((), dtype=torch.float64, device=data.device))

    def time_courses(self, data: torch.Tensor) -> torch.Tensor:
        """Time courses (n_tokens, K) in float64: ``data ~ time_courses @ maps``."""
        return self.products(data) @ self.inverse


@dataclass
class ExplainedVariance:
    """Sums over runs from which shares of variance follow."""

    alone: np.ndarray
    joint: float = 0.0
    total: float = 0.0

    def add(self, data: torch.Tensor, products: torch.Tensor, courses: torch.Tensor, maps_gram: torch.Tensor) -> None:
        """Take one run: its data (tokens, neurons), their products with the maps, and the time courses."""
        shared = (courses * products).sum(dim=0)
        own = courses.square().sum(dim=0) * maps_gram.diagonal()
        self.alone += (2 * shared - own).cpu().numpy()
        self.joint += float(shared.sum())
        with workers(data.device) as team:
            parts = team.map(
                lambda block: torch.linalg.vector_norm(data[:, block]).double(), data.shape[1], rows=data.shape[0]
            )
            self.total += float(sum(part.square() for part in parts))


__all__ = ["ExplainedVariance", "Regressor", "project", "standardize_maps"]

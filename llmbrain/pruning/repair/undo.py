"""Down projections of experts as they were, after work on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from llmbrain.anatomy.experts import ExpertAnatomy


def down_projections(body: ExpertAnatomy) -> list[Tensor]:
    """Every tensor that a refit writes to."""
    found: list[Tensor] = []
    for layer in body.layers:
        owners: list[tuple[nn.Module, str]] = [(mlp.down.module, n) for mlp in layer.shared for n in ("weight", "bias")]
        if layer.routed is not None:
            owners += [(layer.routed.module, n) for n in ("down_proj", "down_proj_bias")]
        found += [t for module, n in owners if isinstance(t := getattr(module, n, None), Tensor)]
    return found


@contextmanager
def unchanged(tensors: Sequence[Tensor], *, always: bool = True) -> Iterator[None]:
    """After the block tensors hold what they held, whatever happened; or, not `always`, after an error only."""
    saved = [t.detach().to("cpu", copy=True) for t in tensors]
    done = False
    try:
        yield
        done = True
    finally:
        if always or not done:
            with torch.no_grad():
                for tensor, before in zip(tensors, saved):
                    tensor.copy_(before)

"""What a model promises, tried on the model itself with a few tokens before it is relied on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llmbrain.hooks.text import embeddings, evaluating, input_device

LENGTH, CHANGED = 12, 8  # tokens in the probe, and the first that is changed
SAME = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 2e-2}
"""How far two readings of the same tokens may lie apart, relative to the largest value: rounding."""


def nearly_equal(one: Tensor, other: Tensor) -> bool:
    """Whether two readings of one signal differ by no more than rounding in the dtype that was computed in."""
    if not one.numel() and one.shape == other.shape:
        return True
    limit = SAME.get(one.dtype, 1e-4) * float(other.double().abs().max().clamp_min(1e-12))
    return float((one.double() - other.double()).abs().max()) <= limit


def is_causal(model: nn.Module) -> bool:
    """Whether what a model says at a token stays as it is when later tokens change: two passes over 12 tokens.

    Models that read a whole text first (encoders, encoder-decoders, bidirectional attention) do not; their loss at a
    token has seen the answer. A model without logits is not causal either; one whose logits are NaN passes here.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    ids = ordinary_ids(model, 2 * LENGTH - CHANGED)[None].to(input_device(model))
    other = torch.cat([ids[:, :CHANGED], ids[:, LENGTH:]], dim=1)
    with evaluating(model):
        said = [getattr(model(input_ids=x), "logits", None) for x in (ids[:, :LENGTH], other)]
    logits = [x[:, :CHANGED] for x in said if isinstance(x, Tensor) and x.shape[:2] == other.shape]
    if len(logits) < 2:
        return False
    before, after = logits
    return bool(torch.isnan(before).any()) or nearly_equal(before, after)


def ordinary_ids(model: nn.Module, n: int) -> Tensor:
    """Different tokens, the same at every call, none of them special (an image's, say); int64 ``(n,)``."""
    table = getattr(embeddings(model), "weight", None)
    config: Any = getattr(model, "config", None)
    rows = int(table.shape[0]) if table is not None else int(getattr(config, "vocab_size", 256))
    special = _special_ids(config)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0)).tolist()
    free = [i for i in order if i not in special] or order
    return torch.tensor([free[i % len(free)] for i in range(n)])


def _special_ids(config: Any) -> set[int]:
    """Every token id that a config, or a config within it, gives a name."""
    found: set[int] = set()
    for name, value in vars(config).items() if hasattr(config, "to_dict") else ():
        if name.endswith(("_token_id", "_token_index", "_token_ids")):
            found.update(v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, int))
        elif hasattr(value, "to_dict"):
            found |= _special_ids(value)
    return found

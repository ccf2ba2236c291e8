"""Weights that are spread over ranks: tensor parallelism, in which each holds some columns of every layer.

Such weights are torch's `DTensor`: their shape is that of the whole, their memory that of a part. What reads or writes
weights itself does not take them; a scan does, since hooks hear what a rank's own columns give.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from llmbrain._validation import InputError


def is_part(tensor: object) -> bool:
    """Whether a tensor is one rank's part of a larger one."""
    return "DTensor" in (type(tensor).__name__, type(getattr(tensor, "data", None)).__name__)


def is_spread(model: nn.Module) -> bool:
    """Whether weights of a model are spread over ranks."""
    return any(is_part(parameter) for parameter in model.parameters())


def spread_over(model: nn.Module) -> int:
    """Over how many ranks the weights of a model are spread; 1 where each holds all."""
    parts: list[Any] = [parameter for parameter in model.parameters() if is_part(parameter)]
    return max((int(part.device_mesh.size()) for part in parts), default=1)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, of which each rank may hold a part; then all ranks must ask for it, in the same order."""
    if not is_part(tensor):
        return tensor
    part: Any = tensor.detach()
    full: Tensor = part.full_tensor()
    return full


def parts_of(weight: object, axis: int) -> list[int] | None:
    """How many entries along an axis of a weight each rank holds, one rank's after the other's.

    None where ranks hold them otherwise: all of them, or interleaved.
    """
    if not is_part(weight):
        return None
    part: Any = weight
    placements = list(part.placements)
    if len(placements) != 1 or type(placements[0]).__name__ != "Shard" or placements[0].dim % part.ndim != axis:
        return None
    total, size = int(part.shape[axis]), int(part.device_mesh.size())
    most = -(-total // size)
    return [max(0, min(total, most * (rank + 1)) - most * rank) for rank in range(size)]


def refuse_spread(model: nn.Module, what: str) -> None:
    """Refuse a model whose weights are spread over ranks, and say what to do.

    Raises
    ------
    InputError
        Naming the first weight of which no rank holds all.
    """
    for name, parameter in model.named_parameters():
        if is_part(parameter):
            raise InputError(
                f"{what}: {name} is spread over ranks (tp_plan), and none holds all of it: only a scan takes such a "
                "model. Load it with device_map='auto' (--device-map auto), or cut it block by block (llmbrain prune "
                "--offload, lb.prune_offloaded)"
            )

"""What goes from rank to rank: tensors as bytes, facts as JSON, and short words for errors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, dtype

Json = Any  # what JSON can hold


def shapes_of(tensors: Mapping[str, Tensor]) -> list[Json]:
    return [[name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in tensors.items()]


def empty(shapes: Sequence[Json]) -> dict[str, Tensor]:
    import torch

    return {name: torch.empty(shape, dtype=getattr(torch, dtype)) for name, dtype, shape in shapes}


def bytes_of(tensor: Tensor) -> Tensor:
    """A tensor as the bytes of a contiguous copy on the CPU; its own memory where it is that already."""
    import torch

    return tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)


def wide(kind: dtype) -> dtype:
    """What numbers of this kind are summed in: half precision is not lost in a sum, nor refused by an older gloo."""
    import torch

    return torch.float32 if kind in (torch.float16, torch.bfloat16) else kind


def short(value: Json) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def words_of_gone(what: str, ranks: Sequence[int], size: int, error: BaseException) -> str:
    who = f"rank {', '.join(map(str, ranks))} of {size} is" if ranks else "another rank is"
    return f"{what}: {who} gone. What was written is kept: the same command goes on from there ({line_of(error)})"


def line_of(error: BaseException) -> str:
    """What an error says, short and in one line."""
    return " ".join(str(error).split())[:120] or type(error).__name__

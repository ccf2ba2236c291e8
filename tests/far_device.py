"""A device that is not the CPU, on any machine: tensors that say they lie elsewhere, and mix with none that do not.

A `Far` tensor holds an ordinary one and computes with it; but an operation that is given tensors of both kinds fails as
it would on a GPU, and so does asking for its numpy array. So code that forgets where its tensors are is found without a
GPU. The device's name is one that torch knows and does not use ("lazy"); what is special to CUDA is not seen here.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

FAR = torch.device("lazy")
# CUDA takes an index from the CPU, and copies between devices; nothing else.
MIXING = {"aten::copy_", "aten::_to_copy", "aten::index", "aten::index_put_", "aten::_index_put_impl_"}


class Far(torch.Tensor):
    """A tensor elsewhere."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Far:
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=FAR,
        )  # fmt: skip

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert a far tensor to numpy: use Tensor.cpu() first")

    def tolist(self) -> Any:
        return self.inner.tolist()

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            made: Any = Far(self.inner.detach().clone()).requires_grad_(self.requires_grad)
            if isinstance(self, nn.Parameter):
                made = nn.Parameter(made, requires_grad=self.requires_grad)
            memo[id(self)] = made
        return memo[id(self)]


class FarDevice(TorchDispatchMode):
    """Within the block tensors can be made on, and moved to, `FAR`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name
    flat, _ = pytree.tree_flatten((args, kwargs))
    far = [x for x in flat if isinstance(x, Far)]
    near = [x for x in flat if isinstance(x, torch.Tensor) and not isinstance(x, Far)]
    if far and any(x.ndim for x in near) and (name not in MIXING or not isinstance(args[0], (Far, torch.Tensor))):
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, got {FAR} and cpu")
    if name in ("aten::index", "aten::index_put_", "aten::_index_put_impl_") and far and not isinstance(args[0], Far):
        raise RuntimeError(f"{name}: indices should be on the same device as the indexed tensor (cpu)")
    device = kwargs.get("device")
    there = torch.device(device).type == FAR.type if device is not None else bool(far)
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type != (FAR.type if there else "cpu"):
        raise RuntimeError(f"{name}: expected a generator on {FAR if there else 'cpu'}, found {generator.device}")
    if device is not None and torch.device(device).type == FAR.type:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    plain_args, plain_kwargs = pytree.tree_map_only(Far, lambda x: x.inner, (args, kwargs))
    found = func(*plain_args, **plain_kwargs)
    written = [
        kwargs.get(a.name, args[i] if i < len(args) else None)
        for i, a in enumerate(func._schema.arguments)
        if a.alias_info is not None and a.alias_info.is_write
    ]
    if written and len(func._schema.returns) == 1 and isinstance(written[0], torch.Tensor):
        return written[0]
    if written and len(func._schema.returns) == len(written):
        return tuple(written)
    return pytree.tree_map_only(torch.Tensor, lambda x: x if isinstance(x, Far) else Far(x), found) if there else found


def far_away(model: nn.Module) -> nn.Module:
    """A copy of a model on the far device; within `FarDevice`."""
    return copy.deepcopy(model).to(FAR)

"""Parts of a block that were set to nothing: an MLP or an attention that is not run and adds nothing."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn


class Nothing:
    """Mixed into the class of an MLP or an attention: it gives zeros, and its block goes on as if it had run.

    What it must know stands in `nothing`: how many values it ``gives`` (0: one tensor, not in a tuple), where among its
    arguments the ``residual`` is that it adds to itself (-1: it adds none), and the ``layer`` of the cache (-1: none)
    whose tokens are counted, one number each, since a model asks any layer of its cache how many it has read.
    """

    nothing: dict[str, int]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Zeros in the shape of what enters."""
        gives, residual, layer = (self.nothing[name] for name in ("gives", "residual", "layer"))
        entering = kwargs["hidden_states"] if "hidden_states" in kwargs else [*args, *kwargs.values()][0]
        if residual < 0:
            given = entering.new_zeros(entering.shape)
        else:
            given = kwargs["residual"] if "residual" in kwargs else args[residual]
        caches = [v for v in (*args, *kwargs.values()) if hasattr(v, "get_seq_length")] if layer >= 0 else []
        for cache in caches[:1]:
            counter = entering.new_zeros(entering.shape[0], 1, entering.shape[1], 1)
            cache.update(counter, counter, layer)
        return (given, *[None] * (gives - 1)) if gives else given


_CLASSES: dict[type, type[nn.Module]] = {}


def _class_of_nothing(kind: type[nn.Module]) -> type[nn.Module]:
    name = f"Dropped{kind.__name__}"
    return _CLASSES.setdefault(kind, type(name, (Nothing, kind), {"__module__": kind.__module__}))


def become_nothing(module: nn.Module, *, gives: int = 0, layer: int = -1) -> None:
    """Let a module be `Nothing`; what it holds stays, and is of no use.

    Parameters
    ----------
    gives : int
        Values that it gives, the rest of them None; 0 for one tensor.
    layer : int
        Of the cache that an attention writes to.
    """
    kind = type(module)
    names = [n for n in inspect.signature(kind.forward).parameters if n != "self"]
    residual = names.index("residual") if "residual" in names else -1
    vars(module)["nothing"] = {"gives": gives, "residual": residual, "layer": layer}
    vars(module).pop("forward", None)  # accelerate's, on devices of their own
    module.__class__ = _class_of_nothing(kind)


def empty_linear(module: nn.Module, axis: int) -> None:
    """Take all units along an axis of its weight out of a linear module, and its bias.

    What is left of the weight is no parameter: files hold no empty tensors.
    """
    weight: Any = module.weight
    shape = list(weight.shape)
    shape[axis] = 0
    if "weight" in module._parameters:
        del module._parameters["weight"]
        module.register_buffer("weight", weight.detach().new_empty(shape), persistent=False)
    else:
        module._buffers["weight"] = weight.detach().new_empty(shape)
    if isinstance(getattr(module, "bias", None), Tensor):
        module._parameters["bias"] = None

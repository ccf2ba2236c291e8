"""Weights that are not in memory: what accelerate keeps on disk or in another memory, brought in while it is needed.

A model that was loaded with a device map may hold most of its weights as names only; accelerate's hooks bring those of
a module in when it runs. What reads or writes weights beside a forward pass (scores, repairs, cuts) does so within
`present`, which does the same for whole blocks. What is written there is gone with the block, unless it is stored:
then the hooks find the new values in a folder of their own, and the checkpoint stays as it was.
"""

from __future__ import annotations

import copy
import ctypes
import sys
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from llmbrain._files.one import writing
from llmbrain._validation import InputError
from llmbrain.anatomy.layers import LayerAnatomy
from llmbrain.anatomy.spread import refuse_spread

LARGE = 2**20  # bytes of weights from which memory is given back when they leave
_CHANGES = "_llmbrain_changes"  # attribute of accelerate's loader: the folder that holds what was changed


def _hooks(module: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    """Modules within a module whose weights are away now, with accelerate's hook on each."""
    for part in module.modules():
        hook = vars(part).get("_hf_hook")
        for one in getattr(hook, "hooks", (hook,)):  # several in a row, or one
            if getattr(one, "offload", False) and getattr(one, "weights_map", None) is not None:
                yield part, one


def is_away(module: nn.Module) -> bool:
    """Whether weights of a module, or of what is in it, are offloaded and not in memory now."""
    return any(True for _ in _hooks(module))


@contextmanager
def present(*modules: nn.Module) -> Iterator[None]:
    """Within the block the weights of these modules are in memory, on the device that they compute on.

    It may be nested; a module whose weights are always there is left alone. Changes are dropped at the end: see
    `store`.
    """
    entered: list[tuple[nn.Module, Any]] = []
    try:
        for module in modules:
            for part, hook in list(_hooks(module)):
                hook.pre_forward(part)
                hook.offload = False  # so that a forward pass leaves them where they are
                entered.append((part, hook))
        yield
    finally:
        size = sum(p.numel() * p.element_size() for part, _ in entered for p in part.parameters(recurse=False))
        for part, hook in entered:
            hook.offload = True
            hook.post_forward(part, None)
        if size > LARGE:
            give_back()


def give_back() -> None:
    """Let the system have what was freed; glibc keeps the gaps that tensors below 32 MB leave, a block's at a time."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def store(module: nn.Module) -> None:
    """Keep the weights of a module (not of what is in it) as they are now, for every later pass.

    Within `present`; where weights are always in memory there is nothing to do.
    """
    for loader, prefix in _loaders(module):
        for name, value in module.named_parameters(recurse=False):
            _put(loader, f"{prefix}{name}", value.detach())


def entries(module: nn.Module) -> dict[str, Any]:
    """What the loaders of a module know of its weights now, for `put_back`."""
    return {
        f"{kind}:{key}": known[key]
        for loader, prefix in _loaders(module)
        for kind, known in _tables(loader)
        for key in list(known)
        if key.startswith(prefix)
    }


def put_back(module: nn.Module, before: dict[str, Any]) -> None:
    """Let the loaders of a module find what they found when `entries` was asked."""
    for loader, prefix in _loaders(module):
        for kind, known in _tables(loader):
            for key in [key for key in known if key.startswith(prefix)]:
                if f"{kind}:{key}" not in before:
                    del known[key]
            known.update({k.partition(":")[2]: v for k, v in before.items() if k.partition(":")[0] == kind})


def _loaders(module: nn.Module) -> Iterator[tuple[Any, str]]:
    """Where accelerate finds the weights of a module, and what their names begin with there."""
    hook = vars(module).get("_hf_hook")
    for one in getattr(hook, "hooks", (hook,)):
        found = getattr(one, "weights_map", None)
        if found is not None:
            yield getattr(found, "dataset", found), getattr(found, "prefix", "")


def _tables(loader: Any) -> list[tuple[str, Any]]:
    tables = [(kind, getattr(loader, kind)) for kind in ("state_dict", "index") if hasattr(loader, kind)]
    return tables or [("state_dict", loader)]


def _put(loader: Any, key: str, value: Tensor) -> None:
    tables = dict(_tables(loader))
    if "index" not in tables or key in tables["state_dict"] or not tables["index"]:  # kept in the memory of the CPU
        tables["state_dict"][key] = value.to("cpu", copy=True)
        return
    from safetensors.torch import save_file

    if not hasattr(loader, _CHANGES):
        setattr(loader, _CHANGES, tempfile.TemporaryDirectory(prefix="llmbrain-", dir=loader.save_folder))
    file = Path(getattr(loader, _CHANGES).name) / f"{key}.safetensors"
    with writing(file, needed=value.numel() * value.element_size()) as temporary:
        save_file({key: value.to("cpu").contiguous()}, temporary)
    tables["index"][key] = {
        "safetensors_file": str(file), "weight_name": key, "dtype": str(value.dtype).removeprefix("torch."),
    }  # fmt: skip


def check_in_memory(model: nn.Module, what: str) -> None:
    """Refuse a model of which weights are offloaded, and say what to do.

    Raises
    ------
    InputError
        Naming the first module whose weights are not there.
    """
    names = {id(part): name for name, part in model.named_modules()}
    for part, _ in _hooks(model):
        raise InputError(
            f"{what}: the weights of {names[id(part)]} are offloaded, not in memory: load the model whole, or cut it "
            "block by block (llmbrain prune --offload, lb.prune_offloaded)"
        )
    refuse_spread(model, what)


def copied(layer: LayerAnatomy) -> LayerAnatomy:
    """A copy of a layer whose weights are all in memory, and stay there."""
    from accelerate.hooks import remove_hook_from_module

    with present(layer.block):
        maps = [
            value
            for part in layer.block.modules()
            for hook in getattr(vars(part).get("_hf_hook"), "hooks", (vars(part).get("_hf_hook"),))
            for value in (getattr(hook, "weights_map", None), getattr(hook, "tied_params_map", None))
            if value is not None
        ]
        trial = copy.deepcopy(layer, {id(value): value for value in maps})  # those hold weights of the whole model
    if maps:
        remove_hook_from_module(trial.block, recurse=True)
    return trial


def shell(model: Any) -> Any:
    """A model of the same shapes that shares what is in memory, and has no values where weights are away.

    Its modules are its own: weights that are put into them, or cut, leave those of `model` as they were.
    """
    from accelerate.hooks import remove_hook_from_module

    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for part in model.modules():
        hook = vars(part).get("_hf_hook")
        for one in getattr(hook, "hooks", (hook,)):
            for value in (getattr(one, "weights_map", None), getattr(one, "tied_params_map", None)):
                if value is not None:
                    memo[id(value)] = value
    made = copy.deepcopy(model, memo)
    for part in made.modules():
        hook = vars(part).get("_hf_hook")
        for one in getattr(hook, "hooks", (hook,)):
            if hasattr(one, "offload"):
                one.offload = False  # so that nothing is brought in when the hooks go
    remove_hook_from_module(made, recurse=True)
    vars(made).pop("hf_device_map", None)
    return made


def lend(source: nn.Module, target: nn.Module) -> None:
    """Let a module (of the same structure) use the weights of another, as they are now; they are shared, not copied."""
    inside = dict(target.named_modules())
    for path, module in source.named_modules():
        for name, value in module.named_parameters(recurse=False):
            if not value.is_meta:
                setattr(inside[path], name, nn.Parameter(value.detach(), requires_grad=False))


def lend_rest(model: nn.Module, small: nn.Module, blocks: Collection[str]) -> None:
    """The same for what is in no block (their paths end with a dot), wherever it is kept."""
    inside = dict(small.named_modules())
    for path, module in model.named_modules():
        if not any(f"{path}.".startswith(block) for block in blocks) and list(module.parameters(recurse=False)):
            own = [name for name, value in module.named_parameters(recurse=False) if value.is_meta]
            with present_alone(module):
                for name in own:
                    value = getattr(module, name).detach()
                    setattr(inside[path], name, nn.Parameter(value, requires_grad=False))


@contextmanager
def present_alone(module: nn.Module) -> Iterator[None]:
    """`present` for the weights of a module itself, not of what is in it."""
    hooks = [hook for part, hook in _hooks(module) if part is module]
    for hook in hooks:
        hook.pre_forward(module)
    try:
        yield
    finally:
        for hook in hooks:
            hook.post_forward(module, None)

"""Changes of a running model: what enters some modules is edited as it passes; the weights are never touched.

Modules and index tensors are all that is known here; which networks they belong to is said by `llmbrain.intervention`.
Changes nest (the outer one acts first), end on any exit, and work wherever the model does: generation, pruned widths,
several devices, half precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmbrain._validation import InputError
from llmbrain.hooks.experts import EditNeurons, EditRoute, Redrawn, changed, changing_experts
from llmbrain.hooks.listen import Call, Hook, Hooks, Place

Edit = Callable[[Tensor], Tensor]
"""What happens to a tensor ``(..., n_inputs)`` that enters a module."""


def change_inputs(model: nn.Module | None, edits: Iterable[tuple[nn.Module, Edit]], *, verify: bool = True) -> Hooks:
    """Hooks that put an edited tensor in place of what enters each module.

    Parameters
    ----------
    model : module or None
        What the modules belong to.
    edits : iterable of (module, function)
    verify : bool
        Each forward pass of `model` must call all modules, else it is an `InputError`: nothing was changed there.
    """

    def editing(edit: Edit) -> Callable[[Call], Tensor]:
        return lambda call: edit(call.entering)

    return Hooks(model if verify else None, [Place(module, editing(edit), changes=True) for module, edit in edits])


@dataclass
class Intervention(AbstractContextManager):
    """A change of some inputs of linear layers, in force within a ``with`` block; yields the model.

    Attributes
    ----------
    model : module
    edits : list of (module, function)
        What happens to the tensor that enters each module.
    n_units : int
        How many neurons (or inputs that belong to heads) are changed.
    verify : bool
        Whether a forward pass that runs past one of the modules is an error.
    neurons, routes : dict
        What happens to neurons of routed experts, and to their gates, by experts module.
    around : function, optional
        Gives a further context that is in force with it (routers that choose among fewer experts).
    """

    model: nn.Module
    edits: list[tuple[nn.Module, Edit]]
    n_units: int
    verify: bool = True
    neurons: dict[nn.Module, EditNeurons] = field(default_factory=dict, repr=False)
    routes: dict[nn.Module, EditRoute] = field(default_factory=dict, repr=False)
    around: Callable[[], AbstractContextManager[None]] | None = field(default=None, repr=False)
    _entered: list[ExitStack] = field(default_factory=list, repr=False)

    def __enter__(self) -> nn.Module:
        for edit in (*(edit for _, edit in self.edits), *self.neurons.values()):
            if isinstance(edit, (Resample, Redrawn)):
                edit.restart()
        with ExitStack() as stack:
            stack.enter_context(change_inputs(self.model, self.edits, verify=self.verify))
            if self.neurons or self.routes:
                stack.enter_context(changing_experts(self.neurons, self.routes))
            if self.around is not None:
                stack.enter_context(self.around())
            self._entered.append(stack.pop_all())
        return self.model

    def __exit__(self, *error: object) -> None:
        self._entered.pop().close()


def refuse_changed(model: nn.Module, what: str) -> None:
    """Refuse work on weights while a change is in force: it would be lost, or measured as if it were the model.

    Raises
    ------
    InputError
        If the model is within a ``with lesion(...)`` or the like.
    """
    if changed(model):
        raise InputError(f"{what}: experts of the model are changed by an intervention now: leave its with block first")
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, Hook) and hook.active and hook.place.changes:
                raise InputError(
                    f"{what}: the model is changed by an intervention now (lesion, keep_only, amplify): leave its "
                    "with block first"
                )


@contextmanager
def saying(module: nn.Module, output: Any) -> Iterator[None]:
    """Within the block a module says this and computes nothing."""
    before = vars(module).get("forward")
    vars(module)["forward"] = lambda *args, **kwargs: output
    try:
        yield
    finally:
        if before is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = before


@contextmanager
def recomputing(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within the block these modules keep nothing for a backward pass but what entered: they run again in it.

    The hooks inside them are called in both runs. Weights that accelerate brings in are let go after each.
    """
    from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

    def again(forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: checkpoint(
            forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs
        )

    saved = [(module, vars(module).get("forward")) for module in modules]
    try:
        for module, _ in saved:
            vars(module)["forward"] = again(module.forward)
        with set_checkpoint_early_stop(False):  # a run that is broken off leaves weights behind
            yield
    finally:
        for module, before in saved:
            if before is None:
                vars(module).pop("forward", None)
            else:
                vars(module)["forward"] = before


# -- edits -------------------------------------------------------------------------------------------------------------


def zero(chosen: Tensor) -> Edit:
    """Chosen inputs (bool, one entry an input) are zero."""
    return lambda x: x.masked_fill(chosen.to(x.device), 0)


def scale(chosen: Tensor, gain: float) -> Edit:
    """Chosen inputs are multiplied."""
    return lambda x: torch.where(chosen.to(x.device), x * gain, x)


def constant(chosen: Tensor, values: Tensor) -> Edit:
    """Chosen inputs hold these values, one a chosen input."""
    full = torch.zeros(len(chosen), dtype=torch.float64, device=chosen.device)
    full[chosen] = values.to(chosen.device)
    return lambda x: torch.where(chosen.to(x.device), full.to(x), x)


class Resample:
    """Puts the joint state of the inputs at `positions` at a random token of a `pool` in place of theirs.

    Parameters
    ----------
    positions : int64 tensor ``(n_chosen,)``
    pool : tensor ``(n_tokens, n_chosen)``
    seed : int
    """

    def __init__(self, positions: Tensor, pool: Tensor, seed: int) -> None:
        self.positions, self.pool, self.seed = positions, pool, seed
        self.restart()

    def restart(self) -> None:
        """Draw the same tokens again."""
        self.generator = torch.Generator().manual_seed(self.seed)

    def __call__(self, x: Tensor) -> Tensor:
        rows = torch.randint(len(self.pool), x.shape[:-1], generator=self.generator)
        return x.index_copy(-1, self.positions.to(x.device), self.pool[rows].to(x))


def scale_replicas(scales: Tensor, shifts: Tensor | None = None) -> Edit:
    """Row ``r`` of `scales` (and of `shifts`, added) is for replica ``r`` of a batch that holds them one after another.

    Parameters
    ----------
    scales, shifts : tensor ``(replicas, n_inputs)``
    """

    def edit(x: Tensor) -> Tensor:
        wide = x.reshape(len(scales), -1, x.shape[-1]) * scales.to(x)[:, None]
        if shifts is not None:
            wide = wide + shifts.to(x)[:, None]
        return wide.reshape(x.shape)

    return edit

"""Lesion, keep-only and amplification, as context managers on a living model.

They act on what enters the down projection (neurons) or the output projection of the attention (heads), through forward
pre-hooks: the weights are never touched. They nest (the outer one acts first), end on any exit, and work wherever the
model does: generation, pruned widths, several devices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llmbrain._validation import InputError, check_option, check_range
from llmbrain.anatomy.families import anatomy
from llmbrain.anatomy.space import NeuronSpace
from llmbrain.hooks.text import as_windows, batches, evaluating, input_device
from llmbrain.intervention.targets import Part, find_parts
from llmbrain.scanning.inputs import Runs

VALUES = ("zero", "mean", "resample")
Edit = Callable[[Tensor], Tensor]


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
    """

    model: nn.Module
    edits: list[tuple[nn.Module, Edit]]
    n_units: int
    _handles: list[list[RemovableHandle]] = field(default_factory=list, repr=False)

    def __enter__(self) -> nn.Module:
        handles: list[RemovableHandle] = []
        self._handles.append(handles)
        for module, edit in self.edits:
            if isinstance(edit, _Resample):
                edit.restart()
            handles.append(module.register_forward_pre_hook(_pre_hook(edit)))
        return self.model

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles.pop():
            handle.remove()


def lesion(
    model: nn.Module, what: Any, value: str = "zero", *, reference: Any = None, random_state: int = 0
) -> Intervention:
    """Silence neurons or heads.

    Parameters
    ----------
    model : module
        Any model that `llmbrain.anatomy.families.anatomy` knows.
    what : Network, FunctionalNetworks, list of Network, bool mask, flat indices, (layer, neuron) pairs, table or Heads
        See `llmbrain.intervention.targets.neuron_mask`; several networks mean their union.
    value : {"zero", "mean", "resample"}
        What the units hold instead. "zero" equals zero columns in the weight they enter; "mean" is each unit's mean
        over the reference; "resample" is what the units of a layer held together at a random token of the reference,
        drawn anew for every token, so that their distribution stays and their meaning goes.
    reference : scans, arrays ``(n_tokens, n_neurons)``, NIfTI images, or int64 token ids ``(n, length)``
        Needed by "mean" and "resample"; there is no hidden default. Token ids are read by the model first; heads need
        them, since a scan holds one signal a head.
    random_state : int
        Seed of "resample"; entering the context starts it anew.

    Returns
    -------
    Intervention
        A context manager; it can be entered again.

    Raises
    ------
    InputError
        If `what` belongs to another space or names what does not exist, or a reference is missing or does not fit.

    Warns
    -----
    UserWarning
        If `what` is empty: the model is unchanged.

    Examples
    --------
    ``with lesion(model, networks[4]): model.generate(...)``
    """
    check_option("value", value, VALUES)
    return _replace(model, find_parts(model, what), value, reference, random_state)


def keep_only(
    model: nn.Module, what: Any, value: str = "zero", *, reference: Any = None, random_state: int = 0
) -> Intervention:
    """Silence everything but `what`: the other neurons where it is neurons, the other heads where it is heads.

    Parameters are those of `lesion`.
    """
    check_option("value", value, VALUES)
    return _replace(model, find_parts(model, what, complement=True), value, reference, random_state)


def amplify(model: nn.Module, what: Any, gain: float) -> Intervention:
    """Multiply what neurons or heads say by `gain` (1 changes nothing, 0 is a lesion, below 0 turns the sign).

    Parameters
    ----------
    model, what
        As in `lesion`.
    gain : float
        Must be finite.
    """
    gain = float(check_range("gain", gain))
    parts = find_parts(model, what)
    edits = [(p.module, _scale(_near(p), gain)) for p in parts]
    return Intervention(model, edits, _count(parts))


def _replace(model: nn.Module, parts: list[Part], value: str, reference: Any, random_state: int) -> Intervention:
    if value == "zero":
        return Intervention(model, [(p.module, _zero(_near(p))) for p in parts], _count(parts))
    if reference is None:
        raise InputError(f"value={value!r} needs reference=: scans of this model, arrays, or token ids for it to read")
    edits: list[tuple[nn.Module, Edit]] = []
    for i, (part, values) in enumerate(zip(parts, reference_values(model, parts, reference))):
        if value == "mean":
            edits.append((part.module, _constant(_near(part), values.double().mean(dim=0))))
        else:
            edits.append((part.module, _Resample(part.positions, values, random_state + i)))
    return Intervention(model, edits, _count(parts))


def _count(parts: Sequence[Part]) -> int:
    return int(sum(int(p.chosen.sum()) for p in parts))


# -- what happens to a tensor (..., n_inputs) -------------------------------------------------------------------------


def _pre_hook(edit: Edit) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    return lambda module, args: (edit(args[0]), *args[1:])


def _near(part: Part) -> Tensor:
    """What is chosen, on the device of the weight (the edits move it again where accelerate decides later)."""
    weight = part.module.weight
    assert isinstance(weight, Tensor)
    return part.chosen if weight.device.type == "meta" else part.chosen.to(weight.device)


def _zero(chosen: Tensor) -> Edit:
    return lambda x: x.masked_fill(chosen.to(x.device), 0)


def _scale(chosen: Tensor, gain: float) -> Edit:
    return lambda x: torch.where(chosen.to(x.device), x * gain, x)


def _constant(chosen: Tensor, values: Tensor) -> Edit:
    full = torch.zeros(len(chosen), dtype=torch.float64, device=chosen.device)
    full[chosen] = values.to(chosen.device)
    return lambda x: torch.where(chosen.to(x.device), full.to(x), x)


class _Resample:
    """Puts the joint state of the chosen inputs at a random reference token in place of theirs."""

    def __init__(self, positions: Tensor, pool: Tensor, seed: int) -> None:
        self.positions, self.pool, self.seed = positions, pool, seed
        self.restart()

    def restart(self) -> None:
        """Draw the same tokens again."""
        self.generator = torch.Generator().manual_seed(self.seed)

    def __call__(self, x: Tensor) -> Tensor:
        rows = torch.randint(len(self.pool), x.shape[:-1], generator=self.generator)
        return x.index_copy(-1, self.positions.to(x.device), self.pool[rows].to(x))


# -- what the units held elsewhere -------------------------------------------------------------------------------------


def reference_values(model: nn.Module, parts: Sequence[Part], reference: Any) -> list[Tensor]:
    """What the chosen inputs of each part held over the reference; one tensor ``(n_tokens, n_chosen)`` a part."""
    if isinstance(reference, Tensor) and not reference.is_floating_point():
        return _read_values(model, parts, as_windows(model, None, reference))
    body = anatomy(model)
    space = NeuronSpace(body.widths)
    if any(p.module is not body.layers[p.layer].down.module for p in parts):
        raise InputError("reference= for heads must be token ids (n, length): a scan holds one signal a head")
    for scan in reference if isinstance(reference, (list, tuple)) else [reference]:
        if getattr(scan, "site", "neuron") != "neuron":
            raise InputError(f"reference is a scan of site={scan.site!r}: lesions replace what site 'neuron' records")
    runs = Runs(reference)
    collected: list[list[Tensor]] = [[] for _ in parts]
    for data in runs:
        if data.shape[1] != space.n_neurons or (runs.space is not None and runs.space != space):
            where = runs.space if runs.space is not None else f"{data.shape[1]} neurons"
            raise InputError(f"reference lies in {where}, the model has {space}: scan this model")
        for values, part in zip(collected, parts):
            layer = torch.from_numpy(data[:, space.layer_slice(part.layer)])
            values.append(layer[:, part.chosen].float())
    return [torch.cat(values) for values in collected]


def _read_values(model: nn.Module, parts: Sequence[Part], windows: Tensor) -> list[Tensor]:
    collected: list[list[Tensor]] = [[] for _ in parts]

    def keep(part: Part, values: list[Tensor]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            values.append(args[0].flatten(0, -2)[:, part.positions.to(args[0].device)].float().cpu())

        return hook

    handles: list[RemovableHandle] = []
    try:
        for part, values in zip(parts, collected):
            handles.append(part.module.register_forward_pre_hook(keep(part, values)))
        with evaluating(model):
            for ids in batches(windows):
                model(input_ids=ids.to(input_device(model)))
    finally:
        for handle in handles:
            handle.remove()
    return [torch.cat(values) for values in collected]

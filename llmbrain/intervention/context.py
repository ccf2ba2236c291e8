"""Lesion, keep-only and amplification, as context managers on a living model.

They act on what enters the down projection (neurons) or the output projection of the attention (heads): see
`llmbrain.hooks.change`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmbrain._validation import InputError, check_option, check_range, seed_of
from llmbrain.anatomy.experts import has_experts
from llmbrain.anatomy.families import anatomy
from llmbrain.anatomy.space import NeuronSpace
from llmbrain.hooks.change import Edit, Intervention, Resample, constant, scale, zero
from llmbrain.hooks.listen import hear_inputs
from llmbrain.hooks.text import as_windows, batches, evaluating, input_device
from llmbrain.intervention.experts import change_mixture, filling_of, reroute
from llmbrain.intervention.targets import Part, find_parts
from llmbrain.scanning.inputs import Runs

VALUES = ("zero", "mean", "resample")


def lesion(
    model: nn.Module,
    what: Any,
    value: str = "zero",
    *,
    reference: Any = None,
    random_state: int | None = 0,
    verify: bool = True,
) -> Intervention:
    """Silence neurons or heads.

    Parameters
    ----------
    model : module
        Any model that `llmbrain.anatomy.families.anatomy` knows.
    what : Network, FunctionalNetworks, list of Network, bool mask, flat indices, (layer, neuron) pairs, table or Heads
        See `llmbrain.intervention.targets.neuron_mask`; several networks mean their union. Of a mixture of experts
        also `llmbrain.intervention.experts.Experts`; with "reroute", its routers may not choose these experts, so that
        their tokens go to others.
    value : {"zero", "mean", "resample"}
        What the units hold instead. "zero" equals zero columns in the weight they enter; "mean" is each unit's mean
        over the reference; "resample" is what the units of a layer held together at a random token of the reference,
        drawn anew for every token, so that their distribution stays and their meaning goes. Of a routed expert both are
        over the tokens that call it, and what is drawn is of one expert together; an expert that is called though the
        reference never called it is an error.
    reference : scans, arrays ``(n_tokens, n_neurons)``, NIfTI images, or int64 token ids ``(n, length)``
        Needed by "mean" and "resample"; there is no hidden default. Token ids are read by the model first; heads need
        them, since a scan holds one signal a head. Of a mixture of experts scans or token ids: arrays do not tell which
        experts were called.
    random_state : int or None
        Seed of "resample"; entering the context starts it anew. None draws one.
    verify : bool
        A forward pass that runs past one of the lesioned layers (a fused kernel, say) is an error; False lets it be.

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
    if has_experts(model):
        check_option("value", value, (*VALUES, "reroute"))
        return _of_mixture(model, what, value, reference, random_state, verify)
    check_option("value", value, VALUES)
    return _replace(model, find_parts(model, what), value, reference, random_state, verify)


def keep_only(
    model: nn.Module,
    what: Any,
    value: str = "zero",
    *,
    reference: Any = None,
    random_state: int | None = 0,
    verify: bool = True,
) -> Intervention:
    """Silence everything but `what`: the other neurons where it is neurons, the other heads where it is heads.

    Parameters are those of `lesion`.
    """
    if has_experts(model):
        check_option("value", value, (*VALUES, "reroute"))
        return _of_mixture(model, what, value, reference, random_state, verify, complement=True)
    check_option("value", value, VALUES)
    return _replace(model, find_parts(model, what, complement=True), value, reference, random_state, verify)


def amplify(model: nn.Module, what: Any, gain: float, *, verify: bool = True) -> Intervention:
    """Multiply what neurons or heads say by `gain` (1 changes nothing, 0 is a lesion, below 0 turns the sign).

    Parameters
    ----------
    model, what, verify
        As in `lesion`.
    gain : float
        Must be finite.
    """
    gain = float(check_range("gain", gain))
    if has_experts(model):
        return change_mixture(model, what, gain=gain, verify=verify)
    parts = find_parts(model, what)
    edits = [(p.module, scale(_near(p), gain)) for p in parts]
    return Intervention(model, edits, _count(parts), verify)


def _of_mixture(
    model: nn.Module, what: Any, value: str, reference: Any, random_state: int | None, verify: bool, *,
    complement: bool = False,
) -> Intervention:  # fmt: skip
    if value == "reroute":
        return reroute(model, what, complement=complement, verify=verify)
    filling = None
    if value != "zero":
        filling = filling_of(model, what, value, reference, seed_of(random_state), complement)
    return change_mixture(model, what, complement=complement, verify=verify, filling=filling)


def _replace(
    model: nn.Module, parts: list[Part], value: str, reference: Any, random_state: int | None, verify: bool
) -> Intervention:
    if value == "zero":
        return Intervention(model, [(p.module, zero(_near(p))) for p in parts], _count(parts), verify)
    if reference is None:
        raise InputError(f"value={value!r} needs reference=: scans of this model, arrays, or token ids for it to read")
    edits: list[tuple[nn.Module, Edit]] = []
    seed = seed_of(random_state)
    for i, (part, values) in enumerate(zip(parts, reference_values(model, parts, reference))):
        if value == "mean":
            edits.append((part.module, constant(_near(part), values.double().mean(dim=0))))
        else:
            edits.append((part.module, Resample(part.positions, values, seed + i)))
    return Intervention(model, edits, _count(parts), verify)


def _count(parts: Sequence[Part]) -> int:
    return int(sum(int(p.chosen.sum()) for p in parts))


def _near(part: Part) -> Tensor:
    """What is chosen, on the device of the weight (the edits move it again where accelerate decides later)."""
    weight = part.module.weight
    assert isinstance(weight, Tensor)
    return part.chosen if weight.device.type == "meta" else part.chosen.to(weight.device)


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

    def keep(part: Part, values: list[Tensor]) -> Callable[[Tensor], None]:
        return lambda x: values.append(x.flatten(0, -2)[:, part.positions.to(x.device)].float().cpu())

    places = [(part.module, keep(part, values)) for part, values in zip(parts, collected)]
    with evaluating(model), hear_inputs(model, places):
        for ids in batches(windows):
            model(input_ids=ids.to(input_device(model)))
    return [torch.cat(values) for values in collected]

"""A mixture of experts in the shapes that a plain config builds: with zeros where neurons are missing, and experts that
no router can choose where experts are.

An expert that is only zeros would still be chosen, and take the place of another. What forbids it is a bias of its
router: the least number that its dtype has. Families whose routers have none can not carry dead experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmbrain._validation import InputError
from llmbrain.anatomy.expert_parts import WHOLE, places_of
from llmbrain.anatomy.experts import ExpertAnatomy, ExpertLayer, Routed, expert_anatomy
from llmbrain.checkpoints.expert_shapes import expert_shapes, plain_entries, shape_text
from llmbrain.checkpoints.shapes import OF_EXPERTS, RECORD, build_empty, stock_config, text_config


@dataclass
class _Places:
    """Where a layer's experts and neurons lie in the stock shapes.

    Attributes
    ----------
    experts : list of int
        Of each routed expert that is left.
    neurons : list of Tensor
        Of each of them, its neurons.
    shared : list of Tensor
        Of each shared expert, its neurons.
    """

    experts: list[int]
    neurons: list[Tensor]
    shared: list[Tensor]


def stock_mixture(model: Any, format: str, multiple_of: int = 1) -> nn.Module:
    """The same function in the shapes of a plain config, sharing what needs no change.

    Parameters
    ----------
    format : str
        ``"padded"``: as many experts as the layer that has most, as wide as the widest. ``"masked"``: the uncut shapes.
    multiple_of : int
        With ``"padded"``, widths are rounded up to a multiple of it.

    Raises
    ------
    InputError
        If no config can say it, or a router can not be told that an expert is dead.
    """
    body = expert_anatomy(model)
    if format == "padded":
        places, shapes = [_in_order(layer) for layer in body.layers], _largest(model, multiple_of)
    else:
        cuts = getattr(model, RECORD, [])
        found = [_before(layer, cuts) for layer in body.layers]
        places, shapes = [p for p, _ in found], [s for _, s in found]
    config = stock_config(model.config)
    entries = plain_entries(type(model), config, shapes)
    if entries is None:
        raise InputError(
            f"format={format!r}: the config of {type(model).__name__} cannot say these shapes "
            f"({', '.join(map(shape_text, shapes))}): use 'per-layer'"
        )
    for name, value in entries.items():
        setattr(text_config(config), name, value)
    empty = build_empty(type(model), config)
    state = {**dict(model.state_dict()), **_filled(format, body, expert_anatomy(empty), places, empty)}
    empty.load_state_dict(state, strict=True, assign=True)
    empty.tie_weights()
    if getattr(model, "generation_config", None) is not None:
        empty.generation_config = model.generation_config
    return empty  # type: ignore[no-any-return]


def _in_order(layer: ExpertLayer) -> _Places:
    """One after the other, what is missing behind them."""
    count, width = (0, 0) if layer.routed is None else (layer.routed.count, layer.routed.width)
    return _Places(list(range(count)), [torch.arange(width)] * count, [torch.arange(mlp.width) for mlp in layer.shared])


def _largest(model: nn.Module, multiple_of: int) -> list[dict[str, int]]:
    """The largest count and widths of the layers of each kind (with routed experts or without), for all of them."""
    shapes = expert_shapes(model)
    found = []
    for shape in shapes:
        alike = [s for s in shapes if bool(s["routed_experts"]) == bool(shape["routed_experts"])]
        most = {name: max(s[name] for s in alike) for name in OF_EXPERTS}
        for name in OF_EXPERTS[1:]:
            most[name] = -(-most[name] // multiple_of) * multiple_of
        found.append(most)
    return found


def _before(layer: ExpertLayer, cuts: list[dict[str, Any]]) -> tuple[_Places, dict[str, int]]:
    """Where what is left stood before all cuts, and the shapes then."""
    i, routed, n_shared = layer.index, layer.routed, len(layer.shared)
    of_experts = [cut for cut in cuts if "kept_experts" in cut]
    of_neurons = [cut for cut in cuts if "kept_experts" not in cut and "kept" in cut and cut.get("experts_before")]
    if len(of_experts) + len(of_neurons) < len(cuts):
        raise InputError("format='masked': this model lost more than experts and their neurons: use 'per-layer'")
    count = 0 if routed is None else routed.count
    count = of_experts[0]["experts_before"][i] if of_experts else count
    widths = [int(w) for w in (of_neurons[0]["experts_before"][i] if of_neurons else layer.expert_widths)]
    places = _Places(
        list(range(count)),
        [torch.arange(widths[-1]) for _ in range(count)],
        [torch.arange(w) for w in widths[:n_shared]],
    )
    shape = dict(zip(OF_EXPERTS, (count, widths[-1] if count else 0, sum(widths[:n_shared]))))
    for cut in cuts:
        if "kept_experts" in cut:
            if count:
                places.experts = [places.experts[k] for k in cut["kept_experts"][i]]
                places.neurons = [places.neurons[k] for k in cut["kept_experts"][i]]
            continue
        start, kept = 0, torch.tensor(cut["kept"][i], dtype=torch.long)
        parts = []
        for width, now in zip(cut["experts_before"][i], [*places.shared, *places.neurons]):
            parts.append(now[kept[(kept >= start) & (kept < start + width)] - start])
            start += width
        places.shared, places.neurons = parts[:n_shared], parts[n_shared:]
    return places, shape


def _filled(
    format: str, small: ExpertAnatomy, full: ExpertAnatomy, places: list[_Places], empty: nn.Module
) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    known = set(empty.state_dict())
    for ours, stock, at in zip(small.layers, full.layers, places):
        for mlp, wide, neurons in zip(ours.shared, stock.shared, at.shared):
            for narrow, target in zip((*mlp.inputs, mlp.down), (*wide.inputs, wide.down)):
                for name in ("weight", "bias"):
                    value = getattr(narrow.module, name, None)
                    if not isinstance(value, Tensor) or (name == "bias" and not narrow.is_output):
                        continue
                    key, axis = f"{target.path}.{name}", target.axis if name == "weight" else 0
                    shape = getattr(target.module, name).shape
                    state.setdefault(key, value.new_zeros(shape))
                    rows = value.detach().index_select(axis, narrow.rows(range(narrow.units)).to(value.device))
                    state[key].index_copy_(axis, target.rows(neurons).to(value.device), rows)
        if ours.routed is not None and stock.routed is not None:
            state |= _routed(format, ours.routed, stock.routed, at, known)
    return state


def _routed(format: str, ours: Routed, stock: Routed, at: _Places, known: set[str]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for tensor, target in zip(ours.weights, stock.weights):
        value = tensor.value.detach()
        wide = value.new_zeros(target.value.shape)
        for j, (expert, neurons) in enumerate(zip(at.experts, at.neurons)):
            if tensor.name in WHOLE:
                wide[expert] = value[j]
                continue
            axis, rows = places_of(stock, tensor.name, neurons[None])
            wide[expert].index_copy_(axis, rows[0].to(value.device), value[j])
        state[target.path] = wide
    dead = [e for e in range(stock.count) if e not in at.experts]
    closed = False
    for tensor, target in zip(ours.router, stock.router):
        value = tensor.value.detach()
        wide = value.new_zeros(target.value.shape)
        if dead and "bias" in tensor.name and target.path in known:
            wide[..., dead] = torch.finfo(value.dtype).min
            closed = True
        wide.index_copy_(tensor.axis, torch.tensor(at.experts, device=value.device), value)
        state[target.path] = wide
    if dead and not closed:
        raise InputError(
            f"format={format!r}: {ours.path} would hold {len(dead)} dead experts, and its router has no bias that "
            "could forbid them: use 'per-layer', or 'uniform' where all layers keep as many"
        )
    return state

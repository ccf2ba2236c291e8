"""Listening to and changing routed experts while a model runs.

The neurons of an expert pass no module. So transformers is told of one more implementation of its experts,
``"llmbrain"``: a plain loop over the experts that were called. It is in force within a ``with`` block; afterwards the
implementation that was there comes back, whatever happened. Each set of experts is first computed both ways: where the
loop gives something else than the model's own implementation, its experts are of no known layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmbrain._validation import InputError
from llmbrain.anatomy.expert_surgery import cut_router
from llmbrain.anatomy.experts import Routed
from llmbrain.hooks.probe import nearly_equal

NAME = "llmbrain"  # what our implementation is called in transformers
STATE = "_llmbrain_experts"  # attribute of an experts module while our implementation is in force


@dataclass(frozen=True)
class Visits:
    """What the routed experts of a layer did for every token.

    Attributes
    ----------
    experts : int64 ``(tokens, top_k)``
        Which experts each token called; -1 where it called none.
    weights : ``(tokens, top_k)``
        What the output of each was multiplied with: the gate.
    neurons : ``(tokens, top_k, width)``
        What entered the down projection; zero where none was called.
    outputs : ``(tokens, top_k, hidden)`` or None
        What each expert gave before it was multiplied with its gate; only where asked for.
    inputs : ``(tokens, hidden)``
        What entered the experts.
    """

    experts: Tensor
    weights: Tensor
    neurons: Tensor
    outputs: Tensor | None
    inputs: Tensor


Listen = Callable[[Visits], None]
EditNeurons = Callable[[Tensor, int], Tensor]
"""Neurons ``(tokens, width)`` of an expert, and its number; gives what is to take their place."""
EditRoute = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Experts called and their weights; gives others."""


@dataclass
class _State:
    """What is done in one experts module."""

    before: str | None
    listen: list[tuple[Listen, bool]] = field(default_factory=list)
    neurons: list[EditNeurons] = field(default_factory=list)
    routes: list[EditRoute] = field(default_factory=list)
    compared: bool = False


def changed(model: nn.Module) -> bool:
    """Whether experts of a model are changed (not only heard) now."""
    states = [vars(module).get(STATE) for module in model.modules()]
    return any(state is not None and (state.neurons or state.routes) for state in states)


@contextmanager
def hearing_experts(places: Mapping[nn.Module, Listen], *, outputs: bool = False) -> Iterator[None]:
    """Within the block functions get the `Visits` of each call of an experts module; with `outputs`, what they gave.

    Raises
    ------
    InputError
        On a call whose experts do not compute what their layout says.
    """
    with _in_force(list(places)) as states:
        added = [(states[id(module)], (listen, outputs)) for module, listen in places.items()]
        for state, entry in added:
            state.listen.append(entry)
        try:
            yield
        finally:
            for state, entry in added:
                state.listen.remove(entry)


@contextmanager
def changing_experts(
    neurons: Mapping[nn.Module, EditNeurons] | None = None, routes: Mapping[nn.Module, EditRoute] | None = None
) -> Iterator[None]:
    """Within the block neurons of routed experts, or which are called and how much they count, are edited."""
    neurons, routes = neurons or {}, routes or {}
    with _in_force([*dict.fromkeys((*neurons, *routes))]) as states:
        for module, edit in neurons.items():
            states[id(module)].neurons.append(edit)
        for module, route in routes.items():
            states[id(module)].routes.append(route)
        try:
            yield
        finally:
            for module, edit in neurons.items():
                states[id(module)].neurons.remove(edit)
            for module, route in routes.items():
                states[id(module)].routes.remove(route)


@contextmanager
def _in_force(modules: list[Any]) -> Iterator[dict[int, _State]]:
    """Our implementation is that of these modules within the block; it may be entered again within itself."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, _forward)
    configs = {id(module.config): module.config for module in modules}
    before = {key: config._experts_implementation_internal for key, config in configs.items()}
    new, states = [], {}
    try:
        for module in modules:
            state = vars(module).get(STATE)
            if state is None:
                state = vars(module)[STATE] = _State(before[id(module.config)])
                new.append(module)
            states[id(module)] = state
        for config in configs.values():
            config._experts_implementation_internal = NAME
        yield states
    finally:
        for key, config in configs.items():
            config._experts_implementation_internal = before[key]
        for module in new:
            vars(module).pop(STATE, None)


def _forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Our implementation; it computes plainly what it is not asked to hear or change."""
    state = vars(self).get(STATE) or _State(None, compared=True)
    if getattr(self, "_is_expert_parallel", False):
        raise InputError(f"{type(self).__name__} is spread over several processes: load the model whole")
    if not state.compared and not hidden_states.is_meta:
        _compare(self, state, hidden_states, top_k_index, top_k_weights)
    for route in state.routes:
        top_k_index, top_k_weights = route(top_k_index, top_k_weights)
    wanted = any(outputs for _, outputs in state.listen)
    out, neurons, outputs = _run(
        self, hidden_states, top_k_index, top_k_weights, state.neurons, hear=bool(state.listen), outputs=wanted
    )
    if neurons is not None:
        called = (top_k_index >= 0) & (top_k_index < self.down_proj.shape[0])
        experts = torch.where(called, top_k_index, -1)
        weights = torch.where(called, top_k_weights, 0)
        for listen, asked in state.listen:
            listen(Visits(experts, weights, neurons, outputs if asked else None, hidden_states))
    return out


def _run(
    module: Any, x: Tensor, index: Tensor, weights: Tensor, edits: list[EditNeurons], *, hear: bool, outputs: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The experts' sum, and, where they are to be heard, neurons and outputs by visit."""
    count = int(module.down_proj.shape[0])
    total = torch.zeros_like(x)
    neurons: Tensor | None = None
    given: Tensor | None = None
    for expert in torch.unique(index).tolist():
        if not 0 <= expert < count:  # a place left empty: the token calls fewer experts
            continue
        place, token = torch.where((index == expert).T)
        h = _neurons(module, x[token], expert)
        for edit in edits:
            h = edit(h, expert)
        one = _linear(module, h, "down_proj", expert)
        if getattr(module, "has_post_expert_norm", False):
            one = module.post_expert_norm(one)
        if hear:
            if neurons is None:
                neurons = h.new_zeros((*index.shape, h.shape[-1]))
            neurons[token, place] = h
        if outputs:
            if given is None:
                given = one.new_zeros((*index.shape, one.shape[-1]))
            given[token, place] = one
        total.index_add_(0, token, (one * weights[token, place, None]).to(total.dtype))
    if hear and neurons is None:
        axis = 1 if module.is_transposed else 2
        neurons = x.new_zeros((*index.shape, int(module.down_proj.shape[axis])))
    return total, neurons, given


def _neurons(module: Any, x: Tensor, expert: int) -> Tensor:
    """What the neurons of an expert say to some tokens."""
    if module.has_gate:
        return module._apply_gate(_linear(module, x, "gate_up_proj", expert))
    return module.act_fn(_linear(module, x, "up_proj", expert))


def _linear(module: Any, x: Tensor, name: str, expert: int) -> Tensor:
    weight = getattr(module, name)[expert]
    bias = getattr(module, f"{name}_bias")[expert] if module.has_bias else None
    if not module.is_transposed:
        return F.linear(x, weight, bias)
    y = x @ weight
    return y if bias is None else y + bias


def _compare(module: Any, state: _State, x: Tensor, index: Tensor, weights: Tensor) -> None:
    """Our loop and the model's own implementation, on the same call."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    eager = getattr(type(module).forward, "__wrapped__", None)
    own: Any = ALL_EXPERTS_FUNCTIONS.get(state.before, eager) if state.before is not None else eager
    if own is None:
        return
    wanted = own(module, x, index, weights)
    got, _, _ = _run(module, x, index, weights, [], hear=False, outputs=False)
    finite = bool(torch.isfinite(wanted).all())
    if finite and not nearly_equal(got, wanted):
        raise InputError(
            f"{type(module).__name__} does not compute what its weights say (gate and up projection, activation, down "
            "projection, gate of the router): its experts are of no known layout"
        )
    state.compared = True


@contextmanager
def rerouted(routed: Mapping[int, Routed], kept: Mapping[int, Sequence[int]]) -> Iterator[None]:
    """Within the block routers choose among the experts `kept` only, by layer; no weight of an expert is touched.

    That is what a model does whose other experts are cut out. Whether routers can choose so is for
    `llmbrain.anatomy.expert_surgery.check_kept` to say, before.
    """

    def numbered(stays: Sequence[int]) -> EditRoute:
        table = torch.tensor(list(stays))

        def edit(index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
            return table.to(index.device)[index], weights

        return edit

    routes = {routed[layer].module: numbered(stays) for layer, stays in kept.items()}
    with ExitStack() as stack:
        for layer, stays in kept.items():
            stack.callback(cut_router(routed[layer], stays))
        stack.enter_context(changing_experts(routes=routes))
        for module in routes:
            vars(module)[STATE].compared = True  # experts are numbered otherwise here than in the model's own loop
        yield


def silenced(chosen: Tensor) -> EditNeurons:
    """Chosen neurons (bool ``(experts, width)``) are zero."""
    return lambda h, expert: h.masked_fill(chosen[expert].to(h.device), 0)


def scaled(chosen: Tensor, gain: float) -> EditNeurons:
    """Chosen neurons are multiplied."""
    return lambda h, expert: torch.where(chosen[expert].to(h.device), h * gain, h)


class Held:
    """Chosen neurons hold these values whatever is said.

    Parameters
    ----------
    chosen : bool tensor ``(experts, width)``
    values : tensor ``(experts, width)``
        nan where nothing is known: a call of such an expert is an error.
    path : str
        Of the experts, for messages.
    """

    def __init__(self, chosen: Tensor, values: Tensor, path: str) -> None:
        self.chosen, self.values, self.path = chosen, values, path

    def __call__(self, h: Tensor, expert: int) -> Tensor:
        chosen, values = self.chosen[expert], self.values[expert]
        if bool(torch.isnan(values[chosen]).any()):
            raise InputError(unknown(self.path, expert))
        return torch.where(chosen.to(h.device), values.to(h), h)


class Redrawn:
    """Chosen neurons of an expert hold what they held together at a random one of the calls in its pool.

    Parameters
    ----------
    chosen : bool tensor ``(experts, width)``
    pools : dict of expert -> tensor ``(calls, n_chosen)``
    seed : int
    path : str
        Of the experts, for messages.
    """

    def __init__(self, chosen: Tensor, pools: Mapping[int, Tensor], seed: int, path: str) -> None:
        self.chosen, self.pools, self.seed, self.path = chosen, pools, seed, path
        self.restart()

    def restart(self) -> None:
        """Draw the same calls again."""
        self.generator = torch.Generator().manual_seed(self.seed)

    def __call__(self, h: Tensor, expert: int) -> Tensor:
        positions = self.chosen[expert].nonzero()[:, 0]
        if not len(positions):
            return h
        if expert not in self.pools:
            raise InputError(unknown(self.path, expert))
        rows = torch.randint(len(self.pools[expert]), (len(h),), generator=self.generator)
        return h.index_copy(-1, positions.to(h.device), self.pools[expert][rows].to(h))


def unknown(path: str, expert: int) -> str:
    """What is said where a lesioned expert is called that the reference never called."""
    return (
        f"{path}: expert {expert} is called, but reference= never called it, so that nothing is known of what its "
        "neurons hold: pass more text as reference=, or value='zero'"
    )


def unweighted(experts: Tensor) -> EditRoute:
    """What these routed experts (int64) give does not count, biases included; the others' gates stay as they are."""

    def edit(index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        return index, weights.masked_fill(torch.isin(index, experts.to(index.device)), 0)

    return edit

"""Listening to and changing routed experts while a model runs.

The neurons of an expert pass no module. So transformers is told of one more implementation of its experts,
``"llmbrain"``: a plain loop over the experts that were called. It is in force within a ``with`` block; afterwards the
implementation that was there comes back, whatever happened. Experts that are not on that interface (Llama-4) have their
``forward`` replaced within the block. Each set of experts is first computed both ways: where the
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
from llmbrain.anatomy.experts import Layout, Routed, block_of, is_experts, multiplies_in_groups
from llmbrain.hooks.probe import nearly_equal
from llmbrain.hooks.text import GROUPED

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
        What the output of each was multiplied with: the gate; 1 where the gate multiplies what enters.
    neurons : ``(tokens, top_k, width)``
        What entered the down projection; zero where none was called.
    outputs : ``(tokens, top_k, hidden)`` or None
        What each expert gave before it was multiplied with its gate; only where asked for.
    gates : ``(tokens, top_k)``
        What the router said: what the output of each, or what entered it, was multiplied with.
    """

    experts: Tensor
    weights: Tensor
    neurons: Tensor
    outputs: Tensor | None
    gates: Tensor


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


def run_one_by_one(model: Any) -> None:
    """Where torch cannot multiply matrices of these sizes in groups, the model runs its experts one after the other.

    Stock transformers does not look, and fails at the first token.
    """
    for module in model.modules():
        if not is_experts(module) or Layout.of(module).gate_first:
            continue
        if not multiplies_in_groups(module) and module.config._experts_implementation == GROUPED:
            model.set_experts_implementation("eager")
            return


@contextmanager
def implemented_by(model: Any, name: str) -> Iterator[None]:
    """Within the block a mixture of experts runs its experts by this implementation of transformers."""
    modules = [m for m in model.modules() if is_experts(m) and not Layout.of(m).gate_first]
    configs = {id(m.config): m.config for m in modules}
    before = {key: config._experts_implementation_internal for key, config in configs.items()}
    try:
        for config in configs.values():
            config._experts_implementation_internal = name
        yield
    finally:
        for key, config in configs.items():
            config._experts_implementation_internal = before[key]


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
    gate_first = [module for module in modules if Layout.of(module).gate_first]
    configs = {id(module.config): module.config for module in modules if module not in gate_first}
    before = {key: config._experts_implementation_internal for key, config in configs.items()}
    states: dict[int, _State] = {}
    with ExitStack() as stack:
        for module in modules:
            state = vars(module).get(STATE)
            if state is None:
                was = None if module in gate_first else before[id(module.config)]
                state = vars(module)[STATE] = _State(was)
                stack.callback(vars(module).pop, STATE, None)
                if module in gate_first:
                    stack.enter_context(_replaced(module, state))
            states[id(module)] = state
        for key, config in configs.items():
            stack.callback(setattr, config, "_experts_implementation_internal", before[key])
            config._experts_implementation_internal = NAME
        yield states


@contextmanager
def _replaced(module: Any, state: _State) -> Iterator[None]:
    """Within the block experts whose gate multiplies what enters them are run by us, on the choice of their router."""
    block: Any = block_of(module)
    said: list[tuple[Tensor, Tensor]] = []

    def hear(router: nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> None:
        said[:] = [output]

    name = "_old_forward" if "_old_forward" in vars(module) else "forward"  # what accelerate wraps: weights come first
    before, own = vars(module).get(name), getattr(module, name)

    def forward(hidden_states: Tensor) -> Tensor:
        scores, logits = said[0]  # (tokens, experts)
        index = torch.topk(logits, block.router.top_k, dim=1).indices  # as the router itself chose
        entering = hidden_states.unflatten(0, (scores.shape[1], -1))  # (experts, tokens, hidden)
        token = torch.arange(len(scores), device=index.device)[:, None]
        if not state.compared and not hidden_states.is_meta:
            wanted = own(hidden_states)
            done = _run(module, entering[index, token], index, _ones(index, scores), [], outputs=True)
            _hold_against(module, _spread(done, index, scores.shape[1]), wanted)
            state.compared = True
        called, weights = index, _ones(index, scores)
        for route in state.routes:
            called, weights = route(called, weights)
        done = _run(
            module, entering[index, token], called, weights, state.neurons, hear=bool(state.listen), outputs=True
        )
        _tell(module, state, called, weights, done, scores.gather(1, index) * weights)
        assert done.outputs is not None
        done.outputs = done.outputs * weights[..., None]
        return _spread(done, index, scores.shape[1])

    handle = block.router.register_forward_hook(hear)
    try:
        vars(module)[name] = forward
        yield
    finally:
        vars(module).pop(name)
        if before is not None:
            vars(module)[name] = before
        handle.remove()


def _ones(index: Tensor, like: Tensor) -> Tensor:
    return torch.ones(index.shape, dtype=like.dtype, device=like.device)


def _spread(done: _Done, index: Tensor, count: int) -> Tensor:
    """What experts gave by visit, as ``(experts * tokens, hidden)``, zero where not called."""
    assert done.outputs is not None
    spread = done.outputs.new_zeros((count, len(index), done.outputs.shape[-1]))
    token = torch.arange(len(index), device=index.device)[:, None].expand_as(index)
    return spread.index_put((index, token), done.outputs).flatten(0, 1)


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
    done = _run(self, hidden_states, top_k_index, top_k_weights, state.neurons, hear=bool(state.listen), outputs=wanted)
    _tell(self, state, top_k_index, top_k_weights, done, top_k_weights)
    return done.total


def _tell(module: Any, state: _State, index: Tensor, weights: Tensor, done: _Done, gates: Tensor) -> None:
    """Functions that listen get what was done."""
    if done.neurons is None:
        return
    called = (index >= 0) & (index < module.down_proj.shape[0])
    experts = torch.where(called, index, -1)
    weights, gates = torch.where(called, weights, 0), torch.where(called, gates, 0)
    for listen, asked in state.listen:
        listen(Visits(experts, weights, done.neurons, done.outputs if asked else None, gates))


@dataclass
class _Done:
    """What experts did: their sum ``(tokens, hidden)``, and by visit, where asked for, neurons and outputs."""

    total: Tensor
    neurons: Tensor | None = None
    outputs: Tensor | None = None


def _run(
    module: Any, x: Tensor, index: Tensor, weights: Tensor, edits: list[EditNeurons], *, hear: bool = False,
    outputs: bool = False,
) -> _Done:  # fmt: skip
    """Run the experts; `x` is ``(tokens, hidden)``, or ``(tokens, top_k, hidden)`` where each gets something else."""
    count, layout = int(module.down_proj.shape[0]), Layout.of(module)
    done = _Done(x.new_zeros((len(x), x.shape[-1])))
    for expert in torch.unique(index).tolist():
        if not 0 <= expert < count:  # a place left empty: the token calls fewer experts
            continue
        place, token = torch.where((index == expert).T)
        h = _neurons(module, layout, x[token] if x.ndim == 2 else x[token, place], expert)
        for edit in edits:
            h = edit(h, expert)
        one = _linear(module, layout, h, "down_proj", expert)
        if layout.normed:
            one = module.post_expert_norm(one)
        if hear:
            if done.neurons is None:
                done.neurons = h.new_zeros((*index.shape, h.shape[-1]))
            done.neurons[token, place] = h
        if outputs:
            if done.outputs is None:
                done.outputs = one.new_zeros((*index.shape, one.shape[-1]))
            done.outputs[token, place] = one
        done.total.index_add_(0, token, (one * weights[token, place, None]).to(done.total.dtype))
    if hear and done.neurons is None:
        axis = 1 if layout.transposed else 2
        done.neurons = x.new_zeros((*index.shape, int(module.down_proj.shape[axis])))
    return done


def _neurons(module: Any, layout: Layout, x: Tensor, expert: int) -> Tensor:
    """What the neurons of an expert say to some tokens."""
    if layout.gate_first:
        gate, up = _linear(module, layout, x, "gate_up_proj", expert).chunk(2, dim=-1)
        return up * module.act_fn(gate)  # type: ignore[no-any-return]
    if layout.gated:
        return module._apply_gate(_linear(module, layout, x, "gate_up_proj", expert))  # type: ignore[no-any-return]
    return module.act_fn(_linear(module, layout, x, "up_proj", expert))  # type: ignore[no-any-return]


def _linear(module: Any, layout: Layout, x: Tensor, name: str, expert: int) -> Tensor:
    weight: Tensor = getattr(module, name)[expert]
    bias: Tensor | None = getattr(module, f"{name}_bias")[expert] if layout.has_bias else None
    if not layout.transposed:
        return F.linear(x, weight, bias)
    y = x @ weight
    return y if bias is None else y + bias


def _compare(module: Any, state: _State, x: Tensor, index: Tensor, weights: Tensor) -> None:
    """Our loop and the model's own implementation, on the same call."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    eager = getattr(type(module).forward, "__wrapped__", None)
    own: Any = ALL_EXPERTS_FUNCTIONS.get(state.before, eager) if state.before is not None else eager
    if state.before == GROUPED and not multiplies_in_groups(module):
        own = eager
    if own is None:
        return
    _hold_against(module, _run(module, x, index, weights, []).total, own(module, x, index, weights))
    state.compared = True


def _hold_against(module: Any, got: Tensor, wanted: Tensor) -> None:
    if bool(torch.isfinite(wanted).all()) and not nearly_equal(got, wanted):
        raise InputError(
            f"{type(module).__name__} does not compute what its weights say (gate and up projection, activation, down "
            "projection, gate of the router): its experts are of no known layout"
        )


def summed(module: Any, out: Tensor) -> Tensor:
    """The sum over experts of what their module gave, ``(tokens, hidden)``."""
    out = out.flatten(0, -2)
    count = int(module.down_proj.shape[0])
    return out.unflatten(0, (count, -1)).sum(0) if Layout.of(module).gate_first else out


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
        f"{path}: expert {expert} is called, but the reference (reference=, or the evaluations' own tokens) never "
        "called it, so that nothing is known of what its neurons hold: give it more text, or value='zero'"
    )


def unweighted(experts: Tensor) -> EditRoute:
    """What these routed experts (int64) give does not count, biases included; the others' gates stay as they are."""

    def edit(index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        return index, weights.masked_fill(torch.isin(index, experts.to(index.device)), 0)

    return edit

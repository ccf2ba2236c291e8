"""Hooks on a running model that listen: they copy or measure what passes, and leave it as it is.

All hooks of the package are hung up here. They count: a forward pass in which one of them was not called is an error
that says why, because what was to be heard or changed there was not.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmbrain._validation import InputError
from llmbrain.hooks.experts import Visits, hearing_experts
from llmbrain.hooks.probe import nearly_equal
from llmbrain.hooks.sites import Tap
from llmbrain.hooks.text import Block, Run, embeddings, evaluating, no_cache, pad_id

WHY_SILENT = (
    "the model ran past this module (a compiled or fused forward, or a code path that uses its weight without calling "
    "it, such as slow_but_exact of BLOOM)"
)


@dataclass(frozen=True)
class Call:
    """What a module was called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def entering(self) -> Tensor:
        """The tensor that enters: the first argument."""
        found = self.args[0] if self.args else self.kwargs[self._name]
        assert isinstance(found, Tensor)
        return found

    @property
    def _name(self) -> str:
        return "hidden_states" if "hidden_states" in self.kwargs else next(iter(self.kwargs))

    def entered_by(self, value: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with another tensor that enters."""
        if self.args:
            return (value, *self.args[1:]), self.kwargs
        return (), {**self.kwargs, self._name: value}


@dataclass(frozen=True)
class Place:
    """A module and what is done whenever it is called.

    Attributes
    ----------
    module : module
    act : function
        Gets the `Call`, and, with `after`, the output too. Before the call it may give another tensor to enter.
    after : bool
        Whether it acts after the call.
    changes : bool
        Whether it may change what passes; such hooks stay behind when the model is copied.
    """

    module: nn.Module
    act: Callable[..., Any]
    after: bool = False
    changes: bool = False


class Hook:
    """One hook in its place; counts its calls. A copy of the model gets one that does nothing."""

    def __init__(self, place: Place) -> None:
        self.place, self.count, self.active = place, 0, True

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> Any:
        if not self.active:
            return None
        self.count += 1
        call = Call(args, kwargs)
        found = self.place.act(call, *output)
        return None if found is None or self.place.after else call.entered_by(found)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        copied = Hook(Place(nn.Identity(), lambda *_: None))
        copied.active = False
        return copied


class Hooks(AbstractContextManager):
    """Hooks that are there within a ``with`` block, and gone afterwards whatever happens. It may be entered again.

    Compiled code does not see hooks that come after it, so within the block it runs as plain Python.

    Parameters
    ----------
    model : module or None
        After each of its forward passes, every place must have been called; None: nothing is checked.
    places : sequence of Place

    Raises
    ------
    InputError
        On the forward pass in which a place was not called.
    """

    def __init__(self, model: nn.Module | None, places: Sequence[Place]) -> None:
        self.model, self.places = model, list(places)
        self._stacks: list[ExitStack] = []

    def __enter__(self) -> Hooks:
        with ExitStack() as stack:
            stack.enter_context(_uncompiled())
            hooks = [Hook(place) for place in self.places]
            for hook in hooks:
                module, after = hook.place.module, hook.place.after
                hang_up = module.register_forward_hook if after else module.register_forward_pre_hook
                stack.callback(hang_up(hook, with_kwargs=True).remove)  # type: ignore[operator]
            for module in _wholes(self.model) if hooks else ():
                watch = _Watch(type(self.model).__name__, hooks)
                stack.callback(module.register_forward_pre_hook(watch.before).remove)
                stack.callback(module.register_forward_hook(watch.after).remove)
            self._stacks.append(stack.pop_all())
        return self

    def __exit__(self, *error: object) -> None:
        self._stacks.pop().close()


@dataclass
class _Watch:
    """Compares the calls of hooks before and after each forward pass of a whole model."""

    name: str
    hooks: list[Hook]
    counts: list[int] = field(default_factory=list)

    def before(self, *_: Any) -> None:
        self.counts = [hook.count for hook in self.hooks]

    def after(self, *_: Any) -> None:
        silent = [i for i, (hook, count) in enumerate(zip(self.hooks, self.counts)) if hook.count == count]
        if silent:
            kinds = {type(self.hooks[i].place.module).__name__ for i in silent}
            raise InputError(
                f"model {self.name}: {len(silent)} of {len(self.hooks)} hooks (on {', '.join(sorted(kinds))}) were not "
                f"called in a forward pass, so nothing was heard or changed there: {WHY_SILENT}. Off with verify=False"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> _Watch:
        return _Watch(self.name, [])


def _wholes(model: nn.Module | None) -> list[nn.Module]:
    """What is called when a model runs: itself, or what it is without its head."""
    body = getattr(model, "base_model", None)
    return [m for m in dict.fromkeys((model, body)) if isinstance(m, nn.Module)]


@contextmanager
def _uncompiled() -> Iterator[None]:
    """Within the block `torch.compile` is as if it had not been asked for."""
    if "torch._dynamo.eval_frame" not in sys.modules:  # nothing can be compiled; importing it takes seconds
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def hear_inputs(model: nn.Module | None, places: Iterable[tuple[nn.Module, Callable[[Tensor], None]]]) -> Hooks:
    """Functions that get the tensor that enters a module."""

    def hearing(listen: Callable[[Tensor], None]) -> Callable[[Call], None]:
        return lambda call: listen(call.entering)

    return Hooks(model, [Place(module, hearing(listen)) for module, listen in places])


def hear_outputs(model: nn.Module | None, places: Iterable[tuple[nn.Module, Callable[..., None]]]) -> Hooks:
    """Functions that get the tensor that entered a module, and what came out."""

    def hearing(listen: Callable[[Tensor, Any], None]) -> Callable[[Call, Any], None]:
        return lambda call, output: listen(call.entering, output)

    return Hooks(model, [Place(module, hearing(listen), after=True) for module, listen in places])


def hear_calls(model: nn.Module | None, places: Iterable[tuple[nn.Module, Callable[[Call], None]]]) -> Hooks:
    """Functions that get the whole call of a module before it runs; one that raises ends the forward pass."""
    return Hooks(model, [Place(module, listen) for module, listen in places])


# -- recording sites -------------------------------------------------------------------------------------------------


class Recorder:
    """Listens at `taps`; what it hears goes to `buffers` on the CPU, real tokens only.

    A buffer that is given is filled at the rows of the batch; one that is not is made. The hooks copy at once, since
    some models change a module's output in place afterwards (Falcon).
    """

    def __init__(self, taps: Sequence[Tap]) -> None:
        self.taps = taps
        self.buffers: dict[tuple[str, int], Tensor] = {}
        self.n_rows = self.n_cells = 0
        self._keep: Tensor | None = None
        self._keep_on: dict[torch.device, Tensor] = {}
        self._rows = slice(0)
        self._heard: Counter[tuple[str, int]] = Counter()

    def expect(self, mask: Tensor, first_row: int) -> None:
        """Prepare for one forward pass over a batch whose real tokens are `mask` (bool, CPU)."""
        self.n_cells, self.n_rows = mask.numel(), int(mask.sum())
        self._keep = None if self.n_rows == self.n_cells else mask.flatten().nonzero()[:, 0]
        self._rows = slice(first_row, first_row + self.n_rows)
        self._heard, self._keep_on = Counter(), {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hooks are there within the block, and gone afterwards whatever happens."""
        by_visit: dict[nn.Module, list[Tap]] = {}
        for tap in self.taps:
            if tap.by_visit:
                by_visit.setdefault(tap.module, []).append(tap)
        experts = {module: partial(self._hear_visits, taps) for module, taps in by_visit.items()}
        places = [self._place(tap) for tap in self.taps if not tap.by_visit and not tap.silent]
        with Hooks(None, places), hearing_experts(experts) if experts else nullcontext():
            yield

    def _hear_visits(self, taps: Sequence[Tap], visits: Visits) -> None:
        heard = {
            "visited": visits.experts.to(torch.int32),
            "weight": visits.gates,
            "routed": visits.neurons.flatten(1),
        }
        for tap in taps:
            self._hear(tap, heard[tap.site])

    def _place(self, tap: Tap) -> Place:
        if tap.output:
            return Place(tap.module, lambda call, out: self._hear(tap, out), after=True)
        return Place(tap.module, lambda call: self._hear(tap, call.entering))

    def _hear(self, tap: Tap, value: Any) -> None:
        signal = tap.read(value)
        signal = signal.flatten(0, -2)
        if signal.shape[0] == self.n_cells:
            if self._keep is not None:
                keep = self._keep_on.setdefault(signal.device, self._keep.to(signal.device))
                signal = signal.index_select(0, keep)
        elif signal.shape[0] != self.n_rows:  # models that drop the padding themselves give the real tokens only
            raise InputError(
                f"site={tap.site!r}, layer {tap.layer}: {signal.shape[0]} rows for {self.n_cells} tokens: "
                "this module does not see one row a token"
            )
        key = (tap.site, tap.layer)
        self._heard[key] += 1
        if key in self.buffers:
            self.buffers[key][self._rows].copy_(signal)
        else:
            self.buffers[key] = signal.to("cpu", copy=True)

    def check_heard(self) -> None:
        """Every tap must have been passed exactly once."""
        for tap in self.taps:
            if tap.silent:
                like = tap.module.weight
                assert isinstance(like, Tensor)
                self._hear(tap, like.new_zeros(self.n_rows, tap.width or 0))
            times = self._heard[tap.site, tap.layer]
            if times != 1:
                why = "" if times else f": {WHY_SILENT}"
                raise InputError(
                    f"site={tap.site!r}: layer {tap.layer} ran {times} times in one forward pass, and can not be "
                    f"recorded{why}"
                )


Kinds = Mapping[tuple[str, int], tuple[torch.dtype, int]]
"""Dtype and number of units of each site and layer."""


@dataclass
class Reader:
    """Runs the model's body over batches of blocks; a `Recorder` listens."""

    body: nn.Module
    recorder: Recorder
    runs: Sequence[Run]
    device: torch.device
    padding: int
    options: Mapping[str, Any]

    def read(self, blocks: Sequence[Block], first_row: int = 0) -> int:
        """One forward pass; what the recorder hears goes to its buffers from `first_row` on. Returns how many tokens.

        Padding is on the right: positions then are right without being told, and a mask is only given where needed.
        """
        ids = torch.full((len(blocks), max(len(block) for block in blocks)), self.padding)
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        for i, block in enumerate(blocks):
            ids[i, : len(block)] = torch.from_numpy(self.runs[block.run].token_ids[block.start : block.stop])
            mask[i, : len(block)] = True
        self.recorder.expect(mask, first_row)
        attention = None if bool(mask.all()) else mask.to(self.device, torch.long)
        self.body(input_ids=ids.to(self.device), attention_mask=attention, **self.options)
        self.recorder.check_heard()
        return self.recorder.n_rows

    def pads_well(self, together: Sequence[Block]) -> bool:
        """Whether the shortest of some blocks gives the same alone as beside the longest, padded.

        Some models do not obey the padding mask (FNet), or look at the length of the whole batch.
        """
        short, long = min(together, key=len), max(together, key=len)
        if len(short) == len(long):
            return True
        alone = self.read_alone(short)
        self.recorder.buffers = {}
        self.read([short, long])
        beside = self.recorder.buffers
        return all(nearly_equal(signal, beside[key][: len(short)]) for key, signal in alone.items())

    def read_alone(self, block: Block) -> dict[tuple[str, int], Tensor]:
        """What one block gives when read by itself: ``(tokens, units)`` by site and layer."""
        self.recorder.buffers = {}
        self.read([block])
        return self.recorder.buffers

    def kinds(self, block: Block, kept: torch.dtype | None) -> Kinds:
        """What each signal looks like, seen in a first reading of two tokens; `kept` overrides the dtype."""
        heard = self.read_alone(Block(block.run, block.start, min(block.start + 2, block.stop)))
        wide: dict[str, torch.dtype] = {}
        for (site, _), signal in heard.items():
            wide[site] = torch.promote_types(wide.get(site, signal.dtype), signal.dtype)
        keys = [(tap.site, tap.layer) for tap in self.recorder.taps]
        return {
            key: (wide[key[0]] if key[0] == "visited" else kept or wide[key[0]], heard[key].shape[1]) for key in keys
        }


@contextmanager
def reading(model: nn.Module, recorder: Recorder, runs: Sequence[Run]) -> Iterator[Reader]:
    """The model in evaluation mode with the recorder's hooks; both are undone on any exit."""
    from transformers import PreTrainedModel

    body = model.base_model if isinstance(model, PreTrainedModel) else model
    weight = getattr(embeddings(model), "weight", None)
    weight = next(model.parameters()) if weight is None or weight.is_meta else weight
    device = torch.device("cpu") if weight.is_meta else weight.device  # accelerate moves the ids from there itself
    with evaluating(model), recorder.listening():
        yield Reader(body, recorder, runs, device, pad_id(body), no_cache(body))

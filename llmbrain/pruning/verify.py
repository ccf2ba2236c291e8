"""Cut equals zeroed: tried on a copy of this very model, before a plan is carried out.

A table of families can not foresee everything. So the units that a plan removes are first set to zero in a copy, and
then cut out of it: both must say the same. Where the model is small the copy is of all of it, else of one block of each
kind. The copy's weights are shaken a little, so that what happens to be alike (norms with gains of one, biases of zero)
does not hide a part that was left behind.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llmbrain._validation import InputError
from llmbrain.anatomy.families import Anatomy, LayerAnatomy, anatomy
from llmbrain.anatomy.offload import copied, is_away
from llmbrain.anatomy.surgery import cut, drop
from llmbrain.anatomy.units import HEADS, NEURONS, Units
from llmbrain.hooks.change import change_inputs, zero
from llmbrain.hooks.listen import Call, hear_calls
from llmbrain.hooks.text import evaluating, input_device

WHOLE = 2**26  # parameters up to which a copy is of the whole model
N_TOKENS = 16
SHAKEN = 0.1  # standard deviation of the factors that weights are multiplied with
SHARE = 0.01  # of what silencing changes: more than that between cut and silenced is another function
ROUNDING = 1e-5  # of the output's size: no more than this is rounding, in float32
HALF = 2e-2  # the same where a model only runs in 16 bits
FAILURES = (RuntimeError, ValueError, IndexError, TypeError, AttributeError, KeyError, AssertionError)

Kept = Mapping[Units, Sequence[NDArray[np.int64]]]


def check_cut_is_zeroing(model: nn.Module, body: Anatomy, kept: Kept, windows: Tensor | None = None) -> None:
    """Compare cutting with silencing, on copies.

    Parameters
    ----------
    model : transformers model
        Not changed.
    body : Anatomy
        Its own.
    kept : mapping
        Units of each kind that stay, by layer.
    windows : (n, window) int64, optional
        Text whose first tokens are read; default some tokens of the vocabulary.

    Raises
    ------
    InputError
        Naming the kind of units and the difference; or why the model can not be tried.
    """
    kinds = [units for units in (NEURONS, HEADS) if units in kept and _cuts(units, body, kept[units])]
    if not kinds:
        return
    ids = _tokens(model, windows)
    if sum(p.numel() for p in model.parameters()) <= WHOLE and not is_away(model):
        _try_whole(model, kept, kinds, ids)
    else:
        _try_blocks(model, body, kept, kinds, ids)


def check_reads(model: nn.Module, windows: Tensor) -> None:
    """Refuse a model that does not read token ids alone, before any work.

    Raises
    ------
    InputError
        With what the model said.
    """
    try:
        with evaluating(model):
            model(input_ids=windows[:1, :N_TOKENS].to(input_device(model)))
    except FAILURES as error:
        raise InputError(
            f"model {type(model).__name__} does not read token ids alone ({type(error).__name__}: {_line(error)}): "
            "pass the language model inside it"
        ) from error


def take(layer: LayerAnatomy, units: Units, stays: NDArray[np.int64]) -> None:
    """Leave a layer the units that stay; with none of them its MLP or attention is dropped."""
    if not len(stays) and units.count(layer):
        drop(layer, units)
    elif len(stays) < units.count(layer):
        cut(layer, units, torch.from_numpy(stays))


def check_cache(model: Any, windows: Tensor | None = None) -> None:
    """Read a few tokens at once, and again in two parts with the cache between them: both must say the same.

    Raises
    ------
    InputError
        If they do not: the model without an attention would write other texts than it should.
    """
    if not (hasattr(model, "can_generate") and model.can_generate()):
        return
    ids = _tokens(model, windows)
    ids = ids.to(input_device(model))
    with evaluating(model, cache=True):
        try:
            whole = model(input_ids=ids).logits[:, -1]
            first = model(input_ids=ids[:, :-2], use_cache=True)
            cache = first.past_key_values
            second = model(input_ids=ids[:, -2:-1], past_key_values=cache, use_cache=True)
            parts = model(input_ids=ids[:, -1:], past_key_values=second.past_key_values, use_cache=True).logits[:, -1]
        except FAILURES as error:
            raise InputError(
                f"the attention of this model cannot be dropped: {type(model).__name__} does not go on from its cache "
                f"without it ({type(error).__name__}: {_line(error)})"
            ) from error
    size = float(whole.float().square().mean().sqrt())
    apart = float((whole.float() - parts.float()).square().mean().sqrt())
    if not apart <= (1e-3 if _exact(model) else 0.1) * max(size, 1e-30):
        raise InputError(
            f"the attention of this model cannot be dropped: with a cache {type(model).__name__} says something else "
            f"(difference {apart / max(size, 1e-30):.2g} of the output's size)"
        )


def _cuts(units: Units, body: Anatomy, kept: Sequence[NDArray[np.int64]]) -> bool:
    return any(len(k) < units.count(layer) for layer, k in zip(body.layers, kept))


def _try_whole(model: nn.Module, kept: Kept, kinds: Sequence[Units], ids: Tensor) -> None:
    trial = _shaken(model, _runs_in_32_bits(model))
    exact = _exact(trial)
    with evaluating(trial):

        def run() -> Tensor:
            return _output(trial(input_ids=ids.to(input_device(trial))))

        dense = _first(model, run)
        for units in kinds:
            layers = anatomy(trial).layers
            silenced = _with_zeros(layers, kept[units], units, run)
            for layer, stays in zip(layers, kept[units]):
                take(layer, units, stays)
            _compare(model, units, dense, silenced, run, exact)
            dense = silenced


def _try_blocks(model: nn.Module, body: Anatomy, kept: Kept, kinds: Sequence[Units], ids: Tensor) -> None:
    calls: dict[int, Call] = {}
    tried: set[Any] = set()
    chosen: list[LayerAnatomy] = []
    for layer in body.layers:
        cuts = tuple(len(kept[units][layer.index]) < units.count(layer) for units in kinds)
        sign = (
            type(layer.block),
            layer.n_heads,
            layer.n_kv_heads,
            tuple(n for n, _ in layer.block.named_modules()),
            cuts,
        )
        if any(cuts) and sign not in tried:
            tried.add(sign)
            chosen.append(layer)

    def hear(i: int) -> Callable[[Call], None]:
        def keep(call: Call) -> None:
            calls[i] = call

        return keep

    with evaluating(model), hear_calls(None, [(layer.block, hear(layer.index)) for layer in chosen]):
        _first(model, lambda: model(input_ids=ids.to(input_device(model))))
    for layer in chosen:
        wide = _runs_in_32_bits(model)
        trial = copied(layer)  # its projections hold the modules of the copied block
        _shake(trial.block, wide)
        call = calls[layer.index]
        args, kwargs = (_without_cache(_as(x, wide)) for x in (call.args, call.kwargs))
        with evaluating(trial.block):

            def run(block: nn.Module = trial.block, args: Any = args, kwargs: Any = kwargs) -> Tensor:
                return _output(block(*args, **kwargs))

            dense = _first(model, run)
            for units in kinds:
                stays = kept[units][layer.index]
                if len(stays) == units.count(layer):
                    continue
                silenced = _with_zeros([trial], [stays], units, run)
                take(trial, units, stays)
                _compare(model, units, dense, silenced, run, _exact(trial.block))
                dense = silenced


def _with_zeros(
    layers: Sequence[LayerAnatomy], kept: Sequence[NDArray[np.int64]], units: Units, run: Callable[[], Tensor]
) -> Tensor:
    """What comes out while the units that go are zero where they enter their output projection.

    Of a part that goes whole, the projection of the copy itself is set to zero, bias included.
    """
    edits = []
    for layer, stays in zip(layers, kept):
        output = units.output(layer)
        if output is None or len(stays) == output.units:
            continue
        if not len(stays):
            with torch.no_grad():
                for parameter in output.module.parameters():
                    parameter.zero_()
            continue
        width = output.weight().shape[0]
        chosen = torch.ones(width, dtype=torch.bool)
        chosen[output.rows(torch.from_numpy(stays)) - output.start] = False
        edits.append((output.module, zero(chosen)))
    with change_inputs(None, edits):
        return run()


def _compare(
    model: nn.Module, units: Units, dense: Tensor, silenced: Tensor, run: Callable[[], Tensor], exact: bool
) -> None:
    check_difference(units.name, type(model).__name__, dense, silenced, run, exact=exact)


def check_difference(
    what: str, model: str, dense: Tensor, silenced: Tensor, run: Callable[[], Tensor], *, exact: bool = True
) -> None:
    """Refuse a cut model that says something else than the dense one with the same units silenced.

    Parameters
    ----------
    what, model : str
        Names, for the error.
    dense, silenced : Tensor
        What the dense model says, as it is and with the units silenced.
    run : function
        What the cut model says.
    exact : bool
        Whether it computes in 32 bits.

    Raises
    ------
    InputError
        With the difference, or why it does not run.
    """
    try:
        small = run()
    except FAILURES as error:
        raise InputError(
            f"the {what} of this model cannot be cut: {model} does not run without them "
            f"({type(error).__name__}: {_line(error)})"
        ) from error
    size = float(silenced.square().mean().sqrt())
    effect = float((dense - silenced).square().mean().sqrt())
    same = small.shape == silenced.shape
    difference = float((small - silenced).square().mean().sqrt()) if same else float("inf")
    if not difference <= SHARE * effect + (ROUNDING if exact else HALF) * size:
        raise InputError(
            f"the {what} of this model cannot be cut: cutting is not the same as silencing them (difference "
            f"{difference / max(size, 1e-30):.2g} of the output's size)"
        )


def _first(model: nn.Module, run: Callable[[], Any]) -> Any:
    try:
        return run()
    except FAILURES as error:
        raise InputError(
            f"model {type(model).__name__} does not read a few tokens as it is ({type(error).__name__}: "
            f"{_line(error)}), so that a cut cannot be tried on it; verify=False cuts all the same"
        ) from error


def _tokens(model: Any, windows: Tensor | None) -> Tensor:
    """One short text ``(1, n)``; without special tokens, at which some models look for an image."""
    if windows is not None:
        return windows[:1, :N_TOKENS]
    table = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    n = len(table.weight) if table is not None else 2
    config = getattr(model, "config", None)
    entries = {
        k: v for c in (config, getattr(config, "text_config", None)) if c is not None for k, v in vars(c).items()
    }
    special = {v for k, v in entries.items() if k.endswith(("token_id", "token_index")) and isinstance(v, int)}
    ordinary = [i for i in range(min(n, 512)) if i not in special] or [0]
    step = max(1, len(ordinary) // N_TOKENS)
    return torch.tensor([(ordinary[::step] * N_TOKENS)[:N_TOKENS]])


def _shaken(model: nn.Module, wide: bool) -> Any:
    trial = copy.deepcopy(model)
    _shake(trial, wide)
    return trial


def _shake(module: nn.Module, wide: bool) -> None:
    if wide:
        module.float()
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            generator = torch.Generator().manual_seed(i)
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.mul_(1 + SHAKEN * noise)


def _runs_in_32_bits(model: Any) -> bool:
    """Attention kernels of their own often take 16 bits only."""
    return "flash" not in str(getattr(getattr(model, "config", None), "_attn_implementation", ""))


def _exact(module: nn.Module) -> bool:
    return all(p.dtype in (torch.float32, torch.float64) for p in module.parameters() if p.is_floating_point())


def _as(value: Any, wide: bool) -> Any:
    """Arguments with floating tensors in 32 bits."""
    if isinstance(value, Tensor):
        return value.float() if wide and value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        return type(value)(_as(v, wide) for v in value)
    return {k: _as(v, wide) for k, v in value.items()} if isinstance(value, dict) else value


def _without_cache(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {k: None if "past_key_value" in k or k in ("layer_past", "cache_params") else v for k, v in value.items()}


def _output(value: Any) -> Tensor:
    for name in ("logits", "last_hidden_state"):
        if isinstance(getattr(value, name, None), Tensor):
            return getattr(value, name).detach().float()
    while not isinstance(value, Tensor):
        value = value[0]
    return value.detach().float()


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) < 160 else text[:157] + "..."

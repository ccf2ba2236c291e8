"""What the neurons of a mixture of experts hold on text: means, pools to draw from, and how often experts are called.

A routed expert is measured at the tokens that call it, a shared one at all. That is what takes a lesioned expert's
place: at tokens that do not call it, it is silent in any case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llmbrain._validation import InputError
from llmbrain.anatomy.experts import ExpertAnatomy
from llmbrain.hooks.experts import Visits, hearing_experts
from llmbrain.hooks.listen import hear_inputs
from llmbrain.hooks.text import as_windows, batches, evaluating, input_device
from llmbrain.intervention.evaluations import PASS_TOKENS, TokenEvaluation
from llmbrain.scanning.scans import Scan

Place = tuple[int, int]
"""A layer, and one of its experts: shared ones first, as in `NeuronSpace.expert_slice`."""
PIECE = 1024  # tokens of a scan that are looked at together
READS = "scans of this model, or int64 token ids (n, length) for it to read"


@dataclass(frozen=True)
class Held:
    """What every neuron held over some text.

    Attributes
    ----------
    means : float64 ``(n_neurons,)``
        Over the tokens that call its expert; nan where none did.
    levels : float64 ``(3, n_neurons)``
        Mean, mean ``|a|`` and SD over all tokens, 0 where its expert is not called.
    calls : dict of layer -> int64 ``(n_experts,)``
        How many tokens called each routed expert.
    """

    means: NDArray[np.float64]
    levels: NDArray[np.float64]
    calls: dict[int, NDArray[np.int64]]


def is_readable(reference: Any) -> bool:
    """Whether a reference tells what experts held when they were called: scans, token ids or evaluations."""
    if isinstance(reference, Tensor):
        return not reference.is_floating_point()
    parts = reference if isinstance(reference, (list, tuple)) else [reference]
    return bool(parts) and all(isinstance(part, (Scan, TokenEvaluation)) for part in parts)


def held_over(model: nn.Module, body: ExpertAnatomy, reference: Any) -> Held:
    """Measure all neurons; `reference` is scans, token ids, or a list of `TokenEvaluation`."""
    space = body.space
    sums, called = np.zeros((3, space.n_neurons)), np.zeros(space.n_neurons, dtype=np.int64)
    n_tokens = 0
    for found, n in _pieces(model, body, reference):
        n_tokens += n
        for (layer, part), values in found.items():
            at, wide = space.expert_slice(layer, part), values.double().cpu().numpy()
            sums[:, at] += np.stack([wide.sum(axis=0), np.abs(wide).sum(axis=0), np.square(wide).sum(axis=0)])
            called[at] += len(wide)
    mean, absolute, square = sums / max(n_tokens, 1)
    calls = {}
    for layer, routed in body.routed:
        first = len(body.layers[layer].shared)
        calls[layer] = np.array([called[space.expert_slice(layer, first + e).start] for e in range(routed.count)])
    means = np.where(called > 0, sums[0] / np.maximum(called, 1), np.nan)
    return Held(means, np.stack([mean, absolute, np.sqrt(np.maximum(square - mean**2, 0))]), calls)


def pools_of(model: nn.Module, body: ExpertAnatomy, mask: NDArray[np.bool_], reference: Any) -> dict[Place, Tensor]:
    """What the chosen neurons of each expert held together, token by token that called it; ``(calls, n_chosen)``.

    Parameters
    ----------
    mask : bool array ``(n_neurons,)``
        Experts without a chosen neuron are left out, and those that no token called.
    """
    chosen = {place: torch.from_numpy(part) for place, part in by_expert(mask, body) if part.any()}
    pools: dict[Place, list[Tensor]] = {}
    for found, _ in _pieces(model, body, reference):
        for place, values in found.items():
            if place in chosen and len(values):
                pools.setdefault(place, []).append(values[:, chosen[place].to(values.device)].float().cpu())
    return {place: torch.cat(values) for place, values in pools.items()}


def by_expert(values: NDArray[Any], body: ExpertAnatomy) -> Iterator[tuple[Place, NDArray[Any]]]:
    """One number a neuron ``(n_neurons,)``, expert by expert."""
    for layer in body.layers:
        for part in range(len(layer.expert_widths)):
            yield (layer.index, part), values[body.space.expert_slice(layer.index, part)]


Found = dict[Place, Tensor]
"""Neurons of experts ``(calls, width)`` at tokens that called them."""


def _pieces(model: nn.Module, body: ExpertAnatomy, reference: Any) -> Iterator[tuple[Found, int]]:
    """What experts held, piece by piece, and how many tokens a piece has."""
    if isinstance(reference, Tensor) and not reference.is_floating_point():
        windows = as_windows(model, None, reference)
        yield from _read(model, body, [(ids, torch.ones_like(ids, dtype=torch.bool)) for ids in batches(windows)])
        return
    parts = list(reference) if isinstance(reference, (list, tuple)) else [reference]
    if not is_readable(parts):
        raise InputError(
            f"reference={type(reference).__name__} does not tell which experts were called: of a mixture of experts "
            f"pass {READS}"
        )
    if isinstance(parts[0], TokenEvaluation):
        for evaluation in parts:
            size = max(1, PASS_TOKENS // evaluation.ids.shape[1])
            yield from _read(model, body, list(zip(evaluation.ids.split(size), evaluation.read().split(size))))
        return
    for scan in parts:
        yield from _scanned(body, scan)


def _scanned(body: ExpertAnatomy, scan: Scan) -> Iterator[tuple[Found, int]]:
    if scan.site != "neuron":
        raise InputError(f"reference is a scan of site={scan.site!r}: lesions replace what site 'neuron' records")
    if scan.space != body.space:
        raise InputError(f"reference lies in {scan.space}, the model has {body.space}: scan this model")
    for start in range(0, scan.n_tokens, PIECE):
        tokens = slice(start, min(start + PIECE, scan.n_tokens))
        found: Found = {}
        for layer in body.layers:
            data = torch.from_numpy(scan.data(layer.index, tokens))
            visits = scan.visits(layer.index, tokens) if layer.routed is not None else None
            parts = data.split(list(layer.expert_widths), dim=1)
            for number, values in enumerate(parts):
                expert = number - len(layer.shared)
                if expert >= 0:
                    assert visits is not None
                    values = values[torch.from_numpy(visits[:, expert])]
                found[layer.index, number] = values
        yield found, tokens.stop - tokens.start


def _read(
    model: nn.Module, body: ExpertAnatomy, rows: Sequence[tuple[Tensor, Tensor]]
) -> Iterator[tuple[Found, int]]:  # fmt: skip
    """The model reads token ids; those that are marked count."""
    found: Found = {}
    real: Tensor = torch.empty(0, dtype=torch.bool)

    def routed(layer: int, first: int) -> Callable[[Visits], None]:
        def hear(visits: Visits) -> None:
            called = torch.where(real.to(visits.experts.device)[:, None], visits.experts, -1)
            for expert in torch.unique(called[called >= 0]).tolist():
                found[layer, first + expert] = visits.neurons[called == expert]

        return hear

    def shared(layer: int) -> Callable[[Tensor], None]:
        def hear(x: Tensor) -> None:
            found[layer, 0] = x.flatten(0, -2)[real.to(x.device)]

        return hear

    places = [(mlp.down.module, shared(x.index)) for x in body.layers for mlp in x.shared]
    experts = {of.module: routed(i, len(body.layers[i].shared)) for i, of in body.routed}
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(hear_inputs(model, places))
        stack.enter_context(hearing_experts(experts))
        for ids, counts in rows:
            real = counts.flatten()
            found = {}
            model(input_ids=ids.to(input_device(model)))
            yield found, int(real.sum())

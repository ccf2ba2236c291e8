"""Relevance in place of gradients: a backward pass by rules that keep what a layer says in proportion to its input.

Relevance patching (RelP, arXiv 2508.21258) replaces the local gradient of a module by a coefficient such that input
times coefficient is the output: of a norm its scale as it is (LN rule), of an activation ``f(x) / x`` (identity rule),
of the product of a gate and an up signal half for each (half rule), and attention patterns are taken as they are. With
these in force, ``x * dL/dx`` at a neuron is its relevance; the forward pass says what it always says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from llmbrain.anatomy.families import Anatomy
from llmbrain.anatomy.layers import LayerAnatomy

SMALL = 1e-9  # an input nearer to zero than this says nothing about a coefficient


@contextmanager
def relevance_rules(model: nn.Module, body: Anatomy) -> Iterator[list[str]]:
    """Within the block, backward passes of the model follow RelP's rules.

    The half rule is not in force by itself: it belongs where neurons are heard (`halved`).

    Yields
    ------
    list of str
        What had to stay an ordinary gradient.
    """
    left: list[str] = []
    with ExitStack() as stack:
        for module in model.modules():
            if "norm" in type(module).__name__.lower() and getattr(module, "weight", None) is not None:
                stack.enter_context(_instead(module, _of_norm(module)))
        for layer in body.layers:
            if layer.act is None:
                left.append(f"activation of layer {layer.index}")
            else:
                stack.enter_context(_instead(layer.act, _proportional))
            for module, rule in _patterns(layer, left):
                stack.enter_context(_instead(module, rule))
        yield left


def halved(layer: LayerAnatomy, x: Tensor) -> Tensor:
    """What enters a layer's down projection, such that a gate and an up signal get half of its relevance each."""
    return 0.5 * x + 0.5 * x.detach() if layer.gated else x


Rule = Callable[[Tensor, Tensor], Tensor]
"""From what enters a module and what it says, the same output with another gradient."""


@contextmanager
def _instead(module: nn.Module, rule: Rule) -> Iterator[None]:
    """Within the block a module says what it says, with the gradient of a rule."""
    if "forward" in vars(module):  # another rule is in force: one activation module may serve all layers
        yield
        return
    own = module.forward

    def forward(x: Tensor, *args: object, **kwargs: object) -> Tensor:
        return rule(x, own(x, *args, **kwargs))

    vars(module)["forward"] = forward
    try:
        yield
    finally:
        del vars(module)["forward"]


def _proportional(x: Tensor, y: Tensor) -> Tensor:
    safe = x.detach().abs() > SMALL
    coefficient = torch.where(safe, y.detach() / torch.where(safe, x.detach(), 1.0), 0.5)
    return y.detach() + coefficient * (x - x.detach())


def _of_norm(module: nn.Module) -> Rule:
    if not isinstance(module, nn.LayerNorm):
        return _proportional
    shift: Tensor = module.bias if module.bias is not None else torch.zeros(())

    def rule(x: Tensor, y: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return _proportional(centred, y - shift.to(y).detach()) + shift.to(y).detach()

    return rule


def _patterns(layer: LayerAnatomy, left: list[str]) -> Iterator[tuple[nn.Module, Rule]]:
    """Queries and keys, whose outputs pass no relevance on."""
    if layer.attention is None:
        return
    if len(layer.heads) != 3:
        left.append(f"attention pattern of layer {layer.index}")
        return
    query, key, value = layer.heads
    if query.module is not value.module:
        for projection in (query, key):
            yield projection.module, lambda x, y: y.detach()
        return

    def values_only(x: Tensor, y: Tensor) -> Tensor:
        kept = torch.zeros(y.shape[-1], dtype=torch.bool, device=y.device)
        kept[value.start : value.start + value.units * value.size] = True
        return torch.where(kept, y, y.detach())

    yield query.module, values_only

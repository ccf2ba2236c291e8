"""What calibration text says about a layer, streamed: moments of its signals, and the metric of its output gradients.

Memory is of order width squared for the layer at hand; tokens are added batch by batch and forgotten.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from llmbrain._validation import InputError
from llmbrain.anatomy.families import Anatomy
from llmbrain.evaluation.perplexity import next_token_losses, predicts_next_token
from llmbrain.hooks.windows import batches, evaluating
from llmbrain.pruning.losses import last_states


class Moments:
    """Means, covariance of signals x, and their covariance with targets t, of all tokens added so far.

    Sums are float64 and of deviations from the mean of the first batch, so that a large mean costs no precision
    (Chan, Golub & LeVeque 1983, shifted data). Two sets that share their shift can be added.

    Attributes
    ----------
    n : float
        Number of tokens (the sum of their weights).
    """

    def __init__(self, like: Moments | None = None) -> None:
        self.n = 0.0
        self._shift_x: Tensor | None = like._shift_x if like is not None else None
        self._shift_t: Tensor | None = like._shift_t if like is not None else None
        self._x = self._t = self._xx = self._tx = self._tt = torch.zeros(())

    def add(self, x: Tensor, t: Tensor | None = None, weights: Tensor | None = None) -> None:
        """Add tokens.

        Parameters
        ----------
        x : (tokens, units)
        t : (tokens, targets), optional
        weights : (tokens,), optional
            How much each token counts; default 1.
        """
        x = x.float()
        t = x[:, :0] if t is None else t.float()
        if self._shift_x is None or self._shift_t is None:
            self._shift_x, self._shift_t = x.mean(0), t.mean(0)
        if self.n == 0:
            size, out = x.shape[1], t.shape[1]
            self._x, self._t = x.new_zeros(size, dtype=torch.float64), x.new_zeros(out, dtype=torch.float64)
            self._xx = x.new_zeros(size, size, dtype=torch.float64)
            self._tx = x.new_zeros(out, size, dtype=torch.float64)
            self._tt = x.new_zeros(out, dtype=torch.float64)
        x, t = x - self._shift_x, t - self._shift_t
        wx, wt = (x, t) if weights is None else (x * weights[:, None], t * weights[:, None])
        self.n += float(len(x) if weights is None else weights.sum())
        self._x += wx.sum(0, dtype=torch.float64)
        self._t += wt.sum(0, dtype=torch.float64)
        self._xx += wx.T @ x
        self._tx += wt.T @ x
        self._tt += (wt * t).sum(0, dtype=torch.float64)

    def __add__(self, other: Moments) -> Moments:
        total = Moments(self)
        total.n = self.n + other.n
        for name in ("_x", "_t", "_xx", "_tx", "_tt"):
            setattr(total, name, getattr(self, name) + getattr(other, name) if other.n else getattr(self, name))
        return total

    @property
    def mean(self) -> Tensor:
        """Mean signal; float64 ``(units,)``."""
        assert self._shift_x is not None
        return self._shift_x.double() + self._x / self.n

    @property
    def target_mean(self) -> Tensor:
        """Mean target; float64 ``(targets,)``."""
        assert self._shift_t is not None
        return self._shift_t.double() + self._t / self.n

    @property
    def covariance(self) -> Tensor:
        """Of the signals, per token; float64 ``(units, units)``."""
        return self._xx / self.n - torch.outer(self._x, self._x) / self.n**2

    @property
    def variance(self) -> Tensor:
        """Of each signal; float64 ``(units,)``."""
        return self._xx.diagonal() / self.n - (self._x / self.n) ** 2

    @property
    def cross_covariance(self) -> Tensor:
        """Of targets with signals; float64 ``(targets, units)``."""
        return self._tx / self.n - torch.outer(self._t, self._x) / self.n**2

    @property
    def target_variance(self) -> Tensor:
        """Of each target; float64 ``(targets,)``."""
        return self._tt / self.n - (self._t / self.n) ** 2

    @property
    def mean_square(self) -> Tensor:
        """Mean square of each signal, its mean included; float64 ``(units,)``."""
        return self.variance + self.mean**2


def gradient_pass(
    model: nn.Module,
    body: Anatomy,
    windows: Tensor,
    *,
    metric: bool = True,
    taylor: bool = False,
    weights: Tensor | None = None,
    heads: bool = False,
) -> dict[str, list[Tensor]]:
    """Second moments of the loss gradient, by one backward pass over the windows.

    For a model that predicts no next token (an encoder, say) the gradient is that of the last hidden states in a random
    direction, ``J^T r`` with r ~ N(0, 1): its second moment is the curvature ``J^T J`` of half their squared change.

    Parameters
    ----------
    windows : (n, window) int64
    metric : bool
        Give ``G = E[g g^T]`` of each layer, g the gradient of the summed loss by the MLP's output at a token
        (the output-side Kronecker factor of LLM Surgeon, arXiv 2312.17244, eq. 6).
    weights : (n, window) float, optional
        How much each token counts in the metric.
    taylor : bool
        Give each neuron's first-order importance, ``sum |w * dL/dw|`` over its weights (LLM-Pruner, arXiv 2305.11627,
        eq. 5, `param_first`).
    heads : bool
        Of the attention's output and of key/value groups instead.

    Returns
    -------
    dict
        ``"metric"``: float64 ``(hidden, hidden)`` a layer; ``"taylor"``: float64 ``(units,)`` a layer.
    """
    causal = predicts_next_token(model)
    if taylor and not causal:
        raise InputError(
            f"model {type(model).__name__} predicts no next token, as method='taylor' needs: use another one"
        )
    probe = torch.Generator().manual_seed(0)
    grams: list[Any] = [0.0] * len(body.layers)
    root: Tensor | None = None  # square root of the weights of the batch at hand

    def watch(i: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            def take(g: Tensor) -> None:
                g = g.detach().float().flatten(0, -2)
                if root is not None:
                    g = g * root.to(g.device)
                grams[i] = grams[i] + (g.T @ g).double()

            output.register_hook(take)

        return hook

    outputs = [layer.out if heads else layer.down for layer in body.layers]
    projections = [
        (*layer.heads, out) if heads else layer.neuron_projections for layer, out in zip(body.layers, outputs)
    ]
    wanted = {id(p) for of in projections for j in of if j for p in j.module.parameters(recurse=False)}
    before = [(p, p.requires_grad) for p in model.parameters()]
    handles = [out.module.register_forward_hook(watch(i)) for i, out in enumerate(outputs) if out is not None]
    try:
        for p, _ in before:
            p.requires_grad_(taylor and id(p) in wanted)
        if not taylor:  # one leaf is enough for gradients to reach every layer
            embeddings = model.get_input_embeddings()  # type: ignore[operator]
            embeddings.weight.requires_grad_(True)
        with evaluating(model, gradients=True):
            for i, batch in enumerate(batches(windows)):
                if weights is not None:
                    root = batches(weights)[i].flatten().sqrt()[:, None]
                if causal:
                    next_token_losses(model, batch).sum().backward()
                else:
                    states = last_states(model, batch)
                    states.backward(torch.randn(states.shape, generator=probe).to(states.device))
                if not taylor:
                    embeddings.weight.grad = None
        n = windows.numel()
        found: dict[str, list[Tensor]] = {}
        if metric:
            found["metric"] = [g / n for g in grams]
        if taylor:
            found["taylor"] = [sum(_first_order(p) for p in of if p) for of in projections]  # type: ignore[misc]
        return found
    finally:
        for handle in handles:
            handle.remove()
        for p, flag in before:
            p.requires_grad_(flag)
            if id(p) in wanted:
                p.grad = None


def _first_order(projection: Any) -> Tensor:
    """``|w * grad|`` summed over each unit's weights; float64 ``(units,)``."""
    weight, grad = projection.module.weight, projection.module.weight.grad
    product = (weight.detach() * grad).abs().double()
    product = product if projection.axis == 0 else product.T
    rows = product[projection.start : projection.start + projection.units * projection.size]
    return rows.sum(1).reshape(projection.units, -1).sum(1)

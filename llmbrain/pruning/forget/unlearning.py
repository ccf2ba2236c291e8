"""The repair after a cut that is to forget: refit the output projections to all but what is to be forgotten.

Least squares alone brings much of it back (on the demo brain 240 neurons took agreement from 1.00 to 0.22, and an
ordinary refit brought it back to 1.00): what the others need of the removed neurons and what was to be forgotten are
not apart in any one layer. They are in the output of the model, so the refit goes on from there by gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmbrain._progress import bar
from llmbrain.anatomy.families import Projection
from llmbrain.hooks.text import batches, input_device
from llmbrain.pruning.calibrate.losses import gradients_of, log_odds, token_losses
from llmbrain.pruning.forget.conditions import condition_numbers, token_conditions

STEPS = 160  # of Adam, each on one batch of windows
TOKENS = 1024  # in a batch, and as many with some swapped; twice as many took twice as long and did no better
RATE = 0.02  # first step, relative to the root mean square of a layer's weights; falls linearly to 0
FORGET = 0.1  # weight of a nat of log odds on a token to forget, against a nat of divergence on another
MARGIN = 2.0  # log odds below minus this count no more
SWAPPED = 0.1  # of the tokens are swapped for others: what stays is to hold near the calibration text too
HELD_OUT = 8  # one window in so many is not trained on, and tells how well it went
SURE = 0.9  # the record counts tokens that had this probability and fell below a half


def unlearn(
    model: nn.Module,
    windows: Tensor,
    scans: Sequence[Any],
    functions: dict[str, Any],
    cut: Sequence[tuple[Projection, Any]],
    weights: Tensor,
    mend: Callable[[], None],
) -> dict[str, Any]:
    """Repair a cut model such that it forgets what it did under some conditions and does the rest as before.

    After an ordinary repair, `STEPS` of Adam on the output projections minimise

    ``sum_t w_t KL(dense_t | cut_t) / sum_t w_t + FORGET * mean_f max(0, log odds_f + MARGIN)``

    over tokens t that are not to be forgotten, in the windows and once more with a share `SWAPPED` of all tokens
    swapped for other ones of the text, and over tokens f to forget that the dense model gets right. The dense model is
    its own teacher: no label but the conditions is used.

    Parameters
    ----------
    model : transformers model
        Uncut; its output projections are written to, zeros where units go.
    windows : (n, window) int64
    functions : dict
        ``"forget"`` of the plan.
    cut : sequence of (Projection, int array)
        Output projections, and the units that stay in each.
    weights : (n, window) float
        Of the tokens that are not to be forgotten.
    mend : function
        The ordinary repair.

    Returns
    -------
    dict
        ``"broken"``: by condition the share of surely known tokens (probability 0.9) that are below a half afterwards,
        and ``"loss_added"`` in nats a token, on ``"windows"`` held-out windows (on all where there are fewer than
        `HELD_OUT`).
    """
    labels, names = token_conditions(scans, (windows.shape[0], windows.shape[1]))
    lost = torch.from_numpy(np.isin(labels, condition_numbers("forget", functions["forget"], names)))
    held = torch.arange(len(windows)) % HELD_OUT == HELD_OUT - 1
    test = held if held.any() else ~held
    before = token_losses(model, windows[test])
    dense = [_copies(output.module) for output, _ in cut]
    mend()
    refits = [r for (output, kept), old in zip(cut, dense) for r in _refits(output, old, kept)]
    _train(model, refits, windows[~held], lost[~held], weights[~held])
    change = token_losses(model, windows[test]) - before
    numbers = torch.from_numpy(labels)[test]
    sure = before < -np.log(SURE)

    def by_condition(values: Tensor, among: Tensor) -> dict[str, float]:
        found = {name: values[among & (numbers == i)] for i, name in enumerate(names)}
        return {name: float(v.float().mean()) for name, v in found.items() if len(v)}

    return {
        "windows": int(test.sum()),
        "broken": by_condition(change + before > np.log(2), sure),
        "loss_added": by_condition(change, torch.ones_like(sure)),
    }


@dataclass
class _Refit:
    """A weight or bias to be trained."""

    now: nn.Parameter
    dense: Tensor  # as it was in the dense model
    stays: Tensor  # 1 where it may change, 0 where units went
    rate: float


def _copies(module: Any) -> tuple[Tensor, Tensor | None]:
    bias = getattr(module, "bias", None)
    return module.weight.detach().clone(), None if bias is None else bias.detach().clone()


def _refits(output: Projection, dense: tuple[Tensor, Tensor | None], kept: Any) -> list[_Refit]:
    module: Any = output.module
    weight, bias = dense
    rate = RATE * float(weight.float().square().mean().sqrt())
    stays = torch.zeros_like(weight)
    rows = output.rows(torch.as_tensor(kept)).to(weight.device)
    stays.index_fill_(output.axis, rows, 1)
    found = [_Refit(module.weight, weight, stays, rate)]
    if getattr(module, "bias", None) is not None:  # perhaps one that the repair added
        old = torch.zeros_like(module.bias) if bias is None else bias
        found.append(_Refit(module.bias, old, torch.ones_like(old), rate))
    return found


def _train(model: nn.Module, refits: Sequence[_Refit], windows: Tensor, lost: Tensor, weights: Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    masters = [r.now.detach().float().clone() for r in refits]  # small steps vanish in half precision
    optimizer = torch.optim.Adam([{"params": [m], "lr": r.rate} for m, r in zip(masters, refits)])
    falls = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    order: list[Tensor] = []
    with gradients_of(model, [r.now for r in refits]):
        for _ in bar(range(STEPS), desc="unlearn", leave=False):
            if not order:
                shuffled = torch.randperm(len(windows), generator=generator)
                order = list(shuffled.split(len(batches(windows, TOKENS)[0])))
            part = order.pop()
            ids = windows[part]
            swap = torch.rand(ids.shape, generator=generator) < SWAPPED
            others = windows.flatten()[torch.randint(windows.numel(), ids.shape, generator=generator)]
            _add_gradients(model, refits, ids, torch.where(swap, others, ids), lost[part], weights[part])
            for master, r in zip(masters, refits):
                assert r.now.grad is not None
                master.grad, r.now.grad = r.now.grad.float() * r.stays, None
            optimizer.step()
            falls.step()
            with torch.no_grad():
                for master, r in zip(masters, refits):
                    r.now.copy_(master)


def _add_gradients(
    model: Any, refits: Sequence[_Refit], ids: Tensor, swapped: Tensor, lost: Tensor, weights: Tensor
) -> None:
    """Backward passes of the loss on some windows, as they are and with tokens swapped."""

    def both(ids: Tensor) -> tuple[Tensor, Tensor]:
        ids = ids.to(input_device(model))
        with torch.no_grad(), _dense(refits):
            dense = model(input_ids=ids).logits.float()
        return model(input_ids=ids).logits.float(), dense

    def divergence(now: Tensor, dense: Tensor) -> Tensor:
        w = (weights * ~lost)[:, 1:].to(now.device)
        found, wanted = (x[:, :-1].log_softmax(-1) for x in (now, dense))
        return (w * F.kl_div(found, wanted, reduction="none", log_target=True).sum(-1)).sum() / w.sum().clamp_min(1e-9)

    now, dense = both(ids)
    loss = divergence(now, dense)
    known = lost[:, 1:].to(now.device) & (log_odds(dense, ids) > 0)
    if known.any():
        loss = loss + FORGET * F.relu(log_odds(now, ids)[known] + MARGIN).mean()
    loss.backward()
    divergence(*both(swapped)).backward()


@contextmanager
def _dense(refits: Sequence[_Refit]) -> Iterator[None]:
    """Within the block the model is the dense one."""
    now = [r.now.data for r in refits]
    for r in refits:
        r.now.data = r.dense
    try:
        yield
    finally:
        for r, data in zip(refits, now):
            r.now.data = data

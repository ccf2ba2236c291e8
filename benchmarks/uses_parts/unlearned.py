"""Unlearning without a cut: gradient difference (arXiv 2203.12817) and NPO (arXiv 2404.05868), on all parameters.

Both get what our repair gets, so that the objective and the cut are what is compared: the loss is raised on the tokens
that the dense model knows (the rest of a line says nothing of the ability), and what stays is held by divergence from
the dense model (OpenUnlearning's ``retain_loss_type: KL``), on lines that do not come twice. And a small search of
strength and rate, since either does nothing or harm where they are wrong.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from llmbrain.hooks.text import evaluating, input_device
from llmbrain.pruning.calibrate.losses import log_odds
from llmbrain.pruning.forget.relearning import padded

STEPS, LOOK = 75, 15  # of unlearning, and steps between two looks at the harm
OWN, REST = 8, 24  # lines in a step: of what is to go, and of what stays
GONE, HALF = 0.02, 0.5  # accuracy at which nothing is left to forget, and half
BETA = 0.1  # of NPO
TRIES, WEIGHT = 6, 0.01  # strengths that are tried at most, and the first weight: found on the demo brain's addition
TOO_MUCH = 0.3  # harm at which a try is given up
Lines = list[torch.Tensor]


def unlearned(
    dense: Any,
    how: str,
    gone: Lines,
    stays: Lines,
    watch: Callable[[Any], tuple[float, float]],
    harm: float,
    rate: float,
) -> tuple[Any, dict[str, Any]]:
    """A model that was taught not to know some lines, and to keep others.

    Of all steps that were looked at and harm the rest by at most `harm`, the one with the lowest accuracy on what is to
    go, of several the last one; the dense model where there is none. Where that leaves more than `GONE`, another
    strength is tried: half of the weight where it went with too much harm, twice the weight and 1.5 of the rate where
    more than half went, else four times the weight and twice the rate.

    Parameters
    ----------
    watch : function
        Of a model: accuracy on what is to go, and harm to the rest; on other lines than the table's.
    rate : float
        First step of Adam, relative to the root mean square of each parameter; falls linearly to 0.

    Returns
    -------
    model, dict
        And every look: weight, rate, step, accuracy, harm.
    """
    best, least, looks = copy.deepcopy(dense), watch(dense)[0], []
    chosen, weight = None, WEIGHT
    for _ in range(TRIES):
        model, lowest = copy.deepcopy(dense), 1.0
        for step in _steps(model, dense, how, gone, stays, weight, rate):
            if step % LOOK:
                continue
            accuracy, worst = watch(model)
            looks.append([weight, rate, step, round(accuracy, 4), round(worst, 4)])
            lowest = min(lowest, accuracy)
            if round(worst, 6) <= harm and accuracy <= least:
                best, least, chosen = copy.deepcopy(model), accuracy, looks[-1]
            if worst > TOO_MUCH:
                break
        if least <= GONE:
            break
        if lowest <= GONE:
            weight /= 2
        else:
            weight, rate = (2 * weight, 1.5 * rate) if lowest <= HALF else (4 * weight, 2 * rate)
    for p in best.parameters():
        p.grad = None
    return best, {"chosen": chosen, "looks": looks}


def _steps(model: Any, dense: Any, how: str, gone: Lines, stays: Lines, weight: float, rate: float) -> Any:
    """Unlearn in place; yields the number of each step when it is done."""
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.requires_grad_(True)
    groups = [{"params": [p], "lr": rate * float(p.detach().square().mean().sqrt())} for p in model.parameters()]
    optimizer = torch.optim.Adam(groups)
    falls = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    orders: dict[int, list[int]] = {}

    def drawn(lines: Lines, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Lines that did not come yet; all over again when there is none."""
        left = orders.setdefault(id(lines), [])
        if len(left) < min(n, len(lines)):
            left[:] = torch.randperm(len(lines), generator=generator).tolist()
        ids, real = padded([lines[left.pop()] for _ in range(min(n, len(lines)))])
        return ids.to(input_device(model)), real[:, 1:].to(input_device(model))

    def nats(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none")

    for step in range(1, STEPS + 1):
        own, real = drawn(gone, OWN)
        rest, held = drawn(stays, REST)
        with evaluating(dense):
            before, wanted = dense(input_ids=own).logits, dense(input_ids=rest).logits[:, :-1].float().log_softmax(-1)
        known = real & (log_odds(before, own) > 0)
        with evaluating(model, gradients=True):
            now = model(input_ids=rest).logits[:, :-1].float().log_softmax(-1)
            loss = F.kl_div(now, wanted, reduction="none", log_target=True).sum(-1)[held].mean()
            if known.any():
                per_line = known.sum(1).clamp_min(1)
                lost = (nats(model(input_ids=own).logits, own) * known).sum(1) / per_line
                if how == "gradient difference":
                    loss = loss - weight * lost[known.any(1)].mean()
                else:
                    reference = (nats(before, own) * known).sum(1) / per_line
                    more = lost - reference
                    loss = loss + weight * (2 / BETA) * F.softplus(-BETA * more)[known.any(1)].mean()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        falls.step()
        optimizer.zero_grad(set_to_none=True)
        yield step

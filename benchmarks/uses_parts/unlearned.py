"""Unlearning without a cut: gradient difference (arXiv 2203.12817) and NPO (arXiv 2404.05868), on all parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from llmbrain.hooks.text import evaluating, input_device
from llmbrain.pruning.forget.relearning import padded

STEPS, LOOK = 200, 20  # of unlearning, and steps between two looks at the harm
Lines = list[torch.Tensor]


def unlearned(
    dense: Any,
    how: str,
    gone: Lines,
    stays: Lines,
    watch: Callable[[Any], tuple[float, float]],
    harm: float,
    rate: float,
) -> Any:
    """A model that was taught not to know some lines, and to keep others.

    The step with the lowest accuracy on what is to be forgotten among those that harm the rest by at most `harm` is
    kept; the dense model where there is none.

    Parameters
    ----------
    watch : function
        Of a model: accuracy on what is to go, and harm to the rest.
    rate : float
        First step of Adam, relative to the root mean square of each parameter; falls linearly to 0.
    """
    model: Any = copy.deepcopy(dense)
    generator = torch.Generator().manual_seed(0)
    groups = [{"params": [p], "lr": rate * float(p.detach().square().mean().sqrt())} for p in model.parameters()]
    for p in model.parameters():
        p.requires_grad_(True)
    optimizer = torch.optim.Adam(groups)
    falls = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    best, least = copy.deepcopy(model.state_dict()), np.inf

    def nats(of: Any, lines: Lines) -> torch.Tensor:
        ids, real = (x.to(input_device(of)) for x in padded(lines))
        logits = of(input_ids=ids).logits[:, :-1].float()
        losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none") * real[:, 1:]
        return losses.sum(1) / real[:, 1:].sum(1)

    for step in range(1, STEPS + 1):
        some = [gone[i] for i in torch.randint(len(gone), (16,), generator=generator)]
        rest = [stays[i] for i in torch.randint(len(stays), (32,), generator=generator)]
        with evaluating(model, gradients=True):
            loss = nats(model, rest).mean()
            if how == "gradient difference":
                loss = loss - 0.3 * nats(model, some).mean()
            else:
                with evaluating(dense):
                    reference = nats(dense, some)
                loss = loss + (2 / 0.1) * F.softplus(-0.1 * (nats(model, some) - reference)).mean()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        falls.step()
        optimizer.zero_grad(set_to_none=True)
        if step % LOOK == 0:
            accuracy, worst = watch(model)
            if worst <= harm and accuracy < least:
                best, least = copy.deepcopy(model.state_dict()), accuracy
    model.load_state_dict(best)
    return model

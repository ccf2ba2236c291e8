"""The repair after a cut that is to forget: refit the output projections to all but what is to be forgotten.

Least squares alone brings much of it back (on the demo brain 240 neurons took agreement from 1.00 to 0.22, and an
ordinary refit brought it back to 1.00): what the others need of the removed neurons and what was to be forgotten are
not apart in any one layer. They are in the output of the model, so the refit goes on from there by gradients.
"""

from __future__ import annotations

import warnings
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
from llmbrain.pruning.forget.harm import SURE, SureLines, lines_apart
from llmbrain.pruning.forget.relearning import lines_of, padded

STEPS = 160  # of Adam, each on one batch of windows
TOKENS = 1024  # in a batch, and as many with some swapped; twice as many took twice as long and did no better
RATE = 0.02  # first step, relative to the root mean square of a layer's weights; falls linearly to 0
FORGET = 0.1  # weight of a nat of log odds on a token to forget, against a nat of divergence on another
MARGIN = 2.0  # log odds below minus this count no more
SWAPPED = 0.1  # of the tokens are swapped for others: what stays is to hold near the calibration text too
HELD_OUT = 8  # one window in so many is not trained on, and tells how well it went
HELD_LASTING = 4  # the same where forgetting is to last: there it decides
LINES = 8  # in a step of the adversary
HELD_LINES = 24  # single lines of what stays, in a step beside it
PATIENCE = 40  # steps after which it starts anew
ADVERSARY = 0.01  # its step, that of `Relearning`; with 20 steps of half the size what was forgotten came back sooner
RATE_OTHERS = 0.005  # first step of all other weights
MENDS, MENDING = 3, 80  # what is to last: so often, and so many steps, the repair goes on for what suffers most
LOUDER = 4.0  # there the condition that suffers most counts so much more
BROKEN = 0.005  # while it breaks more than this share of what a condition was sure of
HARM = 0.03  # a share above which what is to last says that it does harm


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
        ``"forget"`` of the plan; with ``"last"`` all weights are trained, and against an adversary that is learning it
        again meanwhile: what it knows counts as what the model knows.
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
        `HELD_OUT`). With ``"last"`` also ``"mended"``: how often the repair went on because another condition lost more
        than `BROKEN` of the stretches it was sure of (`SureLines`, of lines in held-out windows), and ``"harm"``: what
        each lost in the end, short lines counted whole (`SureLines.broken_items`). Of all rounds the one is taken after
        which what was sure fell least, so the share is a little too good; where it is above `HARM`, a `UserWarning`
        says so.
    """
    last = bool(functions.get("last"))
    labels, names = token_conditions(scans, (windows.shape[0], windows.shape[1]))
    lost = torch.from_numpy(np.isin(labels, condition_numbers("forget", functions["forget"], names)))
    every = HELD_LASTING if last else HELD_OUT
    held = torch.arange(len(windows)) % every == every - 1
    test = held if held.any() else ~held
    before = token_losses(model, windows[test])
    dense = [_copies(output.module) for output, _ in cut]
    sure_lines: dict[str, SureLines] = {}
    stays: dict[str, list[Tensor]] = {}
    for c in [c for c in names if last and c not in functions["forget"]]:
        train, tested = lines_apart(scans, c, held, windows.shape[1])
        if train:
            stays[c] = train
        if tested:
            sure_lines[c] = SureLines(model, tested)
    mend()
    refits = [r for (output, kept), old in zip(cut, dense) for r in _refits(output, old, kept)]
    adversary = None
    if last:
        refits += _others(model, refits)
        adversary = Adversary(model, lines_of(scans, functions["forget"]), list(stays.values()))
    _train(model, refits, windows[~held], lost[~held], weights[~held], adversary)
    numbers = torch.from_numpy(labels)[test]
    sure = before < -np.log(SURE)

    def by_condition(values: Tensor, among: Tensor) -> dict[str, float]:
        found = {name: values[among & (numbers == i)] for i, name in enumerate(names)}
        return {name: float(v.float().mean()) for name, v in found.items() if len(v)}

    change = token_losses(model, windows[test]) - before
    mended, rounds = 0, list[_Round]()
    while last:
        broken = by_condition(change + before > np.log(2), sure)
        found = {c: of.harm(model) for c, of in sure_lines.items()}
        harmed = {c: max(broken.get(c, 0.0), of[0]) for c, of in found.items()}
        worst, fall = max(harmed.values(), default=0.0), max((of[1] for of in found.values()), default=0.0)
        if not rounds or fall <= rounds[0].fall:
            rounds = [_Round(fall, harmed, change, [r.now.detach().clone() for r in refits])]
        if worst <= BROKEN or mended == MENDS:
            break
        share = {c: h / max(worst, 1e-9) for c, h in harmed.items()}
        louder = torch.tensor([0.0, *(share.get(c, 0.0) for c in names)])
        urgent = weights * (1 + LOUDER * louder[torch.from_numpy(labels) + 1])
        assert adversary is not None
        adversary.urgency = [1 + LOUDER * share.get(c, 0.0) for c in stays]
        _train(model, refits, windows[~held], lost[~held], urgent[~held], adversary, steps=MENDING, scale=0.5)
        change = token_losses(model, windows[test]) - before
        mended += 1
    for best in rounds:
        change = best.change
        with torch.no_grad():
            for r, was in zip(refits, best.weights):
                r.now.copy_(was)
    harm = {c: max(rounds[0].harm[c], of.broken_items(model)) for c, of in sure_lines.items()} if rounds else {}
    if worse := [f"{c} ({h:.1%})" for c, h in harm.items() if h > HARM]:
        warnings.warn(
            f"last=True: forgetting {functions['forget']} costs other conditions more than {HARM:.0%} of what "
            f"the model was sure of: {', '.join(worse)}; calibrate with more text of these, or leave last away",
            UserWarning, stacklevel=2,
        )  # fmt: skip
    return {
        "windows": int(test.sum()),
        "broken": by_condition(change + before > np.log(2), sure),
        "loss_added": by_condition(change, torch.ones_like(sure)),
        **({"mended": mended, "harm": harm} if last else {}),
    }


@dataclass
class _Round:
    """How a repair stood after a round."""

    fall: float  # of the probability of an answer, on average, in the condition where it falls most
    harm: dict[str, float]  # by condition
    change: Tensor
    weights: list[Tensor]


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


def _others(model: nn.Module, refits: Sequence[_Refit]) -> list[_Refit]:
    """All other matrices of the model (no norms, no embeddings): what relearning would use as well."""
    known = {id(r.now) for r in refits}
    shared = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    found = []
    for p in model.parameters():
        if p.ndim < 2 or id(p) in known | shared:
            continue
        rate = RATE_OTHERS * float(p.detach().float().square().mean().sqrt())
        found.append(_Refit(p, p.detach().clone(), torch.ones_like(p), rate))
    return found


class Adversary:
    """A copy of the model that learns again what is being forgotten, a step for each step of the repair.

    It is kept as differences from the model, so that it follows what the repair does, and starts anew every
    `PATIENCE` steps.

    Parameters
    ----------
    model : causal language model
    lines : sequence of int64 tensor
        Of what is to be forgotten.
    stays : sequence of lists of lines
        Of each condition that stays. The adversary acts on single lines, each alone; where what stays is held in
        running text only, single lines of it go with those (on the demo brain 99 of 100 of one ability).
    """

    def __init__(self, model: nn.Module, lines: Sequence[Tensor], stays: Sequence[Sequence[Tensor]] = ()) -> None:
        self.model, self.lines, self.stays = model, list(lines), [list(of) for of in stays]
        self.parameters = list(model.parameters())
        self.urgency: list[float] | None = None  # of each condition that stays; None: all alike
        self.generator = torch.Generator().manual_seed(0)
        self.steps = 0
        self._restart()

    def _restart(self) -> None:
        self.moved = [torch.zeros_like(p) for p in self.parameters]
        self._size = [torch.zeros_like(p, dtype=torch.float32) for p in self.parameters]

    @contextmanager
    def acting(self) -> Iterator[None]:
        """Within the block the model is the adversary."""
        before = [p.data for p in self.parameters]
        for p, d in zip(self.parameters, self.moved):
            p.data = p.data + d
        try:
            yield
        finally:
            for p, data in zip(self.parameters, before):
                p.data = data

    def draw(self) -> tuple[Tensor, Tensor]:
        """Some lines, padded, and which tokens are real."""
        chosen = torch.randint(len(self.lines), (min(LINES, len(self.lines)),), generator=self.generator)
        return padded([self.lines[i] for i in chosen.tolist()])

    def draw_stays(self) -> tuple[Tensor, Tensor] | None:
        """Some lines of what stays, of every condition alike or by urgency; None where there are none."""
        if not self.stays:
            return None
        each = [-(-HELD_LINES // len(self.stays))] * len(self.stays)
        if self.urgency is not None:
            drawn = torch.multinomial(torch.tensor(self.urgency), HELD_LINES, True, generator=self.generator)
            each = torch.bincount(drawn, minlength=len(self.stays)).tolist()
        chosen = [
            of[int(i)]
            for of, n in zip(self.stays, each)
            for i in torch.randint(len(of), (n,), generator=self.generator)
        ]
        order = torch.randperm(len(chosen), generator=self.generator).tolist()
        most = min(HELD_LINES, max(1, TOKENS // max(map(len, chosen))))
        return padded([chosen[i] for i in order[:most]])

    def learn(self) -> None:
        """One step of relearning: RMSprop on the next-token loss of some lines."""
        if self.steps % PATIENCE == 0:
            self._restart()
        self.steps += 1
        ids, mask = self.draw()
        with self.acting():
            ids = ids.to(input_device(self.model))
            logits = self.model(input_ids=ids).logits[:, :-1].float()
            nats = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
            loss = (nats * mask[:, 1:].to(nats.device)).sum() / mask[:, 1:].sum()
            gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        with torch.no_grad():
            for p, d, size, g in zip(self.parameters, self.moved, self._size, gradients):
                if g is None:
                    continue
                size.mul_(0.9).addcmul_(g.float(), g.float(), value=0.1)
                rate = ADVERSARY * p.detach().float().square().mean().sqrt()
                d.sub_((rate * g / (size.sqrt() + 1e-8)).to(d))


def _train(
    model: nn.Module, refits: Sequence[_Refit], windows: Tensor, lost: Tensor, weights: Tensor,
    adversary: Adversary | None = None, *, steps: int | None = None, scale: float = 1.0,
) -> None:  # fmt: skip
    steps = steps or STEPS
    generator = torch.Generator().manual_seed(0)
    masters = [r.now.detach().float().clone() for r in refits]  # small steps vanish in half precision
    optimizer = torch.optim.Adam([{"params": [m], "lr": scale * r.rate} for m, r in zip(masters, refits)])
    falls = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    order: list[Tensor] = []
    with gradients_of(model, [r.now for r in refits] if adversary is None else list(model.parameters())):
        for _ in bar(range(steps), desc="unlearn", leave=False):
            if not order:
                shuffled = torch.randperm(len(windows), generator=generator)
                order = list(shuffled.split(len(batches(windows, TOKENS)[0])))
            part = order.pop()
            ids = windows[part]
            swap = torch.rand(ids.shape, generator=generator) < SWAPPED
            others = windows.flatten()[torch.randint(windows.numel(), ids.shape, generator=generator)]
            _add_gradients(model, refits, ids, torch.where(swap, others, ids), lost[part], weights[part])
            if adversary is not None:
                adversary.learn()
                _add_adversary(model, refits, adversary)
                _add_lines(model, refits, adversary)
            for master, r in zip(masters, refits):
                assert r.now.grad is not None
                master.grad, r.now.grad = r.now.grad.float() * r.stays, None
            optimizer.step()
            falls.step()
            with torch.no_grad():
                for master, r in zip(masters, refits):
                    r.now.copy_(master)
            if adversary is not None:
                model.zero_grad(set_to_none=True)


def _add_adversary(model: Any, refits: Sequence[_Refit], adversary: Adversary) -> None:
    """Backward pass of what the adversary knows of some lines (first order: its steps are taken as given)."""
    ids, mask = adversary.draw()
    ids = ids.to(input_device(model))
    with torch.no_grad(), _dense(refits):
        known = log_odds(model(input_ids=ids).logits, ids) > 0
    known &= mask[:, 1:].to(known.device)
    if not known.any():
        return
    with adversary.acting():
        odds = log_odds(model(input_ids=ids).logits, ids)
        (FORGET * F.relu(odds[known] + MARGIN).mean()).backward()


def _add_lines(model: Any, refits: Sequence[_Refit], adversary: Adversary) -> None:
    """Backward pass of the divergence from the dense model on single lines of what stays."""
    drawn = adversary.draw_stays()
    if drawn is None:
        return
    ids, real = drawn[0].to(input_device(model)), drawn[1][:, 1:].to(input_device(model))
    with torch.no_grad(), _dense(refits):
        wanted = model(input_ids=ids).logits[:, :-1].float().log_softmax(-1)
    now = model(input_ids=ids).logits[:, :-1].float().log_softmax(-1)
    F.kl_div(now, wanted, reduction="none", log_target=True).sum(-1)[real].mean().backward()


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

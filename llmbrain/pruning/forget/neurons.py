"""Which neurons go when a model is to forget what it does under a condition, and nothing else.

For the repair afterwards see `llmbrain.pruning.forget.unlearning`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from llmbrain._validation import InputError, check_option
from llmbrain.anatomy.families import Anatomy
from llmbrain.anatomy.layers import LayerAnatomy
from llmbrain.evaluation.perplexity import predicts_next_token
from llmbrain.hooks.change import change_inputs
from llmbrain.hooks.relevance import halved, relevance_rules
from llmbrain.hooks.text import batches, input_device
from llmbrain.pruning.calibrate.losses import gradients_of, log_odds

LEVEL = 0.3  # a condition is forgotten when so small a share of its known tokens is still the first choice
STEP = 0.01  # share of all neurons that goes in one round
MOST = 0.5  # and in all rounds together
TOKENS = 8192  # on which a round is measured
ATTRIBUTIONS = ("gradient", "relp")


@dataclass
class Forgetting:
    """Neurons that were found, and how much was left of each condition after every round."""

    gone: NDArray[np.bool_]
    left: list[dict[str, float]]


def neurons_to_forget(
    model: nn.Module,
    body: Anatomy,
    windows: Tensor,
    labels: NDArray[np.int64],
    names: Sequence[str],
    forget: Sequence[int],
    *,
    most: int | None = None,
    level: float = LEVEL,
    attribution: str = "gradient",
    gone: NDArray[np.bool_] | None = None,
) -> Forgetting:
    """Silence neurons in rounds, the most specific first, until a condition's tokens are not predicted any more.

    What a neuron does is measured on tokens that the dense model gets right, by the first-order effect of silencing it
    on their log odds, ``x * d(log odds)/dx``, in the model as lesioned so far: its mean over the tokens of the
    conditions to forget, divided by its root mean square over the tokens of the other condition that it matters most
    to. (The loss would not do: it is flat where a model is sure. Nor does activity alone: a neuron may be active under
    one condition and needed under another.) Tokens that are wrong already count no more.

    Parameters
    ----------
    windows : (n, window) int64
    labels : (n, window) int64
        Condition of each token, -1 for none.
    forget : sequence of int
        Numbers of the conditions to forget.
    most : int, optional
        Never more neurons than these; default half of them.
    level : float
        Share of the conditions' known tokens still right at which it ends.
    attribution : {"gradient", "relp"}
        How ``d(log odds)/dx`` is found: by the gradient, or by RelP's rules (`llmbrain.hooks.relevance`).
    gone : bool array ``(n_neurons,)``, optional
        Neurons that are silent already; they count in `most`.
    """
    check_option("attribution", attribution, ATTRIBUTIONS)
    if not predicts_next_token(model):
        raise InputError(f"forget: model {type(model).__name__} predicts no next token, so there is none to forget")
    holds = np.asarray(np.isin(labels, list(forget)).any(axis=1))
    chosen = spread(holds, max(1 + int(holds.any() and not holds.all()), TOKENS // windows.shape[1]))
    unseen = np.setdiff1d(labels, labels[chosen])
    lost = [names[i] for i in unseen.tolist() if i >= 0 and i not in set(forget)]
    if lost:
        warnings.warn(
            f"forget: {lost} stand in none of the windows that are measured, and nothing protects them: use shorter "
            "windows, or mix the texts",
            UserWarning,
            stacklevel=2,
        )
    windows, labels_ = windows[chosen], torch.from_numpy(labels[chosen])
    total = sum(body.widths)
    most = min(int(MOST * total), total if most is None else most)
    step = max(1, round(STEP * total))
    gone = np.zeros(total, dtype=bool) if gone is None else gone.copy()
    left: list[dict[str, float]] = []
    leaf: Any = model.get_input_embeddings()  # type: ignore[operator]
    with gradients_of(model, [leaf.weight]):  # one leaf is enough for gradients to reach every layer
        known = torch.cat([_log_odds(model, ids).detach().cpu() > 0 for ids in batches(windows)])
        target = torch.from_numpy(np.isin(labels_[:, 1:].numpy(), list(forget))) & known
        if not np.isin(labels, list(forget)).any():
            raise InputError(
                f"forget={[names[i] for i in forget]}: none of these tokens are in the {len(labels)} calibration "
                "windows that are used: raise max_windows, or mix the texts"
            )
        if not target.any():
            raise InputError(
                f"forget={[names[i] for i in forget]}: the model predicts none of these tokens: nothing to forget"
            )
        while True:
            with relevance_rules(model, body) if attribution == "relp" else nullcontext():
                found = _round(
                    model, body, windows, labels_, known, target, gone, len(names), half=attribution == "relp"
                )
            left.append({name: float(found.left[i]) for i, name in enumerate(names)})
            room = min(step, most - int(gone.sum()))
            if found.target_left <= level or room < 1:
                return Forgetting(gone, left)
            others = np.delete(found.harm, [i + 1 for i in forget], axis=0).max(0)
            score = found.gain / (others + 1e-3 * others.mean() + 1e-12)
            score[gone] = -np.inf
            full = _last_ones(gone, body.widths)
            score[full] = -np.inf
            chosen = np.argsort(-score, kind="stable")[:room]
            chosen = chosen[score[chosen] > 0]
            if not len(chosen):
                return Forgetting(gone, left)
            gone[chosen] = True


@dataclass
class _Found:
    gain: NDArray[np.float64]  # (n_neurons,)
    harm: NDArray[np.float64]  # (1 + conditions, n_neurons); first: tokens of no condition
    left: NDArray[np.float64]  # (conditions,) share of known tokens still right
    target_left: float


def _round(
    model: nn.Module, body: Anatomy, windows: Tensor, labels: Tensor, known: Tensor, target: Tensor,
    gone: NDArray[np.bool_], n: int, *, half: bool = False,
) -> _Found:  # fmt: skip
    widths = body.widths
    gain, harm = torch.zeros(sum(widths)), torch.zeros(n + 1, sum(widths))
    stays = torch.from_numpy(~gone).float().split(list(widths))
    right = []
    signals: list[Tensor] = []

    def silence(layer: LayerAnatomy, keep: Tensor) -> Callable[[Tensor], Tensor]:
        def edit(x: Tensor) -> Tensor:
            signals.append((halved(layer, x) if half else x) * keep.to(x))
            return signals[-1]

        return edit

    with change_inputs(model, [(layer.down.module, silence(layer, s)) for layer, s in zip(body.layers, stays)]):
        at = 0
        for ids in batches(windows):
            part = slice(at, at + len(ids))
            at += len(ids)
            signals.clear()
            odds = _log_odds(model, ids)
            right.append(odds.detach().cpu() > 0)
            wanted = target[part].to(odds.device)
            other = (known[part] & ~target[part]).to(odds.device)
            ours = torch.autograd.grad(F.softplus(odds[wanted] + 1).sum(), signals, retain_graph=True)
            theirs = torch.autograd.grad(odds[other].sum(), signals)
            onehot = F.one_hot(labels[part].flatten() + 1, n + 1).float().T
            flat = [x.detach().float().reshape(-1, x.shape[-1]) for x in signals]
            gain += torch.cat([(x * g.reshape(x.shape)).sum(0).cpu() for x, g in zip(flat, ours)])
            harm += torch.cat(
                [(onehot.to(x) @ (x * g.reshape(x.shape)).square()).cpu() for x, g in zip(flat, theirs)], 1
            )
    still = torch.cat(right)
    counts = F.one_hot(labels.flatten() + 1, n + 1).sum(0)[:, None].clamp_min(1)
    share = [float(still[known & (labels[:, 1:] == i)].float().mean()) for i in range(n)]
    return _Found(
        (gain / target.sum()).double().numpy(), (harm / counts).sqrt().double().numpy(), np.array(share),
        float(still[target].float().mean()),
    )  # fmt: skip


def _log_odds(model: Any, ids: Tensor) -> Tensor:
    ids = ids.to(input_device(model))
    return log_odds(model(input_ids=ids).logits, ids)


def spread(holds: NDArray[np.bool_], count: int) -> NDArray[np.int64]:
    """Numbers of so many windows, spread over the text, at least half of them where something is to be forgotten.

    Texts may come sorted by condition: then the first windows would hold one of them only.

    Parameters
    ----------
    holds : bool array ``(n_windows,)``
        Whether a window holds tokens to forget.
    count : int
        At most so many windows.
    """

    def evenly(among: NDArray[np.int64], n: int) -> NDArray[np.int64]:
        return among[np.arange(n) * len(among) // max(n, 1)]

    own, others = np.flatnonzero(holds), np.flatnonzero(~holds)
    of_own = min(len(own), max((count + 1) // 2, count - len(others)))
    return np.sort(np.concatenate([evenly(own, of_own), evenly(others, min(count - of_own, len(others)))]))


def _last_ones(gone: NDArray[np.bool_], widths: Sequence[int]) -> NDArray[np.int64]:
    """Of each layer the neuron that must stay: no layer may become empty."""
    starts = np.cumsum([0, *widths[:-1]])
    return np.array([s + int(np.argmin(gone[s : s + w])) for s, w in zip(starts, widths)])

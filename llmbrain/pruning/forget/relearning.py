"""How well forgetting lasts: the cut model is taught again, on little text, and watched.

What was forgotten may be one step away: a model that gives wrong answers may still hold all that the right ones need.
So the forgetting model is fine-tuned on a few lines of what it forgot, and on unrelated text only, and the accuracy is
measured on other lines as it comes back.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from llmbrain._progress import bar
from llmbrain._validation import InputError, check_range, check_whole
from llmbrain.hooks.text import evaluating, input_device
from llmbrain.pruning.calibrate.windows import scans_with_tokens
from llmbrain.scanning.scans import Scan

if TYPE_CHECKING:
    import pandas as pd

LONGEST = 128  # tokens of a line; a longer event is cut into several
UNRELATED = "unrelated"
ENOUGH = 0.5  # of what the dense model knew: back that far, it counts as relearned


@dataclass(frozen=True)
class Relearning:
    """A relearning attack: how much text, how long, how fast.

    A step is a forward and a backward pass over `batch` lines, so all of it costs about
    ``(len(lines) + unrelated) * steps * batch * tokens a line * 3`` token passes, and one copy of the model with its
    gradients and two moments of Adam in float32 (four times the model).

    Parameters
    ----------
    lines : sequence of int
        How many lines of what was forgotten the attacker has; each number is an attack of its own. Fewer are used, and
        recorded, where the text has fewer.
    unrelated : bool
        One more attack with lines of the other conditions only, as many as the most of `lines`.
    steps : int
        Of Adam, on all parameters.
    batch : int
        Lines in a step.
    rate : float
        Step relative to the root mean square of each parameter, so that it means the same in models of any size.
    every : int
        Steps between two measurements.
    test : int
        Lines that the accuracy is measured on, at most; never those that the attacker has.
    """

    lines: tuple[int, ...] = (8, 32, 128)
    unrelated: bool = True
    steps: int = 60
    batch: int = 8
    rate: float = 0.01
    every: int = 5
    test: int = 128

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "every", "test"):
            check_whole(name, getattr(self, name), 1)
        check_range("rate", self.rate, 0, open_low=True)
        lines: Any = (self.lines,) if isinstance(self.lines, Integral) else self.lines
        lines = lines.tolist() if hasattr(lines, "tolist") else lines
        if isinstance(lines, str) or not lines or any(not isinstance(n, Integral) or n < 1 for n in lines):
            raise InputError(f"lines={self.lines!r} must be whole numbers, at least 1: lines that an attacker has")
        object.__setattr__(self, "lines", tuple(int(n) for n in lines))


def relearn(
    model: nn.Module,
    lines: Sequence[Tensor],
    score: Callable[[nn.Module], float],
    attack: Relearning | None = None,
    *,
    random_state: int = 0,
) -> tuple[list[int], list[float]]:
    """Fine-tune a copy of a model on lines and score it on the way.

    Parameters
    ----------
    model : causal language model
        Not changed.
    lines : sequence of int64 tensor ``(length,)``
        What the attacker has.
    score : function of the model
        Measured before the first step, every `attack.every` steps and at the end.

    Returns
    -------
    steps, scores
    """
    attack = attack or Relearning()
    taught: Any = copy.deepcopy(model).float()
    steps, scores = [0], [score(taught)]
    for step in teach(taught, lines, attack, random_state=random_state):
        if step % attack.every == 0 or step == attack.steps:
            steps.append(step)
            scores.append(score(taught))
    return steps, scores


def teach(model: nn.Module, lines: Sequence[Tensor], attack: Relearning, *, random_state: int = 0) -> Iterator[int]:
    """Fine-tune all parameters of this model on lines, in place; yields the number of each step when it is done."""
    if not lines or any(len(line) < 2 for line in lines):
        raise InputError(f"lines={len(lines)} lines: an attack needs at least one, each of two tokens or more")
    for p in model.parameters():
        p.requires_grad_(True)
    groups = [
        {"params": [p], "lr": attack.rate * float(p.detach().square().mean().sqrt().clamp_min(1e-6))}
        for p in model.parameters()
    ]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(random_state)
    order: list[int] = []
    for step in bar(range(1, attack.steps + 1), desc="relearn", leave=False):
        if len(order) < min(attack.batch, len(lines)):
            order = torch.randperm(len(lines), generator=generator).tolist()
        part, order = order[: attack.batch], order[attack.batch :]
        with evaluating(model, gradients=True):
            _loss(model, [lines[i] for i in part]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield step


def area(steps: Sequence[int], scores: Sequence[float]) -> float:
    """Mean score over the steps (area under the curve, trapezoids, divided by its length)."""
    if len(steps) < 2:
        return float(scores[0])
    return float(np.trapezoid(scores, steps) / (steps[-1] - steps[0]))


def steps_until(steps: Sequence[int], scores: Sequence[float], level: float) -> float | None:
    """First step, interpolated, at which the score reaches a level; None where it never does."""
    for i, (step, value) in enumerate(zip(steps, scores)):
        if value >= level:
            if i == 0:
                return float(step)
            before, low = steps[i - 1], scores[i - 1]
            return float(before + (step - before) * (level - low) / (value - low))
    return None


def lines_of(scans: Sequence[Scan], conditions: Sequence[str], *, without: bool = False) -> list[Tensor]:
    """Token ids of each event of some conditions (or of all others), led by the first token of its run where that is
    in no event (a begin-of-sequence token); events of more than `LONGEST` tokens in pieces.

    Parameters
    ----------
    scans : sequence of Scan
        With token ids and events.
    conditions : names
    without : bool
        The events of all other conditions instead.
    """
    return [line for _, line, _ in placed_lines(scans, conditions, without=without)]


def placed_lines(
    scans: Sequence[Scan], conditions: Sequence[str], *, without: bool = False
) -> Iterator[tuple[int, Tensor, int]]:
    """As `lines_of`, each with where it begins among the tokens of all scans, and how long it is there."""
    begin = 0
    for scan in scans_with_tokens(scans):
        ids, events = torch.from_numpy(scan.token_ids), scan.events
        first = ids[:1] if not len(events) or float(events["onset"].min()) >= 1 else ids[:0]
        for onset, duration, name in events[["onset", "duration", "trial_type"]].itertuples(index=False):
            if (str(name) in conditions) == without:
                continue
            start = begin + int(onset)
            for piece in ids[int(onset) : int(onset + duration)].split(LONGEST):
                line = torch.cat([first, piece])
                if len(piece) and len(line) > 1:
                    yield start, line, len(piece)
                start += len(piece)
        begin += len(ids)


class Known:
    """How much of what a model knew of some lines another still does: share of tokens, the first choice of both.

    Parameters
    ----------
    model : causal language model
        The one that knew: its right first choices are what counts.
    lines : sequence of int64 tensor
        The first token of each is never predicted.
    """

    def __init__(self, model: nn.Module, lines: Sequence[Tensor]) -> None:
        self.ids, self.mask = padded(lines)
        self.known = self._right(model)

    def __call__(self, model: nn.Module) -> float:
        """The share, 0 to 1; 0 where nothing was known."""
        return float(self._right(model)[self.known].float().mean()) if bool(self.known.any()) else 0.0

    def _right(self, model: Any) -> Tensor:
        found = []
        with evaluating(model):
            for ids, mask in zip(self.ids.split(32), self.mask.split(32)):
                first = model(input_ids=ids.to(input_device(model))).logits[:, :-1].argmax(-1).cpu()
                found.append((first == ids[:, 1:]) & mask[:, 1:])
        return torch.cat(found)


def attacked(
    model: nn.Module, scans: Sequence[Scan], forget: Sequence[str], known: Known, attack: Relearning
) -> dict[str, Any]:
    """The attack on a model that is to have forgotten conditions of its scans, as plain JSON values.

    Parameters
    ----------
    model : causal language model
        Cut and repaired.
    known : Known
        Of the dense model, on the lines that `split_lines` keeps apart.

    Returns
    -------
    dict
        ``steps``; by attack ``accuracy`` at these steps (share of what the dense model knew), ``area``, ``relearned``
        (the step at which half is back, None: not within the attack) and ``lines``; ``seconds``; what the attack was.
    """
    began = time.perf_counter()
    own, _ = split_lines(scans, forget, attack)
    cases = {str(n): own[:n] for n in attack.lines}
    if attack.unrelated:
        others = lines_of(scans, forget, without=True)
        generator = torch.Generator().manual_seed(1)
        chosen = torch.randperm(len(others), generator=generator)[: max(attack.lines)].tolist()
        if chosen:
            cases[UNRELATED] = [others[i] for i in chosen]
    record: dict[str, Any] = {"steps": [], "accuracy": {}, "area": {}, "relearned": {}, "lines": {}}
    for name, lines in cases.items():
        steps, scores = relearn(model, lines, known, attack)
        record["steps"] = steps
        record["accuracy"][name] = [round(s, 4) for s in scores]
        record["area"][name] = round(area(steps, scores), 4)
        record["relearned"][name] = steps_until(steps, scores, ENOUGH)
        record["lines"][name] = len(lines)
    return {**record, "seconds": round(time.perf_counter() - began, 1), "attack": asdict(attack)}


def attack_table(found: dict[str, Any]) -> pd.DataFrame:
    """What `attacked` gave, one row an attack.

    Parameters
    ----------
    found : dict
        ``model.llmbrain_pruning[-1]["forgetting"]["relearning"]``.

    Returns
    -------
    DataFrame
        ``taught_again_on``, ``lines``; ``known`` before it and ``known_after`` (shares of what the dense model knew);
        ``area``, their mean over the steps; ``half_back_at_step``, ``"never"`` where half is not back by its end. Empty
        where there was no attack.
    """
    import pandas as pd

    rows = []
    for name, shares in found.get("accuracy", {}).items():
        step = found["relearned"][name]
        rows.append({
            "taught_again_on": "unrelated text" if name == UNRELATED else "what was forgotten",
            "lines": found["lines"][name], "known": shares[0], "known_after": shares[-1], "area": found["area"][name],
            "half_back_at_step": f"never (of {found['steps'][-1]})" if step is None else f"{step:.0f}",
        })  # fmt: skip
    columns = ["taught_again_on", "lines", "known", "known_after", "area", "half_back_at_step"]
    return pd.DataFrame(rows, columns=columns)


def split_lines(scans: Sequence[Scan], forget: Sequence[str], attack: Relearning) -> tuple[list[Tensor], list[Tensor]]:
    """Lines that the attacker may have, and lines to measure on: every fourth, at most `attack.test`."""
    lines = lines_of(scans, forget)
    held = {i for i in range(len(lines)) if i % 4 == 1}
    return [x for i, x in enumerate(lines) if i not in held], [lines[i] for i in sorted(held)][: attack.test]


def padded(lines: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Lines as one tensor, padded on the right with their own last token, and which tokens are real."""
    longest = max(len(line) for line in lines)
    ids = torch.stack([torch.cat([x, x[-1:].expand(longest - len(x))]) for x in lines])
    mask = torch.arange(longest)[None] < torch.tensor([len(x) for x in lines])[:, None]
    return ids, mask


def probe_accuracy(
    model: nn.Module, train: Sequence[Tensor], test: Sequence[Tensor], *, ridge: float = 1.0
) -> NDArray[np.float64]:
    """Whether hidden states still tell the next token linearly, layer by layer.

    One-against-all ridge regression of the next token on the standardized hidden states after each block (the
    embeddings first), fitted on some lines and scored on others: what it gets right is information that the model still
    computes, whatever it says.

    Parameters
    ----------
    train, test : lines
        Different ones.
    ridge : float
        Relative to the number of training tokens times 0.01.

    Returns
    -------
    float64 array ``(n_layers + 1,)``
        Accuracy on the tokens of the test lines. Compare it with that of the dense model and of a model that never
        knew; tokens that follow from the token before them are right in any model.
    """
    states, targets = [], []
    for lines in (train, test):
        ids, mask = padded(lines)
        with evaluating(model):
            hidden = model(input_ids=ids.to(input_device(model)), output_hidden_states=True).hidden_states
        states.append([h[:, :-1][mask[:, 1:]].double().cpu() for h in hidden])
        targets.append(ids[:, 1:][mask[:, 1:]])
    kinds, place = targets[0].unique(return_inverse=True)
    onehot = F.one_hot(place, len(kinds)).double()
    found = []
    for x, y in zip(*states):
        mean, spread = x.mean(0), x.std(0).clamp_min(1e-8)
        x, y = (x - mean) / spread, (y - mean) / spread
        gram = x.T @ x + ridge * 0.01 * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
        weights = torch.linalg.solve(gram, x.T @ (onehot - onehot.mean(0)))
        found.append(float((kinds[(y @ weights + onehot.mean(0)).argmax(1)] == targets[1]).double().mean()))
    return np.array(found)


def _loss(model: Any, lines: Sequence[Tensor]) -> Tensor:
    ids, mask = padded(lines)
    ids, mask = ids.to(input_device(model)), mask.to(input_device(model))
    logits = model(input_ids=ids).logits[:, :-1].float()
    nats = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return nats[mask[:, 1:].flatten()].mean()

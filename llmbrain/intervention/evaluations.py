"""What an intervention is measured by, and the engine that measures many interventions in one forward pass.

Every row of a batch is repeated once a condition, and each replica's neurons are multiplied by the condition's factors:
0 is a lesion, 1 leaves a neuron alone, anything else is a gain. So a network and all its random controls share a pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from llmbrain._validation import InputError, check_option
from llmbrain.anatomy.families import Anatomy, anatomy
from llmbrain.anatomy.space import NeuronSpace
from llmbrain.evaluation.perplexity import check_causal
from llmbrain.hooks.change import Edit, change_inputs, scale_replicas
from llmbrain.hooks.listen import Hooks, hear_inputs
from llmbrain.hooks.text import as_windows, evaluating, input_device, without_end
from llmbrain.intervention.targets import unit_space

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SCORES = ("loss", "accuracy", "exact")
PASS_TOKENS = 8192  # tokens in one forward pass, all replicas together
PASS_LOGITS = 2**26  # numbers in its logits at most (256 MB of float32)

Evaluation = Callable[[nn.Module], Any]


@dataclass(frozen=True)
class TokenEvaluation:
    """Rows of tokens, which of them count, and how they are scored; one score a row.

    Attributes
    ----------
    ids : int64 tensor ``(n_items, length)``
        Right-padded with any token where rows differ in length.
    scored : bool tensor ``(n_items, length)``
        Tokens that are predicted from those before them; the first of a row never is.
    score : {"loss", "accuracy", "exact"}
        Mean negative log likelihood (nats a token), share of tokens that are the first choice, or 1 if all of them are
        (the same as greedy generation giving exactly these tokens).
    """

    ids: Tensor
    scored: Tensor
    score: str = "loss"

    def __post_init__(self) -> None:
        check_option("score", self.score, SCORES)
        if self.ids.ndim != 2 or self.ids.shape != self.scored.shape or not len(self.ids):
            raise InputError(
                f"ids {tuple(self.ids.shape)} and scored {tuple(self.scored.shape)} must be (n_items, length)"
            )
        if self.scored[:, 0].any() or not self.scored.any(dim=1).all():
            raise InputError("scored must mark at least one token of every row, and never the first")

    @property
    def higher_is_better(self) -> bool:
        """Whether more is better: not for a loss."""
        return self.score != "loss"

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def from_texts(
        cls,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase | None,
        texts: Sequence[str] | Tensor,
        *,
        window: int | None = None,
        max_windows: int | None = None,
    ) -> TokenEvaluation:
        """Mean loss over packed windows, as `llmbrain.perplexity` measures it; one item a window."""
        if not isinstance(texts, Tensor) and not len(texts):
            raise InputError("the evaluation has no data: texts=[]")
        ids = as_windows(model, tokenizer, texts, window, max_windows)
        scored = torch.ones_like(ids, dtype=torch.bool)
        scored[:, 0] = False
        return cls(ids, scored)

    @classmethod
    def from_answers(
        cls, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], answers: Sequence[str], *, score: str = "exact"
    ) -> TokenEvaluation:
        """Answers that follow prompts; only the answers' tokens count. One item a pair.

        Prompt and answer are tokenized as one text; the answer starts where the tokens differ from those of the prompt
        alone. Special tokens that the tokenizer puts behind a text (an end of sequence) are no part of the answer.
        """
        if not len(prompts) or len(prompts) != len(answers):
            raise InputError(f"prompts ({len(prompts)}) and answers ({len(answers)}) must be as many, at least one")
        rows, starts = [], []
        for prompt, answer in zip(prompts, answers):
            alone, both = (without_end(tokenizer, text) for text in (prompt, prompt + answer))
            same = next((i for i, (a, b) in enumerate(zip(alone, both)) if a != b), min(len(alone), len(both)))
            if same >= len(both) or same == 0:
                raise InputError(f"answer {answer!r} adds no token to prompt {prompt!r}, or nothing stands before it")
            rows.append(both)
            starts.append(same)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        ids = torch.full((len(rows), max(map(len, rows))), pad, dtype=torch.long)
        scored = torch.zeros_like(ids, dtype=torch.bool)
        for i, (row, start) in enumerate(zip(rows, starts)):
            ids[i, : len(row)] = torch.tensor(row)
            scored[i, start : len(row)] = True
        return cls(ids, scored, score)

    def read(self) -> Tensor:
        """Tokens that are not padding on the right: bool ``(n_items, length)``."""
        return self.scored.flip(1).cummax(dim=1).values.flip(1)

    def of(self, logits: Tensor, rows: Tensor, replicas: int = 1) -> Tensor:
        """Scores of the given rows from their logits ``(replicas * rows, length, vocabulary)``; same order."""
        target = self.ids[rows].repeat(replicas, 1)[:, 1:].to(logits.device)
        counts = self.scored[rows].repeat(replicas, 1)[:, 1:].to(logits.device)
        logits = logits[:, :-1].float()
        if self.score == "loss":
            nats = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view_as(target)
            return (nats * counts).sum(dim=1) / counts.sum(dim=1)
        right = (logits.argmax(dim=-1) == target) | ~counts
        if self.score == "exact":
            return right.all(dim=1).float()
        return (right & counts).sum(dim=1) / counts.sum(dim=1)


def as_evaluations(
    model: nn.Module, evaluations: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None, **windows: int | None
) -> dict[str, TokenEvaluation | Evaluation]:
    """Each evaluation as a `TokenEvaluation` or a callable; texts and token ids become losses over windows.

    Raises
    ------
    InputError
        If there is none, or one has no data; the message names it.
    """
    if not isinstance(evaluations, Mapping) or not evaluations:
        raise InputError(f"evaluations={evaluations!r} must be a dict with at least one name -> evaluation")
    ready: dict[str, TokenEvaluation | Evaluation] = {}
    for name, what in evaluations.items():
        if isinstance(what, TokenEvaluation) or (callable(what) and not isinstance(what, Tensor)):
            ready[str(name)] = what
            continue
        try:
            ready[str(name)] = TokenEvaluation.from_texts(model, tokenizer, what, **windows)
        except (InputError, TypeError) as error:
            raise InputError(f"evaluations[{name!r}]: {error}") from error
    return ready


def scaled_replicas(model: nn.Module, body: Anatomy, scales: Tensor, shifts: Tensor | None = None) -> Hooks:
    """Within the block, replica ``r`` of a batch has its units multiplied by ``scales[r]`` (and `shifts` added).

    The batch must hold ``len(scales)`` replicas one after the other; both tensors are ``(replicas, n_neurons)``, or
    ``(replicas, n_units)`` where heads follow the neurons (`unit_space`).
    """
    space = unit_space(body)
    if scales.shape[1] == sum(body.widths):
        space = NeuronSpace(body.widths)

    edits: list[tuple[nn.Module, Edit]] = []
    for i in range(space.n_layers):
        part = space.layer_slice(i)
        scale = scales[:, part]
        if not bool((scale != 1).any()):
            continue
        shift = None if shifts is None else shifts[:, part]
        layer = body.layers[i % len(body.layers)]
        module = layer.down.module
        if i >= len(body.layers):  # heads: runs of inputs of the attention's output projection
            assert layer.out is not None
            scale, module = scale.repeat_interleave(layer.head_dim, dim=1), layer.out.module
            shift = None if shift is None else shift.repeat_interleave(layer.head_dim, dim=1)
        edits.append((module, scale_replicas(scale, shift)))
    return change_inputs(model, edits)


def score_conditions(
    model: nn.Module,
    scales: NDArray[Any],
    evaluations: Mapping[str, TokenEvaluation | Evaluation],
    *,
    fill: NDArray[Any] | None = None,
) -> dict[str, NDArray[np.float64]]:
    """Score every condition by every evaluation.

    Parameters
    ----------
    model : causal language model
    scales : array ``(n_conditions, n_neurons)`` or ``(n_conditions, n_units)``
        Factor of each neuron (and, in the second form, of each head: `unit_space`) in each condition.
    evaluations : dict of `TokenEvaluation` or callable
        A callable takes the model and gives a number or one number an item; it is called once a condition.
    fill : array ``(n_neurons,)``, optional
        What a neuron with factor 0 holds instead of zero (its mean, say).

    Returns
    -------
    dict of float64 array ``(n_conditions, n_items)``
    """
    if any(isinstance(evaluation, TokenEvaluation) for evaluation in evaluations.values()):
        check_causal(model)
    body = anatomy(model)
    factors = torch.as_tensor(np.asarray(scales, dtype=np.float32)).to(input_device(model))
    shifts = None
    if fill is not None:
        shifts = (factors == 0) * torch.as_tensor(np.asarray(fill, dtype=np.float32)).to(factors.device)
    scores: dict[str, NDArray[np.float64]] = {}
    for name, evaluation in evaluations.items():
        with evaluating(model, cache=not isinstance(evaluation, TokenEvaluation)):  # a callable may generate
            if isinstance(evaluation, TokenEvaluation):
                scores[name] = _score_tokens(model, body, factors, shifts, evaluation)
            else:
                scores[name] = _score_callable(model, body, factors, shifts, evaluation, name)
            if not np.isfinite(scores[name]).all():
                raise InputError(f"evaluations[{name!r}] gives nan or inf: an evaluation must be finite")
    return scores


def _score_tokens(
    model: nn.Module, body: Anatomy, factors: Tensor, shifts: Tensor | None, evaluation: TokenEvaluation
) -> NDArray[np.float64]:
    scores = torch.empty(len(factors), len(evaluation), dtype=torch.float64)
    device = input_device(model)
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None) or 1
    budget = max(1, min(PASS_TOKENS, PASS_LOGITS // vocabulary) // evaluation.ids.shape[1])
    # Rows of like length go together, so that little padding is computed.
    lengths = evaluation.read().sum(dim=1)
    for rows in torch.argsort(lengths, stable=True).split(max(min(budget, 8), budget // len(factors))):
        longest = int(lengths[rows].max())
        cut = TokenEvaluation(evaluation.ids[rows, :longest], evaluation.scored[rows, :longest], evaluation.score)
        ids = cut.ids.to(device)
        for first in range(0, len(factors), max(1, budget // len(rows))):
            part = slice(first, first + max(1, budget // len(rows)))
            replicas = len(factors[part])
            with scaled_replicas(model, body, factors[part], None if shifts is None else shifts[part]):
                output = model(input_ids=ids.repeat(replicas, 1))
            logits = getattr(output, "logits", None)
            if logits is None or logits.shape[:2] != (replicas * len(rows), longest):
                raise InputError(f"model {type(model).__name__} gives no next-token logits: use a causal model")
            scores[part, rows] = cut.of(logits, torch.arange(len(rows)), replicas).view(replicas, -1).double().cpu()
    return scores.numpy()


def _score_callable(
    model: nn.Module, body: Anatomy, factors: Tensor, shifts: Tensor | None, evaluation: Evaluation, name: str
) -> NDArray[np.float64]:
    rows: list[NDArray[np.float64]] = []
    for i in range(len(factors)):
        with scaled_replicas(model, body, factors[i : i + 1], None if shifts is None else shifts[i : i + 1]):
            values = np.atleast_1d(np.asarray(evaluation(model), dtype=np.float64))
        if values.ndim != 1 or not len(values) or (rows and len(values) != len(rows[0])):
            raise InputError(
                f"evaluations[{name!r}] gave shape {values.shape}: a number, or one number an item each time"
            )
        rows.append(values)
    return np.stack(rows)


def activation_levels(
    model: nn.Module, evaluations: Sequence[TokenEvaluation], *, heads: bool = False
) -> NDArray[np.float64]:
    """Mean, mean ``|a|`` and SD of every neuron of the intact model over the tokens read; ``(3, n_neurons)``.

    With `heads`, those of the heads follow (`unit_space`): what is averaged there is all channels of a head's output.
    """
    body = anatomy(model)
    sites = [(layer.down.module, layer.width, 1) for layer in body.layers]
    if heads:
        sites += [(layer.out.module, layer.n_heads, layer.head_dim) for layer in body.layers if layer.out is not None]
    totals = [torch.zeros(3, units, dtype=torch.float64) for _, units, _ in sites]
    keep: Tensor = torch.empty(0, dtype=torch.bool)
    count = 0

    def add(total: Tensor, size: int, x: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1])[keep.to(x.device)].double()
        x = x.reshape(len(x), -1, size)
        total += torch.stack([v.mean(dim=2).sum(dim=0) for v in (x, x.abs(), x * x)]).cpu()

    places = [(module, partial(add, total, size)) for (module, _, size), total in zip(sites, totals)]
    with evaluating(model), hear_inputs(model, places):
        for evaluation in evaluations:
            size = max(1, PASS_TOKENS // evaluation.ids.shape[1])
            for ids, read in zip(evaluation.ids.split(size), evaluation.read().split(size)):
                keep = read.flatten()
                count += int(keep.sum())
                model(input_ids=ids.to(input_device(model)))
    return _levels(torch.cat(totals, dim=1).numpy(), count)


def levels_of_runs(runs: Any, space: NeuronSpace) -> NDArray[np.float64]:
    """Mean, mean ``|a|`` and SD of every neuron over scans or arrays; ``(3, n_neurons)``."""
    from llmbrain.scanning.inputs import Runs

    total, count = np.zeros((3, space.n_neurons)), 0
    for data in Runs(runs, space=space):
        for first in range(0, len(data), 256):  # in pieces: float64 of a whole run of a large model is much
            wide = data[first : first + 256].astype(np.float64)
            total += np.stack([wide.sum(axis=0), np.abs(wide).sum(axis=0), (wide**2).sum(axis=0)])
        count += len(data)
    return _levels(total, count)


def _levels(total: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    mean, absolute, square = total / count
    return np.stack([mean, absolute, np.sqrt(np.maximum(square - mean**2, 0))])

"""Exact-answer scoring of a model on examples of the abilities, in a few padded forward passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from llmbrain.datasets.abilities import Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def score_examples(
    model: PreTrainedModel, tokenizer: Any, examples: Sequence[Example], *, batch_size: int = 256
) -> tuple[np.ndarray, np.ndarray]:
    """Score each example alone, after the beginning-of-text token.

    An answer (with the newline that ends it) is right if every one of its tokens is the model's first choice given the
    right tokens before it. By induction that is the same as greedy generation giving exactly the answer, and needs one
    forward pass instead of one per token.

    Parameters
    ----------
    model : PreTrainedModel
        Any causal model over the demo tokenizer, on any device; its mode and its weights are left as they are.
    tokenizer : PreTrainedTokenizerFast
        The demo tokenizer: one token per character, so answers start at a token of their own.
    examples : sequence of Example
        What to score; the ability does not matter.
    batch_size : int
        Examples per forward pass.

    Returns
    -------
    correct : ndarray of bool, shape (n_examples,)
        Whether the greedy answer is exactly right.
    loss : ndarray of float64, shape (n_examples,)
        Mean negative log likelihood over the answer's tokens, in nats.
    """
    import torch

    correct = np.zeros(len(examples), dtype=bool)
    loss = np.zeros(len(examples), dtype=np.float64)
    device = next(model.parameters()).device
    prompts = [len(tokenizer(example.prompt)["input_ids"]) for example in examples]
    ids = [tokenizer(example.text)["input_ids"] for example in examples]
    by_length = np.argsort([len(row) for row in ids], kind="stable")
    for first in range(0, len(examples), batch_size):
        rows = by_length[first : first + batch_size]
        longest = max(len(ids[row]) for row in rows)
        # Padding stands on the right of a causal model: it changes nothing before it, so no attention mask is needed.
        tokens = torch.full((len(rows), longest), tokenizer.pad_token_id, dtype=torch.long)
        answer = torch.zeros((len(rows), longest), dtype=torch.bool)
        for place, row in enumerate(rows):
            tokens[place, : len(ids[row])] = torch.tensor(ids[row])
            answer[place, prompts[row] : len(ids[row])] = True
        tokens, answer = tokens.to(device), answer[:, 1:].to(device)
        with torch.no_grad():
            logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
        target = tokens[:, 1:]
        wrong = (logits.argmax(-1) != target) & answer
        nats = -torch.log_softmax(logits, -1).gather(-1, target[..., None])[..., 0] * answer
        correct[rows] = (~wrong.any(1)).cpu().numpy()
        loss[rows] = (nats.double().sum(1) / answer.sum(1)).cpu().numpy()
    return correct, loss

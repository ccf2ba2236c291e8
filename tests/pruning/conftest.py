"""A model with two abilities, trained once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import tiny, tiny_tokenizer

from llmbrain import (
    Stimulus,
    scan,
)


@pytest.fixture(scope="session")
def two_abilities():
    """A tiny model that was trained to go on with two cycles of letters, and scans of text of both."""
    torch.manual_seed(0)
    model, tokenizer, rng = tiny("llama", intermediate_size=48), tiny_tokenizer(), np.random.default_rng(0)
    texts = []
    for _ in range(24):
        parts = [(letters * 3, name) for name, letters in (("low", "abcde"), ("high", "vwxyz"))]
        texts.append(Stimulus.from_segments([parts[i] for i in rng.permutation([0, 1, 0, 1])], tokenizer))
    scans = scan(model, tokenizer, texts)
    ids = torch.tensor(np.stack([s.token_ids for s in scans]))
    model.train()
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(80):
        optimiser.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
    return model.eval(), scan(model, tokenizer, texts), ids

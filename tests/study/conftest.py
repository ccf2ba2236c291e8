"""A tiny model, its tokenizer and texts for it."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_models import CHARACTERS, tiny, tiny_tokenizer


@pytest.fixture(scope="session")
def subject():
    """A random Llama of 2 x 40 neurons and a character tokenizer."""
    return tiny("llama", seed=3, intermediate_size=40), tiny_tokenizer()


@pytest.fixture(scope="session")
def texts():
    rng = np.random.default_rng(0)
    letters = np.array(list(CHARACTERS))
    return ["".join(rng.choice(letters, 300)) for _ in range(8)]

"""What several tests of commands begin with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_models import CHARACTERS, tiny, tiny_tokenizer


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of two layers (``model``), its tokenizer of characters, and ``texts.json``."""
    folder = tmp_path_factory.mktemp("places")
    tiny("llama", seed=3, intermediate_size=40).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    letters, rng = np.array(list(CHARACTERS)), np.random.default_rng(0)
    (folder / "texts.json").write_text(json.dumps(["".join(rng.choice(letters, 300)) for _ in range(16)]))
    return folder

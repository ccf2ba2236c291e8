"""Calibration text: windows that the model writes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import tiny, tiny_tokenizer

from llmbrain import (
    InputError,
)
from llmbrain.pruning.calibrate.windows import mixed_windows, write_windows


def test_windows_that_the_model_writes_follow_its_distribution():
    model, tokenizer = tiny("llama"), tiny_tokenizer()
    state = torch.random.get_rng_state()
    ids = write_windows(model, tokenizer, 300, 3, random_state=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert ids.shape == (300, 3)
    assert torch.equal(ids, write_windows(model, tokenizer, 300, 3, random_state=1))
    assert not torch.equal(ids, write_windows(model, tokenizer, 300, 3, random_state=2))
    assert (ids[:, 0] == tokenizer.bos_token_id).all()
    with torch.no_grad():
        p = model(input_ids=ids[:1, :1]).logits[0, 0].softmax(-1).numpy()
    counts = np.bincount(ids[:, 1], minlength=len(p))
    often = p * 300 >= 5
    chi2 = (np.square(counts - 300 * p) / (300 * p))[often].sum()
    assert chi2 < 2 * often.sum() + 10
    mixed = mixed_windows(ids[:5], ids[5:9])
    assert sorted(map(tuple, mixed.tolist())) == sorted(map(tuple, ids[:9].tolist()))
    with pytest.raises(InputError, match="predicts no next token: it writes no"):
        write_windows(tiny("bert"), tokenizer)

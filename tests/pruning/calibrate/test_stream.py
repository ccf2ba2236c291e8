"""The stream is the model."""

from __future__ import annotations

import pytest
import torch
from pruning_data import FAMILIES, windows
from tiny_models import tiny

from llmbrain import (
    plan_pruning,
)
from llmbrain.anatomy.families import anatomy
from llmbrain.pruning.calibrate.stream import Stream, split_windows


@pytest.mark.parametrize("name", FAMILIES)
def test_streams_replay_the_model_bit_for_bit(name):
    model, ids = tiny(name), windows(5)
    body = anatomy(model)
    caught = []
    handle = body.layers[-1].block.register_forward_hook(
        lambda m, a, o: caught.append(o if torch.is_tensor(o) else o[0])
    )
    with torch.no_grad():
        model(input_ids=ids)
        handle.remove()
        stream = Stream(model, body, ids)
        for _ in body.layers:
            stream.advance()
    assert torch.equal(torch.cat(stream.hidden), caught[0])


def test_little_text_is_split_so_that_some_is_held_out():
    ids = windows(9, 16)
    held, train = split_windows(ids)
    assert len(held) >= 1
    assert torch.equal(torch.cat([held, train]).sort(0).values, ids.sort(0).values)
    plan = plan_pruning(tiny("llama"), ratio=0.5, calibration=ids)
    assert sum(plan.widths) == 24

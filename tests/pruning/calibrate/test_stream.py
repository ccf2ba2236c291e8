"""The stream is the model."""

from __future__ import annotations

import warnings

import pytest
import torch
from pruning_data import FAMILIES, windows
from tiny_models import VOCAB, tiny

from llmbrain import InputError, plan_pruning, prune
from llmbrain.anatomy.families import anatomy
from llmbrain.anatomy.units import NEURONS
from llmbrain.pruning.calibrate.stream import CalibrationWarning, Stream, split_windows, walk


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


class Told(torch.nn.Module):
    """A llama whose blocks get an embedding of the tokens each, beside what the block before gives."""

    def __init__(self):
        super().__init__()
        self.inner = tiny("llama", num_hidden_layers=3)
        self.config, self.tables = self.inner.config, torch.nn.ModuleList()
        for layer in self.inner.model.layers:
            self.tables.append(torch.nn.Embedding(VOCAB, 16))
            layer.register_forward_pre_hook(self.telling(len(self.tables) - 1))

    def telling(self, i):
        return lambda module, args: (args[0] + self.tables[i](self.ids), *args[1:])

    def get_input_embeddings(self):
        return self.inner.get_input_embeddings()

    def forward(self, input_ids):
        self.ids = input_ids
        return self.inner(input_ids=input_ids)


def test_blocks_that_get_more_than_the_block_before_gives_are_read_by_whole_passes():
    torch.manual_seed(0)
    model, ids = Told(), windows(20)
    body, caught, seen = anatomy(model), {}, {}

    def keep(i):
        return lambda module, args: caught.__setitem__(i, args[0].flatten(0, 1).double())

    handles = [layer.down.module.register_forward_pre_hook(keep(layer.index)) for layer in body.layers]
    with torch.no_grad():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()

    def look(measured):
        seen[measured.layer.index] = measured.all

    for times in (1, 0):  # said once
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            walk(model, body, ids, {NEURONS: look}, sequential=False)
        assert [w.category for w in said] == [CalibrationWarning] * times
        for i, x in caught.items():
            assert torch.allclose(seen[i].mean, x.mean(0), atol=1e-6)
            assert torch.allclose(seen[i].covariance, torch.cov(x.T, correction=0), atol=1e-5)


def test_whole_passes_say_what_a_stream_says(monkeypatch):
    model, ids = tiny("gemma2", num_hidden_layers=3), windows(20)
    options = {"calibration": ids, "compensate": "least-squares"}
    plan = plan_pruning(model, ratio=0.4, method="obs", head_ratio=0.4, calibration=ids)
    by_stream = prune(model, plan, **options)
    monkeypatch.setattr(stream_module(), "is_faithful", lambda *_: False)
    again = tiny("gemma2", num_hidden_layers=3)
    with pytest.warns(CalibrationWarning):
        same = plan_pruning(again, ratio=0.4, method="obs", head_ratio=0.4, calibration=ids)
    assert same.to_dict() == plan.to_dict()
    with pytest.warns(CalibrationWarning):
        by_passes = prune(again, same, **options)
    for a, b in zip(by_stream.parameters(), by_passes.parameters()):
        assert torch.allclose(a, b, atol=1e-5)


def stream_module():
    import sys

    return sys.modules[Stream.__module__]


def test_a_model_that_wants_more_than_token_ids_is_refused():
    model = tiny("llama")

    def forward(input_ids, **options):
        raise ValueError("no pixel_values")

    model.forward = forward
    with pytest.raises(InputError, match=r"does not read token ids alone \(ValueError: no pixel_values\)"):
        plan_pruning(model, ratio=0.4, method="obs-gradient", calibration=windows())

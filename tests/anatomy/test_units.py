"""Kinds of units: how many there are, and where their weights lie."""

from __future__ import annotations

import pytest
from tiny_models import tiny

from llmbrain import InputError
from llmbrain.anatomy.families import anatomy
from llmbrain.anatomy.units import HEADS, NEURONS


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_units_count_and_find_their_weights(name):
    body = anatomy(tiny(name))
    layer = body.layers[0]
    assert NEURONS.counts(body) == body.widths
    assert HEADS.counts(body) == tuple(layer.n_kv_heads for layer in body.layers)
    for units in (NEURONS, HEADS):
        modules = {p.path: p.module for p in units.projections(layer)}
        weights = sum(m.weight.numel() for m in modules.values())
        biases = [m.bias for path, m in modules.items() if path != units.output(layer).path]
        total = weights + sum(b.numel() for b in biases if b is not None)
        assert units.parameters(layer) * units.count(layer) == total
        assert units.projections(layer)[-1] is units.output(layer)


def test_heads_that_share_a_norm_cannot_be_cut():
    from transformers import Olmo2Config, Olmo2ForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = Olmo2Config(vocab_size=32, num_key_value_heads=2, **sizes)
    body = anatomy(Olmo2ForCausalLM(config))
    with pytest.raises(InputError, match=r"head_ratio=0\.5: the heads of this .* cannot be cut: "):
        HEADS.check(body, 0.5)
    NEURONS.check(body, 0.5)

"""Cuts: the cut model equals the original with those neurons set to zero, on every family."""

from __future__ import annotations

import copy

import pytest
import torch
from pruning_data import FAMILIES, IDS, logits, windows, with_zeros
from tiny_models import tiny, tiny_tokenizer

from llmbrain import (
    InputError,
    load_pruned,
    plan_pruning,
    prune,
    save_pruned,
    scan,
)
from llmbrain.anatomy.families import anatomy
from llmbrain.pruning.plan import weights_digest


@pytest.mark.parametrize("name", FAMILIES)
def test_a_cut_equals_the_neurons_set_to_zero(name):
    model = tiny(name)
    plan = plan_pruning(model, ratio=0.2, method="random", protect=[0], random_state=3)
    dense, expected = logits(model), with_zeros(model, plan.kept)
    small = prune(model, plan)
    assert anatomy(small).widths == plan.widths != plan.widths_before
    assert torch.allclose(logits(small), expected, atol=1e-5)
    assert not torch.allclose(dense, expected, atol=1e-3)
    assert torch.equal(logits(model), dense)  # the model passed is untouched
    gone = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in small.parameters())
    assert gone == plan.parameters_removed > 0


@pytest.mark.parametrize("compensate", ["bias", "least-squares"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "gemma3", "bloom", "falcon", "opt"])
def test_compensated_models_travel(name, compensate, tmp_path):
    model = tiny(name)
    plan = plan_pruning(model, ratio=0.4, method="flap", allocation="global", calibration=windows())
    small = prune(model, plan, calibration=windows(), compensate=compensate)
    save_pruned(small, None, tmp_path / "p")
    assert torch.equal(logits(load_pruned(tmp_path / "p")[0]), logits(small))


def test_a_pruned_model_is_pruned_and_scanned_again(tmp_path):
    model = tiny("qwen2")
    once = prune(model, plan_pruning(model, ratio=0.3, method="magnitude"))
    twice = prune(once, plan_pruning(once, ratio=0.3, method="random", allocation="global"))
    save_pruned(twice, None, tmp_path / "t", format="masked")
    assert torch.allclose(logits(load_pruned(tmp_path / "t")[0]), logits(twice), atol=1e-6)
    save_pruned(twice, tiny_tokenizer(), tmp_path / "p")
    again = load_pruned(tmp_path / "p")[0]
    assert len(again.llmbrain_pruning) == 2
    (run,) = scan(again, tiny_tokenizer(), ["abcabc"])
    assert run.space.widths == anatomy(twice).widths


def test_weights_that_cannot_be_cut_are_refused_and_untouched():
    model = tiny("llama")
    plan = plan_pruning(model, ratio=0.3, method="magnitude")
    tied = tiny("llama")
    tied.model.layers[1].mlp.down_proj.weight = tied.model.layers[0].mlp.down_proj.weight
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.down_proj\.weight is tied to model\.layers\.0"):
        plan_pruning(tied, ratio=0.3, method="magnitude")
    quantised = copy.deepcopy(model)
    down = quantised.model.layers[0].mlp.down_proj
    down.weight = torch.nn.Parameter(down.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(InputError, match="is quantised"):
        plan_pruning(quantised, ratio=0.3, method="magnitude")
    before = weights_digest(anatomy(model))
    wide = tiny("llama", intermediate_size=256)
    wide_plan = plan_pruning(wide, ratio=0.3, method="magnitude")
    with pytest.raises(InputError, match="6 tokens, too few for layers of 256 neurons: at least 64"):
        prune(wide, wide_plan, calibration=IDS[:1, :6], compensate="bias")
    with pytest.raises(InputError, match="needs calibration texts"):
        prune(model, plan, compensate="bias")
    with pytest.raises(InputError, match=r"weights of shape \(40, 16\) do not fit calibration windows \(9, 16\)"):
        prune(model, plan, calibration=windows(9), compensate="bias", weights=torch.ones(40, 16))
    with pytest.raises(InputError, match="weights must be at least 0"):
        plan_pruning(model, ratio=0.3, method="obs", calibration=windows(9), weights=-torch.ones(9, 16))
    assert weights_digest(anatomy(model)) == before

"""Experts of a width that torch cannot multiply in groups: stock transformers fails on them, llmbrain does not."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import tiny, tiny_tokenizer

import llmbrain as lb

IDS = torch.tensor([[1, 5, 7, 9, 11, 13]])
WINDOWS = torch.randint(3, 30, (12, 16), generator=torch.Generator().manual_seed(0))


def test_they_are_scanned_lesioned_and_cut_and_the_model_stays_as_it_was() -> None:
    model = tiny("mixtral", intermediate_size=13)
    assert model.config._experts_implementation == "grouped_mm"
    with pytest.raises(RuntimeError, match="multiple of 16 bytes"):
        model(IDS)
    plain = copy.deepcopy(model)
    plain.set_experts_implementation("eager")
    tokenizer = tiny_tokenizer()
    ours, theirs = (lb.scan(m, tokenizer, ["hello there, you"])[0].data(1) for m in (model, plain))
    assert ours.any()
    assert (ours == theirs).all()
    gone = lb.Experts([(0, 1), (1, 2)])
    with lb.lesion(model, gone), torch.no_grad():
        said = model(IDS).logits
    with lb.lesion(plain, gone), torch.no_grad():
        assert torch.equal(said, plain(IDS).logits)
    plan = lb.plan_pruning(model, ratio=0.4, method="flap", calibration=WINDOWS)
    small = lb.prune(model, plan, compensate="least-squares", calibration=WINDOWS)
    assert small.model.layers[0].mlp.experts.down_proj.shape[2] == 8
    assert model.config._experts_implementation == "grouped_mm"

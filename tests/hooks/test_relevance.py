"""RelP's rules: the forward pass stays, and relevance is conserved."""

from __future__ import annotations

import pytest
import torch
from pruning_data import IDS, windows
from tiny_models import tiny

from llmbrain import plan_pruning
from llmbrain.anatomy.families import anatomy
from llmbrain.hooks.change import change_inputs
from llmbrain.hooks.relevance import halved, relevance_rules


def backward(model, *, rules):
    """Logits of one token, and the embeddings with their gradient."""
    body = anatomy(model)
    found = []

    def keep(_, __, out):
        found.append(out.detach().requires_grad_(True))
        return found[0]

    handle = model.get_input_embeddings().register_forward_hook(keep)
    edits = [(layer.down.module, lambda x, layer=layer: halved(layer, x) if rules else x) for layer in body.layers]
    try:
        with relevance_rules(model, body) if rules else torch.enable_grad(), change_inputs(model, edits):
            logits = model(input_ids=IDS).logits
            logit = logits[0, -1, 5]
            (gradient,) = torch.autograd.grad(logit, found)
    finally:
        handle.remove()
    return logits.detach(), float(logit.detach()), float((found[0].detach() * gradient).sum())


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_relevance_of_the_embeddings_is_the_logit(family):
    """Without biases every rule hands on all of the relevance: input times coefficient sums to the output."""
    model = tiny(family, **({"mlp_bias": False} if family == "llama" else {}))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.zero_()
    plain, logit, gradient_sum = backward(model, rules=False)
    ruled, same, relevance = backward(model, rules=True)
    torch.testing.assert_close(ruled, plain)
    assert same == pytest.approx(logit, rel=1e-5)
    assert relevance == pytest.approx(logit, rel=1e-3)
    assert gradient_sum != pytest.approx(logit, rel=1e-2)
    assert "forward" not in vars(anatomy(model).layers[0].act)


def test_forward_is_the_same_with_layer_norms():
    model = tiny("gpt2")
    plain, *_ = backward(model, rules=False)
    ruled, *_ = backward(model, rules=True)
    torch.testing.assert_close(ruled, plain, rtol=1e-4, atol=1e-5)


def test_relp_is_a_criterion():
    model = tiny("llama", intermediate_size=48)
    plan = plan_pruning(model, ratio=0.25, method="relp", calibration=windows())
    assert plan.method == "relp"
    assert sum(plan.widths) == 72
    with torch.no_grad():  # a neuron that says nothing to anyone has no relevance
        anatomy(model).layers[0].down.weight()[7] = 0
    assert 7 not in plan_pruning(model, ratio=0.05, method="relp", calibration=windows()).kept[0]

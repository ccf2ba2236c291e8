"""Cut equals zeroed, tried on the model at hand; and what `prune` refuses before it touches anything."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pruning_data import windows
from tiny_models import randomise, tiny

from llmbrain import InputError, PruningPlan, lesion, plan_pruning, prune
from llmbrain.anatomy.families import anatomy
from llmbrain.anatomy.units import HEADS, NEURONS
from llmbrain.pruning import prune as prune_function
from llmbrain.pruning import verify
from llmbrain.pruning.plan import weights_digest


class NormOfNeurons(torch.nn.Module):
    """A gate that looks at all neurons of its layer: cutting some changes the others."""

    def forward(self, x):
        return torch.nn.functional.silu(x / x.abs().mean(-1, keepdim=True))


class NormOfHeads(torch.nn.Linear):
    """An output projection that looks at all heads."""

    def forward(self, x):
        return super().forward(x / x.std(-1, keepdim=True))


def with_norm(kind):
    model = tiny("llama")
    for layer in anatomy(model).layers:
        if kind is NEURONS:
            layer.block.mlp.act_fn = NormOfNeurons()
        else:
            layer.block.self_attn.o_proj.__class__ = NormOfHeads
    return model


@pytest.fixture(params=["whole", "blocks"])
def copies(request, monkeypatch):
    """The probe copies the whole model, or one block of each kind."""
    monkeypatch.setattr(verify, "WHOLE", 2**26 if request.param == "whole" else 0)


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon", "gemma2", "bert"])
def test_what_can_be_cut_passes_in_any_precision(name, copies):
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny(name, num_hidden_layers=3, dtype=dtype) if name != "gpt2" else tiny(name, n_layer=3, dtype=dtype)
        state = {k: v.clone() for k, v in model.state_dict().items()}
        plan = plan_pruning(model, ratio=0.5, method="random", head_ratio=0.4)
        prune(model, plan)
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("kind", [NEURONS, HEADS], ids=repr)
def test_units_that_hang_together_are_refused_before_anything_is_touched(kind, copies):
    model, heads = with_norm(kind), kind is HEADS
    plan = plan_pruning(model, ratio=0.5, method="random", head_ratio=0.5 if heads else 0.0)
    before = weights_digest(anatomy(model))
    with pytest.raises(InputError, match=rf"the {kind.name} of this model cannot be cut: cutting is not the same as"):
        prune(model, plan, inplace=True)
    assert weights_digest(anatomy(model)) == before
    assert anatomy(prune(model, plan, verify=False)).widths == plan.widths


def test_a_model_that_does_not_run_without_them_is_refused(copies):
    from transformers import BitNetConfig, BitNetForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = BitNetForCausalLM(BitNetConfig(vocab_size=48, num_key_value_heads=2, **sizes)).eval()
    randomise(model)
    with pytest.raises(InputError, match=r"the neurons of .*cannot be cut"):
        prune(model, plan_pruning(model, ratio=0.5, method="random"))


def test_a_part_that_is_left_behind_is_found_though_it_is_alike(monkeypatch, copies):
    """Gains of one hide that the wrong ones were kept, until they are shaken."""

    class Gains(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = torch.nn.Parameter(torch.ones(24))

        def forward(self, x):
            return torch.nn.functional.silu(x) * self.gain[: x.shape[-1]]

    model = tiny("llama")
    for layer in anatomy(model).layers:
        layer.block.mlp.act_fn = Gains()
    plan = plan_pruning(model, ratio=0.5, method="random")
    with pytest.raises(InputError, match="cutting is not the same as silencing"):
        prune(model, plan)
    first = PruningPlan.from_dict({**plan.to_dict(), "kept": [np.arange(12), np.arange(12)]})
    prune(model, first)  # these are the right gains


def test_a_model_that_cannot_be_tried_is_refused_unless_asked_for():
    model = tiny("llama")
    plan = plan_pruning(model, ratio=0.5, method="random")

    def forward(input_ids, **options):
        raise ValueError("no picture")

    model.forward = forward
    with pytest.raises(InputError, match=r"does not read a few tokens as it is.*verify=False cuts all the same"):
        prune(model, plan)


@pytest.mark.parametrize("ridge", [-1, float("nan"), float("inf"), "much"])
def test_ridges_that_are_none_are_refused(ridge):
    model = tiny("llama")
    plan = plan_pruning(model, ratio=0.5, method="random")
    with pytest.raises(InputError, match="ridge="):
        prune(model, plan, calibration=windows(), compensate="least-squares", ridge=ridge)


def test_nothing_is_cut_while_an_intervention_is_in_force():
    model = tiny("llama")
    plan = plan_pruning(model, ratio=0.5, method="random")
    with lesion(model, np.array([0, 1])), pytest.raises(InputError, match="prune: the model is changed by an interv"):
        prune(model, plan)


@pytest.mark.parametrize("error", [KeyboardInterrupt, InputError])
def test_an_interrupted_compensation_in_place_is_undone(error, monkeypatch):
    import sys

    model = tiny("llama", num_hidden_layers=3)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    plan = plan_pruning(model, ratio=0.5, method="random")
    module = sys.modules["llmbrain.pruning.repair.fit"]
    fit, calls = module.fit, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise error
        return fit(*args, **kwargs)

    monkeypatch.setattr(module, "fit", interrupted)
    with pytest.raises(error):
        prune(model, plan, calibration=windows(), compensate="least-squares", inplace=True)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())


def test_an_interrupted_cut_in_place_says_so(monkeypatch):
    import sys

    model = tiny("llama")
    plan = plan_pruning(model, ratio=0.5, method="random")

    def interrupted(model):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["llmbrain.pruning.prune"], "record_shapes", interrupted)
    assert prune is prune_function
    with pytest.raises(KeyboardInterrupt) as caught:
        prune(model, plan, inplace=True)
    assert "load it again" in caught.value.__notes__[0]

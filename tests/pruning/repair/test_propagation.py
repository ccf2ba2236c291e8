"""The share of earlier layers' errors that a layer's repair takes on, against a solution by hand."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from pruning_data import logits, windows
from tiny_models import tiny
from torch import nn

from llmbrain import plan_pruning, prune
from llmbrain._validation import InputError
from llmbrain.anatomy.families import anatomy
from llmbrain.checkpoints.shapes import RECORD
from llmbrain.pruning.repair.propagation import gains_of

IDS = windows()


def heard(model: nn.Module, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What enters and leaves a layer's down projection, and the hidden states after its block, by plain hooks."""
    found: dict[str, torch.Tensor] = {}
    block = anatomy(model).layers[layer].block

    def keep(module: Any, entering: Any, out: Any) -> None:
        found.update(x=entering[0].flatten(0, -2), t=out.flatten(0, -2))

    def after(module: Any, entering: Any, out: Any) -> None:
        found["h"] = (out if isinstance(out, torch.Tensor) else out[0]).flatten(0, -2)

    hooks = [anatomy(model).layers[layer].down.module.register_forward_hook(keep), block.register_forward_hook(after)]
    with torch.no_grad():
        model(input_ids=IDS)
    for hook in hooks:
        hook.remove()
    return found["x"].double(), found["t"].double(), found["h"].double()


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_second_layer_is_fitted_to_its_output_and_a_share_of_the_error(share: float) -> None:
    model = tiny("llama")
    plan = plan_pruning(model, ratio=0.5, method="random")
    small = prune(model, plan, calibration=IDS, compensate="least-squares", ridge=1e-9, propagation=share)
    plain = prune(model, plan, calibration=IDS, compensate="least-squares", ridge=1e-9, propagation=0)
    first, second = (anatomy(small).layers[i].down.module for i in (0, 1))
    assert torch.equal(first.weight, anatomy(plain).layers[0].down.module.weight)  # no error before the first
    half = prune(model, PlanOf.first(plan, model), calibration=IDS, compensate="least-squares", ridge=1e-9,
                 propagation=0)  # fmt: skip
    _, _, wanted = heard(model, 1)
    x, t, now = heard(half, 1)
    target = t + share * (wanted - now)
    stays = torch.as_tensor(plan.kept[1])
    centred = x[:, stays] - x[:, stays].mean(0)
    by_hand = torch.linalg.lstsq(centred, target - target.mean(0)).solution
    assert torch.allclose(second.weight.double().T, by_hand, atol=1e-4)
    assert torch.allclose(second.bias.double(), target.mean(0) - x[:, stays].mean(0) @ by_hand, atol=1e-4)
    error = [float((heard(m, 1)[2] - wanted).square().mean()) for m in (plain, small)]
    assert error[1] < error[0]  # on the text it is fitted to
    assert getattr(small, RECORD)[-1]["propagation"] == share
    assert getattr(plain, RECORD)[-1]["propagation"] is None


@pytest.mark.parametrize(("name", "intercept"), [("qwen2", True), ("qwen2", False), ("gpt_neox", False)])
def test_every_layer_of_a_deep_model_solves_what_is_said(name: str, intercept: bool) -> None:
    """Ridge regression in float64 of what the layer makes of its input, and half of the error after its block."""
    model = tiny(name, num_hidden_layers=20).double()
    plan = plan_pruning(model, ratio=0.4, method="magnitude", protect=[0, 1, -1], multiple_of=8)
    asked = {"calibration": IDS, "compensate": "least-squares", "ridge": 1e-2, "intercept": intercept}
    small, by_hand = prune(model, plan, **asked), deepcopy(model)
    for i, kept in enumerate(plan.kept):
        _, _, wanted = heard(model, i)
        x, t, now = heard(by_hand, i)
        target, stays, down = t + 0.5 * (wanted - now), torch.as_tensor(kept), anatomy(by_hand).layers[i].down.module
        free = intercept or down.bias is not None
        mean, level = (x.mean(0), target.mean(0)) if free else (torch.zeros(x.shape[1]), torch.zeros(target.shape[1]))
        covariance, cross = ((x - mean).T @ (y - of) / len(x) for y, of in ((x, mean), (target, level)))
        penalty, old = 1e-2 * covariance.diagonal().mean(), down.weight.detach().T[stays]
        left = covariance[stays][:, stays] + penalty * torch.eye(len(stays))
        with torch.no_grad():
            down.weight.zero_()
            down.weight[:, stays] = torch.linalg.solve(left, cross[stays] + penalty * old).T
            if free:
                down.bias = nn.Parameter(level - down.weight[:, stays] @ mean[stays])
    assert getattr(small, RECORD)[-1]["propagation"] == 0.5
    assert torch.allclose(logits(small), logits(by_hand), atol=1e-5)


class PlanOf:
    """Plans that are a part of another."""

    @staticmethod
    def first(plan: Any, model: nn.Module) -> Any:
        """Of the first layer alone."""
        kept = [plan.kept[0].tolist(), list(range(plan.widths_before[1]))]
        return type(plan).from_dict({**plan.to_dict(), "kept": kept})


def test_deep_models_get_it_and_others_do_not() -> None:
    deep, shallow = (tiny("llama", num_hidden_layers=n) for n in (20, 19))
    for model, share in ((deep, 0.5), (shallow, None)):
        plan = plan_pruning(model, ratio=0.5, method="random")
        asked = {"calibration": IDS, "compensate": "least-squares"}
        small = prune(model, plan, **asked)
        assert getattr(small, RECORD)[-1]["propagation"] == share
        assert torch.equal(logits(small), logits(prune(model, plan, propagation=share or 0, **asked)))
        assert getattr(prune(model, plan, calibration=IDS, compensate="bias"), RECORD)[-1]["propagation"] is None


def test_it_is_measured_how_a_block_adds_what_its_mlp_says() -> None:
    from tiny_models import MODELS, randomise
    from transformers import GraniteConfig, GraniteForCausalLM

    granite = GraniteForCausalLM(GraniteConfig(**{**MODELS["qwen2"][2], "residual_multiplier": 0.25})).eval()
    randomise(granite)
    for model, gain in ((granite, 0.25), (tiny("gpt2"), 1.0), (tiny("falcon"), 1.0), (tiny("gptj"), 1.0)):
        found = gains_of(model, anatomy(model), IDS)
        assert found is not None
        assert found == pytest.approx([gain] * len(found), rel=1e-3)
    for name in ("gemma2", "bert"):  # a norm stands behind the MLP
        model = tiny(name)
        assert gains_of(model, anatomy(model), IDS) is None
        plan = plan_pruning(model, ratio=0.5, method="random")
        with pytest.raises(InputError, match=r"propagation=0\.5: the blocks of .* use propagation=0"):
            prune(model, plan, calibration=IDS, compensate="least-squares", propagation=0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_it_is_measured_beside_large_hidden_states_of_16_bits(name: str, dtype: torch.dtype) -> None:
    model = tiny(name, num_hidden_layers=20)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(100)  # type: ignore[operator]
    model = model.to(dtype)
    found = gains_of(model, anatomy(model), IDS)
    assert found is not None
    assert found == pytest.approx([1.0] * 20, rel=1e-2)
    small = prune(model, plan_pruning(model, ratio=0.5, method="random"), calibration=IDS, compensate="least-squares")
    assert getattr(small, RECORD)[-1]["propagation"] == 0.5


def test_it_is_measured_where_an_mlp_says_nothing() -> None:
    model = tiny("qwen2")
    with torch.no_grad():
        anatomy(model).layers[1].down.module.weight.zero_()  # as of blocks that were put in
    assert gains_of(model, anatomy(model), IDS) == pytest.approx([1.0, 1.0])


def test_a_multiplied_mlp_is_fitted_in_its_own_units() -> None:
    from tiny_models import MODELS, randomise
    from transformers import GraniteConfig, GraniteForCausalLM

    model = GraniteForCausalLM(GraniteConfig(**{**MODELS["qwen2"][2], "residual_multiplier": 0.25})).eval()
    randomise(model)
    plan = plan_pruning(model, ratio=0.5, method="random")
    wanted = heard(model, 1)[2]
    errors = [
        float((heard(prune(model, plan, calibration=IDS, compensate="least-squares", ridge=1e-9, propagation=share),
                     1)[2] - wanted).square().mean())
        for share in (0, 0.5, 1)
    ]  # fmt: skip
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize(
    ("propagation", "options", "said"),
    [
        (1.5, {}, r"propagation=1\.5"),
        (float("nan"), {}, "propagation=nan"),
        (0.5, {"compensate": "bias"}, r"propagation=0\.5 needs compensate='least-squares'"),
        (0.5, {"sequential": False}, r"propagation=0\.5 needs .*sequential=True"),
        (0.5, {"compensate": None}, r"propagation=0\.5 needs"),
    ],
)
def test_what_can_not_be_is_refused(propagation: float, options: dict[str, Any], said: str) -> None:
    model = tiny("llama")
    plan = plan_pruning(model, ratio=0.5, method="random")
    with pytest.raises(InputError, match=said):
        prune(model, plan, **{"calibration": IDS, "compensate": "least-squares", "propagation": propagation, **options})

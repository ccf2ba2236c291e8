"""Hooks count their calls, stay on no copy, and act on compiled models too."""

from __future__ import annotations

import ast
import copy
from pathlib import Path

import pytest
import torch
from tiny_models import tiny, tiny_tokenizer

import llmbrain as lb
from llmbrain import InputError
from llmbrain.anatomy.families import anatomy
from llmbrain.hooks.change import refuse_changed, saying
from llmbrain.hooks.listen import hear_calls, hear_inputs, hear_outputs
from llmbrain.hooks.text import evaluating

IDS = torch.arange(3, 15).reshape(2, 6)
ROOM = Path(lb.__file__).parent


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def zeroed(model, layer=0, neuron=3):
    """The answer without one neuron, by its column of weights."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        anatomy(other).layers[layer].down.weight()[neuron] = 0
    return logits(other)


def test_only_hooks_hang_up_hooks_and_set_evaluation_mode():
    """Every `register_forward*` and `.eval()` of the package lies in hooks/."""
    found = []
    for path in ROOM.rglob("*.py"):
        if path.parent.name == "hooks":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = node.attr if isinstance(node, ast.Attribute) else ""
            if name.startswith(("register_forward", "register_full", "register_module")) or name == "eval":
                found.append(f"{path.relative_to(ROOM)}:{node.lineno} {name}")
    assert not found


@pytest.mark.parametrize("compiled", ["compile()", "torch.compile", "forward", "a layer"])
def test_a_lesion_acts_on_a_model_that_was_compiled_and_has_run(compiled):
    model = tiny("llama")
    expected, intact = zeroed(model), logits(model)
    torch._dynamo.reset()
    runner = model
    if compiled == "compile()":
        model.compile(backend="eager")
    elif compiled == "torch.compile":
        runner = torch.compile(model, backend="eager")
    elif compiled == "forward":
        model.forward = torch.compile(model.forward, backend="eager")
    else:
        model.model.layers[0].compile(backend="eager")
    torch.testing.assert_close(logits(runner), intact)
    with lb.lesion(model, [(0, 3)]):
        torch.testing.assert_close(logits(runner), expected)
    torch.testing.assert_close(logits(runner), intact)


def test_a_forward_that_runs_past_a_hook_is_an_error():
    model = tiny("llama")
    mlp, intact = model.model.layers[1].mlp, logits(model)

    def fused(x):  # as fused kernels do: the weight is used, the module is not called
        return torch.nn.functional.linear(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x), *mlp.down_proj.parameters())

    mlp.forward = fused
    with lb.lesion(model, [(1, 3)]), pytest.raises(InputError, match=r"1 of 1 hooks .* were not called"):
        logits(model)
    with lb.lesion(model, [(1, 3)], verify=False):
        torch.testing.assert_close(logits(model), intact)
    with pytest.raises(InputError, match=r"layer 1 ran 0 times .* ran past this module"):
        lb.scan(model, tiny_tokenizer(), ["abc"])
    logits(model)  # nothing stays behind


def test_bloom_that_slices_its_weights_is_refused():
    model = tiny("bloom", pretraining_tp=2, slow_but_exact=True)
    for change in (lb.lesion(model, [(0, 3)]), lb.keep_only(model, [(0, 3)]), lb.amplify(model, [(0, 3)], 2.0)):
        with change, pytest.raises(InputError, match="slow_but_exact"):
            logits(model)


def test_copies_of_a_changed_model_are_unchanged():
    model = tiny("llama")
    intact = logits(model)
    with lb.lesion(model, [(0, 3)]):
        other = copy.deepcopy(model)
        with pytest.raises(InputError, match="prune: the model is changed by an intervention"):
            refuse_changed(model, "prune")
        refuse_changed(other, "prune")
    torch.testing.assert_close(logits(other), intact)
    refuse_changed(model, "prune")


def test_what_is_heard():
    model = tiny("llama")
    layer = anatomy(model).layers[0]
    entered, passed, calls = [], [], []
    with (
        torch.no_grad(),
        hear_inputs(model, [(layer.down.module, entered.append)]),
        hear_outputs(model, [(layer.down.module, lambda x, y: passed.append((x, y)))]),
        hear_calls(model, [(layer.block, calls.append)]),
    ):
        model(input_ids=IDS)
    assert entered[0].shape == (2, 6, 24)
    torch.testing.assert_close(layer.down.module(entered[0]), passed[0][1])
    assert calls[0].entering.shape == (2, 6, 16)
    logits(model)
    assert len(entered) == len(passed) == len(calls) == 1


def test_a_module_that_says():
    model = tiny("llama")
    mlp, x = model.model.layers[0].mlp, torch.ones(1, 16)
    with saying(mlp, "this"):
        assert mlp(x) == "this"
    assert mlp(x).shape == (1, 16)


def test_evaluating_turns_every_cache_off_and_gives_it_back():
    model = tiny("llama")
    model.config.use_cache = True
    with evaluating(model):
        assert model(input_ids=IDS).past_key_values is None
    with evaluating(model, cache=True):
        assert model(input_ids=IDS).past_key_values is not None
    assert model.config.use_cache


def test_a_multimodal_wrapper_reads_as_the_model_within():
    """LLaVA says use_cache in its text config only; a cache that grew over batches would change every moment."""
    from transformers import CLIPVisionConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

    inner = tiny("llama")
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2,
                              image_size=8, patch_size=4)  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=inner.config, image_token_index=47)
    wrapper = LlavaForConditionalGeneration(config)
    wrapper.model.language_model.load_state_dict(inner.model.state_dict())
    wrapper.lm_head.load_state_dict(inner.lm_head.state_dict())
    assert isinstance(inner, LlamaForCausalLM)
    windows = torch.randint(3, 46, (64, 32), generator=torch.Generator().manual_seed(0))
    after = []
    for model in (inner, wrapper):
        plan = lb.plan_pruning(model, ratio=0.5, method="flap", calibration=windows)
        small = lb.prune(model, plan, calibration=windows, compensate="bias")
        after.append(([list(map(int, kept)) for kept in plan.kept], lb.perplexity(small, None, windows)))
    assert after[0][0] == after[1][0]
    assert after[0][1] == pytest.approx(after[1][1], rel=1e-6)

"""Scans of mixtures of experts, against a plain re-computation from the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

import llmbrain as lb
from llmbrain import InputError
from llmbrain.anatomy.experts import expert_anatomy
from llmbrain.hooks.experts import STATE
from tests.families.configs import build, rows
from tests.tiny_models import tiny, tiny_tokenizer

FAMILIES = [
    "MixtralForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM", "OlmoeForCausalLM", "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM", "GptOssForCausalLM", "Glm4MoeForCausalLM", "GraniteMoeForCausalLM", "AfmoeForCausalLM",
    "GraniteMoeSharedForCausalLM", "PhimoeForCausalLM", "JambaForCausalLM", "Lfm2MoeForCausalLM",
    "HunYuanMoEV1ForCausalLM", "AriaTextForCausalLM", "MiniMaxM2ForCausalLM", "ZayaForCausalLM",
]  # fmt: skip
TEXTS = ["abc abcabc b", "cab bac", "b"]


@contextmanager
def plain(model: Any) -> Iterator[dict[int, list[Any]]]:
    """What entered the experts modules and their shared MLPs' down projections, by hooks of the test's own."""
    heard: dict[int, list[Any]] = {}
    handles = []
    for layer in expert_anatomy(model).layers:
        parts: list[Any] = [None, None]
        heard[layer.index] = parts
        if layer.routed is not None:
            handles.append(
                layer.routed.module.register_forward_pre_hook(
                    lambda m, args, kwargs, parts=parts: parts.__setitem__(0, (*args, *kwargs.values())),
                    with_kwargs=True,
                )
            )
        for mlp in layer.shared:
            handles.append(
                mlp.down.module.register_forward_pre_hook(
                    lambda m, args, parts=parts: parts.__setitem__(1, args[0].reshape(-1, args[0].shape[-1]))
                )
            )
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def expected(module: Any, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> tuple[Any, Any]:
    """Neurons ``(tokens, experts * width)`` and gates ``(tokens, experts)``, expert by expert and visit by visit."""
    count = module.down_proj.shape[0]
    width = module.down_proj.shape[1 if module.is_transposed else 2]
    neurons, gates = torch.zeros(len(x), count, width), torch.zeros(len(x), count)
    for expert in range(count):
        places, tokens = torch.where((index == expert).T)  # the order in which transformers reads them
        if not len(tokens):
            continue
        matrix = module.gate_up_proj[expert] if module.is_transposed else module.gate_up_proj[expert].T
        y = x[tokens] @ matrix
        y = y + module.gate_up_proj_bias[expert] if module.has_bias else y
        if not module.is_concatenated:
            neurons[tokens, expert] = module._apply_gate(y)
        else:
            gate, up = y[:, :width], y[:, width:]
            neurons[tokens, expert] = module._apply_gate(torch.cat([gate, up], dim=1))
        gates[tokens, expert] = weights[tokens, places]
    return neurons.flatten(1), gates


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_equals_a_plain_computation(name: str) -> None:
    model, tokenizer = build(name, rows()[name]), tiny_tokenizer()
    before = model.config._experts_implementation
    model.set_experts_implementation("eager")
    ids = torch.tensor([tokenizer(TEXTS[0])["input_ids"]])
    with plain(model) as heard:
        model.base_model(input_ids=ids, use_cache=False)
    model.set_experts_implementation(before)
    scan = lb.scan(model, tokenizer, TEXTS[0], site=("neuron", "router"))[0]
    body = expert_anatomy(model)
    assert scan.space == body.space
    for layer in body.layers:
        call, shared = heard[layer.index]
        data, gate = scan.data(layer.index), scan.data(layer.index, site="router")
        parts = [] if shared is None else [shared]
        if layer.routed is not None:
            neurons, gates = expected(layer.routed.module, *call[:3])
            np.testing.assert_array_equal(gate, gates.numpy())
            np.testing.assert_array_equal(scan.visits(layer.index), gates.numpy() != 0)
            parts.append(neurons)
        np.testing.assert_array_equal(data, torch.cat(parts, dim=1).numpy())
    assert model.config._experts_implementation == before
    assert not any(STATE in vars(m) for m in model.modules())


def test_batches_and_store(tmp_path: Any) -> None:
    model, tokenizer = build("DeepseekV2ForCausalLM", "deepseek_v2"), tiny_tokenizer()
    alone = [lb.scan(model, tokenizer, text, site=("router", "neuron"))[0] for text in TEXTS]
    lb.scan(model, tokenizer, TEXTS, site=("router", "neuron"), out=tmp_path)
    for one, stored in zip(alone, lb.load_scans(tmp_path)):
        assert stored.spaces == one.spaces
        assert stored.sites == ("router", "neuron")
        for site in one.sites:
            np.testing.assert_allclose(stored.data(site=site), one.data(site=site), atol=1e-5)
        np.testing.assert_array_equal(stored.visits(), one.visits())
        np.testing.assert_array_equal(stored.visits(1, slice(1, 3)), one.visits()[1:3])
    size = sum(f.stat().st_size for f in (tmp_path / "shards").iterdir())
    assert size < alone[0].spaces["neuron"].n_neurons * 4 * sum(s.n_tokens for s in alone)  # less than dense would be
    again = lb.scan(model, tokenizer, TEXTS, site=("router", "neuron"), out=tmp_path)  # nothing left to do
    np.testing.assert_array_equal(again[0].data(), lb.load_scans(tmp_path)[0].data())


def test_the_implementation_comes_back_after_an_error() -> None:
    model, tokenizer = tiny("mixtral"), tiny_tokenizer()
    before = model.config._experts_implementation
    handle = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lb.scan(model, tokenizer, TEXTS)
    handle.remove()
    assert model.config._experts_implementation == before
    assert not any(STATE in vars(m) for m in model.modules())


def test_experts_that_compute_something_else_are_refused() -> None:
    model = tiny("mixtral")
    experts = model.model.layers[0].mlp.experts
    kind = type(experts)

    class Other(kind):  # type: ignore[misc, valid-type]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    def own(self: Any, x: Any, index: Any, weights: Any) -> Any:
        return 2 * x

    Other.forward.__wrapped__ = own  # type: ignore[attr-defined]
    experts.__class__ = Other
    model.set_experts_implementation("eager")
    with pytest.raises(InputError, match="no known layout"):
        lb.scan(model, tiny_tokenizer(), TEXTS)


def test_other_sites_and_quantized_experts_are_refused() -> None:
    model = tiny("mixtral")
    with pytest.raises(InputError, match="site='head' is not recorded of a mixture of experts"):
        lb.scan(model, tiny_tokenizer(), TEXTS, site="head")
    with pytest.raises(InputError, match="does not exist in layer 0 of this model"):
        lb.scan(tiny("llama"), tiny_tokenizer(), TEXTS, site="router")
    with pytest.raises(InputError, match="holds no visits"):
        lb.scan(tiny("llama"), tiny_tokenizer(), TEXTS)[0].visits()
    experts = model.model.layers[1].mlp.experts
    experts.down_proj = torch.nn.Parameter(experts.down_proj.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(InputError, match="is quantized"):
        lb.scan(model, tiny_tokenizer(), TEXTS)


def test_group_ica_over_experts_and_neurons() -> None:
    model, tokenizer = tiny("mixtral"), tiny_tokenizer()
    texts = ["abc cab bca abcab cabbac" * 2, "bb cab abc acb bac" * 3]
    for site, units in (("router", 8), ("neuron", None)):
        scans = lb.scan(model, tokenizer, texts, site=site)
        ica = lb.GroupICA(n_components=2, random_state=0, max_iter=5000, tol=1e-3).fit(scans)
        assert ica.components_.shape == (2, units or scans[0].n_neurons)
        assert np.isfinite(ica.components_).all()

"""Where the experts of each family are, and the space of their neurons."""

import numpy as np
import pytest
import torch

from llmbrain import InputError, NeuronSpace
from llmbrain.anatomy.experts import expert_anatomy, has_experts
from llmbrain.imaging import maps_to_nifti, read_nifti
from llmbrain.study import describe_path
from tests.families.configs import build, rows
from tests.tiny_models import tiny, tiny_tokenizer

# Shared (or dense) widths, routed experts, neurons of each, experts visited, tensors of the router; of every layer.
_SHARED, _WIDE = ((12,), 4, 12, 2), ((), 4, 24, 2)
FAMILIES = {
    "MixtralForCausalLM": [(*_WIDE, 1)] * 2,
    "Qwen2MoeForCausalLM": [(*_SHARED, 1)] * 2,
    "Qwen3MoeForCausalLM": [((), 4, 12, 2, 1)] * 2,
    "OlmoeForCausalLM": [(*_WIDE, 1)] * 2,
    "DeepseekV2ForCausalLM": [((24,),), ((24,), 4, 12, 2, 1)],
    "DeepseekV3ForCausalLM": [((24,),), (*_SHARED, 2)],
    "GptOssForCausalLM": [(*_WIDE, 2)] * 2,
    "Glm4MoeForCausalLM": [((24,),), (*_SHARED, 2)],
    "GraniteMoeForCausalLM": [(*_WIDE, 1)] * 2,
    "GraniteMoeSharedForCausalLM": [((12,), 4, 24, 2, 1)] * 2,
    "PhimoeForCausalLM": [(*_WIDE, 1)] * 2,
    "AfmoeForCausalLM": [((24,),), ((24,), 4, 12, 2, 2)],
    "JambaForCausalLM": [((24,),), (*_WIDE, 1)] * 2,
    "Lfm2MoeForCausalLM": [((24,),), ((), 4, 12, 2, 2)],
    "HunYuanMoEV1ForCausalLM": [((24,), 4, 24, 2, 1)] * 2,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_layers(name: str) -> None:
    model = build(name, rows()[name])
    found = []
    for layer in expert_anatomy(model).layers:
        r = layer.routed
        shared = tuple(mlp.width for mlp in layer.shared)
        found.append((shared,) if r is None else (shared, r.count, r.width, r.top_k, len(r.router)))
        assert all(t.value.shape[t.axis] == r.count for t in (*r.weights, *r.router)) if r else True
    assert found == FAMILIES[name]
    assert has_experts(model)


def test_layouts_of_gpt_oss() -> None:
    routed = dict(expert_anatomy(build("GptOssForCausalLM", "gpt_oss")).routed)[0]
    assert (routed.transposed, routed.interleaved, routed.has_bias, routed.gated) == (True, True, True, True)
    assert not dict(expert_anatomy(tiny("mixtral")).routed)[0].interleaved


def test_a_dense_model_has_none() -> None:
    assert not has_experts(tiny("llama"))
    with pytest.raises(InputError, match="no routed experts"):
        expert_anatomy(tiny("llama"))


def test_what_is_not_known_is_refused() -> None:
    model = tiny("mixtral")
    model.model.layers[1].mlp.extra = torch.nn.Linear(3, 5)
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.extra\.weight .* no known layout"):
        expert_anatomy(model)


def test_space_and_image(tmp_path) -> None:  # type: ignore[no-untyped-def]
    space = expert_anatomy(build("DeepseekV2ForCausalLM", "deepseek_v2")).space
    assert space.experts == ((24,), (24, 12, 12, 12, 12))
    flat = np.arange(space.n_neurons)
    layer, expert, neuron = space.locate_expert(flat)
    assert (space.index(layer, neuron, expert=expert) == flat).all()
    assert space.locate_expert(24 + 24 + 12 + 5) == (1, 2, 5)
    assert space.index(1, 5, expert=2) == 65
    maps = np.arange(2 * space.n_neurons, dtype=np.float32).reshape(2, -1)
    maps_to_nifti(maps, space).to_filename(tmp_path / "maps.nii")
    values, read = read_nifti(tmp_path / "maps.nii")
    assert read == space
    np.testing.assert_array_equal(values, maps)


def test_space_of_experts_is_checked() -> None:
    space = NeuronSpace([4, 6], experts=[[4], [2, 2, 2]])
    assert NeuronSpace.from_dict(space.to_dict()) == space != NeuronSpace([4, 6])
    for bad in ([[4], [2, 2]], [[4]], [[4], [2, 2, 2.5]], [[4], [8, -2]]):
        with pytest.raises(InputError, match="experts="):
            NeuronSpace([4, 6], experts=bad)
    with pytest.raises(InputError, match="neuron=2 does not exist in expert 1 of layer 1"):
        space.index(1, 2, expert=1)
    with pytest.raises(InputError, match="expert=3 does not exist"):
        space.index(1, 0, expert=3)


def test_info(tmp_path) -> None:  # type: ignore[no-untyped-def]
    tiny("mixtral").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    facts = describe_path(tmp_path)
    assert facts["what"] == "model MixtralForCausalLM, a mixture of experts"
    assert (facts["routed experts per layer"], facts["experts a token visits"]) == ([4, 4], [2, 2])

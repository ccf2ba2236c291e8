"""A `remote-code` folder in the calls that vLLM's Transformers backend makes (vLLM itself: not run)."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import llmbrain as lb
from llmbrain.anatomy import anatomy
from llmbrain.anatomy.surgery import drop, keep_heads, keep_neurons
from llmbrain.anatomy.units import HEADS, NEURONS

IDS = torch.arange(3, 14)[None]


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma2"])
def test_the_headless_model_and_the_sizes_of_layers(name, dropped, tmp_path):
    model = tiny(name, num_hidden_layers=3)
    for layer, width in zip(anatomy(model).layers, (20, 9, 24)):
        keep_neurons(layer, range(width))
    keep_heads(anatomy(model).layers[1], [0])
    if dropped:
        drop(anatomy(model).layers[0], HEADS)
        drop(anatomy(model).layers[2], NEURONS)
    folder = lb.save_pruned(model, None, tmp_path / "small", format="remote-code")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    stock = {"LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Gemma2ForCausalLM"}
    assert not set(config.architectures) & stock  # a name of its own, or the stock class would be built
    with torch.device("meta"):
        built = AutoModel.from_config(config, trust_remote_code=True)
    assert {n: p.shape for n, p in built.named_parameters()} == {
        n: p.shape for n, p in model.base_model.named_parameters()
    }
    for i, layer in enumerate(anatomy(model).layers):
        own = config.per_layer_config[i]
        assert own.intermediate_size == layer.width
        assert (own.num_attention_heads, own.num_key_value_heads, own.head_dim) == (
            layer.n_heads, layer.n_kv_heads, layer.head_dim or anatomy(model).layers[1].head_dim)  # fmt: skip
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()(IDS).last_hidden_state
        assert torch.equal(hidden, model.base_model(IDS).last_hidden_state)
        whole = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(whole.generate(IDS, **options), model.generate(IDS, **options))
    assert torch.equal(lb.load_pruned(folder)[0](IDS).logits, model(IDS).logits)

"""Mixtures of experts as GGUF: the same function here again, in llama.cpp and in files of others; else refused."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from gguf_mixtures import MIXTURES, VARIANTS, as_of_others, make
from gguf_models import PROMPT, SHARED
from transformers import AutoTokenizer

import llmbrain as lb
from llmbrain._validation import InputError
from llmbrain.anatomy.expert_parts import cut_neurons
from llmbrain.anatomy.experts import expert_anatomy
from llmbrain.datasets import load_demo
from llmbrain.evaluation import LlamaCpp


@pytest.fixture(scope="session")
def tokenizer(shared_data):
    pytest.importorskip("gguf")
    return AutoTokenizer.from_pretrained(shared_data / "models/stories260K")


def cut(model, how: str):
    """Without a third of the experts, of the neurons of each, or of both."""
    if how in ("experts", "both"):
        model = lb.prune(model, lb.plan_pruning(model, expert_ratio=0.34, method="random"))
    if how in ("neurons", "both"):
        model = lb.prune(model, lb.plan_pruning(model, ratio=0.3, method="random"))
    return model


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def hold_against_llama_cpp(path, model, ids, tokenizer):
    """Log-probabilities of the next token, and what is written greedily."""
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("llama.cpp is not here: pip install 'llmbrain[serve]'")
    engine, given = LlamaCpp(path, exact=True), ids[0].tolist()
    assert engine.tokenize(PROMPT) == given
    found = engine.logprobs(given, SHARED["vocab_size"])
    wanted = logits(model, ids)[0, -1].double().log_softmax(-1)
    assert len(found) == SHARED["vocab_size"]
    assert max(abs(found[i] - float(wanted[i])) for i in found) < 1e-4
    written = model.generate(ids, max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert engine.generate(given, 16) == written[0, ids.shape[1] :].tolist()


CASES = [(name, "both") for name in MIXTURES]
CASES += [pytest.param(n, how, marks=pytest.mark.slow) for n in MIXTURES for how in ("none", "experts", "neurons")]
CASES += [pytest.param(n, how, marks=pytest.mark.slow) for n in VARIANTS for how in ("none", "neurons")]


@pytest.mark.parametrize(("name", "how"), CASES)
def test_the_file_holds_the_mixture(name, how, tokenizer, tmp_path):
    model = cut(make(name), how)
    path = lb.save_pruned(model, tokenizer, tmp_path / "small.gguf", format="gguf", gguf_type="f32")
    ids = torch.tensor([tokenizer(PROMPT).input_ids])
    wanted = logits(model, ids)
    again, tokens = lb.load_model(path)
    assert torch.equal(logits(again, ids), wanted)
    assert [r.count for _, r in expert_anatomy(again).routed] == [r.count for _, r in expert_anatomy(model).routed]
    assert tokens(PROMPT).input_ids == ids[0].tolist()
    foreign = as_of_others(path, tmp_path / "foreign.gguf")
    if "yarn" in name:
        with pytest.raises(InputError, match=r"scales its rotary positions \('yarn'\)"):
            lb.load_model(foreign)
    elif "rotary factors" not in name:
        theirs = lb.load_model(foreign)[0]
        assert type(theirs) is type(model)
        assert torch.allclose(logits(theirs, ids), wanted, atol=1e-5, rtol=0)
    hold_against_llama_cpp(path, model, ids, tokenizer)


def test_transformers_reads_the_same_of_qwen3(tokenizer, tmp_path):
    """Its own reader, where the config has the width that it takes for granted."""
    from transformers import AutoModelForCausalLM

    model = make("qwen3_moe", moe_intermediate_size=768)
    path = lb.save_pruned(model, tokenizer, tmp_path / "small.gguf", format="gguf", gguf_type="f32")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name).eval()
    ids = torch.tensor([tokenizer(PROMPT).input_ids])
    assert torch.allclose(logits(theirs, ids), logits(model, ids), atol=1e-5)


def test_shared_experts_that_are_no_multiple_are_filled_with_zeros(tokenizer, tmp_path):
    model = make("deepseek_v3")
    for layer in expert_anatomy(model).layers[1:]:
        shared, width = layer.shared[0].width, layer.routed.width
        kept = [*range(shared - 7), *range(shared, shared + layer.routed.count * width)]
        cut_neurons(layer, kept)
    path = lb.save_pruned(model, tokenizer, tmp_path / "small.gguf", format="gguf", gguf_type="f32")
    ids = torch.tensor([tokenizer(PROMPT).input_ids])
    again = lb.load_model(path)[0]
    assert torch.equal(logits(again, ids), logits(model, ids))
    assert expert_anatomy(again).layers[1].shared[0].width == 41
    hold_against_llama_cpp(path, model, ids, tokenizer)


def test_types_are_as_near_as_they_say_and_routers_stay_whole(tokenizer, tmp_path):
    import gguf

    model = make("gpt_oss", intermediate_size=64)
    ids = torch.tensor([tokenizer(PROMPT).input_ids])
    wanted = logits(model, ids)
    for kind, near in (("f16", 0.02), ("bf16", 0.1), ("q8_0", 0.2)):
        path = lb.save_pruned(model, tokenizer, tmp_path / f"{kind}.gguf", format="gguf", gguf_type=kind)
        error = (logits(lb.load_model(path)[0], ids) - wanted).abs().max() / wanted.abs().max()
        assert 0 < error < near, kind
        kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
        assert kinds["blk.1.ffn_gate_exps.weight"] == kind.upper()
        for name in ("ffn_gate_inp.weight", "ffn_gate_exps.bias", "attn_sinks.weight"):
            assert kinds[f"blk.1.{name}"] == "F32", name


def test_the_demo_mixture_is_written_and_says_the_same(tmp_path):
    pytest.importorskip("gguf")
    demo = load_demo(experts=8)
    model = demo.model.float()
    with pytest.warns(UserWarning, match="knows 96 characters: llama.cpp leaves out all others"):
        path = lb.save_pruned(model, demo.tokenizer, tmp_path / "demo.gguf", format="gguf", gguf_type="f32")
    text = demo.examples("heldout", demo.abilities[0], n=1)[0].prompt
    ids = torch.tensor([demo.tokenizer(text).input_ids])
    again, tokens = lb.load_model(path)
    assert torch.equal(logits(again, ids), logits(model, ids))
    assert tokens(text).input_ids == ids[0].tolist()
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("llama.cpp is not here: pip install 'llmbrain[serve]'")
    engine = LlamaCpp(path, exact=True)
    assert engine.tokenize(text) == ids[0].tolist()
    found = engine.logprobs(ids[0].tolist(), 99)
    wanted = logits(model, ids)[0, -1].double().log_softmax(-1)
    assert max(abs(found[i] - float(wanted[i])) for i in found) < 1e-4


REFUSED = {
    "norm_topk_prob=False (it takes True for granted)": ("qwen3_moe", {"norm_topk_prob": False}),
    "norm_topk_prob=True (it takes False for granted)": ("qwen2_moe", {"norm_topk_prob": True}),
    "clip_qkv=1.0": ("olmoe", {"clip_qkv": 1.0}),
    "2 key/value heads for 4 heads": ("olmoe", {"num_key_value_heads": 2}),
    "4 heads of 32 in a model of 64": ("qwen2_moe", {"head_dim": 32}),
    "hidden_act=gelu": ("mixtral", {"hidden_act": "gelu"}),
    "sliding_window=16 below the context of 128": ("mixtral", {"sliding_window": 16}),
    "blocks without experts (mlp_only_layers, decoder_sparse_step)": ("qwen3_moe", {"mlp_only_layers": [0]}),
    "has no place for model.layers.0.self_attn.q_proj.bias (attention_bias)": ("qwen3_moe", {"attention_bias": True}),
    "residual_multiplier=0": ("granitemoe", {"residual_multiplier": 0.0}),
    "'yarn' with truncate=False": ("gpt_oss", {"rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32,
        "truncate": False}}),
    "with mscale=0.7 and mscale_all_dim=1.0": ("deepseek_v3", {"rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32, "mscale": 0.7,
        "mscale_all_dim": 1.0}}),
    "positions of type 'linear'": ("qwen3_moe", {"rope_parameters": {
        "rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "swiglu_limit=3.0": ("gpt_oss", {"swiglu_limit": 3.0}),
    "do not take turns, a sliding one first": ("gpt_oss", {"layer_types": ["full_attention"] * 3}),
    "model with sliding_window=None": ("gpt_oss", {"sliding_window": None}),
    "groups of experts chosen by their best one": ("deepseek_v2", {
        "topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1}),
    "q_lora_rank=None in 3 layers": ("deepseek_v2", {"q_lora_rank": None}),
    "rms_norm_eps=1e-05 beside the 1e-06": ("deepseek_v2", {"rms_norm_eps": 1e-5}),
    "rope_interleave=False": ("deepseek_v3", {"rope_interleave": False}),
    "use_qk_norm=False and 4 experts": ("llama4_text", {"use_qk_norm": False}),
    "attn_scale=0.2": ("llama4_text", {"attn_scale": 0.2}),
    "attention_chunk_size=64": ("llama4_text", {"attention_chunk_size": 64}),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_what_llama_cpp_would_compute_in_another_way_is_refused(message, tokenizer, tmp_path):
    name, options = REFUSED[message]
    with pytest.raises(InputError) as error:
        lb.save_pruned(make(name, **options), tokenizer, tmp_path / "small.gguf", format="gguf")
    assert message in str(error.value)
    assert "save as 'uniform'" in str(error.value)
    assert not list(tmp_path.iterdir())


def test_layers_that_differ_are_refused_and_padded_ones_are_not(tokenizer, tmp_path):
    model = make("mixtral")
    few = lb.prune(model, lb.plan_pruning(model, expert_ratio=0.2, method="random", allocation=[5, 3, 4]))
    with pytest.raises(InputError, match=r"whose layers differ \(5 x 48, 3 x 48, 4 x 48\).*allocation='uniform'"):
        lb.save_pruned(few, tokenizer, tmp_path / "small.gguf", format="gguf")
    uneven = make("gpt_oss")
    uneven = lb.prune(uneven, lb.plan_pruning(uneven, expert_ratio=0.2, method="random", allocation=[5, 4, 3]))
    with pytest.raises(InputError, match="or save as 'padded' where it can be, load that and save it as 'gguf'"):
        lb.save_pruned(uneven, tokenizer, tmp_path / "small.gguf", format="gguf")
    ids = torch.tensor([tokenizer(PROMPT).input_ids])
    wanted = logits(uneven, ids)
    lb.save_pruned(uneven, tokenizer, tmp_path / "padded", format="padded")
    padded = lb.load_model(tmp_path / "padded")[0]
    path = lb.save_pruned(padded, tokenizer, tmp_path / "small.gguf", format="gguf", gguf_type="f32")
    assert torch.allclose(logits(lb.load_model(path)[0], ids), wanted, atol=1e-5)
    hold_against_llama_cpp(path, uneven, ids, tokenizer)


def test_families_that_are_computed_in_another_way_are_refused(tokenizer, tmp_path):
    from transformers import JambaConfig, PhimoeConfig

    base = {**SHARED, "intermediate_size": 48}
    for config, message in (
        (PhimoeConfig(**base, num_local_experts=4), "sparse mixer: they say different things: save as 'uniform'"),
        (JambaConfig(**base, num_experts=4), "knows the mixtures of experts deepseek_v2, .*, not JambaForCausalLM"),
    ):
        from transformers import AutoModelForCausalLM

        with pytest.raises(InputError, match=message):
            lb.save_pruned(AutoModelForCausalLM.from_config(config), tokenizer, tmp_path / "small.gguf", format="gguf")
    assert not list(tmp_path.iterdir())


def test_files_of_others_are_read_in_full_or_refused(tokenizer, tmp_path):
    path = lb.save_pruned(make("deepseek_v2"), tokenizer, tmp_path / "small.gguf", format="gguf", gguf_type="f32")
    theirs = tmp_path / "theirs.gguf"
    for changes, message in (
        ({"expert_used_count": None}, "lacks the key deepseek2.expert_used_count"),
        ({"attention_key_length_mla": None}, "lacks the key deepseek2.attention.key_length_mla"),
        ({"rope_dimension_count": 6}, "does not fit its config|where llmbrain reads"),
        ({"expert_feed_forward_length": 23}, "does not fit its config: blk.1.ffn_gate_exps.weight is"),
        ({"attention_key_length": 20}, "deepseek2.attention.key_length is 20, where llmbrain reads 24"),
    ):
        theirs.unlink(missing_ok=True)
        with pytest.raises(InputError, match=message):
            lb.load_model(as_of_others(path, theirs, **changes))
    path = lb.save_pruned(make("mixtral"), tokenizer, tmp_path / "mixtral.gguf", format="gguf")
    theirs.unlink(missing_ok=True)
    as_of_others(path, theirs)
    data = theirs.read_bytes().replace(b"ffn_up_exps", b"ffn_up.expe")  # one matrix an expert, as files once had
    theirs.write_bytes(data)
    with pytest.raises(InputError, match=r"it lacks blk\.0\.ffn_up_exps\.weight"):
        lb.load_model(theirs)


def test_a_file_that_does_not_read_back_as_the_mixture_is_not_put_in_place(tokenizer, tmp_path, monkeypatch):
    from llmbrain.checkpoints import gguf_experts

    tensors = gguf_experts.tensors

    def wrong(model, mixture):
        for name, value in tensors(model, mixture):
            yield name, value.flip(0) if "ffn_up_exps" in name else value

    monkeypatch.setattr(gguf_experts, "tensors", wrong)
    with pytest.raises(InputError, match=r"read again, model\.layers\.0\.mlp\.experts\.gate_up_proj is off"):
        lb.save_pruned(make("mixtral"), tokenizer, tmp_path / "small.gguf", format="gguf")
    assert not list(tmp_path.iterdir())


def test_shapes_are_told_by_configs_alone(tokenizer, tmp_path):
    """Of a folder whose layers differ, and of a file that another program wrote."""
    from llmbrain.checkpoints.configs import model_of_config, read_config
    from llmbrain.checkpoints.expert_shapes import expert_shapes

    model = make("mixtral")
    few = lb.prune(model, lb.plan_pruning(model, expert_ratio=0.2, method="random", allocation=[5, 3, 4]))
    lb.save_pruned(few, None, tmp_path / "few")
    assert expert_shapes(model_of_config(read_config(tmp_path / "few"))) == expert_shapes(few)
    model = make("glm4_moe")
    path = lb.save_pruned(model, tokenizer, tmp_path / "small.gguf", format="gguf")
    foreign = as_of_others(path, tmp_path / "foreign.gguf")
    assert expert_shapes(model_of_config(read_config(foreign))) == expert_shapes(model)


def test_plans_look_at_the_width_of_an_expert_not_of_a_layer():
    model = make("mixtral", intermediate_size=96, num_local_experts=4)
    plan = lb.plan_pruning(model, ratio=0.25, method="random")
    assert plan.expert_widths == [[72] * 4] * 3
    assert plan.widths_read == [72] * 3
    assert "no multiple of 32: 3 of 3 widths, such as 72" in plan.summary()  # 288 of a layer is one

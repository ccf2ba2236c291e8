"""GGUF files out: the same function here again, and in llama.cpp; what it has no place for is refused."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
import torch
from cli_calls import call
from gguf_models import FAMILIES, PROMPT, SHARED, TableGelu, make
from raw_llama import raw_logits
from tiny_models import tiny, tiny_tokenizer
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig

import llmbrain as lb
from llmbrain._validation import InputError
from llmbrain.anatomy import anatomy
from llmbrain.anatomy.surgery import add_bias, drop, keep_heads, keep_neurons
from llmbrain.anatomy.units import NEURONS
from llmbrain.checkpoints.gguf_layout import interleave, split_halves
from llmbrain.evaluation import LlamaCpp
from llmbrain.evaluation.llama_cpp import llama_cpp_latency


def cut(model, how: str):
    layers = anatomy(model).layers
    widths = {"none": None, "uniform": [32] * 9}.get(how, [64, 32, 7])
    for layer, width in zip(layers, widths or []):
        keep_neurons(layer, range(width))
    if how in ("uneven", "biased"):
        keep_heads(anatomy(model).layers[1], [1])
    if how in ("biased", "biased-uniform"):
        for layer in anatomy(model).layers:
            add_bias(layer.down)
            add_bias(layer.out)
            with torch.no_grad():
                layer.down.module.bias.normal_()
                layer.out.module.bias.normal_()
    return model


@pytest.fixture(scope="session")
def tokenizer(shared_data):
    return AutoTokenizer.from_pretrained(shared_data / "models/stories260K")


CASES = [(family, how) for family in FAMILIES for how in ("none", "uniform")]
CASES += [
    (family, how) for family in ("llama", "llama3", "llama-biased", "mistral", "qwen2") for how in ("uneven", "biased")
]
CASES += [("qwen3", "uneven")]


@pytest.mark.parametrize(("family", "how"), CASES)
def test_the_file_holds_the_model(family, how, tokenizer, tmp_path):
    model = cut(make(family), how)
    path = lb.save_pruned(model, tokenizer, tmp_path / "small.gguf", format="gguf", gguf_type="f32")
    again, tokens = lb.load_model(path)
    ids = torch.tensor([tokenizer(PROMPT).input_ids])
    with torch.no_grad():
        wanted = model(ids).logits
        # norms stored as 1 + w lose the last bit
        assert torch.allclose(again(ids).logits, wanted, atol=1e-4 if family.startswith("gemma") else 0, rtol=0)
    assert tokens(PROMPT).input_ids == ids[0].tolist()
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("llama.cpp is not here: pip install 'llmbrain[serve]'")
    engine = LlamaCpp(path, exact=True)
    assert engine.tokenize(PROMPT) == ids[0].tolist()
    found = engine.logprobs(ids[0].tolist(), SHARED["vocab_size"])
    reference = wanted[0, -1].double().log_softmax(-1)
    assert len(found) == SHARED["vocab_size"]
    if family.startswith("gemma"):
        for layer in anatomy(model).layers:
            layer.block.mlp.act_fn = TableGelu()
        with torch.no_grad():
            reference = model(ids).logits[0, -1].double().log_softmax(-1)
    # float32 in another order of sums; the sandwich norms of Gemma 3 magnify what is left of the table
    scale = max(1.0, float(wanted[0, -1].abs().max()))
    assert (
        max(abs(found[i] - float(reference[i])) for i in found)
        < (5e-4 if family.startswith("gemma3") else 1e-4) * scale
    )
    written = model.generate(ids, max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert engine.generate(ids[0].tolist(), 16) == written[0, ids.shape[1] :].tolist()


def test_types_are_as_near_as_they_say(tokenizer, tmp_path):
    model = cut(make("llama"), "uneven")
    ids = torch.tensor([tokenizer(PROMPT).input_ids])
    with torch.no_grad():
        wanted = model(ids).logits
        for kind, near in (("f16", 0.02), ("bf16", 0.15), ("q8_0", 0.15)):
            path = lb.save_pruned(model, tokenizer, tmp_path / f"{kind}.gguf", format="gguf", gguf_type=kind)
            error = (lb.load_model(path)[0](ids).logits - wanted).abs().max() / wanted.abs().max()
            assert 0 < error < near, kind
    sizes = [(tmp_path / f"{kind}.gguf").stat().st_size for kind in ("q8_0", "f16")]
    assert sizes[0] < sizes[1]


def test_like_gives_the_tokenizer_of_the_dense_file(tokenizer, tmp_path):
    dense = lb.save_pruned(make("llama"), tokenizer, tmp_path / "dense.gguf", format="gguf")
    small = cut(make("llama"), "uneven")
    path = lb.save_pruned(small, None, tmp_path / "small.gguf", format="gguf", like=dense)
    import gguf

    ours, theirs = (gguf.GGUFReader(p).fields for p in (path, dense))
    for key in theirs:
        if key.startswith("tokenizer.ggml"):
            assert ours[key].contents() == theirs[key].contents(), key


def test_like_of_another_model_is_refused(tokenizer, tmp_path):
    there = lb.save_pruned(make("llama"), _renamed(tokenizer), tmp_path / "other.gguf", format="gguf")
    with pytest.raises(InputError, match=r"is of another model: 2 of 509 tokens are others, such as 300"):
        lb.save_pruned(make("llama"), tokenizer, tmp_path / "small.gguf", format="gguf", like=there)
    for vocabulary in (500, 640):
        with pytest.raises(InputError, match=f"has 512 tokens, the model {vocabulary}: it is of another model"):
            lb.save_pruned(
                make("llama", vocab_size=vocabulary), None, tmp_path / "small.gguf", format="gguf", like=there
            )
    assert [path.name for path in tmp_path.iterdir()] == ["other.gguf"]


def _renamed(tokenizer):
    """A tokenizer of as many tokens, some of which are others."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    names = {number: token for token, number in state["model"]["vocab"].items()}
    names[300], names[301] = names[301], names[300]
    state["model"]["vocab"] = {token: number for number, token in sorted(names.items())}
    return type(tokenizer)(tokenizer_object=Tokenizer.from_str(json.dumps(state)), bos_token="<s>", eos_token="</s>")


OTHERWISE = {
    "reads no gemma model with an output matrix of its own": ("gemma", {"tie_word_embeddings": False}),
    "reads no gemma2 model with an output matrix of its own": ("gemma2", {"tie_word_embeddings": False}),
    "computes no gemma2 without soft caps": ("gemma2", {"final_logit_softcapping": None}),
    "of a gemma2 model of 46 layers llama.cpp takes the hidden size over the heads, 8": (
        "gemma2", {"num_hidden_layers": 46, "hidden_size": 32}),
    "of a gemma3_text model of 6 layers llama.cpp takes head_dim, 16": ("gemma3", {"query_pre_attn_scalar": 8}),
    "attn_logit_softcapping=5.0 of gemma3 is not read": ("gemma3", {"attn_logit_softcapping": 5.0}),
}  # fmt: skip


@pytest.mark.parametrize("message", OTHERWISE)
def test_what_llama_cpp_computes_in_another_way_is_refused(message, tokenizer, tmp_path):
    family, options = OTHERWISE[message]
    with pytest.raises(InputError, match=message):
        lb.save_pruned(make(family, **options), tokenizer, tmp_path / "small.gguf", format="gguf")


REFUSED = {
    "llama.cpp reads no gemma2 model with layers that differ": ("gemma2", "uneven"),
    "llama.cpp reads a qwen3 model with layers that differ only without a bias": ("qwen3", "biased"),
    "llama.cpp reads no gemma model with a bias": ("gemma", "biased-uniform"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_llama_cpp_has_no_place_for_is_refused(message, tokenizer, tmp_path):
    family, how = REFUSED[message]
    model = make(family)
    if how == "biased-uniform":
        for layer in anatomy(model).layers:
            add_bias(layer.down)
    else:
        cut(model, how)
    with pytest.raises(InputError, match=message):
        lb.save_pruned(model, tokenizer, tmp_path / "small.gguf", format="gguf")
    assert not list(tmp_path.iterdir())


def test_other_models_and_names_are_refused(tokenizer, tmp_path):
    from transformers import GPT2Config

    other = AutoModelForCausalLM.from_config(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=512))
    with pytest.raises(InputError, match="not GPT2LMHeadModel"):
        lb.save_pruned(other, tokenizer, tmp_path / "small.gguf", format="gguf")
    with pytest.raises(InputError, match=r"must end in \.gguf"):
        lb.save_pruned(make("llama"), tokenizer, tmp_path / "small", format="gguf")
    with pytest.raises(InputError, match="gguf_type='q4'"):
        lb.save_pruned(make("llama"), tokenizer, tmp_path / "small.gguf", format="gguf", gguf_type="q4")
    windowed = AutoModelForCausalLM.from_config(MistralConfig(**SHARED | {"sliding_window": 16}))
    with pytest.raises(InputError, match="sliding_window=16"):
        lb.save_pruned(windowed, tokenizer, tmp_path / "small.gguf", format="gguf")
    (tmp_path / "there.gguf").write_bytes(b"")
    with pytest.raises(FileExistsError, match="exists already"):
        lb.save_pruned(make("llama"), tokenizer, tmp_path / "there.gguf", format="gguf")


def test_rows_are_interleaved_and_back():
    rows = torch.arange(16.0).reshape(16, 1)
    paired = interleave(rows, 8)
    assert paired[:8, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert torch.equal(split_halves(paired, 8), rows)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_padded_opens_in_plain_transformers(family, tokenizer, tmp_path):
    model = cut(make(family), "uneven")
    path = lb.save_pruned(model, tokenizer, tmp_path / "padded", format="padded", multiple_of=48)
    plain = AutoModelForCausalLM.from_pretrained(path)
    assert plain.config.intermediate_size == 96  # 64, rounded up
    ids = torch.tensor([tokenizer(PROMPT).input_ids])
    with torch.no_grad():
        assert torch.allclose(plain(ids).logits, model(ids).logits, atol=1e-5)
    narrow = AutoModelForCausalLM.from_pretrained(lb.save_pruned(model, None, tmp_path / "narrow", format="padded"))
    assert narrow.config.intermediate_size == 64


def test_a_file_that_does_not_read_back_as_the_model_is_not_put_in_place(tokenizer, tmp_path, monkeypatch):
    from llmbrain.checkpoints import gguf_writing

    encoded = gguf_writing._encoded

    def wrong(name, tensor, kind):
        return encoded(name, tensor.flip(0) if "attn_k" in name else tensor, kind)

    monkeypatch.setattr(gguf_writing, "_encoded", wrong)
    for kind in ("f32", "q8_0"):
        with pytest.raises(InputError, match=r"read again, model\.layers\.0\.self_attn\.k_proj\.weight is off"):
            lb.save_pruned(make("llama"), tokenizer, tmp_path / "small.gguf", format="gguf", gguf_type=kind)
    assert not list(tmp_path.iterdir())


RAW = [("llama", "none"), ("llama3", "uneven"), ("llama-biased", "biased"), ("mistral", "biased"), ("qwen2", "uneven"),
       ("qwen3", "uneven")]  # fmt: skip


@pytest.mark.skipif(not importlib.util.find_spec("xllamacpp"), reason="pip install 'llmbrain[serve]'")
@pytest.mark.parametrize(("family", "how"), RAW)
def test_raw_logits_in_llama_cpp(family, how, tokenizer, tmp_path):
    """At every token, as they are: its server tells log-probabilities after the last one."""
    model = cut(make(family), how)
    path = lb.save_pruned(model, tokenizer, tmp_path / "small.gguf", format="gguf", gguf_type="f32")
    ids = tokenizer(PROMPT).input_ids
    try:
        found = raw_logits(path, ids)
    except (NotImplementedError, AttributeError, OSError) as error:
        pytest.skip(f"another llama.cpp: {error}")
    with torch.no_grad():
        assert np.abs(found - model(torch.tensor([ids])).logits[0].numpy()).max() < 1e-4


def test_models_of_16_bits_are_written_in_full(tokenizer, tmp_path):
    """What is read back computes in float32, and says a little else than the model did."""
    for dtype in (torch.bfloat16, torch.float16):
        model = make("gemma").to(dtype)
        path = lb.save_pruned(model, tokenizer, tmp_path / f"{dtype}.gguf", format="gguf", gguf_type="f32")
        again, _ = lb.load_model(path)
        assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.float().state_dict().values()))


def test_a_family_with_biases_of_attention_is_refused_by_that(tokenizer, tmp_path):
    for family in ("qwen3", "gemma"):
        with pytest.raises(InputError, match=r"no (qwen3|gemma) model with attention_bias=True: save as 'padded'"):
            lb.save_pruned(make(family, attention_bias=True), tokenizer, tmp_path / "a.gguf", format="gguf")


def test_padded_has_a_width_where_no_mlp_is_left(tmp_path):
    model = make("llama")
    for layer in anatomy(model).layers:
        drop(layer, NEURONS)
    lb.save_pruned(model, None, tmp_path / "a", format="padded")
    lb.save_pruned(model, None, tmp_path / "b", format="padded", multiple_of=32)
    ids = torch.arange(3, 20)[None]
    for name, width in (("a", 1), ("b", 32)):
        again = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert again.config.intermediate_size == width
        with torch.no_grad():
            assert torch.allclose(again(ids).logits, model(ids).logits, atol=1e-6)


def test_a_folder_is_not_called_like_a_file(tmp_path, monkeypatch, capsys):
    for format in ("per-layer", "padded", "remote-code"):
        with pytest.raises(InputError, match=rf"is the name of a GGUF, format='{format}' a folder: say format='gguf'"):
            lb.save_pruned(make("llama"), None, tmp_path / "small.gguf", format=format)
    tiny("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("once upon a time " * 50)
    for words in (["prune", "--method", "magnitude"], ["recover", "--steps", 1], ["export", "--format", "onnx"]):
        out, text = tmp_path / "small.GGUF", ["--text", tmp_path / "text.txt"] if words[0] != "export" else []
        code, _, said = call(monkeypatch, capsys, words[0], tmp_path / "model", *words[1:], *text, "--out", out)
        assert code == 2, said
        assert "is the name of a GGUF" in said
        assert not out.exists()


def test_speed_is_measured_within_the_context(tokenizer, tmp_path):
    path = lb.save_pruned(make("llama"), tokenizer, tmp_path / "small.gguf", format="gguf")
    with pytest.raises(InputError, match="prompt=100 and new_tokens=40 exceed the model's context of 128 tokens"):
        llama_cpp_latency(path, prompt=100, new_tokens=40)

"""Pruned models in folders: equal logits after the round trip, in this process and in a fresh one, for every family."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import MODELS, VOCAB, tiny, tiny_tokenizer

from llmbrain import InputError, load_model, load_pruned, plan_pruning, prune, save_pruned
from llmbrain.anatomy.families import anatomy
from llmbrain.anatomy.surgery import add_bias, keep_heads, keep_neurons
from llmbrain.checkpoints.shapes import RECORD, record_shapes

FAMILIES = sorted(set(MODELS) - {"mixtral"})
IDS = torch.arange(3, 3 + 24).reshape(2, 12) % VOCAB


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


BY_STRUCTURE = ("codegen", "gpt_neo", "mpt")  # recognised only while wider than the residual stream


def widths_for(name):
    return (17, 21) if name in BY_STRUCTURE else (9, 17)


def cut(name: str, widths=None, *, bias: bool = False, **changes):
    """A tiny model with layers cut to `widths` by the first principles of surgery, recorded as `prune` does."""
    model = tiny(name, **changes)
    widths = widths or widths_for(name)
    before, kept = list(anatomy(model).widths), []
    for layer, width in zip(anatomy(model).layers, widths):
        kept.append(torch.randperm(layer.width, generator=torch.Generator().manual_seed(1))[:width].sort().values)
        keep_neurons(layer, kept[-1])
        if bias:
            torch.nn.init.normal_(add_bias(layer.down))
    record_shapes(model)
    setattr(model, RECORD, [{"widths_before": before, "kept": [k.tolist() for k in kept]}])
    return model


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("bias", [False, True])
def test_round_trip_of_every_family(name, bias, tmp_path):
    model = cut(name, bias=bias)
    expected = logits(model)
    save_pruned(model, tiny_tokenizer(), tmp_path / "a")
    loaded, tokenizer = load_model(tmp_path / "a")
    assert type(loaded) is type(model)
    assert anatomy(loaded).widths == widths_for(name)
    assert torch.equal(logits(loaded), expected)
    assert tokenizer("abc").input_ids == tiny_tokenizer()("abc").input_ids
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert [entry["intermediate_size"] for entry in config["per_layer_config"].values()] == list(widths_for(name))
    save_pruned(loaded, None, tmp_path / "b")  # and once more from what was loaded
    assert torch.equal(logits(load_pruned(tmp_path / "b")[0]), expected)
    assert getattr(load_pruned(tmp_path / "b")[0], RECORD) == getattr(model, RECORD)


FRESH = """
import sys, torch, transformers
from pathlib import Path
root = Path(sys.argv[1])
ids = torch.load(root / "ids.pt", weights_only=True)
for folder in sorted(p for p in root.iterdir() if p.is_dir()):
    form = folder.name.split(".")[1]
    if form == "per-layer":
        from llmbrain import load_pruned
        model, _ = load_pruned(folder)
    else:
        auto = transformers.AutoConfig.from_pretrained(folder)
        remote = getattr(auto, "auto_map", None)
        names = list(remote) if remote else [auto.architectures[0]]
        kwargs = {"trust_remote_code": True} if remote else {}
        model, info = getattr(transformers, names[0]).from_pretrained(folder, output_loading_info=True, **kwargs)
        assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), (folder, info)
        model.eval()
    with torch.no_grad():
        torch.save(model(input_ids=ids).logits, root / (folder.name + ".pt"))
assert sys.argv[2] == "all" or "llmbrain" not in sys.modules
"""


@pytest.mark.slow
@pytest.mark.parametrize("form", ["per-layer", "remote-code", "uniform", "masked"])
def test_every_format_in_a_fresh_process(form, tmp_path):
    expected = {}
    for name in FAMILIES:
        if form == "uniform" and name in ("bloom", "mpt"):
            continue  # no config entry for the width: see test_formats_say_what_they_cannot_hold
        model = cut(name, (17, 17) if form == "uniform" else None, bias=form in ("per-layer", "remote-code"))
        folder = tmp_path / f"{name}.{form}"
        expected[folder.name] = logits(model)
        save_pruned(model, None, folder, format=form)
    torch.save(IDS, tmp_path / "ids.pt")
    command = [sys.executable, "-c", FRESH, str(tmp_path), "all" if form == "per-layer" else "plain"]
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for name, wanted in expected.items():
        got = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        assert torch.allclose(got, wanted, atol=1e-5, rtol=1e-4), name


def test_masked_has_the_old_shapes_and_the_new_function(tmp_path):
    model = cut("phi3")
    save_pruned(model, None, tmp_path / "m", format="masked")
    loaded = transformers.Phi3ForCausalLM.from_pretrained(tmp_path / "m").eval()
    assert anatomy(loaded).widths == (24, 24)
    zero = sum((layer.down.weight() == 0).all(1).sum().item() for layer in anatomy(loaded).layers)
    assert zero == 48 - 9 - 17
    assert torch.allclose(logits(loaded), logits(model), atol=1e-6)


def test_an_intercept_survives_where_the_family_can_hold_it(tmp_path):
    model = cut("llama", (11, 11), bias=True)
    save_pruned(model, None, tmp_path / "u", format="uniform")
    assert torch.equal(logits(transformers.LlamaForCausalLM.from_pretrained(tmp_path / "u").eval()), logits(model))
    with pytest.raises(InputError, match=r"down_proj.bias.*intercept=False"):
        save_pruned(cut("qwen2", (11, 11), bias=True), None, tmp_path / "q", format="uniform")
    assert not (tmp_path / "q").exists()


def test_formats_say_what_they_cannot_hold(tmp_path):
    with pytest.raises(InputError, match="one width in all layers, this model has 9 to 17"):
        save_pruned(cut("llama"), None, tmp_path / "u", format="uniform")
    with pytest.raises(InputError, match=r"Bloom.*no config entry"):
        save_pruned(cut("bloom", (11, 11)), None, tmp_path / "u", format="uniform")
    with pytest.raises(InputError, match="format='onnx' is not known"):
        save_pruned(cut("llama"), None, tmp_path / "u", format="onnx")
    assert not (tmp_path / "u").exists()


def test_a_uniform_cut_is_a_plain_model_by_itself(tmp_path):
    model = cut("gpt2", (11, 11))
    save_pruned(model, None, tmp_path / "g")
    assert "per_layer_config" not in json.loads((tmp_path / "g" / "config.json").read_text())
    assert torch.equal(logits(transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "g").eval()), logits(model))


def test_dtype_shards_ties_and_generation_config_are_kept(tmp_path):
    save_pruned(cut("llama", tie_word_embeddings=True), None, tmp_path / "f")
    model = load_pruned(tmp_path / "f", dtype=torch.bfloat16)[0]
    model.generation_config.max_new_tokens = 7
    save_pruned(model, None, tmp_path / "s", max_shard_size="3KB")
    assert len(list((tmp_path / "s").glob("model-*.safetensors"))) > 1
    loaded, _ = load_pruned(tmp_path / "s")
    assert loaded.dtype == torch.bfloat16
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.generation_config.max_new_tokens == 7
    assert torch.equal(logits(loaded), logits(model))
    assert load_pruned(tmp_path / "s", dtype=torch.float32)[0].dtype == torch.float32
    out = loaded.generate(IDS[:1, :4], do_sample=False, max_new_tokens=5, pad_token_id=0)
    assert torch.equal(out, model.generate(IDS[:1, :4], do_sample=False, max_new_tokens=5, pad_token_id=0))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("change", [{"num_hidden_layers": 10**9}, {"vocab_size": 10**9}, {"intermediate_size": 10**9}])
def test_numbers_that_the_weights_have_no_room_for(family, change, tmp_path, capfd):
    """Nothing is built, or allocated, by a number that cannot be."""
    tiny(family).save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(InputError, match=next(iter(change))):
        load_model(tmp_path)
    assert "MISMATCH" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_a_tensor_that_does_not_fit_is_named(change, tmp_path):
    save_pruned(cut("llama"), None, tmp_path / "x")
    file, name = tmp_path / "x" / "model.safetensors", "model.layers.1.mlp.down_proj.weight"
    state = load_file(file)
    if change == "missing":
        del state[name]
    elif change == "extra":
        name = "model.layers.7.mlp.down_proj.weight"
        state[name] = torch.zeros(2, 2)
    else:
        state[name] = state[name][:, :-1].contiguous()
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"layers\.\d\.mlp\.down_proj\.weight"):
        load_pruned(tmp_path / "x")


def test_folders_are_not_overwritten_by_accident(tmp_path):
    model = cut("llama")
    save_pruned(model, None, tmp_path / "x")
    with pytest.raises(FileExistsError, match="holds a model already"):
        save_pruned(model, None, tmp_path / "x")
    save_pruned(model, None, tmp_path / "x", overwrite=True)
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_model(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_model(Path(tmp_path / "nothing"))


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - {"gpt_neo", "codegen", "mpt", "phi3", "bloom", "falcon_new"}))
def test_heads_cut_by_group_round_trip(name, tmp_path):
    model = tiny(name)
    for layer, kept in zip(anatomy(model).layers, ([0], [0, 1])):
        keep_heads(layer, kept)
    record_shapes(model)
    save_pruned(model, None, tmp_path / "h")
    assert torch.equal(logits(load_pruned(tmp_path / "h")[0]), logits(model))


def test_the_tokenizer_comes_back(tmp_path):
    save_pruned(cut("llama"), tiny_tokenizer(), tmp_path / "with")
    model, tokenizer = load_pruned(tmp_path / "with")
    assert model(torch.tensor([tokenizer("hello").input_ids])).logits.isfinite().all()
    save_pruned(cut("llama"), None, tmp_path / "without")
    assert load_pruned(tmp_path / "without")[1] is None


def test_code_from_elsewhere_is_not_run_for_a_config(tmp_path):
    import json

    tiny("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"attn_implementation": "someone/kernel"}))
    with pytest.raises(InputError, match=r"attn_implementation='someone/kernel', code that is not in transformers"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
def test_plain_transformers_loads_as_few_heads_everywhere(name, tmp_path):
    model = tiny(name)
    small = prune(model, plan_pruning(model, ratio=0.5, method="magnitude", head_ratio=0.5))
    save_pruned(small, None, tmp_path / "u", format="uniform")
    plain = type(model).from_pretrained(tmp_path / "u")
    assert torch.equal(logits(plain), logits(small))
    assert plain.config.num_key_value_heads == model.config.num_key_value_heads // 2
    gpt2 = tiny("gpt2")
    small = prune(gpt2, plan_pruning(gpt2, ratio=0.5, method="magnitude", head_ratio=0.5))
    with pytest.raises(InputError, match="cannot say that heads are fewer"):
        save_pruned(small, None, tmp_path / "none", format="uniform")

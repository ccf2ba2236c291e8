"""The scanner: what it records, how it reads, and how it refuses. (Each family: see test_architectures.py.)"""

from __future__ import annotations

import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_models import CONTEXT, tiny, tiny_tokenizer

import llmbrain as lb
from llmbrain._validation import InputError
from llmbrain.anatomy.families import anatomy
from llmbrain.hooks.text import ScanWarning

TEXTS = ["hello there, you.", "hi", "what is it about, then? no one knows"]


def n_hooks(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def down_inputs(model: Any, ids: torch.Tensor) -> np.ndarray:
    """What enters each down projection when the whole model reads `ids` (1, tokens); (tokens, neurons)."""
    heard = []
    modules = [layer.down.module for layer in anatomy(model).layers]
    handles = [m.register_forward_pre_hook(lambda m, a: heard.append(a[0].detach().float())) for m in modules]
    with torch.no_grad():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return torch.cat([h.reshape(-1, h.shape[-1]) for h in heard], dim=1).numpy()


# -- what is recorded --------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:4 of 4 texts are longer")
@pytest.mark.parametrize("name", ["stories260K", "shakespeare-gpt2"])
def test_real_models_to_the_bit(shared_data: Path, name: str) -> None:
    model, tokenizer = load(shared_data, name)
    texts = [text[:90] for text in json.loads((shared_data / "corpora/tinystories-1000.json").read_text())[700:704]]
    for text, scan in zip(texts, lb.scan(model, tokenizer, texts, batch_size=1, block_size=24)):
        ids = tokenizer(text, return_tensors="pt").input_ids
        assert scan.token_ids.tolist() == ids[0].tolist()
        expected = np.concatenate([down_inputs(model, ids[:, i : i + 24]) for i in range(0, ids.shape[1], 24)])
        assert (scan.data() == expected).all()
        assert "".join(scan.tokens).replace("<s>", "").strip() == text.strip()


def load(shared_data: Path, name: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shared_data / "models" / name
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def test_a_long_text_is_read_in_blocks() -> None:
    model, tokenizer = tiny("gpt2"), tiny_tokenizer()
    text = "abcdefghij" * 13  # 131 tokens, context 64
    with pytest.warns(ScanWarning, match="1 of 2 texts are longer than 64 tokens"):
        scan, short = lb.scan(model, tokenizer, [text, "hi"])
    ids = tokenizer(text, return_tensors="pt").input_ids
    expected = np.concatenate([down_inputs(model, ids[:, i : i + CONTEXT]) for i in range(0, 131, CONTEXT)])
    assert abs(scan.data() - expected).max() < 1e-5
    assert scan.positions.tolist() == [*range(64), *range(64), 0, 1, 2]
    assert (scan.token_ids == ids[0].numpy()).all()
    assert (scan.token_ids == 1).sum() == 1  # no second begin of sequence
    assert short.positions.tolist() == [0, 1, 2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lb.scan(model, tokenizer, ["a" * 63])


@pytest.mark.parametrize("batch_size", [1, 8])
def test_half_precision_is_kept_as_it_is(batch_size: int) -> None:
    model, tokenizer = tiny("llama", dtype=torch.bfloat16), tiny_tokenizer()
    scan = lb.scan(model, tokenizer, ["hello there"], batch_size=batch_size)[0]
    expected = down_inputs(model, tokenizer("hello there", return_tensors="pt").input_ids)
    assert scan.data().dtype == np.float32
    assert (scan.data() == expected).all()
    assert (scan.data() == torch.from_numpy(scan.data()).bfloat16().float().numpy()).all()


@pytest.mark.parametrize("dtype", ["float16", torch.bfloat16, "float32"])
def test_the_dtype_to_keep(dtype: Any) -> None:
    model, tokenizer = tiny("llama"), tiny_tokenizer()
    full = lb.scan(model, tokenizer, TEXTS)
    kept = lb.scan(model, tokenizer, TEXTS, dtype=dtype)
    torch_dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    for one, other in zip(full, kept):
        assert (torch.from_numpy(one.data()).to(torch_dtype).float().numpy() == other.data()).all()


def test_without_a_language_head_or_a_pad_token() -> None:
    model = tiny("llama")
    expected = lb.scan(model, tiny_tokenizer(), TEXTS)
    for got in (lb.scan(model.model, tiny_tokenizer(), TEXTS), lb.scan(model, tiny_tokenizer(pad=False), TEXTS)):
        for one, other in zip(expected, got):
            assert (one.data() == other.data()).all()


def test_a_model_spread_by_accelerate(tmp_path: Path) -> None:
    from accelerate import dispatch_model

    expected = lb.scan(tiny("llama"), tiny_tokenizer(), TEXTS, site=["neuron", "head", "block_out"])
    model = tiny("llama")
    where = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "cpu",
             "model.rotary_emb": "cpu", "lm_head": "disk"}  # fmt: skip
    model = dispatch_model(model, where, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    assert model.model.layers[0].mlp.down_proj.weight.is_meta
    for one, other in zip(expected, lb.scan(model, tiny_tokenizer(), TEXTS, site=["neuron", "head", "block_out"])):
        for site in one.sites:
            assert (one.data(site=site) == other.data(site=site)).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    model, tokenizer = tiny("llama", dtype=dtype).cuda(), tiny_tokenizer()
    scan = lb.scan(model, tokenizer, ["hello there"], batch_size=1)[0]
    heard: list[torch.Tensor] = []
    modules = [layer.mlp.down_proj for layer in model.model.layers]
    handles = [m.register_forward_pre_hook(lambda m, a: heard.append(a[0][0].float().cpu())) for m in modules]
    with torch.no_grad():
        model(tokenizer("hello there", return_tensors="pt").input_ids.cuda())
    for handle in handles:
        handle.remove()
    assert (scan.data() == torch.cat(heard, dim=1).numpy()).all()


def test_several_sites_in_one_pass() -> None:
    model, calls = tiny("llama"), []
    handle = model.model.register_forward_hook(lambda m, a, o: calls.append(1))
    scan = lb.scan(model, tiny_tokenizer(), ["hello"], site=("block_out", "neuron", "gate", "up"))[0]
    handle.remove()
    assert len(calls) == 2  # one to see the sizes, one to record
    assert scan.sites == ("block_out", "neuron", "gate", "up")
    assert scan.site == "block_out"
    assert scan.space.widths == (16, 16)
    assert scan.spaces["neuron"].widths == (24, 24)
    assert (scan.data() == scan.data(site="block_out")).all()
    product = scan.data(site="gate") * scan.data(site="up")
    np.testing.assert_allclose(product, scan.data(site="neuron"), atol=1e-6)
    with pytest.raises(InputError, match="site='head' is not known"):
        scan.data(site="head")


# -- the model afterwards ------------------------------------------------------------------------------------------


def test_training_mode_and_hooks_come_back() -> None:
    model, tokenizer = tiny("bert"), tiny_tokenizer()  # with dropout, which must be off while scanning
    model.train()
    model.bert.encoder.layer[0].eval()
    modes = [module.training for module in model.modules()]
    first, second = (lb.scan(model, tokenizer, TEXTS)[2].data() for _ in range(2))
    assert (first == second).all()
    assert [module.training for module in model.modules()] == modes
    assert n_hooks(model) == 0


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_they_come_back_whatever_happens(error: type[BaseException], tmp_path: Path) -> None:
    model, tokenizer = tiny("llama").train(), tiny_tokenizer()
    calls = []

    def fail(module: Any, args: Any) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise error("stop")

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(error, match="stop"):
        lb.scan(model, tokenizer, TEXTS, out=tmp_path, batch_size=1)
    handle.remove()
    assert n_hooks(model) == 0
    assert all(module.training for module in model.modules())
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


# -- texts, tokens, events ---------------------------------------------------------------------------------------------


def test_tokens_and_offsets_travel_with_the_scan() -> None:
    scan = lb.scan(tiny("llama"), tiny_tokenizer(), ["hello q."])[0]
    assert scan.tokens == ["<s>", *"hello q."]
    assert scan.offsets is not None
    assert scan.offsets.tolist() == [[0, 0], *([i, i + 1] for i in range(8))]
    assert (scan.text, scan.name, scan.model_id) == ("hello q.", "run-0001", "LlamaForCausalLM")
    assert scan.n_tokens == 9
    assert scan.n_neurons == 48


def test_dropped_characters_are_counted_and_offsets_put_right() -> None:
    tokenizer = tiny_tokenizer(unknown=False)
    text = "heQQllo XY you"
    with pytest.warns(ScanWarning, match="drops 4 characters"):
        scan = lb.scan(tiny("llama"), tokenizer, [text, "fine"])[0]
    assert scan.tokens[1:] == list("hello  you")
    assert scan.offsets is not None
    assert [text[a:b] for a, b in scan.offsets[1:]] == list("hello  you")
    stimulus = lb.Stimulus.from_segments([("hQQe", "a"), ("llo", "b")], tokenizer)
    assert stimulus.events is not None
    assert stimulus.events.to_numpy().tolist() == [[1, 2, "a"], [3, 3, "b"]]


def test_much_that_a_tokenizer_does_not_know_is_said() -> None:
    model = tiny("llama")
    with pytest.warns(ScanWarning, match=r"50% of the tokens are <unk>, .* perplexity of such a text is too low"):
        lb.scan(model, tiny_tokenizer(bos=False), ["ÄÖÜßabcd"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", ScanWarning)
        lb.scan(model, tiny_tokenizer(bos=False), ["abcdefgh"])


def test_real_tokenizer_drops_and_keeps(shared_data: Path) -> None:
    model, tokenizer = load(shared_data, "shakespeare-gpt2")
    text = "Hé é@llo\nyou"
    with pytest.warns(ScanWarning, match="drops 3 characters"):
        scan = lb.scan(model, tokenizer, [text])[0]
    assert scan.offsets is not None
    assert [text[a:b] for a, b in scan.offsets] == list("H llo\nyou")


def test_n_tokens_cuts_texts_and_events() -> None:
    model, tokenizer = tiny("llama"), tiny_tokenizer()
    stimulus = lb.Stimulus.from_segments([("abcd", "x"), ("efgh", "y"), ("ij", "z")], tokenizer, name="demo")
    full, cut = (lb.scan(model, tokenizer, [stimulus], n_tokens=n)[0] for n in (None, 7))
    assert full.events.to_numpy().tolist() == [[1, 4, "x"], [5, 4, "y"], [9, 2, "z"]]
    assert cut.events.to_numpy().tolist() == [[1, 4, "x"], [5, 2, "y"]]
    assert cut.name == "demo"
    assert cut.n_tokens == 7
    assert abs(cut.data() - full.data(tokens=slice(0, 7))).max() < 1e-5


def test_stimulus_is_a_string_with_events() -> None:
    events = pd.DataFrame({"trial_type": ["b", "a"], "duration": [1, 2], "onset": [3, 0]})
    stimulus = lb.Stimulus("hello", events, name="x")
    assert stimulus == "hello"
    assert stimulus.events is not None
    assert list(stimulus.events.columns) == ["onset", "duration", "trial_type"]
    assert stimulus.events["onset"].tolist() == [0, 3]
    again = pickle.loads(pickle.dumps(stimulus))
    assert again == "hello"
    assert again.name == "x"
    assert again.events.equals(stimulus.events)


def test_from_segments_with_a_real_tokenizer(shared_data: Path) -> None:
    _, tokenizer = load(shared_data, "stories260K")
    segments = [("Once upon a time", "opening"), (" there was", None), (" a dog named Spot.", "hero")]
    stimulus = lb.Stimulus.from_segments(segments, tokenizer)
    ids = tokenizer(str(stimulus)).input_ids
    assert str(stimulus) == "Once upon a time there was a dog named Spot."
    assert stimulus.events is not None
    words = {
        row.trial_type: tokenizer.decode(ids[row.onset : row.onset + row.duration])
        for row in stimulus.events.itertuples()
    }
    assert {k: v.strip() for k, v in words.items()} == {"opening": "Once upon a time", "hero": "a dog named Spot."}


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ({"onset": [0], "duration": [1]}, "trial_type"),
        ({"onset": [-1], "duration": [1], "trial_type": ["a"]}, "onset=-1"),
        ({"onset": [0], "duration": [float("nan")], "trial_type": ["a"]}, "duration=nan"),
    ],
)
def test_bad_events_are_refused(events: dict[str, list[Any]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        lb.Stimulus("hello", pd.DataFrame(events))


def test_events_beyond_the_text_are_refused() -> None:
    events = pd.DataFrame({"onset": [4], "duration": [9], "trial_type": ["a"]})
    with pytest.raises(InputError, match="end at token 13, but the text has 6 tokens"):
        lb.scan(tiny("llama"), tiny_tokenizer(), [lb.Stimulus("hello", events)])


@pytest.mark.parametrize("segments", [[], [("", "a")], [("ab", "a"), ("Q", "b")]])
def test_bad_segments_are_refused(segments: list[tuple[str, str]]) -> None:
    with pytest.raises(InputError, match="segments"):
        lb.Stimulus.from_segments(segments, tiny_tokenizer(unknown=False))


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([], {}, "texts is empty"),
        (["ab", ""], {}, r"texts\[1\] is an empty text"),
        (["a\ud800b"], {}, r"texts\[0\] holds half a surrogate pair"),
        (["ab", 3], {}, r"texts\[1\] is a int"),
        (["ab"], {"site": "brain"}, "site='brain' is not known: allowed are 'neuron'"),
        (["ab"], {"site": ()}, "site=None is not known"),
        (["ab"], {"site": ["neuron", "x"]}, "site='x'"),
        (["ab"], {"block_size": 65}, "block_size=65"),
        (["ab"], {"block_size": 0}, "block_size=0"),
        (["ab"], {"batch_size": 0}, "batch_size=0"),
        (["ab"], {"n_tokens": 0}, "n_tokens=0"),
        (["ab"], {"dtype": "int8"}, "dtype='int8' is not known: allowed are float16"),
        (["ab"], {"dtype": "float99"}, "float99"),
    ],
)
def test_bad_input_is_named(texts: list[Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        lb.scan(tiny("llama"), tiny_tokenizer(), texts, **options)


def test_a_site_that_the_model_lacks() -> None:
    with pytest.raises(InputError, match=r"site='gate' does not exist in layer 0 .*not gated"):
        lb.scan(tiny("gpt2"), tiny_tokenizer(), ["ab"], site="gate")
    from transformers import FNetConfig, FNetModel

    sizes = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    with pytest.raises(InputError, match="site='head' does not exist"):
        lb.scan(FNetModel(FNetConfig(**sizes)), tiny_tokenizer(), ["ab"], site="head")  # it has no attention


def test_a_text_without_tokens() -> None:
    with pytest.raises(InputError, match=r"texts\[0\]='QQ' has no token"):
        lb.scan(tiny("llama"), tiny_tokenizer(bos=False, unknown=False), ["QQ"])


def test_a_tokenizer_of_another_model() -> None:
    with pytest.raises(InputError, match="token id 34, but the model knows 20"):
        lb.scan(tiny("llama", vocab_size=20), tiny_tokenizer(), ["it's"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named(value: float, tmp_path: Path) -> None:
    model = tiny("gpt2")
    with torch.no_grad():
        # Only the letter z makes neuron 5 of layer 1 go wrong: run 2, token 4.
        model.transformer.h[1].mlp.c_fc.register_forward_hook(spoil(value))
    with pytest.raises(InputError, match=f"{value} in neuron of layer 1, neuron 5, at token 4 of run-0002"):
        lb.scan(model, tiny_tokenizer(), ["hello", "hi yzz", "more"], out=tmp_path)


def spoil(value: float) -> Any:
    def hook(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        if out.shape[0] == 3:  # not in the first look at the sizes
            out[1, 4, 5] = value
        return out

    return hook


def test_overflow_of_float16_is_named() -> None:
    model = tiny("gpt2")
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.bias[7] = 1e5
    scan = lb.scan(model, tiny_tokenizer(), ["hello"])[0]
    assert scan.data(0)[:, 7].min() > 9e4
    with pytest.raises(InputError, match=r"inf in neuron of layer 0, neuron 7.*exceed what float16.*bfloat16"):
        lb.scan(model, tiny_tokenizer(), ["hello"], dtype="float16")


# -- Scan as an object -------------------------------------------------------------------------------------------------


def test_data_reads_layers_and_tokens() -> None:
    scan = lb.scan(tiny("llama", num_hidden_layers=3), tiny_tokenizer(), ["hello there"])[0]
    full = scan.data()
    assert full.shape == (12, 72)
    for tokens in (slice(2, 5), slice(None, None, -2), [3, 1, 1], np.arange(12) % 3 == 0, -1, np.array([-2])):
        rows = np.atleast_2d(full[tokens])
        assert (scan.data(tokens=tokens) == rows).all()
        assert (scan.data([2, 0], tokens) == np.concatenate([rows[:, 48:], rows[:, :24]], axis=1)).all()
    assert (scan.data(1) == full[:, 24:48]).all()
    assert scan.data(tokens=[]).shape == (0, 72)
    pieces = list(scan.iter_data(5))
    assert [part for part, _ in pieces] == [slice(0, 5), slice(5, 10), slice(10, 12)]
    assert (np.concatenate([values for _, values in pieces]) == full).all()
    values = scan.data()
    values[:] = 0  # what is given is the caller's own
    assert (scan.data() == full).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": 3}, "layers=3 does not exist: allowed are 0 to 1"),
        ({"layers": [0, -1]}, "layers=-1"),
        ({"layers": "a"}, "layers='a'"),
        ({"tokens": 6}, "tokens=6"),
        ({"tokens": [0.5]}, "tokens="),
    ],
)
def test_data_that_is_not_there(arguments: dict[str, Any], message: str) -> None:
    scan = lb.scan(tiny("llama"), tiny_tokenizer(), ["hello"])[0]
    with pytest.raises(InputError, match=message):
        scan.data(**arguments)


def test_from_array() -> None:
    values = np.random.default_rng(0).standard_normal((7, 10))
    space = lb.NeuronSpace([6, 4])
    scan = lb.Scan.from_array(values, space, name="made", token_ids=range(7))
    assert (scan.data() == values.astype(np.float32)).all()
    assert (scan.data([1, 0], [2]) == values[2:3, [6, 7, 8, 9, 0, 1, 2, 3, 4, 5]].astype(np.float32)).all()
    assert scan.space == space
    assert scan.token_ids.tolist() == list(range(7))
    assert len(scan.events) == 0
    scan.data()[:] = 0
    assert (values != 0).all()
    assert lb.Scan.from_array(values).space.widths == (10,)
    for bad, arguments in ((values[0], {}), (values, {"space": lb.NeuronSpace([9])}), (values, {"tokens": ["a"]})):
        with pytest.raises(InputError):
            lb.Scan.from_array(bad, **arguments)

"""GGUF files in: equal to transformers' own reader, free of marks of quantization, or one clear line."""

from __future__ import annotations

import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE

import llmbrain as lb
from llmbrain._validation import InputError

WIDTH, MLP, HEADS, LAYERS = 32, 64, 4, 2
ALPHABET = sorted(set("abcdefghijklmnopqrstuvwxyz0123456789.,\u0120")) + ["ab"]


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A Llama of random weights."""
    return write(tmp_path / "small.gguf")


def write(path, architecture="llama", pre="smollm", extra=(), fields=()):
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("small")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS // 2)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(ALPHABET))
    for key, value in fields:
        writer.add_uint16(key, value) if isinstance(value, int) else writer.add_string(key, value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(ALPHABET)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(ALPHABET))
    writer.add_token_merges(["a b"])
    shapes = {"token_embd.weight": (len(ALPHABET), WIDTH), "output_norm.weight": (WIDTH,)}
    for i in range(LAYERS):
        shapes |= {
            f"blk.{i}.attn_norm.weight": (WIDTH,), f"blk.{i}.ffn_norm.weight": (WIDTH,),
            f"blk.{i}.attn_q.weight": (WIDTH, WIDTH), f"blk.{i}.attn_k.weight": (WIDTH // 2, WIDTH),
            f"blk.{i}.attn_v.weight": (WIDTH // 2, WIDTH), f"blk.{i}.attn_output.weight": (WIDTH, WIDTH),
            f"blk.{i}.ffn_gate.weight": (MLP, WIDTH), f"blk.{i}.ffn_up.weight": (MLP, WIDTH),
            f"blk.{i}.ffn_down.weight": (WIDTH, MLP),
        }  # fmt: skip
    for name, shape in {**shapes, **dict(extra)}.items():
        values = shape if isinstance(shape, np.ndarray) else rng.standard_normal(shape) / 4
        writer.add_tensor(name, values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def reference(path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name).eval()


def test_equals_the_reader_of_transformers_and_is_an_ordinary_model(small: Path, tmp_path: Path) -> None:
    model, tokenizer = lb.load_model(small)
    ids = torch.tensor([tokenizer("abc 012").input_ids])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, reference(small)(ids).logits)
    assert "quantization_config" not in model.config.to_dict()
    model.float().half().float()
    model.save_pretrained(tmp_path / "folder")
    tokenizer.save_pretrained(tmp_path / "folder")
    again, tokens = lb.load_model(tmp_path / "folder")
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, again(ids).logits, atol=1e-2)
    assert tokens("abc 012").input_ids == ids[0].tolist()


def test_digits_are_split_as_the_file_says(tmp_path: Path) -> None:
    for pre, pieces in (("smollm", ["1", "2"]), ("llama-bpe", ["12"]), ("qwen2", ["1", "2"])):
        _, tokenizer = lb.load_model(write(tmp_path / f"{pre}.gguf", pre=pre))
        found = [piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("12")]
        assert found == pieces, pre


def test_a_tokenizer_beside_the_file_is_taken_and_checked(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    path = write(tmp_path / "small.gguf", pre="of nobody")
    with pytest.raises(InputError, match=r"splits text as 'of nobody'.*tokenizer\.json"):
        lb.load_model(path)
    vocabulary = {token: i for i, token in enumerate(ALPHABET)}
    tokenizer = Tokenizer(BPE(vocabulary, []))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    assert lb.load_model(path)[1]("ab").input_ids == [vocabulary["a"], vocabulary["b"]]
    swapped = {**vocabulary, "a": vocabulary["b"], "b": vocabulary["a"]}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE(swapped, []))).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"token .* is 'a'"):
        lb.load_model(path)


def test_llama3_rotary_factors_become_the_rule_that_made_them(tmp_path: Path) -> None:
    size = WIDTH // HEADS
    waves = 2 * np.pi * 10000.0 ** (np.arange(0, size, 2) / size)  # in tokens; closed form of Llama 3.1's report
    smooth = (8192 / waves - 1.0) / (4.0 - 1.0)
    between = 1 / ((1 - smooth) / 8.0 + smooth)
    factors = np.where(waves < 8192 / 4.0, 1.0, np.where(waves > 8192 / 1.0, 8.0, between))
    path = write(tmp_path / "llama3.gguf", extra=[("rope_freqs.weight", factors)])
    model, _ = lb.load_model(path)
    assert model.config.rope_parameters["rope_type"] == "llama3"
    assert np.allclose(model.model.rotary_emb.inv_freq.numpy(), 2 * np.pi / waves / factors)
    path = write(tmp_path / "small.gguf", extra=[("rope_freqs.weight", (size // 2,))])
    with pytest.raises(InputError, match="rotary factors"):
        lb.load_model(path)


BAD = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("hello"),
    "head": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "nearly": lambda path: path.write_bytes(path.read_bytes()[:-100]),
}


@pytest.mark.parametrize("damage", BAD)
def test_damaged_files_are_one_line(small: Path, damage: str) -> None:
    BAD[damage](small)
    with pytest.raises(InputError, match=r"small\.gguf") as error:
        lb.load_model(small)
    assert "\n" not in str(error.value)


def test_bytes_that_are_no_text_are_one_line(small: Path) -> None:
    """Entries are decoded when they are asked for, long after the file was opened."""
    whole, word = bytearray(small.read_bytes()), b"tokenizer.ggml.tokens"
    whole[whole.find(word) + len(word) + 40] = 0xFF
    small.write_bytes(whole)
    with pytest.raises(InputError, match=r"small\.gguf.*(damaged|truncated)"):
        lb.load_model(small)


def test_numbers_beyond_the_end_are_one_line(tmp_path: Path) -> None:
    """gguf's reader takes what is beyond the end as empty, and would count to 2**60."""
    path = write(tmp_path / "long.gguf")
    whole, word = bytearray(path.read_bytes()), b"tokenizer.ggml.token_type"
    at = whole.find(word) + len(word) + 8  # behind two types: the number of entries
    assert int.from_bytes(whole[at : at + 8], "little") == len(ALPHABET)
    whole[at : at + 8] = (2**60).to_bytes(8, "little")
    path.write_bytes(whole)
    with pytest.raises(InputError, match=r"long\.gguf is not a GGUF file.*ends within an entry"):
        lb.load_model(path)
    path, word = write(tmp_path / "deep.gguf"), b"llama.block_count"
    whole = bytearray(path.read_bytes())
    at = whole.find(word) + len(word) + 4
    whole[at : at + 4] = (10**9).to_bytes(4, "little")
    path.write_bytes(whole)
    for use in (lb.load_model, lb.estimate):
        with pytest.raises(InputError, match="says 1000000000 blocks"):
            use(path)
    for extra in ([("blk.0.ffn_down.bias", (0,))], [("blk.0.attn_q.weight", (0, WIDTH))]):
        with pytest.raises(InputError, match=r"none\.gguf"):
            lb.load_model(write(tmp_path / "none.gguf", extra=extra))


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.gguf does not exist"):
        lb.load_model(tmp_path / "nowhere.gguf")
    with pytest.raises(InputError, match="architecture 'nobody'"):
        lb.load_model(write(tmp_path / "a.gguf", architecture="nobody"))
    with pytest.raises(InputError, match="one part of 3"):
        lb.load_model(write(tmp_path / "b.gguf", fields=[("split.count", 3)]))
    with pytest.raises(InputError, match="scales its rotary positions"):
        lb.load_model(write(tmp_path / "c.gguf", fields=[("llama.rope.scaling.type", "yarn")]))
    with pytest.raises(InputError, match=r"does not use, such as blk\.0\.ffn_down\.bias"):
        lb.load_model(write(tmp_path / "d.gguf", extra=[("blk.0.ffn_down.bias", (WIDTH,))]))
    (tmp_path / "folder").mkdir()
    shutil.copy(tmp_path / "d.gguf", tmp_path / "folder" / "d.gguf")
    with pytest.raises(FileNotFoundError, match=r"name one of them, such as .*d\.gguf"):
        lb.load_model(tmp_path / "folder")


@pytest.mark.slow
def test_smollm2(shared_data: Path) -> None:
    path = shared_data / "models/smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf"
    model, tokenizer = lb.load_model(path)
    ids = torch.tensor([tokenizer("The capital of France is").input_ids])
    with torch.no_grad():
        logits = model(ids).logits
        assert torch.equal(logits, reference(path)(ids).logits)
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"
    assert "<|im_start|>user" in tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)

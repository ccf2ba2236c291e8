"""Tokenizers of GGUF files of other programs: the same ids as the tokenizer that the file was made of, on odd texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gguf_models import by_hand, make
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import llmbrain as lb
from llmbrain._validation import InputError
from llmbrain.checkpoints.gguf_opening import open_gguf
from llmbrain.checkpoints.gguf_tokenizers import PRE_TOKENIZERS
from llmbrain.checkpoints.gguf_writing import write_gguf

SPACE = "\u2581"
ADDED = {"<|im_start|>": True, "<|im_end|>": True, "<think>": False}
CORPUS = ["The cat sat on the mat. Is it 1234 or 3.14? café, naïve; def f(x):\n    return x + 1\n\n the end  of it"] * 9
TEXTS = [
    "The cat", " sat", "  on the", "mat. ", "a\nb\n\n c\t d\r\ne", "\n\nthe", "café e\u0301", "日本語", "🙂 👩‍👧 ",
    "123456 7.89",
    "<s>the</s>", "<unk> x", "a<|im_start|>user\nthe<|im_end|>\n", "<think>it</think> the", "I'll DON'T", "...!?  ",
    " zyxw qqqq", f"{SPACE}the", "<0x41>", "   ", "x  y   z", "<pad> <mask> <bos>", "a <|endoftext|> b", "\x01",
    "\u00a0the",
    "<｜User｜>the",
]  # fmt: skip


def added_entries(names: dict[str, bool], first: int) -> list[dict[str, Any]]:
    return [
        {"id": first + i, "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": special} for i, (name, special) in enumerate(names.items())
    ]  # fmt: skip


def pieces(*, prefix: bool, first: bool = True) -> tuple[Any, list[str], Any]:
    """A SentencePiece tokenizer as Llama's folder has it, its tokens, and what writes llama.cpp's keys of it."""
    from transformers.tokenization_utils_base import generate_merges

    special = ["<unk>", "<s>", "</s>"]
    maker = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    maker.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    maker.pre_tokenizer = pre_tokenizers.Split(Regex(f"{SPACE}?[^{SPACE}]+|{SPACE}+"), "isolated")
    names = special + [f"<0x{i:02X}>" for i in range(256)]
    maker.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=names, show_progress=False))
    state = json.loads(maker.to_str())
    vocabulary = state["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.get)
    scores = {name: float(min(258 - i, 0)) for i, name in enumerate(tokens)}
    state["model"]["merges"] = [list(pair) for pair in generate_merges(vocabulary, scores, skip_tokens=special)]
    marked = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    both = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, marked]}
    state |= {"normalizer": both if prefix else marked, "pre_tokenizer": None, "decoder": None}
    state["added_tokens"] = added_entries(dict.fromkeys(special, True), 0) + added_entries(ADDED, len(tokens))
    original = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        add_bos_token=first, add_eos_token=False,
    )  # fmt: skip

    def write(writer: Any, size: int) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list([*tokens, *ADDED])
        writer.add_token_scores([*scores.values(), *[-1000.0] * len(ADDED)])
        kinds = [2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259), *(3 if special else 4 for special in ADDED.values())]
        writer.add_token_types(kinds)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
        if not first:
            writer.add_add_bos_token(False)
        if not prefix:
            writer.add_add_space_prefix(False)

    return original, [*tokens, *ADDED], write


def byte_level(kind: str, *, begin: str | None = None, added: dict[str, bool] = ADDED) -> tuple[Any, list[str], Any]:
    """A byte-level tokenizer of a kind as its folder has it, its tokens, and what writes llama.cpp's keys of it."""
    maker, level = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    rule = PRE_TOKENIZERS[kind]
    plain = rule is None or rule == "digits"
    if plain:
        maker.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        maker.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(str(rule)), "isolated"), level])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    maker.train_from_iterator(CORPUS, trainer)
    state = json.loads(maker.to_str())
    vocabulary = state["model"]["vocab"]
    merges = [" ".join(pair) for pair in state["model"]["merges"]]
    if kind == "llama-bpe":  # words that no merges make are one token
        vocabulary |= {"Ġzyxw": len(vocabulary), "qqqq": len(vocabulary) + 1}
        state["model"]["ignore_merges"] = True
    if kind == "qwen2":
        state["normalizer"] = {"type": "NFC"}
    added = {**({} if begin is None else {begin: True}), **added}
    tokens = [*sorted(vocabulary, key=vocabulary.get), *added]
    state["added_tokens"] = added_entries(added, len(vocabulary))
    original = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), bos_token=begin, add_bos_token=begin is not None
    )

    def write(writer: Any, size: int) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(kind)
        writer.add_token_list(tokens)
        writer.add_token_types([1] * (len(tokens) - len(added)) + [3 if special else 4 for special in added.values()])
        writer.add_token_merges(merges)
        if begin is not None:
            writer.add_bos_token_id(tokens.index(begin))
            if kind != "llama-bpe":  # of Llama 3 files do not say that it stands in front
                writer.add_add_bos_token(True)

    return original, tokens, write


def with_spaces(family: str) -> tuple[str, Any]:
    """Gemma's tokens of several spaces stand in a file as spaces, and are matched whole."""

    def made() -> tuple[Any, list[str], Any]:
        original, tokens, write = pieces(prefix=False)
        several = [i for i, token in enumerate(tokens) if len(token) > 1 and set(token) == {SPACE}]
        assert several

        def written(writer: Any, size: int) -> None:
            write(writer, size)
            for entries in writer.kv_data:
                if "tokenizer.ggml.tokens" in entries:
                    names, kinds = (entries[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type"))
                    names.value = [" " * len(t) if i in several else t for i, t in enumerate(names.value)]
                    kinds.value = [4 if i in several else kind for i, kind in enumerate(kinds.value)]

        return original, tokens, written

    return family, made


BEGIN = "<｜begin▁of▁sentence｜>"
CASES: dict[str, Any] = {
    "llama": ("llama", lambda: pieces(prefix=True)),
    "no space in front": ("llama", lambda: pieces(prefix=False)),
    "no token in front": ("llama", lambda: pieces(prefix=True, first=False)),
    "gemma": ("gemma3", lambda: pieces(prefix=False)),
    "the first gemma": ("gemma", lambda: pieces(prefix=False)),
    "gemma with spaces": with_spaces("gemma3"),
    "the first gemma with spaces": with_spaces("gemma"),
    "llama 3": ("llama", lambda: byte_level("llama-bpe", begin="<|begin|>")),
    "qwen2": ("qwen2", lambda: byte_level("qwen2")),
    "gpt-2": ("llama", lambda: byte_level("gpt-2", added={**ADDED, "   ": False, "\t\t": False})),
    "deepseek": ("qwen2", lambda: byte_level("deepseek-r1-qwen", begin=BEGIN, added={**ADDED, "<｜User｜>": False})),
}


@pytest.mark.filterwarnings("ignore:.*does not say what queries are scaled by")
@pytest.mark.parametrize("case", CASES)
def test_ids_are_those_of_the_original(case: str, tmp_path: Path) -> None:
    family, make_tokenizer = CASES[case]
    original, tokens, write = make_tokenizer()
    dense = make(family, vocab_size=len(tokens) + 7, num_hidden_layers=1, head_dim=16)  # rows of padding
    _, tokenizer = lb.load_model(by_hand(tmp_path / "x.gguf", dense, tokens=write))
    for text in TEXTS:
        assert tokenizer(text).input_ids == original(text).input_ids, text
        assert max(tokenizer(text).input_ids) < len(tokens)
    assert len(tokenizer) == len(tokens)
    tokenizer.save_pretrained(tmp_path / "saved")
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path / "saved")
    assert [again(text).input_ids for text in TEXTS] == [original(text).input_ids for text in TEXTS]


def test_a_tokenizer_beside_a_file_that_has_none(tmp_path: Path) -> None:
    original, tokens, _ = byte_level("gpt-2")
    path = by_hand(tmp_path / "x.gguf", make("llama", vocab_size=len(tokens)), tokens=lambda writer, size: None)
    with pytest.raises(InputError, match="holds no tokenizer"):
        lb.load_model(path)
    original.save_pretrained(tmp_path)
    assert lb.load_model(path)[1]("the cat").input_ids == original("the cat").input_ids
    path = by_hand(tmp_path / "y.gguf", make("llama", vocab_size=300), tokens=lambda writer, size: None)
    with pytest.raises(InputError, match=f"its tokenizer has {len(tokens)} tokens, its model 300"):
        lb.load_model(path)


def test_whole_words_are_written_as_llama_cpp_takes_them(tmp_path: Path) -> None:
    """It takes a word that is a token for that token, whatever merges make of it, where the file says ``llama-bpe``."""
    original, tokens, _ = byte_level("llama-bpe", begin="<|begin|>")
    model = make("llama", vocab_size=len(tokens), num_hidden_layers=1)
    state = json.loads(original.backend_tokenizer.to_str())
    for whole, kind in ((True, "llama-bpe"), (False, "smaug-bpe")):
        state["model"]["ignore_merges"] = whole
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))
        path = write_gguf(model, tokenizer, tmp_path / f"{kind}.gguf")
        assert open_gguf(path).fields["tokenizer.ggml.pre"].contents() == kind
    other, tokens, _ = byte_level("qwen2")
    state = json.loads(other.backend_tokenizer.to_str())
    state["model"]["ignore_merges"] = True
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))
    with pytest.raises(InputError, match="takes whole words for tokens"):
        write_gguf(make("qwen2", vocab_size=len(tokens), num_hidden_layers=1), tokenizer, tmp_path / "x.gguf")


def test_a_unigram_tokenizer_is_not_rebuilt_by_another_normalization(tmp_path: Path) -> None:
    def unigram(writer: Any, size: int) -> None:
        names = ["<pad>", "</s>", "<unk>", SPACE, *"abcdefgh\n"]
        writer.add_tokenizer_model("t5")
        writer.add_token_list([*names, *(f"[PAD{i}]" for i in range(len(names), size))])
        writer.add_token_scores([-float(i) for i in range(size)])
        writer.add_token_types([3, 3, 2] + [1] * (len(names) - 3) + [5] * (size - len(names)))
        writer.add_unk_token_id(2)

    path = by_hand(tmp_path / "x.gguf", make("llama", num_hidden_layers=1), tokens=unigram)
    with pytest.raises(InputError, match=r"x\.gguf: its tokenizer is a unigram one"):
        lb.load_model(path)

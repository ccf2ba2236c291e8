"""Tokenizers of GGUF files: rebuilt from their keys, and written as keys where their kind is known for certain."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmbrain._validation import InputError
from llmbrain.checkpoints.gguf_opening import open_gguf

if TYPE_CHECKING:
    import gguf
    from transformers import PreTrainedTokenizerBase

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)  # fmt: skip
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_DIGITS = "digits"
# How byte-level BPE tokenizers split text before merging (`tokenizer.ggml.pre`); None: as GPT-2 does.
PRE_TOKENIZERS: dict[str, str | None] = {
    "gpt-2": None,
    "phi-2": None,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "smaug-bpe": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "command-r": _DIGITS,
}
WHOLE = "tokenizer.huggingface.json"  # the GGUF standard's key for the whole tokenizer.json
SPACE = "\u2581"  # how SentencePiece writes a space
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # llama.cpp's types of tokens


def set_pre_tokenizer(tokenizer: Any, pre: str, spaced: bool) -> None:
    """Split text as the file's kind says; transformers splits every byte-level tokenizer as GPT-2's."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

    rule = PRE_TOKENIZERS[pre]
    if rule is None:
        return
    first = Digits(individual_digits=True) if rule == _DIGITS else Split(Regex(rule), behavior="isolated", invert=False)
    level = ByteLevel(add_prefix_space=spaced, use_regex=rule == _DIGITS)
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([first, level])


def write_whole(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase) -> None:
    """Keep the whole tokenizer.json as well: programs that read it need not rebuild anything."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        writer.add_string(WHOLE, backend.to_str())


def read_whole(fields: dict[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer that a file keeps whole, with its special tokens and chat template."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(fields[WHOLE])
    special = {}
    for role, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"), ("sep", "seperator")):
        number = fields.get(f"tokenizer.ggml.{name}_token_id")
        if number is not None:
            special[f"{role}_token"] = backend.id_to_token(int(number))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.chat_template = fields.get("tokenizer.chat_template")
    return tokenizer


def check_like(
    like: str | Path, vocabulary: int, tokenizer: PreTrainedTokenizerBase | None = None
) -> dict[str, gguf.ReaderField]:
    """The fields of the GGUF file of a model, from which a tokenizer is to be taken.

    Raises
    ------
    InputError
        If `like` is no GGUF file, its tokenizer has not as many tokens as the model, or others than `tokenizer`.
    FileNotFoundError
        If it is not there.
    """
    if not Path(like).is_file():
        raise FileNotFoundError(f"like={str(like)!r}: there is no such file")
    fields = open_gguf(Path(like)).fields
    tokens = fields.get("tokenizer.ggml.tokens")
    if tokens is None:
        raise InputError(f"like={str(like)!r} holds no tokenizer: name the GGUF of the dense model")
    if len(tokens.data) != vocabulary:
        raise InputError(
            f"like={str(like)!r} has {len(tokens.data)} tokens, the model {vocabulary}: it is of another model"
        )
    if tokenizer is not None:
        _check_same(tokenizer, tokens.contents(), like)
    return dict(fields)


def copy_tokenizer(writer: gguf.GGUFWriter, fields: dict[str, gguf.ReaderField]) -> None:
    """Write the tokenizer keys of another GGUF file, of which these are the fields."""
    import gguf

    for name, field in fields.items():
        if not name.startswith("tokenizer.") or name == WHOLE:
            continue
        sub = field.types[1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], sub)


def alike(there: str, ours: str) -> bool:
    """Whether two names are of one token: transformers writes Gemma's byte 9 as the character, its spaces as marks."""
    if there == ours or (there == "<0x09>" and ours == "\t") or (len(ours) == 1 and there == _byte_level_name(ours)):
        return True
    return len(there) > 1 and not there.strip(" ") and ours == SPACE * len(there)


def _byte_level_name(character: str) -> str:
    """What byte-level tokenizers call a character of ASCII."""
    number = ord(character)
    return chr(256 + number) if number < 33 else chr(289) if number == 127 else character


def _check_same(tokenizer: PreTrainedTokenizerBase, tokens: list[str], like: str | Path) -> None:
    """Refuse a file whose tokens are others; added ones, which llama.cpp's converter renames, may have other names."""
    added = tokenizer.get_added_vocab()
    ours = {number: token for token, number in tokenizer.get_vocab().items() if token not in added}
    differ = [n for n, token in sorted(ours.items()) if n >= len(tokens) or not alike(tokens[n], token)]
    if differ:
        number = differ[0]
        there = tokens[number] if number < len(tokens) else None
        raise InputError(
            f"like={str(like)!r} is of another model: {len(differ):,} of {len(ours):,} tokens are others, such as "
            f"{number}, {there!r} there and {ours[number]!r} in the tokenizer"
        )


def write_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
    """Write a tokenizer's keys, where its kind is known for certain.

    Known are byte-level BPE tokenizers that split text as one of `PRE_TOKENIZERS`, BPE with bytes to fall back on
    whose merges are just those that a SentencePiece tokenizer with the same pieces makes, and tokenizers of single
    characters of ASCII (of which llama.cpp leaves out what they do not know: a warning says so).

    Raises
    ------
    InputError
        If it is of another kind: then ``like=`` a GGUF of the dense model has it.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _unknown(f"{type(tokenizer).__name__} is not a fast tokenizer")
    state = json.loads(backend.to_str())
    characters = _is_of_characters(state)
    if state["model"].get("type") != "BPE" and not characters:
        raise _unknown(f"its model is {state['model'].get('type')!r}")
    kind = None if characters else _byte_level(state)
    if characters:
        _write_characters(writer, tokenizer, state, vocabulary)
    elif kind is not None:
        _write_byte_level(writer, tokenizer, state, kind, vocabulary)
    else:
        _write_pieces(writer, tokenizer, state, vocabulary)
    for role in ("bos", "eos", "unk", "pad", "sep"):
        number = getattr(tokenizer, f"{role}_token_id", None)
        if number is not None:
            getattr(writer, f"add_{role}_token_id")(number)
    first = tokenizer("a").input_ids
    writer.add_add_bos_token(bool(first) and first[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(bool(first) and first[-1] == tokenizer.eos_token_id)
    if getattr(tokenizer, "chat_template", None):
        writer.add_chat_template(tokenizer.chat_template)


def _unknown(why: str) -> InputError:
    return InputError(
        f"the tokenizer cannot be written to a GGUF for certain ({why}): give like= (--like) a GGUF of the "
        "dense model, whose tokenizer is then taken"
    )


def _byte_level(state: dict[str, Any]) -> str | None:
    """The `tokenizer.ggml.pre` of a byte-level tokenizer, None where it is no byte-level one."""
    pre = state.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", [pre])
    if not any(step.get("type") == "ByteLevel" for step in steps):
        return None
    if state.get("normalizer") and state["normalizer"].get("type") != "NFC":
        raise _unknown(f"it normalizes text by {state['normalizer'].get('type')}")
    kinds = [step.get("type") for step in steps]
    last = steps[-1]
    whole_words = bool(state["model"].get("ignore_merges"))  # a piece of text that is a token is that token
    if last.get("add_prefix_space"):
        raise _unknown("it adds a space before text")
    plain = not state.get("normalizer")
    splits = kinds == ["Split", "ByteLevel"] and steps[0].get("behavior") == "Isolated"
    rule = (steps[0].get("pattern") or {}).get("Regex") if splits and not last.get("use_regex", True) else None
    if rule == _LLAMA3 and plain:
        return "llama-bpe" if whole_words else "smaug-bpe"
    if whole_words:
        raise _unknown("it takes whole words for tokens, which llama.cpp does of Llama 3's kind alone")
    if rule == _QWEN2:
        return "qwen2"
    if kinds == ["ByteLevel"] and last.get("use_regex", True) and plain:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and last.get("use_regex", True) and plain:
        return "smollm"
    raise _unknown("it splits text in a way of its own")


def _tokens(tokenizer: Any, state: dict[str, Any], vocabulary: int) -> tuple[list[str], list[int]]:
    """Every token and its type, padded to the model's vocabulary."""
    added = {entry["id"]: entry for entry in state.get("added_tokens", [])}
    names = dict(zip(state["model"]["vocab"].values(), state["model"]["vocab"]))
    if max([*names, *added]) >= vocabulary:
        raise InputError(f"the tokenizer numbers tokens up to {max([*names, *added])}, the model has {vocabulary}")
    tokens, types = [], []
    for i in range(vocabulary):
        entry = added.get(i)
        if entry is not None:
            tokens.append(entry["content"])
            types.append(CONTROL if entry["special"] else USER_DEFINED)
        elif i in names:
            tokens.append(names[i])
            types.append(NORMAL)
        else:
            tokens.append(f"[PAD{i}]")
            types.append(5)
    return tokens, types


def _write_byte_level(writer: Any, tokenizer: Any, state: dict[str, Any], kind: str, vocabulary: int) -> None:
    tokens, types = _tokens(tokenizer, state, vocabulary)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in state["model"]["merges"]])


def _is_of_characters(state: dict[str, Any]) -> bool:
    """Whether a tokenizer has a token for each character, all of ASCII, and knows no others."""
    special = {entry["content"] for entry in state.get("added_tokens", [])}
    names = set(state["model"].get("vocab", ())) - special if state["model"].get("type") == "WordLevel" else set()
    every = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
    single = all(len(name) == 1 and name.isascii() for name in names)
    return bool(names) and single and state.get("pre_tokenizer") == every and not state.get("normalizer")


def _write_characters(writer: Any, tokenizer: Any, state: dict[str, Any], vocabulary: int) -> None:
    """Characters of ASCII are bytes: a byte-level tokenizer that merges none."""
    tokens, types = _tokens(tokenizer, state, vocabulary)
    warnings.warn(
        f"the tokenizer knows {types.count(NORMAL)} characters: llama.cpp leaves out all others, which it reads as "
        f"{tokenizer.unk_token!r} itself",
        UserWarning,
        stacklevel=2,
    )
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([_byte_level_name(t) if kind == NORMAL else t for t, kind in zip(tokens, types)])
    writer.add_token_types(types)
    writer.add_token_merges(["\u0100 \u0100"])  # llama.cpp asks for some: of two bytes that are no tokens


def _write_pieces(writer: Any, tokenizer: Any, state: dict[str, Any], vocabulary: int) -> None:
    """SentencePiece's BPE: the pair whose piece has the highest score is merged first."""
    if not state["model"].get("byte_fallback"):
        raise _unknown("it is neither byte-level nor does it fall back on bytes")
    spaced = _adds_space(state)
    pieces = state["model"]["vocab"]
    pairs = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in state["model"]["merges"]]
    rank: dict[str, int] = {}
    for i, (left, right) in enumerate(pairs):
        rank.setdefault(left + right, i)
    listed = set(pairs)
    for piece in rank:
        for cut in range(1, len(piece)):
            if piece[:cut] in pieces and piece[cut:] in pieces and (piece[:cut], piece[cut:]) not in listed:
                raise _unknown(f"it never merges {piece[:cut]!r} and {piece[cut:]!r} though {piece!r} is a token")
    tokens, types = _tokens(tokenizer, state, vocabulary)
    for i, token in enumerate(tokens):
        if token.startswith("<0x") and token.endswith(">") and len(token) == 6:
            types[i] = BYTE
    if tokenizer.unk_token_id is not None:
        types[tokenizer.unk_token_id] = UNKNOWN
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(rank[t]) if t in rank else -1e6 if types[i] == NORMAL else 0.0
                             for i, t in enumerate(tokens)])  # fmt: skip
    writer.add_token_types(types)
    writer.add_add_space_prefix(spaced)


def _adds_space(state: dict[str, Any]) -> bool:
    """Whether a space is put before text; spaces must become SentencePiece's mark in one of the two known ways."""
    normalizer, pre = state.get("normalizer") or {}, state.get("pre_tokenizer") or {}
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    marks = pre.get("type") == "Metaspace" and pre.get("replacement") == SPACE and not pre.get("split", True)
    if marks and not steps and pre.get("prepend_scheme") in ("first", "always", "never"):
        return pre["prepend_scheme"] != "never"
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if not pre and steps == [{"type": "Prepend", "prepend": SPACE}, replaced]:
        return True
    if not pre and steps == [replaced]:
        return False
    raise _unknown("it writes spaces in a way of its own")

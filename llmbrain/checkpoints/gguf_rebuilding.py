"""Tokenizers of GGUF files that other programs wrote: rebuilt by transformers, then put right where it leaves keys out.

What is put right was held against llama.cpp, which reads text as the tokenizers did from which such files were made
(but for Unicode that is not composed, which it takes as it is).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmbrain._validation import InputError
from llmbrain.checkpoints.gguf_opening import first_line
from llmbrain.checkpoints.gguf_quiet import quiet
from llmbrain.checkpoints.gguf_tokenizers import (
    CONTROL,
    PRE_TOKENIZERS,
    SPACE,
    USER_DEFINED,
    alike,
    read_whole,
    set_pre_tokenizer,
)
from llmbrain.checkpoints.gguf_tokenizers import WHOLE as WHOLE_TOKENIZER

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Kinds of Llama 3: a piece of text that is a token is that token, whatever merges make of it; and text begins with the
# begin-of-sequence token where a file does not say.
LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
COMPOSED = ("qwen2",)  # kinds whose tokenizers compose Unicode first (NFC)
ROLES = (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"), ("sep", "seperator"), ("mask", "mask"))


def load_tokenizer(
    path: Path, reader: Any, fields: dict[str, Any], vocabulary: int | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a GGUF file: of a ``tokenizer.json`` beside it, else rebuilt and checked against its tokens."""
    from transformers import AutoTokenizer

    beside = (path.parent / "tokenizer.json").is_file() and (path.parent / "tokenizer_config.json").is_file()
    kind, pre = str(fields.get("tokenizer.ggml.model", "none")), str(fields.get("tokenizer.ggml.pre", "default"))
    written = reader.fields.get("tokenizer.ggml.tokens")
    if written is None and not beside:
        raise InputError(f"{path} holds no tokenizer: lay its tokenizer.json and tokenizer_config.json beside the file")
    tokens = [] if written is None else written.contents()
    try:
        if WHOLE_TOKENIZER in fields:
            tokenizer = read_whole(fields)
        elif beside:
            tokenizer = AutoTokenizer.from_pretrained(path.parent)
        else:
            if kind == "gpt2" and pre not in PRE_TOKENIZERS:
                raise InputError(
                    f"{path}: its tokenizer splits text as {pre!r}, which is unknown here: lay its tokenizer.json and "
                    "tokenizer_config.json beside the file"
                )
            if kind == "t5":  # its classes of characters and white space are not those that transformers gives it
                raise InputError(
                    f"{path}: its tokenizer is a unigram one, whose normalization of text is not rebuilt: lay its "
                    "tokenizer.json and tokenizer_config.json beside the file"
                )
            types = reader.fields.get("tokenizer.ggml.token_type")
            tokenizer = _rebuilt(path, fields, tokens, [] if types is None else types.contents())
    except InputError:
        raise
    except Exception as error:  # the tokenizers library raises bare exceptions
        raise InputError(f"{path}: its tokenizer ({kind!r}) cannot be rebuilt: {first_line(error)}") from error
    _check_tokens(path, tokens, tokenizer, vocabulary)
    return tokenizer


def _rebuilt(path: Path, fields: dict[str, Any], tokens: list[str], types: list[int]) -> PreTrainedTokenizerBase:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    with quiet():
        found = PreTrainedTokenizerFast.from_pretrained(path.parent, gguf_file=path.name)
    kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "default")
    state = json.loads(found.backend_tokenizer.to_str())
    known = state["added_tokens"]
    # Some that transformers' classes bring with them have no row in the model.
    state["added_tokens"] = [entry for entry in known if entry["id"] < len(tokens)]
    special = {}
    for role, name in ROLES:
        number = fields.get(f"tokenizer.ggml.{name}_token_id")
        if number is not None and 0 <= int(number) < len(tokens):
            special[f"{role}_token"] = tokens[int(number)]
    add_bos = bool(fields.get("tokenizer.ggml.add_bos_token", kind == "llama" or (kind == "gpt2" and pre in LLAMA3)))
    add_eos = bool(fields.get("tokenizer.ggml.add_eos_token", False))
    if kind == "gpt2":
        _name_as_written(state, tokens, types)
        if pre in LLAMA3:
            state["model"]["ignore_merges"] = True
        if pre in COMPOSED:
            state["normalizer"] = {"type": "NFC"}
    elif kind == "llama":
        _set_pieces(state, tokens, fields)
    state["post_processor"] = None  # made anew, of what is added in front and behind
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), add_bos_token=add_bos, add_eos_token=add_eos, **special
    )
    tokenizer.chat_template = found.chat_template
    if kind == "gpt2":
        set_pre_tokenizer(tokenizer, str(pre), bool(fields.get("tokenizer.ggml.add_space_prefix", False)))
    return tokenizer


def _name_as_written(state: dict[str, Any], tokens: list[str], types: list[int]) -> None:
    """Give added tokens of a byte-level tokenizer the names that the file gives them, and match them whole in text.

    transformers writes what is not in the alphabet of bytes in it: the text of such a token is then not that token.
    """
    vocabulary = {number: name for name, number in state["model"]["vocab"].items()}
    names = {i: vocabulary.get(i, token) for i, token in enumerate(tokens)}
    added = {entry["id"]: entry for entry in state["added_tokens"]}
    for i, (token, kind) in enumerate(zip(tokens, types)):
        if kind in (CONTROL, USER_DEFINED):
            names[i] = token
            added[i] = {"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
                        "normalized": False, "special": kind == CONTROL}  # fmt: skip
    state["model"]["vocab"] = {name: number for number, name in names.items()}
    state["added_tokens"] = [added[i] for i in sorted(added)]


def _set_pieces(state: dict[str, Any], tokens: list[str], fields: dict[str, Any]) -> None:
    """Spaces of a SentencePiece tokenizer: whether text, and what follows a special token, gets one in front."""
    unknown = fields.get("tokenizer.ggml.unknown_token_id")
    if unknown is not None and 0 <= int(unknown) < len(tokens):
        state["model"]["unk_token"] = tokens[int(unknown)]
    if (state["pre_tokenizer"] or {}).get("type") != "Metaspace":  # Gemma's and Phi-3's are right
        return
    marked: dict[str, Any] = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    decoder = [step for step in state["decoder"]["decoders"] if step["type"] != "Strip"]
    if fields.get("tokenizer.ggml.add_space_prefix", True):
        marked = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, marked]}
        decoder = state["decoder"]["decoders"]
    state |= {"normalizer": marked, "pre_tokenizer": None, "decoder": {"type": "Sequence", "decoders": decoder}}


def _check_tokens(path: Path, tokens: list[str], tokenizer: Any, vocabulary: int | None) -> None:
    """A rebuilt (or other) tokenizer must give every token the number that it has in the file."""
    if vocabulary is not None and (size := len(tokens) or len(tokenizer)) > vocabulary:
        raise InputError(f"{path}: its tokenizer has {size} tokens, its model {vocabulary}")
    known = tokenizer.convert_ids_to_tokens(range(min(len(tokens), len(tokenizer))))
    padding = ("[PAD", "<pad", "<unused", "[unused", "<|dummy")
    for i, token in enumerate(tokens):
        other = known[i] if i < len(known) else None
        if not (other is not None and alike(token, other)) and not (other is None and token.startswith(padding)):
            raise InputError(
                f"{path}: its tokenizer cannot be rebuilt: token {i} is {token!r}, the rebuilt one says {other!r}"
            )

"""GGUF files in: dequantized into ordinary linear layers, with their tokenizer, free of marks of quantization.

transformers reads the tensors; what it would pass over without a word (tensors and keys that it does not know, the
pre-tokenizer, Llama 3's rotary factors) is put right here or refused.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llmbrain._validation import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

MAGIC = b"GGUF"
ROPE_FACTORS = "rope_freqs.weight"
LLAMA3_ROPE = tuple(
    {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 8192} for factor in (8.0, 32.0, 16.0)
)  # fmt: skip

# How byte-level BPE tokenizers split text before merging (`tokenizer.ggml.pre`); None: as transformers builds it.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)  # fmt: skip
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_DIGITS = "digits"
PRE_TOKENIZERS: dict[str, str | None] = {
    "gpt-2": None,
    "gpt2": None,
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


def is_gguf(path: str | Path) -> bool:
    """Whether a path names a GGUF file: by its ending, or by its first bytes."""
    path = Path(path)
    if path.suffix.lower() == ".gguf":
        return True
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == MAGIC


def load_gguf(
    path: str | Path, *, dtype: torch.dtype | str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a GGUF file as an ordinary model of transformers and its tokenizer.

    Parameters
    ----------
    path : str or Path
        A file of one part, of an architecture that transformers reads.
    dtype : torch.dtype or str, optional
        Of the dequantized weights; default float32.

    Returns
    -------
    (model, tokenizer)
        In evaluation mode. The tokenizer is that of a ``tokenizer.json`` beside the file where there is one, else it is
        rebuilt from the file, chat template included.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    InputError
        If the file is truncated, split, of an unknown architecture, holds what the model would not use, or its
        tokenizer cannot be rebuilt.
    """
    from transformers import AutoConfig

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"GGUF file {path} does not exist")
    reader = _open(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if name.split(".")[-1] not in _LONG}
    architecture = str(fields.get("general.architecture", ""))
    _refuse(path, architecture, fields)
    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    except (ValueError, KeyError, NotImplementedError, TypeError, OSError) as error:
        raise InputError(
            f"{path}: its architecture {architecture!r} is not one that transformers reads: {_first(error)}"
        ) from error
    _set_rope(path, reader, config)
    model = _model(path, config, dtype)
    _refuse_unused(path, reader, model, architecture)
    for name, tensor in model.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise InputError(f"{path}: tensor {name} holds values that are not finite: the file is damaged")
    return model.eval(), load_tokenizer(path, reader, fields, int(config.get_text_config().vocab_size))


_LONG = {"tokens", "merges", "scores", "token_type"}


def _open(path: Path) -> Any:
    import gguf

    with path.open("rb") as file:
        head = file.read(4)
    if head != MAGIC:
        raise InputError(f"{path} is not a GGUF file: it begins with {head!r}, not {MAGIC!r}")
    try:
        return gguf.GGUFReader(path)
    except (ValueError, KeyError, IndexError, struct.error, UnicodeDecodeError, OverflowError, MemoryError) as error:
        raise InputError(f"{path} is truncated or damaged: {_first(error)}") from error


def _refuse(path: Path, architecture: str, fields: dict[str, Any]) -> None:
    if int(fields.get("split.count", 0) or 0) > 1:
        raise InputError(
            f"{path} is one part of {fields['split.count']}: join them first (llama-gguf-split --merge FIRST OUT)"
        )
    if not architecture:
        raise InputError(f"{path} does not say its architecture (general.architecture)")
    if int(fields.get(f"{architecture}.expert_count", 0) or 0) > 0:
        raise InputError(f"{path} is a mixture of experts in a GGUF, which is not read: load its transformers folder")
    scaling = fields.get(f"{architecture}.rope.scaling.type", "none")
    if scaling != "none":
        raise InputError(f"{path} scales its rotary positions ({scaling!r}), which a GGUF does not say in full: "
                         "load its transformers folder")  # fmt: skip
    for key in ("feed_forward_length", "attention.head_count", "attention.head_count_kv"):
        value = fields.get(f"{architecture}.{key}")
        if isinstance(value, (list, tuple)) and len(set(value)) > 1:
            raise InputError(f"{path} has layers of different {key}: load the folder that it was written from")


def _set_rope(path: Path, reader: Any, config: PretrainedConfig) -> None:
    """Llama 3's rotary factors: the file holds them as a tensor, transformers wants the rule that makes them."""
    factors = next((t for t in reader.tensors if t.name == ROPE_FACTORS), None)
    if factors is None:
        return
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    text = config.get_text_config()
    base = dict(text.rope_parameters)
    stored = torch.tensor(np.array(factors.data, dtype=np.float32))
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    plain = 1.0 / base["rope_theta"] ** (torch.arange(0, head, 2, dtype=torch.float32) / head)
    if torch.equal(stored, torch.ones_like(stored)):
        return
    for rule in LLAMA3_ROPE:
        text.rope_parameters = {**base, **rule}
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](text, torch.device("cpu"))
        if stored.shape == plain.shape and torch.allclose(plain / scaled, stored, rtol=1e-4):
            return
    text.rope_parameters = base
    raise InputError(f"{path}: its rotary factors ({ROPE_FACTORS}) follow no known rule: load its transformers folder")


def _model(path: Path, config: PretrainedConfig, dtype: torch.dtype | str | None) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    try:
        with _quiet_bars():
            model, found = AutoModelForCausalLM.from_pretrained(
                path.parent,
                gguf_file=path.name,
                config=config,
                dtype=torch.float32 if dtype in (None, "auto") else dtype,
                output_loading_info=True,
            )
    except (ValueError, KeyError, IndexError, NotImplementedError, RuntimeError, TypeError, OSError) as error:
        raise InputError(f"{path} cannot be dequantized into a model: {_first(error)}") from error
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if found.get(kind):
            keys = sorted(map(str, found[kind]))
            raise InputError(f"{path} does not fill its model: {kind.replace('_', ' ')} {keys[0]} ({len(keys)} in all)")
    for mark in ("hf_quantizer", "is_quantized", "quantization_method"):
        model.__dict__.pop(mark, None)
    for part in (model.config, model.config.get_text_config()):
        part.__dict__.pop("quantization_config", None)
        part._name_or_path = str(path)
    return model


def _refuse_unused(path: Path, reader: Any, model: PreTrainedModel, architecture: str) -> None:
    """Every tensor of the file must have a place in the model; transformers drops the others without a word."""
    import gguf

    arch = next((key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), None)
    if arch is None:
        return  # another name of a family: `found` has told that all of the model was filled
    names = gguf.get_tensor_name_map(arch, model.config.get_text_config().num_hidden_layers)
    used = {ROPE_FACTORS}
    for full in model.state_dict():
        name, _, suffix = full.rpartition(".")
        for candidate in (name, name.removeprefix("model."), name.replace("language_model.", "")):
            mapped = names.get_name(candidate)
            if mapped is not None:
                used.add(f"{mapped}.{suffix}")
    left = sorted(t.name for t in reader.tensors if t.name not in used)
    if left:
        raise InputError(f"{path} holds {len(left)} tensors that the model does not use, such as {left[0]}")


def load_tokenizer(
    path: Path, reader: Any, fields: dict[str, Any], vocabulary: int | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a GGUF file: of a ``tokenizer.json`` beside it, else rebuilt and checked against its tokens."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split
    from transformers import AutoTokenizer

    beside = (path.parent / "tokenizer.json").is_file() and (path.parent / "tokenizer_config.json").is_file()
    kind, pre = str(fields.get("tokenizer.ggml.model", "none")), str(fields.get("tokenizer.ggml.pre", "default"))
    if not beside and kind == "gpt2" and pre not in PRE_TOKENIZERS:
        raise InputError(
            f"{path}: its tokenizer splits text as {pre!r}, which is not known here: lay its tokenizer.json and "
            "tokenizer_config.json beside the file"
        )
    try:
        with _quiet_bars():
            tokenizer = AutoTokenizer.from_pretrained(path.parent, **({} if beside else {"gguf_file": path.name}))
    except (ValueError, KeyError, IndexError, NotImplementedError, TypeError, AttributeError, OSError) as error:
        raise InputError(f"{path}: its tokenizer ({kind!r}) cannot be rebuilt: {_first(error)}") from error
    if not beside and kind == "gpt2":
        rule, spaced = PRE_TOKENIZERS[pre], bool(fields.get("tokenizer.ggml.add_space_prefix", False))
        if rule == _DIGITS:
            tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
                [Digits(individual_digits=True), ByteLevel(add_prefix_space=spaced, use_regex=True)]
            )
        elif rule is not None:
            split = Split(Regex(rule), behavior="isolated", invert=False)
            tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
                [split, ByteLevel(add_prefix_space=spaced, use_regex=False)]
            )
    written = reader.fields.get("tokenizer.ggml.tokens")
    if written is None:
        raise InputError(f"{path} holds no tokenizer: lay its tokenizer.json and tokenizer_config.json beside the file")
    _check_tokens(path, written.contents(), tokenizer, vocabulary)
    return tokenizer


def _check_tokens(path: Path, tokens: list[str], tokenizer: Any, vocabulary: int | None) -> None:
    """A rebuilt (or other) tokenizer must give every token the number that it has in the file."""
    if vocabulary is not None and len(tokens) > vocabulary:
        raise InputError(f"{path}: its tokenizer has {len(tokens)} tokens, its model {vocabulary}")
    known = tokenizer.convert_ids_to_tokens(range(min(len(tokens), len(tokenizer))))
    padding = ("[PAD", "<pad", "<unused", "[unused", "<|dummy")
    for i, token in enumerate(tokens):
        other = known[i] if i < len(known) else None
        if other != token and not (other is None and token.startswith(padding)):
            raise InputError(
                f"{path}: its tokenizer cannot be rebuilt: token {i} is {token!r}, the rebuilt one says {other!r}"
            )


@contextmanager
def _quiet_bars() -> Iterator[None]:
    """transformers' bars of loading off within the block."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _first(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)

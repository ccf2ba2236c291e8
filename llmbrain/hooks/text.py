"""Texts as a model reads them: one tokenizing, then runs and blocks (scans) or packed windows (calibration).

A text becomes the tokens that its tokenizer gives by default, special tokens included: a begin-of-sequence token where
the tokenizer puts one in front, ``[CLS]`` and ``[SEP]`` around, or none. A scan reads each text by itself, in blocks;
windows are the same ids of all texts, joined and cut. So what networks were found in and what a model is calibrated on
are the same tokens.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import pairwise
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llmbrain._validation import InputError, check_whole
from llmbrain.anatomy.experts import is_experts, multiplies_in_groups
from llmbrain.anatomy.families import context_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Model = TypeVar("Model", bound=nn.Module)
MAX_WINDOW = 2048
ENCODED_AT_ONCE = 2**14  # characters
JSON_PIECE = 4096  # tokens
BATCH_TOKENS = 2048  # tokens in one forward pass: enough to be fast, few enough for logits over a large vocabulary
# How any text becomes tokens, in scans and windows alike: whole, with the tokenizer's default special tokens.
TOKENIZING = {"padding": False, "truncation": False, "return_attention_mask": False, "verbose": False}


class ScanWarning(UserWarning):
    """Something about a text that the user should know; the scan goes on."""


@dataclass
class Run:
    """One text as the model reads it. `offsets` are character spans, None where the tokenizer does not know them.

    All runs of a study are held while it is made: numbers are int32 here, and `tokens` share their strings.
    """

    name: str
    text: str
    token_ids: NDArray[np.int32]
    tokens: list[str]
    offsets: NDArray[np.int32] | None
    events: pd.DataFrame | None

    def to_json(self) -> Iterator[str]:
        """What a store keeps: one line of JSON, in pieces, since the whole takes many times the text."""
        events = None if self.events is None else self.events.to_dict(orient="list")
        yield f'{{"name": {json.dumps(self.name)}, "text": {json.dumps(self.text)}'
        for name, values in (("token_ids", self.token_ids), ("tokens", self.tokens), ("offsets", self.offsets)):
            yield f', "{name}": {"null" if values is None else "["}'
            if values is None:
                continue
            for start in range(0, len(values), JSON_PIECE):
                piece = values[start : start + JSON_PIECE]
                text = json.dumps(piece if isinstance(piece, list) else piece.tolist())
                yield (", " if start else "") + text[1:-1]
            yield "]"
        yield f', "events": {json.dumps(events)}}}\n'

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Run:
        """Rebuild from `to_record`."""
        offsets, events = record["offsets"], record["events"]
        return cls(
            record["name"],
            record["text"],
            np.array(record["token_ids"], dtype=np.int32),
            [sys.intern(token) for token in record["tokens"]],
            None if offsets is None else np.array(offsets, dtype=np.int32).reshape(-1, 2),
            None if events is None else pd.DataFrame(events),
        )


@dataclass(frozen=True, slots=True)
class Block:
    """Tokens ``start..stop`` of one run: what the model reads at once."""

    run: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def blocks_of(runs: Sequence[Run], size: int | None) -> list[Block]:
    """Cut every run into blocks of at most `size` tokens, in order."""
    return [
        Block(i, start, min(start + (size or len(run.tokens)), len(run.tokens)))
        for i, run in enumerate(runs)
        for start in range(0, len(run.tokens), size or len(run.tokens))
    ]


def read_texts(texts: Iterable[str] | str, tokenizer: Any, n_tokens: int | None = None) -> list[Run]:
    """Tokenize texts with the tokenizer's default special tokens; at most `n_tokens` tokens of each are kept.

    Raises
    ------
    InputError
        If there is no text, a text is empty, or a text has no token.
    """
    texts = listed_texts(texts)
    if not texts:
        raise InputError("texts is empty: give at least one text")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"texts[{i}] is a {type(text).__name__}: texts must be strings")
        if not text:
            raise InputError(f"texts[{i}] is an empty text")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise InputError(f"texts[{i}] holds half a surrogate pair: it was decoded wrongly") from None
    if n_tokens is not None:
        check_whole("n_tokens", n_tokens, 1)
    runs = []
    dropped = 0
    pieces: dict[int, str] = {}
    coded = (found for part in _parts(texts) for found in encode(tokenizer, part))
    for i, (text, (ids, offsets, lost)) in enumerate(zip(texts, coded)):
        name = getattr(text, "name", None) or f"run-{i + 1:04d}"
        if not ids:
            raise InputError(f"texts[{i}]={_short(text)} has no token: the tokenizer knows none of its characters")
        dropped += lost
        events = _cut(getattr(text, "events", None), len(ids), n_tokens, name)
        ids, offsets = ids[:n_tokens], offsets if offsets is None else offsets[:n_tokens]
        tokens = _decoded(tokenizer, ids, pieces)
        spans = None if offsets is None else offsets.astype(np.int32)
        runs.append(Run(name, str(text), np.array(ids, dtype=np.int32), tokens, spans, events))
    if dropped:
        warnings.warn(f"the tokenizer drops {dropped} characters that it does not know", ScanWarning, stacklevel=3)
    return runs


def listed_texts(texts: Iterable[str] | str) -> list[str]:
    """Texts in their order, one as a list: what iterates over something else (columns, keys, bytes) is refused.

    Raises
    ------
    InputError
        Says what to give.
    """
    if isinstance(texts, str):
        return [texts]
    kind = type(texts).__name__
    if hasattr(texts, "columns"):
        raise InputError(f"texts is a {kind}: give one column of it, such as texts['text']")
    if isinstance(texts, Mapping):
        raise InputError(f"texts is a {kind}: give its texts, such as list(texts.values())")
    if isinstance(texts, (set, frozenset)):
        raise InputError(f"texts is a {kind}, which has no order: give a list")
    listable = hasattr(texts, "__iter__") or hasattr(texts, "__getitem__")
    if isinstance(texts, (bytes, PurePath)) or not listable or getattr(texts, "ndim", 1) == 0:
        raise InputError(f"texts is a {kind}: texts must be strings, or a list of them")
    return list(texts)


def _parts(texts: Sequence[str]) -> Iterator[list[str]]:
    """Texts that are tokenized together: what tokenizers give takes many times the text."""
    part: list[str] = []
    for text in texts:
        part.append(text)
        if sum(map(len, part)) >= ENCODED_AT_ONCE:
            yield part
            part = []
    if part:
        yield part


def cut_runs(runs: Sequence[Run], length: int | None) -> list[Run]:
    """Runs of at most `length` tokens: a longer text becomes several of about equal length, one after another.

    Each keeps its own ids, its part of the text and of the events. What has no name of its own is numbered anew.
    """
    if length is None or all(len(run.tokens) <= length for run in runs):
        return list(runs)
    cut: list[Run] = []
    for run in runs:
        n = len(run.tokens)
        k = -(-n // length)
        edges = [n * i // k for i in range(k + 1)]
        for i, (start, stop) in enumerate(pairwise(edges)):
            unnamed = re.fullmatch(r"run-\d+", run.name)
            name = f"run-{len(cut) + 1:04d}" if unnamed else run.name if k == 1 else f"{run.name}-{i + 1}"
            cut.append(_part(run, name, start, stop) if k > 1 else replace(run, name=name))
    return cut


def _part(run: Run, name: str, start: int, stop: int) -> Run:
    """Tokens ``start..stop`` of a run, with their text and their events."""
    text, offsets = "".join(run.tokens[start:stop]), None
    if run.offsets is not None:
        real = np.flatnonzero(run.offsets[:, 1] > run.offsets[:, 0])  # special tokens have no characters
        begins = [*run.offsets[real, 0].tolist(), len(run.text)]
        first, last = (begins[int(np.searchsorted(real, edge))] if edge else 0 for edge in (start, stop))
        text, offsets = run.text[first:last], run.offsets[start:stop].copy()
        offsets[offsets[:, 1] > offsets[:, 0]] -= first
    events = run.events
    if events is not None:
        low, high = events["onset"].clip(lower=start), (events["onset"] + events["duration"]).clip(upper=stop)
        inside = (low < high) | ((events["duration"] == 0) & (events["onset"] >= start) & (events["onset"] < stop))
        events = events.assign(onset=low - start, duration=high - low)[inside].reset_index(drop=True)
    return Run(name, text, run.token_ids[start:stop], run.tokens[start:stop], offsets, events)


def encode(tokenizer: Any, texts: Sequence[str]) -> list[tuple[list[int], NDArray[np.int64] | None, int]]:
    """``(token ids, character spans or None, number of characters dropped)`` of each text."""
    plain = [str(text) for text in texts]
    if not getattr(tokenizer, "is_fast", False):
        return [(list(ids), None, 0) for ids in tokenizer(plain, **TOKENIZING)["input_ids"]]
    coded = tokenizer(plain, return_offsets_mapping=True, **TOKENIZING)
    spans = [np.array(o, dtype=np.int64).reshape(-1, 2) for o in coded["offset_mapping"]]
    known: dict[str, bool] = {}
    return [
        (ids, *_realigned(tokenizer, text, ids, span, known))
        for text, ids, span in zip(plain, coded["input_ids"], spans)
    ]


def without_end(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The token ids of a text without the special tokens that the tokenizer puts behind it (an end of sequence)."""
    coded = tokenizer(text, return_special_tokens_mask=True, **TOKENIZING)
    ids, special = list(coded["input_ids"]), list(coded["special_tokens_mask"])
    plain = tokenizer(text, add_special_tokens=False, **TOKENIZING)["input_ids"]
    while len(ids) > len(plain) and special[len(ids) - 1]:
        ids.pop()
    return ids


def _realigned(
    tokenizer: Any, text: str, ids: list[int], spans: NDArray[np.int64], known: dict[str, bool]
) -> tuple[NDArray[np.int64], int]:
    """Character spans, put right where characters were dropped (after one, the tokenizer's own spans are too early)."""
    edges = np.zeros(len(text) + 1, dtype=np.int64)
    np.add.at(edges, spans[:, 0], 1)
    np.add.at(edges, spans[:, 1], -1)
    if (np.cumsum(edges[:-1]) > 0).all():
        return spans, 0
    for character in set(text) - set(known):
        known[character] = bool(tokenizer(character, add_special_tokens=False)["input_ids"])
    kept = np.array([known[character] for character in text])
    if kept.all():
        return spans, 0
    again = tokenizer("".join(np.array(list(text))[kept]), return_offsets_mapping=True, truncation=False, verbose=False)
    lost = sum(not character.isspace() for character, keep in zip(text, kept) if not keep)
    if again["input_ids"] != ids:  # the characters were not dropped but used, as spaces between words are
        return spans, 0
    spans = np.array(again["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    place = np.append(np.flatnonzero(kept), len(text))
    real = spans[:, 1] > spans[:, 0]
    spans[real] = np.stack([place[spans[real, 0]], place[spans[real, 1] - 1] + 1], axis=1)
    return spans, lost


def _decoded(tokenizer: Any, ids: list[int], known: dict[int, str]) -> list[str]:
    """Each token alone; SentencePiece's leading space, which decoding strips, is put back."""
    new = [i for i in dict.fromkeys(ids) if i not in known]
    for i, raw in zip(new, tokenizer.convert_ids_to_tokens(new)):
        word = tokenizer.decode([i], clean_up_tokenization_spaces=False)
        known[i] = " " + word.lstrip(" ") if str(raw).startswith("\u2581") else word
    return [known[i] for i in ids]


def _cut(events: pd.DataFrame | None, total: int, n_tokens: int | None, name: str) -> pd.DataFrame | None:
    """Events within the tokens that are read; an event beyond the whole text is an error."""
    if events is None:
        return None
    ends = events["onset"] + events["duration"]
    if len(events) and float(ends.max()) > total:
        raise InputError(
            f"events of {name} end at token {ends.max():g}, but the text has {total} tokens: events are in tokens, "
            "special tokens included"
        )
    if n_tokens is None or n_tokens >= total:
        return events
    events = events[events["onset"] < n_tokens].reset_index(drop=True)
    events["duration"] = np.minimum(events["duration"], n_tokens - events["onset"])
    return events


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# -- windows -----------------------------------------------------------------------------------------------------------


def packed_windows(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], window: int, max_windows: int | None = None
) -> Tensor:
    """Tokenize texts as a scan does, join all ids and cut them into windows; what is left over at the end is dropped.

    Parameters
    ----------
    tokenizer : transformers tokenizer
    texts : sequence of str
        A single string counts as one text.
    window : int
        Tokens in a window, at least 2.
    max_windows : int, optional
        Keep the first so many.

    Returns
    -------
    Tensor of int64, shape ``(n_windows, window)``

    Raises
    ------
    InputError
        If the texts do not fill one window; the message says how many tokens there are.
    """
    texts = listed_texts(texts)
    if not texts or not all(isinstance(t, str) for t in texts):
        raise InputError(f"texts must be a list of strings with at least one text, got {_short(texts)}")
    if isinstance(window, bool) or not isinstance(window, int) or window < 2:
        raise InputError(f"window={window!r} must be a whole number of tokens, at least 2")
    if max_windows is not None and max_windows < 1:
        raise InputError(f"max_windows={max_windows!r} must be at least 1")
    needed = None if max_windows is None else window * max_windows
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text, **TOKENIZING)["input_ids"]
        if needed is not None and len(ids) >= needed:
            break
    n = len(ids) // window
    if n == 0:
        raise InputError(f"texts hold {len(ids)} tokens, fewer than one window={window}: give more text or less window")
    return torch.tensor(ids[: n * window], dtype=torch.long).reshape(n, window)[:max_windows]


def window_length(model: nn.Module, window: int | None = None) -> int:
    """The window asked for, or the model's context length (at most 2048); more than the context is an `InputError`."""
    limit = context_length(model)
    if window is None:
        return min(limit or MAX_WINDOW, MAX_WINDOW)
    check_whole("window", window, 2)
    if limit is not None and window > limit:
        raise InputError(f"window={window} is longer than the model's context of {limit} tokens")
    return window


def as_windows(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    texts: Sequence[str] | Tensor,
    window: int | None = None,
    max_windows: int | None = None,
) -> Tensor:
    """Windows ``(n, window)`` from texts, or those that were packed already."""
    if max_windows is not None:
        check_whole("max_windows", max_windows, 1)
    if isinstance(texts, Tensor):
        if texts.ndim != 2 or texts.shape[1] < 2 or not len(texts) or texts.is_floating_point():
            raise InputError(f"windows of shape {tuple(texts.shape)} must be token ids of shape (n >= 1, window >= 2)")
        window_length(model, texts.shape[1])
        return texts[:max_windows]
    if tokenizer is None:
        raise InputError("tokenizer=None: texts need a tokenizer (or pass windows of token ids)")
    return packed_windows(tokenizer, texts, window_length(model, window), max_windows)


def batches(windows: Tensor, tokens: int = BATCH_TOKENS) -> tuple[Tensor, ...]:
    """Windows in batches of about so many tokens."""
    return windows.split(max(1, tokens // windows.shape[1]))


def digest(windows: Tensor) -> str:
    """Hash of token ids, for provenance: 16 hexadecimal digits."""
    return sha256(json.dumps(windows.tolist()).encode()).hexdigest()[:16]


# -- a model that reads ----------------------------------------------------------------------------------------------


def embeddings(model: nn.Module) -> nn.Module | None:
    """The table of token embeddings, where the model says which it is."""
    get = getattr(model, "get_input_embeddings", None)
    try:
        found = get() if callable(get) else None
    except NotImplementedError:  # a wrapper that leaves the table to its only child (BART's decoder)
        found = next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
    return found if isinstance(found, nn.Module) else None


def input_device(model: nn.Module) -> torch.device:
    """Device that token ids go to (the embedding's, also where accelerate spread the model)."""
    module = embeddings(model) or model
    return next((p.device for p in module.parameters() if p.device.type != "meta"), torch.device("cpu"))


def pad_id(model: nn.Module) -> int:
    """A token id to pad with: the model's own, else 0."""
    found = getattr(getattr(model, "config", None), "pad_token_id", None)
    rows = getattr(embeddings(model), "num_embeddings", None)
    if not isinstance(found, int) or found < 0 or (isinstance(rows, int) and found >= rows):
        return 0
    return found


def no_cache(model: nn.Module) -> dict[str, bool]:
    """The option that keeps a forward pass from storing keys and values for a next token that never comes."""
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


@contextmanager
def evaluating(model: nn.Module, *, gradients: bool = False, cache: bool = False) -> Iterator[None]:
    """Evaluation mode within the block: no dropout, no cache, no gradients; what was before comes back.

    Experts that torch cannot multiply in groups run one after the other within it.

    Parameters
    ----------
    model : module
    gradients : bool
        Allow gradients.
    cache : bool
        Leave the models' configs as they are about a cache of keys and values: text is generated.
    """
    modes = [(module, module.training) for module in model.modules()]
    caching = [] if cache else [config for config in _configs(model) if getattr(config, "use_cache", None)]
    grouped = _grouped(model)
    try:
        model.eval()
        for config in grouped:
            config._experts_implementation_internal = "eager"
        for config in caching:
            config.use_cache = False
        with torch.set_grad_enabled(gradients):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for config in caching:
            config.use_cache = True
        for config in grouped:
            config._experts_implementation_internal = GROUPED


GROUPED = "grouped_mm"  # how transformers runs experts where nothing else is said


def _grouped(model: nn.Module) -> list[Any]:
    """Configs of experts that would fail at the first token: run in groups, of sizes that torch cannot run so."""
    found: list[Any] = [
        m.config for m in model.modules() if is_experts(m) and not multiplies_in_groups(m) and hasattr(m, "config")
    ]
    return [config for config in found if config._experts_implementation_internal == GROUPED]


def evaluation_mode(model: Model) -> Model:
    """The model in evaluation mode, for good."""
    return model.eval()


def _configs(model: nn.Module) -> list[Any]:
    """The configs of a model and of all its parts: those of a multimodal model say use_cache each for itself."""
    found: dict[int, Any] = {}

    def add(config: Any) -> None:
        if config is None or id(config) in found or not hasattr(config, "to_dict"):
            return
        found[id(config)] = config
        for part in list(vars(config).values()):
            add(part)

    for module in model.modules():
        add(vars(module).get("config"))
    return list(found.values())

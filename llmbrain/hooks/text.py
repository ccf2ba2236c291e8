"""Texts made ready for reading: token ids, where each token lies in the text, the blocks a model reads, the shards."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from llmbrain._validation import InputError, check_range

SHARD_BYTES = 64 * 2**20  # a shard is closed when it has this much; also what is lost when a run is killed
BATCH_BYTES = 2**30  # fewer texts are read at once where their signals would take more than this


class ScanWarning(UserWarning):
    """Something about a text that the user should know; the scan goes on."""


@dataclass
class Run:
    """One text as the model reads it. `offsets` are character spans, None where the tokenizer does not know them."""

    name: str
    text: str
    token_ids: NDArray[np.int64]
    tokens: list[str]
    offsets: NDArray[np.int64] | None
    events: pd.DataFrame | None

    def to_record(self) -> dict[str, Any]:
        """What a store keeps, ready for JSON."""
        return {
            "name": self.name,
            "text": self.text,
            "token_ids": self.token_ids.tolist(),
            "tokens": self.tokens,
            "offsets": None if self.offsets is None else self.offsets.tolist(),
            "events": None if self.events is None else self.events.to_dict(orient="list"),
        }

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Run:
        """Rebuild from `to_record`."""
        offsets, events = record["offsets"], record["events"]
        return cls(
            record["name"],
            record["text"],
            np.array(record["token_ids"], dtype=np.int64),
            record["tokens"],
            None if offsets is None else np.array(offsets, dtype=np.int64).reshape(-1, 2),
            None if events is None else pd.DataFrame(events),
        )


@dataclass(frozen=True)
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
    """Tokenise texts with the tokenizer's default special tokens; at most `n_tokens` tokens of each are kept.

    Raises
    ------
    InputError
        If there is no text, a text is empty, or a text has no token.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
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
        check_range("n_tokens", n_tokens, 1)
    runs = []
    dropped = 0
    pieces: dict[int, str] = {}
    for i, (text, (ids, offsets, lost)) in enumerate(zip(texts, encode(tokenizer, texts))):
        name = getattr(text, "name", None) or f"run-{i + 1:04d}"
        if not ids:
            raise InputError(f"texts[{i}]={_short(text)} has no token: the tokenizer knows none of its characters")
        dropped += lost
        events = _cut(getattr(text, "events", None), len(ids), n_tokens, name)
        ids, offsets = ids[:n_tokens], offsets if offsets is None else offsets[:n_tokens]
        tokens = _decoded(tokenizer, ids, pieces)
        runs.append(Run(name, str(text), np.array(ids, dtype=np.int64), tokens, offsets, events))
    if dropped:
        warnings.warn(f"the tokenizer drops {dropped} characters that it does not know", ScanWarning, stacklevel=3)
    return runs


def encode(tokenizer: Any, texts: Sequence[str]) -> list[tuple[list[int], NDArray[np.int64] | None, int]]:
    """``(token ids, character spans or None, number of characters dropped)`` of each text."""
    plain = [str(text) for text in texts]
    options = {"padding": False, "truncation": False, "return_attention_mask": False, "verbose": False}
    if not getattr(tokenizer, "is_fast", False):
        return [(list(ids), None, 0) for ids in tokenizer(plain, **options)["input_ids"]]
    coded = tokenizer(plain, return_offsets_mapping=True, **options)
    spans = [np.array(o, dtype=np.int64).reshape(-1, 2) for o in coded["offset_mapping"]]
    known: dict[str, bool] = {}
    return [
        (ids, *_realigned(tokenizer, text, ids, span, known))
        for text, ids, span in zip(plain, coded["input_ids"], spans)
    ]


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


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")


@dataclass(frozen=True)
class Plan:
    """Which blocks go into which shard: ``shards[i]`` is (first block, last block + 1)."""

    blocks: Sequence[Block]
    shards: Sequence[tuple[int, int]]
    per_token: int

    @classmethod
    def make(cls, blocks: Sequence[Block], per_token: int, batch_size: int) -> Plan:
        """Whole batches a shard, until it is large enough."""
        shards, first, held = [], 0, 0
        plan = cls(blocks, [], per_token)
        for low, high in plan.batches(0, len(blocks), batch_size):
            held += per_token * sum(len(block) for block in blocks[low:high])
            if held >= SHARD_BYTES or high == len(blocks):
                shards.append((first, high))
                first, held = high, 0
        return cls(blocks, shards, per_token)

    @property
    def rows(self) -> list[int]:
        """First token of each shard, counted over all runs, and the total."""
        lengths = [sum(len(block) for block in self.blocks[low:high]) for low, high in self.shards]
        return list(accumulate(lengths, initial=0))

    def batches(self, first: int, last: int, batch_size: int) -> Iterator[tuple[int, int]]:
        """Blocks that are read at once."""
        while first < last:
            stop = min(first + batch_size, last)
            longest = 0
            for stop_here in range(first, stop):
                longest = max(longest, len(self.blocks[stop_here]))
                if stop_here > first and longest * (stop_here + 1 - first) * self.per_token > BATCH_BYTES:
                    stop = stop_here
                    break
            yield first, stop
            first = stop

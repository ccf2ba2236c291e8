"""Texts of a study: read from a file, split in what is calibrated on and what is held out, cut to so many tokens."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from llmbrain._files import refuse_device
from llmbrain._validation import InputError
from llmbrain.hooks.text import TOKENIZING, encode
from llmbrain.scanning import Stimulus

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEAST = 3  # tokens of a text whose networks can be found: its first one is left out, and two are wanted
HELD_OUT = 0.2  # share of the text, from its end, that networks and pruning never see


def load_texts(path: str | Path, field: str = "text") -> list[str]:
    """Read the texts of a file.

    Parameters
    ----------
    path : path
        ``.json`` holds a list of strings (or of objects with `field`), ``.jsonl`` one string or object a line; any
        other file is one text.
    field : str
        Where the text is in an object.

    Raises
    ------
    InputError
        If the file holds no text, is not UTF-8 or not what its ending says.
    """
    path = Path(path)
    number = 0
    refuse_device(path)
    try:
        content = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            records = json.loads(content)
        elif path.suffix == ".jsonl":
            records = []
            for line in content.split("\n"):  # not splitlines: a string may hold U+2028
                records += [json.loads(line)] if line.strip() else []
                number += 1
        else:
            records = [content]
    except UnicodeDecodeError as error:
        raise InputError(f"text file {path} is not UTF-8 (byte {error.start})") from None
    except RecursionError:
        raise InputError(f"text file {path} is no list of texts: it is nested too deeply") from None
    except json.JSONDecodeError as error:
        line_number = error.lineno + number
        raise InputError(f"text file {path} is not valid {path.suffix[1:]}: line {line_number}, {error.msg}") from None
    except ValueError:  # of a number of more digits than Python reads
        raise InputError(f"text file {path} holds a number too long to be one, where texts are expected") from None
    if not isinstance(records, list):
        raise InputError(f"text file {path} must hold a list of strings, not {type(records).__name__}")
    texts: list[str] = []
    for i, record in enumerate(records):
        text = record.get(field) if isinstance(record, dict) else record
        if not isinstance(text, str):
            known = f": fields are {sorted(record)} (choose one with --field)" if isinstance(record, dict) else ""
            raise InputError(f"text file {path}: entry {i} has no string in field {field!r}{known}")
        if text.strip():
            texts.append(text)
    if not texts:
        raise InputError(f"text file {path} is empty")
    return texts


def split_texts(
    texts: Sequence[str], held_out: float = HELD_OUT, tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[list[str], list[str]]:
    """Cut the last part off, by characters, between texts or, within one, at a line end or a space.

    Parameters
    ----------
    texts : sequence of str
    held_out : float
        Share of all characters to hold out.
    tokenizer : tokenizer, optional
        A text with events that is cut keeps them where this is given.

    Returns
    -------
    calibration, held_out : lists of str
        Together they are the texts; either may be empty only where the text is too short to be cut.
    """
    cut = round(sum(map(len, texts)) * (1 - held_out))
    calibration: list[str] = []
    rest: list[str] = []
    for text in texts:
        if cut >= len(text):
            calibration.append(text)
        elif cut <= 0 or (len(texts) > 4 and calibration):  # where texts are many, none is cut
            rest.append(text)
        else:
            at = max(text.rfind("\n", 0, cut), text.rfind(" ", 0, cut)) + 1 or cut
            calibration.append(piece(text, 0, at, tokenizer))
            rest.append(piece(text, at, len(text), tokenizer))
        cut -= len(text)
    return calibration, [text for text in rest if text.strip()]


def limit_tokens(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, n_tokens: int | None) -> list[str]:
    """The first texts that hold about `n_tokens` tokens together; the last one is cut where it must be."""
    if n_tokens is None:
        return list(texts)
    kept: list[str] = []
    for text in texts:
        length = len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
        if length > n_tokens:
            text = piece(text, 0, max(1, len(text) * n_tokens // length), tokenizer)
            if kept and len(tokenizer(text, **TOKENIZING)["input_ids"]) < LEAST:  # a scrap
                break
        kept.append(text)
        n_tokens -= length
        if n_tokens <= 0:
            break
    return kept


def piece(text: str, start: int, stop: int, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Characters ``start..stop`` of a text; of a `Stimulus` with its events, whose onsets are tokens of the piece."""
    events, inside = getattr(text, "events", None), text[start:stop]
    if events is None or tokenizer is None or not inside.strip():
        return inside
    (_, whole, _), (_, own, _) = encode(tokenizer, [text, inside])
    if whole is None or own is None:
        said = "the tokenizer knows no character offsets: a text that was cut has lost its events"
        warnings.warn(said, UserWarning, stacklevel=3)
        return inside
    middle = start + own.mean(axis=1)
    real = own[:, 1] > own[:, 0]  # special tokens have no characters
    rows = []
    for onset, duration, kind in events[["onset", "duration", "trial_type"]].itertuples(index=False):
        spans = whole[int(onset) : int(np.ceil(onset + duration))]
        spans = spans[spans[:, 1] > spans[:, 0]]
        if not len(spans):
            continue
        mine = np.flatnonzero(real & (middle >= spans[0, 0]) & (middle < spans[-1, 1]))
        if len(mine):
            rows.append({"onset": float(mine[0]), "duration": float(mine[-1] - mine[0] + 1), "trial_type": kind})
    name = getattr(text, "name", None)
    return Stimulus(
        inside, pd.DataFrame(rows, columns=["onset", "duration", "trial_type"]), name if not start else None
    )


def long_texts(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts of at least `LEAST` tokens; a warning says how many others are left out.

    Raises
    ------
    InputError
        If there is none.
    """
    lengths = [len(tokenizer(str(text), **TOKENIZING)["input_ids"]) for text in texts]
    kept = [text for text, length in zip(texts, lengths) if length >= LEAST]
    if not kept:
        raise InputError(f"texts have {max(lengths, default=0)} tokens at most, a scan needs {LEAST} of one: join them")
    if left := len(texts) - len(kept):
        warnings.warn(
            f"{left} of {len(texts)} texts have fewer than {LEAST} tokens: they are not scanned", stacklevel=2
        )
    return kept

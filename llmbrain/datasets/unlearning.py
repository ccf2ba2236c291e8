"""Files of unlearning benchmarks as texts with conditions: what `forget=` takes.

Rows are those that OpenUnlearning's benchmarks are published in: TOFU's ``question`` and ``answer``, WMDP's
``question``, ``choices`` and the number of the right ``answer``, and plain ``text`` (MUSE, the corpora of WMDP).
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmbrain._files import refuse_device
from llmbrain._validation import InputError, check_whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmbrain.scanning import Stimulus

FORGET, RETAIN = "forget", "retain"
LETTERS = "ABCDEFGHIJ"
LONGEST = 400  # characters of a line made of plain text


def read_rows(path: str | Path) -> list[str]:
    """Lines of text from a ``.json`` (a list) or ``.jsonl`` file of rows.

    Parameters
    ----------
    path : path

    Returns
    -------
    list of str
        A row each (plain text longer than 400 characters in several, cut between words), ending in a newline:
        ``Question: ...\\nAnswer: ...``; of choices the lettered list and the right letter.

    Raises
    ------
    InputError
        If the file is no JSON, or a row is of none of the known kinds; the row is named.
    """
    path = Path(path)
    refuse_device(path)
    try:
        content = path.read_text(encoding="utf-8-sig")
        whole = path.suffix != ".jsonl"
        rows = json.loads(content) if whole else [json.loads(x) for x in content.split("\n") if x.strip()]
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} holds no JSON rows: {error}") from None
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{path} must hold a list of rows, at least one")
    return [line for i, row in enumerate(rows) for line in _lines(row, f"{path}: row {i}")]


def _lines(row: Any, where: str) -> list[str]:
    if isinstance(row, str):
        row = {"text": row}
    if not isinstance(row, dict):
        raise InputError(f"{where} is no object: needed are question and answer, question, choices and answer, or text")
    question, answer, choices = row.get("question"), row.get("answer"), row.get("choices")
    if isinstance(question, str) and isinstance(choices, list):
        if not all(isinstance(c, str) for c in choices) or not 2 <= len(choices) <= len(LETTERS):
            raise InputError(f"{where}: choices must be 2 to {len(LETTERS)} strings")
        if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
            raise InputError(f"{where}: answer={answer!r} must be the number of a choice, 0 to {len(choices) - 1}")
        listed = "".join(f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, choices))
        return [f"Question: {question}\n{listed}Answer: {LETTERS[answer]}. {choices[answer]}\n"]
    if isinstance(question, str) and isinstance(answer, str) and answer.strip():
        return [f"Question: {question}\nAnswer: {answer}\n"]
    text = row.get("text")
    if isinstance(text, str) and text.strip():
        return _cut(text)
    raise InputError(
        f"{where} has fields {sorted(row)}: needed are question and answer, question, choices and answer, or text"
    )


def _cut(text: str) -> list[str]:
    lines, now = [], ""
    for word in text.split():
        if now and len(now) + len(word) >= LONGEST:
            lines.append(f"{now}\n")
            now = ""
        now = f"{now} {word}" if now else word
    return [*lines, f"{now}\n"]


def unlearning_texts(
    forget: str | Path, retain: str | Path, tokenizer: PreTrainedTokenizerBase, *, lines: int = 8, seed: int = 0
) -> list[Stimulus]:
    """Texts to scan, from a file of what is to be forgotten and one of what is to stay.

    Parameters
    ----------
    forget, retain : path
        See `read_rows`.
    tokenizer : transformers tokenizer
    lines : int
        Rows in a text; both files are mixed in random order.
    seed : int

    Returns
    -------
    list of Stimulus
        With the conditions ``"forget"`` and ``"retain"``, one event a row: ``plan_pruning(..., forget=["forget"])``.

    Raises
    ------
    InputError
        As `read_rows`; and if a row stands in both files.
    """
    from llmbrain.scanning import Stimulus

    check_whole("lines", lines, 1)
    goes, stays = read_rows(forget), read_rows(retain)
    kept = set(stays)
    both = [line for line in goes if line in kept]
    if both:
        raise InputError(
            f"{len(both)} rows stand in {forget} and in {retain}, such as {both[0][:80]!r}: a row goes or stays"
        )
    named = [(line, FORGET) for line in goes] + [(line, RETAIN) for line in stays]
    random.Random(seed).shuffle(named)
    groups = [named[i : i + lines] for i in range(0, len(named), lines)]
    return [Stimulus.from_segments(g, tokenizer, f"unlearning-run{i + 1:04d}") for i, g in enumerate(groups)]

"""Files of unlearning benchmarks as texts with conditions: what `forget=` takes.

Rows are those that OpenUnlearning's benchmarks are published in: TOFU's ``question`` and ``answer``, WMDP's and MMLU's
``question``, ``choices`` and the number (or letter) of the right ``answer``, MUSE's ``prompt`` and ``gt`` (a text and
how it goes on), and plain ``text`` (MUSE, the corpora of WMDP). Splits to forget and to retain are a file each.
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
NEEDED = "needed are question and answer, question, choices and answer, prompt and gt, or text"


def read_rows(path: str | Path) -> list[str]:
    """Lines of text from a file of rows.

    Parameters
    ----------
    path : path
        ``.jsonl`` (an object or a string a line), ``.json`` (a list of them; TOFU's files hold an object a line under
        this name), ``.parquet`` (needs pyarrow) or ``.txt`` (one text).

    Returns
    -------
    list of str
        A row each (plain text longer than 400 characters in several, cut between words), ending in a newline:
        ``Question: ...\\nAnswer: ...``; of choices the lettered list and the right letter.

    Raises
    ------
    InputError
        If the file holds no rows, or a row is of none of the known kinds; the row is named.
    """
    path = Path(path)
    refuse_device(path)
    try:
        rows = _rows(path)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 (byte {error.start})") from None
    except RecursionError:
        raise InputError(f"{path} holds no rows: it is nested too deeply") from None
    except ValueError as error:  # no JSON, or a number of too many digits
        raise InputError(f"{path} holds no JSON rows: {error}") from None
    if isinstance(rows, dict):
        raise InputError(f"{path} holds one object with {sorted(rows)[:8]}: {NEEDED}, a row each, one file a split")
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{path} must hold a list of rows, at least one")
    return [line for i, row in enumerate(rows) for line in _lines(row, f"{path}: row {i}")]


def _rows(path: Path) -> Any:
    kind = path.suffix.lower()
    if kind == ".parquet":
        return _parquet(path)
    content = path.read_text(encoding="utf-8-sig")
    if kind == ".txt":
        return [content] if content.strip() else []
    if kind == ".json":
        try:
            found = json.loads(content)
        except json.JSONDecodeError as error:
            if error.msg != "Extra data":  # one object, and more after it: a row a line
                raise
        else:
            only_row = isinstance(found, dict) and {"question", "text", "prompt"} & set(found)
            return [found] if only_row else found
    return [json.loads(x) for x in content.split("\n") if x.strip()]  # not splitlines: a string may hold U+2028


def _parquet(path: Path) -> list[Any]:
    path.open("rb").close()  # a file that is not there says so
    try:
        import pyarrow.parquet as parquet
        from pyarrow import ArrowException
    except ImportError:
        raise InputError(
            f"{path}: reading parquet needs pyarrow (pip install pyarrow), or write it as .jsonl"
        ) from None
    try:
        rows: list[Any] = parquet.read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        raise InputError(f"{path} is no parquet file: {error}") from None
    return rows


def _lines(row: Any, where: str) -> list[str]:
    if isinstance(row, str):
        row = {"text": row}
    if not isinstance(row, dict):
        raise InputError(f"{where} is no object: {NEEDED}")
    question, answer, choices = row.get("question"), row.get("answer"), row.get("choices")
    if isinstance(question, str) and isinstance(choices, list):
        if not all(isinstance(c, str) for c in choices) or not 2 <= len(choices) <= len(LETTERS):
            raise InputError(f"{where}: choices must be 2 to {len(LETTERS)} strings")
        letters = LETTERS[: len(choices)]
        if isinstance(answer, str) and len(answer.strip()) == 1 and answer.strip().upper() in letters:
            answer = letters.index(answer.strip().upper())
        if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
            raise InputError(
                f"{where}: answer={answer!r} must be the number of a choice, 0 to {len(choices) - 1}, or its letter"
            )
        listed = "".join(f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, choices))
        return [f"Question: {question}\n{listed}Answer: {LETTERS[answer]}. {choices[answer]}\n"]
    if isinstance(question, str) and isinstance(answer, str) and answer.strip():
        return [f"Question: {question}\nAnswer: {answer}\n"]
    prompt, goes_on = row.get("prompt"), row.get("gt")
    if isinstance(prompt, str) and isinstance(goes_on, str) and goes_on.strip():
        return _cut(f"{prompt} {goes_on}")
    text = row.get("text")
    if isinstance(text, str) and text.strip():
        return _cut(text)
    raise InputError(f"{where} has fields {sorted(map(str, row))}: {NEEDED}")


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

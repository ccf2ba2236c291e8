"""Plain text as people save it: encodings, separators, quotes, and numbers in the styles of several countries."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llmbrain._files import refuse_device
from llmbrain._validation import InputError

Array = NDArray[np.float64]
BOMS = (
    (b"\xff\xfe\x00\x00", "utf-32"), (b"\x00\x00\xfe\xff", "utf-32"), (b"\xef\xbb\xbf", "utf-8-sig"),
    (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"),
)  # fmt: skip
# What a text in Windows-1252 may hold beyond ASCII. The letters that only look right there (in Mac Roman or Latin-5 the
# same bytes are other letters) are left out: such a file is refused, not guessed.
WESTERN = set("ÀÁÂÃÄÅÆÇÈÉÊËÌÍÎÏÑÒÓÔÕÖØÙÚÛÜÝßàáâãäåæçèéêëìíîïñòóôõöøùúûüýÿŒœªº")
WESTERN_MARKS = set("‘’‚“”„…–—«»‹›¡¿·•°§£€©®™\xa0\xad´½¼¾²±µ×")
MISSING = {"", "n/a"}  # BIDS knows no other
MISSING_NUMBERS = MISSING | {"na", "nan", "null", "none", "-nan", "<na>"}
SEPARATORS = ("\t", ";", ",")
_PLAIN = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_THOUSANDS = re.compile(r"[-+]?[1-9]\d{0,2}(,\d{3})+(\.\d*)?")
_COMMA = re.compile(r"[-+]?(\d+|\d{1,3}(\.\d{3})+)?(,\d+)?([eE][-+]?\d+)?")
_GROUPED = re.compile(r"[-+]?\d{1,3}([ '’\xa0\u2009\u202f]\d{3})+([.,]\d*)?")


def read_plain(path: Path, what: str) -> str:
    """Text of a file in UTF-8, UTF-16 or UTF-32, or in Windows-1252 (Latin-1) where it can be nothing else.

    Line ends become ``\\n``; other characters that end lines for some programs (U+2028, U+0085) stay in the text.

    Parameters
    ----------
    path : Path
    what : str
        What the message calls the parameter.

    Raises
    ------
    InputError
        If the encoding cannot be told.
    """
    refuse_device(path)
    raw = path.read_bytes()
    text = _decode(raw)
    if text is None:
        raise InputError(f"{what}: {path.name} is neither UTF-8, UTF-16 nor plainly Latin-1: save it as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _decode(raw: bytes) -> str | None:
    named = next((name for mark, name in BOMS if raw.startswith(mark)), None)
    head = raw[:2000]
    if named is None and head.count(0) > len(head) / 5:  # UTF-16 without a mark: every second byte of ASCII is 0
        named = "utf-16-be" if head[0::2].count(0) > head[1::2].count(0) else "utf-16-le"
    try:
        return raw.decode(named or "utf-8")
    except UnicodeDecodeError:
        if named is not None:
            return None
    try:
        text = raw.decode("cp1252")
    except UnicodeDecodeError:
        return None
    odd = [c for c in text if ord(c) > 127]
    inside = re.search(r"[^\W\d_][–—„‚•°§£€©®™½¼¾²±µ×¡¿][^\W\d_]", text)  # accents of Mac Roman look like this
    long = re.search(r"[À-ÿ]{3}", text)  # three in a row: Cyrillic, Greek, Chinese
    letters = sum(c.isalpha() for c in text)
    crowded = sum(c in WESTERN for c in odd) > 0.3 * max(letters, 1)
    return None if inside or long or crowded or not set(odd) <= WESTERN | WESTERN_MARKS else text


def separator_of(lines: Sequence[str]) -> str:
    """The mark that cuts all lines into the same number of cells, at least 2; white space where none does."""
    for mark in SEPARATORS:
        counts = {len(cells) for cells in (cut(line, mark) for line in lines) if cells is not None}
        if len(counts) == 1 and counts != {1}:
            return mark
    held = [mark for mark in SEPARATORS if mark in lines[0]]
    return held[0] if held else " "


def cut(line: str, separator: str) -> list[str] | None:
    """Cells of a line, without the quotes round them; None where a quote is opened and not closed.

    Tabs and white space know no quoting (BIDS): a lone quote is a character. Elsewhere it is CSV's, within one line.
    """
    if separator == " ":
        return [_unquoted(cell) for cell in line.split()]
    if separator == "\t":
        return [_unquoted(cell.strip()) for cell in line.split("\t")]
    try:
        return [cell.strip() for cell in next(csv.reader([line], delimiter=separator, strict=True))]
    except csv.Error:
        return None


def _unquoted(cell: str) -> str:
    """Without the quotes that pandas and others put round a cell; the word that is a quote stays."""
    inner = cell[1:-1]
    wrapped = len(cell) > 2 and cell[0] == cell[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if wrapped else cell


def read_cells(text: str, name: str, what: str) -> list[list[str]]:
    """Rows of a table as cells, all of one length; empty lines are left out.

    Raises
    ------
    InputError
        Names the first line with an open quote or with more or fewer cells than the first one.
    """
    numbered = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not numbered:
        raise InputError(f"{what}: {name} is empty")
    separator = separator_of([line for _, line in numbered])
    rows = []
    for i, line in numbered:
        cells = cut(line, separator)
        if cells is None:
            raise InputError(f"{what}: {name}, line {i}: a quote is opened and not closed: {line[:60]!r}")
        rows.append(cells)
    width = len(rows[0])
    if len(rows) > 1 and {len(row) for row in rows[1:]} == {width + 1}:  # written with an index that has no name
        rows[0], width = ["", *rows[0]], width + 1
    for (i, _), row in zip(numbered, rows):
        if len(row) != width:
            raise InputError(f"{what}: {name}, line {i} has {len(row)} cells, the first line {width}")
    return rows


def is_number(cell: str) -> bool:
    """Whether a cell is a number in any of the styles that `parse_numbers` reads."""
    return bool(
        _PLAIN.fullmatch(cell) or _THOUSANDS.fullmatch(cell) or _GROUPED.fullmatch(cell)
        or (_COMMA.fullmatch(cell) and re.search(r"\d", cell))
    )  # fmt: skip


def comma_is_decimal(cells: Sequence[str]) -> bool | None:
    """Whether commas in these numbers are decimal; None where they say nothing: no comma, or ``1,234`` alone."""
    held = [cell for cell in cells if "," in cell]
    decided = None
    if any(cell.rfind(",") > cell.rfind(".") >= 0 for cell in held):
        decided = True  # 1.234,5
    elif any("." in cell for cell in cells):
        decided = False  # a point is decimal somewhere, so that a comma is not
    elif any(not _THOUSANDS.fullmatch(cell) for cell in held):
        decided = True  # 0,5 and 12,25
    return decided


def parse_numbers(cells: Sequence[str], decimal_comma: bool | None = None) -> Array | None:
    """Numbers of a column; NaN where a cell is missing; None where a cell is no number in the style of the others.

    Parameters
    ----------
    cells : sequence of str
    decimal_comma : bool, optional
        From `comma_is_decimal` of all columns that were written alike.
    """
    found = np.full(len(cells), np.nan)
    for i, cell in enumerate(cells):
        cell = cell.strip().replace("−", "-")
        if cell.lower() in MISSING_NUMBERS:
            continue
        if _GROUPED.fullmatch(cell):
            cell = re.sub(r"[ '’\xa0\u2009\u202f]", "", cell)
        if decimal_comma and _COMMA.fullmatch(cell):
            cell = cell.replace(".", "").replace(",", ".")
        elif not decimal_comma and _THOUSANDS.fullmatch(cell):
            if decimal_comma is None:
                return None
            cell = cell.replace(",", "")
        if not _PLAIN.fullmatch(cell):
            return None
        found[i] = float(cell)
    return found

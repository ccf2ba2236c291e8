"""Word tables: when every word of a story was heard. TSV, CSV, BIDS events and Praat TextGrid."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from llmbrain._files import clear_damage
from llmbrain._validation import InputError
from llmbrain.brains.plain import (
    MISSING,
    MISSING_NUMBERS,
    comma_is_decimal,
    is_number,
    parse_numbers,
    read_cells,
    read_plain,
)
from llmbrain.brains.textgrid import read_textgrid

Array = NDArray[np.float64]
# Names as people write them, after lower-casing and dropping everything but letters and digits; the first that is there
# and holds what it should is taken.
USUAL_NAMES: dict[str, tuple[str, ...]] = {
    "word": ("word", "words", "text", "token", "label", "wordtext", "orthography", "trialtype", "stimulus", "value"),
    "onset": ("onset", "wordonset", "onsets", "start", "starttime", "wordstart", "tmin", "xmin", "begin", "onsetsec"),
    "offset": ("offset", "wordoffset", "offsets", "end", "endtime", "wordend", "stop", "tmax", "xmax", "offsetsec"),
    "duration": ("duration", "durations", "wordduration", "durationsec", "length"),
}  # fmt: skip
ROLES = tuple(USUAL_NAMES)
TIMES = ("onset", "offset", "duration")
LONGEST_WORD = 60.0  # seconds in the median; even whole sentences are shorter


def load_words(
    path: str | PathLike[str],
    *,
    columns: Mapping[str, str | int] | None = None,
    tier: str | None = None,
) -> pd.DataFrame:
    """Read the words of a story with their times.

    Parameters
    ----------
    path : path
        ``.tsv``, ``.csv`` or ``.txt`` table, BIDS ``*_events.tsv``, or Praat ``.TextGrid`` (long or short); UTF-8,
        UTF-16 or Latin-1. Commas may be decimal, or mark thousands; only ``n/a`` and nothing are missing: "nan" is
        a word.
    columns : mapping, optional
        Which column is ``"word"``, ``"onset"``, ``"offset"`` (or ``"duration"``) where the names are not the usual
        ones; numbers count from 0. A table without a header is read by what its columns hold, and that is said.
    tier : str, optional
        Tier of the TextGrid, or its number (from 1); default: the one called word or words, else the only interval
        tier.

    Returns
    -------
    DataFrame
        ``word``, ``onset``, ``offset`` (seconds; NaN where unknown), then the other columns as they are. A cell with
        two numbers and a comma (a word that was scored as two) becomes their sum, with a warning. A word that ends
        before it starts loses its times, with a warning. Rows without a word are left out; silences of a TextGrid too.

    Raises
    ------
    InputError
        If a column cannot be found, or onsets step back: the message names the row.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"words: no file at {path}")
    grid = path.suffix.lower() == ".textgrid"
    with clear_damage(path, "a Praat TextGrid" if grid else "a table of words"):
        frame = read_textgrid(path, tier) if grid else _read_table(path, columns)
        return check_words(frame, name=path.name)


def check_words(words: pd.DataFrame, *, name: str = "words") -> pd.DataFrame:
    """Check a table with columns word, onset, offset; see `load_words` for what is repaired and what refused."""
    missing = [column for column in ("word", "onset", "offset") if column not in words.columns]
    if missing:
        raise InputError(f"{name}: column {missing[0]!r} is missing among {list(words.columns)}")
    words = words[words["word"].notna() & (words["word"].astype(str).str.strip() != "")].reset_index(drop=True)
    words = words.assign(word=words["word"].astype(str).str.strip(),
                         onset=words["onset"].astype(float), offset=words["offset"].astype(float))  # fmt: skip
    if words.empty:
        raise InputError(f"{name}: there is no word in it")
    backwards = np.flatnonzero((words["offset"] < words["onset"]).to_numpy())
    if len(backwards):
        first = backwards[0]
        warnings.warn(
            f"{name}: {len(backwards)} words end before they start (first: row {first}, {words['word'][first]!r}); "
            "their times are not used", stacklevel=3,
        )  # fmt: skip
        words.loc[backwards, ["onset", "offset"]] = np.nan
    onsets = words["onset"].dropna()
    steps = np.flatnonzero(np.diff(onsets.to_numpy()) < 0)
    if len(steps):
        row = onsets.index[steps[0] + 1]
        raise InputError(
            f"{name}: words are out of order: row {row} ({words['word'][row]!r}) starts at {words['onset'][row]:g} s, "
            f"before the one above it ({onsets.iloc[steps[0]]:g} s)"
        )
    if onsets.empty:
        raise InputError(f"{name}: none of its {len(words)} words has a time")
    ahead = words["onset"].shift(-2) < words["offset"] - 1e-6
    if ahead.sum() > len(words) / 2:
        raise InputError(
            f"{name}: most words end after the second next one has begun: are offsets or durations in seconds?"
        )
    usual = float((words["offset"] - words["onset"]).median())
    if usual > LONGEST_WORD:
        raise InputError(f"{name}: words last {usual:g} s in the median: times must be in seconds, not milliseconds")
    return words


def _read_table(path: Path, columns: Mapping[str, str | int] | None) -> pd.DataFrame:
    rows = read_cells(read_plain(path, "words"), path.name, "words")
    header, body = (rows[0], rows[1:]) if _has_header(rows) else (None, rows)
    if not body:
        raise InputError(f"{path.name}: there is no word in it")
    numbered = columns is not None and any(isinstance(column, int) for column in columns.values())
    names: list[str | int] = list(range(len(body[0]))) if header is None or numbered else list(header)
    table = {name: [row[i] for row in body] for i, name in reversed(list(enumerate(names)))}
    table = dict(reversed(table.items()))
    found = _given(columns, table, path)
    if header is None and not found:
        found = _by_content(table, path)
    elif not numbered:
        found = _by_name(found, table, path)
    if "offset" in found:
        found.pop("duration", None)
    for needed in (("word",), ("onset",), ("offset", "duration")):
        if not any(role in found for role in needed):
            raise InputError(f"{path.name}: no column for {' or '.join(map(repr, needed))} among {list(table)}: {HOW}")
    frame = pd.DataFrame({"word": [cell if cell.strip() not in MISSING else None for cell in table[found["word"]]]})
    times = {role: table[found[role]] for role in TIMES if role in found}
    comma = _decimal_comma(times, path)
    for role, cells in times.items():
        frame[role] = _times(cells, comma, f"{path.name}: {role}")
    if "offset" not in found:
        frame["offset"] = frame["onset"] + frame["duration"]
    for name, cells in table.items():
        if name not in found.values() and str(name) not in frame.columns:
            frame[str(name)] = _other(cells, comma, str(name), path.name)
    return frame[["word", "onset", "offset", *(c for c in frame.columns if c not in ("word", "onset", "offset"))]]


HOW = "say which, as columns={'word': 'text', 'onset': 0} (--columns word=text,onset=0; numbers count from 0)"


def _has_header(rows: list[list[str]]) -> bool:
    """No number in the first row, and one below it; or names that are known."""
    first = rows[0]
    if any(_simple(cell) in names for cell in first for names in USUAL_NAMES.values()) and not any(
        is_number(cell) for cell in first if cell
    ):
        return True
    return not any(is_number(cell) for cell in first) and any(is_number(c) for row in rows[1:20] for c in row)


def _simple(name: str | int) -> str:
    return re.sub(r"[^a-z0-9]", "", str(name).lower())


def _given(
    columns: Mapping[str, str | int] | None, table: Mapping[str | int, list[str]], path: Path
) -> dict[str, str | int]:
    given = dict(columns or {})
    unknown = set(given) - set(ROLES)
    if unknown:
        raise InputError(f"columns: {sorted(unknown)[0]!r} is not known: allowed are {', '.join(map(repr, ROLES))}")
    for role, column in given.items():
        if column not in table:
            raise InputError(f"columns: {path.name} has no column {column!r} for {role!r}, but {list(table)}")
    return given


def _by_name(found: dict[str, str | int], table: Mapping[str | int, list[str]], path: Path) -> dict[str, str | int]:
    """Columns of the usual names that hold what they should: words are not numbers, and few of them are alike."""
    plain = {_simple(column): column for column in reversed(list(table))}
    for role, names in USUAL_NAMES.items():
        if role in found:
            continue
        taken = set(found.values())
        there = [plain[name] for name in names if name in plain and plain[name] not in taken]
        if role == "word":
            said = [column for column in there if not all(map(is_number, _present(table[column])))]
            if there and not said:
                raise InputError(f"{path.name}: column {there[0]!r} for 'word' holds numbers: {HOW}")
            said.sort(key=lambda column: len(set(table[column])) == 1)  # one label for all rows is a condition
            there = said
        if role == "duration" and there and _simple(there[0]) == "length":
            there = [column for column in there if not _counts_letters(table[column])]
            if not there and "offset" not in found:
                raise InputError(
                    f"{path.name}: column 'length' holds whole numbers, as if of letters: if they are seconds, say "
                    "columns={'duration': 'length'} (--columns duration=length)"
                )
        if there:
            found[role] = there[0]
    return found


def _present(cells: list[str]) -> list[str]:
    return [cell for cell in cells if cell.strip() not in MISSING]


def _counts_letters(cells: list[str]) -> bool:
    return all(cell.strip().isdigit() for cell in _present(cells))


def _by_content(table: Mapping[str | int, list[str]], path: Path) -> dict[str, str | int]:
    """Columns of a table without a header: the one of text, and the times that never step back."""
    comma = comma_is_decimal([c for cells in table.values() for c in cells if is_number(c)])
    numbers = {name: parse_numbers(cells, comma) for name, cells in table.items()}
    text = [name for name, values in numbers.items() if values is None]
    rising: list[str | int] = []
    spans: list[str | int] = []
    for name, values in numbers.items():
        known = None if values is None else values[np.isfinite(values)]
        if known is None or len(known) < max(1, len(table[name]) / 2):
            continue
        steps = np.diff(known)
        if (steps >= 0).all() and not (len(known) > 2 and (steps == 1).all() and len(numbers) > 3):
            rising.append(name)
        elif (known >= 0).all():
            spans.append(name)
    if len(rising) > 2 and _counter(numbers[rising[0]]):
        rising = rising[1:]
    if len(text) != 1 or not rising or len(rising) > 2 or (len(rising) == 1 and len(spans) != 1):
        raise InputError(
            f"{path.name} has no header, and its columns do not say what they are ({_first_row(table)}): {HOW}"
        )
    found: dict[str, str | int] = {"word": text[0], "onset": rising[0]}
    if len(rising) == 2:
        a, b = numbers[rising[0]], numbers[rising[1]]
        later = a is not None and b is not None and bool(np.nanmean(b >= a) < 0.5)
        found |= {"onset": rising[1], "offset": rising[0]} if later else {"offset": rising[1]}
    else:
        found["duration"] = spans[0]
    said = ",".join(f"{role}={found[role]}" for role in ROLES if role in found)
    warnings.warn(f"{path.name} has no header: its columns are read as --columns {said}", stacklevel=4)
    return found


def _counter(values: Array | None) -> bool:
    return values is not None and len(values) > 2 and bool((np.diff(values) == 1).all())


def _first_row(table: Mapping[str | int, list[str]]) -> str:
    """The first row, for a message."""
    return "first row: " + ", ".join(f"{name}: {cells[0]!r}" for name, cells in table.items())


def _decimal_comma(times: Mapping[str, list[str]], path: Path) -> bool | None:
    cells = [cell for column in times.values() for cell in column if cell.strip().lower() not in MISSING_NUMBERS]
    comma = comma_is_decimal(cells)
    if comma is None and any("," in cell for cell in cells):
        first = next(cell for cell in cells if "," in cell)
        raise InputError(f"{path.name}: is the comma of {first!r} a decimal one? Write times with a point, in seconds")
    return bool(comma)


def _times(cells: list[str], comma: bool | None, where: str) -> Array:
    values = parse_numbers(cells, comma)
    if values is not None:
        return values
    bad = next(i for i, cell in enumerate(cells) if parse_numbers([cell], comma) is None)
    raise InputError(f"{where} of row {bad} is {cells[bad]!r}: not a number of seconds")


def _other(cells: list[str], comma: bool | None, column: str, name: str) -> pd.Series:
    """Numbers, where a column is numbers but for cells like ``"4.2,3.1"``; else text as it is, None where missing."""
    numbers = parse_numbers(cells, comma)
    if numbers is not None:
        return pd.Series(numbers)
    known = [cell if cell.strip() not in MISSING else None for cell in cells]
    values = np.array([np.nan if (v := parse_numbers([cell], comma)) is None else v[0] for cell in cells])
    odd = [i for i, cell in enumerate(cells) if np.isnan(values[i]) and cell.strip().lower() not in MISSING_NUMBERS]
    sums = []
    for i in odd:
        pair = parse_numbers(cells[i].split(","), False)
        sums.append(np.nan if pair is None or len(pair) < 2 else pair.sum())
    if len(odd) * 2 >= len(cells) or np.isnan(sums).any():
        return pd.Series(known, dtype=object)
    warnings.warn(
        f"{name}: column {column!r} has {len(odd)} cells with several numbers (first: row {odd[0]}, "
        f"{cells[odd[0]]!r}); their sum is used", stacklevel=5,
    )  # fmt: skip
    values[odd] = sums
    return pd.Series(values)

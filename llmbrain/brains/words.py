"""Word tables: when every word of a story was heard. TSV, CSV, BIDS events and Praat TextGrid."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import numpy as np
import pandas as pd

from llmbrain._files import clear_damage
from llmbrain._validation import InputError

# Names as people write them, after lower-casing and dropping everything but letters and digits.
USUAL_NAMES: dict[str, tuple[str, ...]] = {
    "word": ("word", "words", "text", "token", "label", "wordtext", "orthography", "value", "stimulus", "trialtype"),
    "onset": ("onset", "wordonset", "onsets", "start", "starttime", "wordstart", "tmin", "xmin", "begin", "onsetsec"),
    "offset": ("offset", "wordoffset", "offsets", "end", "endtime", "wordend", "stop", "tmax", "xmax", "offsetsec"),
    "duration": ("duration", "durations", "wordduration", "length", "durationsec"),
}  # fmt: skip
SILENCE = {
    "",
    "sp",
    "sil",
    "spn",
    "<sil>",
    "<p>",
    "<s>",
    "</s>",
    "<eps>",
    "{sl}",
    "{ns}",
    "{lg}",
    "{br}",
    "#",
    "-",
    "silence",
    "pau",
}
LONGEST_WORD = 60.0  # seconds in the median; even whole sentences are shorter
SEPARATORS = {".csv": ",", ".tsv": "\t", ".txt": None}


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
        ``.tsv``, ``.csv`` or ``.txt`` table, BIDS ``*_events.tsv``, or Praat ``.TextGrid`` (long or short).
    columns : mapping, optional
        Which column is ``"word"``, ``"onset"``, ``"offset"`` (or ``"duration"``) where the names are not the usual
        ones; numbers, counted from 0, for a table without a header.
    tier : str, optional
        Tier of the TextGrid; default: the one called word or words, else the only interval tier.

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
        frame = _read_textgrid(path, tier) if grid else _read_table(path, columns)
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
    usual = float((words["offset"] - words["onset"]).median())
    if usual > LONGEST_WORD:
        raise InputError(f"{name}: words last {usual:g} s in the median: times must be in seconds, not milliseconds")
    return words


def _read_table(path: Path, columns: Mapping[str, str | int] | None) -> pd.DataFrame:
    numbered = columns is not None and any(isinstance(column, int) for column in columns.values())
    table = pd.read_csv(
        path, sep=SEPARATORS.get(path.suffix.lower(), "\t"), header=None if numbered else "infer", encoding="utf-8-sig",
        keep_default_na=False, na_values=["", "n/a", "N/A", "nan", "NaN", "NA"], engine="python", quotechar='"',
    )  # fmt: skip
    found = _find_columns(table, columns, path)
    top = table[found["onset"]].astype(str).iloc[:1]
    if numbered and len(top) and top.str.contains(r"[A-Za-z]").all():
        table = table.iloc[1:].reset_index(drop=True)  # a header after all
    table = table.rename(columns={actual: role for role, actual in found.items()})
    for role in ("onset", "offset", "duration"):
        if role in found:
            table[role] = pd.to_numeric(table[role], errors="coerce")
    if "offset" not in found:
        table["offset"] = table["onset"] + table["duration"]
    table.columns = [str(column) for column in table.columns]
    others = [column for column in table.columns if column not in ("word", "onset", "offset")]
    for column in others:
        table[column] = _numbers(table[column], path.name)
    return table[["word", "onset", "offset", *others]]


def _find_columns(table: pd.DataFrame, given: Mapping[str, str | int] | None, path: Path) -> dict[str, str | int]:
    given = dict(given or {})
    unknown = set(given) - set(USUAL_NAMES)
    if unknown:
        raise InputError(
            f"columns: {sorted(unknown)[0]!r} is not known: allowed are {', '.join(map(repr, USUAL_NAMES))}"
        )
    for role, column in given.items():
        if column not in table.columns:
            raise InputError(f"columns: {path.name} has no column {column!r} for {role!r}, but {list(table.columns)}")
    plain = {re.sub(r"[^a-z0-9]", "", str(column).lower()): column for column in reversed(table.columns)}
    found: dict[str, str | int] = given
    for role, names in USUAL_NAMES.items():
        if role not in found:
            taken = set(found.values())
            match = next((plain[name] for name in names if name in plain and plain[name] not in taken), None)
            if match is not None:
                found[role] = match
    for role in ("word", "onset"):
        if role not in found:
            raise InputError(
                f"{path.name}: no column for {role!r} among {list(table.columns)}: pass columns={{'{role}': ...}}"
            )
    if "offset" not in found and "duration" not in found:
        raise InputError(
            f"{path.name}: no column for 'offset' or 'duration' among {list(table.columns)}: pass columns="
        )
    if "offset" in found:
        found.pop("duration", None)
    return found


def _numbers(column: pd.Series, name: str) -> pd.Series:
    """A column that is numbers but for cells like ``"4.2,3.1"``, as numbers; any other column as it is."""
    if pd.api.types.is_numeric_dtype(column):
        return column
    numbers = pd.to_numeric(column, errors="coerce")
    odd = column.notna() & numbers.isna()
    pieces = column[odd].astype(str).str.split(",")
    pairs = pieces.map(lambda cell: pd.to_numeric(pd.Series(cell), errors="coerce").sum(skipna=False)).astype(float)
    if not numbers.notna().any() or not pairs.notna().all():
        return column
    if odd.any():
        warnings.warn(
            f"{name}: column {column.name!r} has {int(odd.sum())} cells with several numbers "
            f"(first: row {odd.idxmax()}, {column[odd].iloc[0]!r}); their sum is used", stacklevel=4,
        )  # fmt: skip
        numbers[odd] = pairs
    return numbers


def _read_textgrid(path: Path, tier: str | None) -> pd.DataFrame:
    raw = path.read_bytes()
    text = raw.decode("utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig", errors="strict")
    if "ooTextFile" not in text[:200]:
        raise InputError(f"{path.name} is not a Praat text file: its first line is {text.splitlines()[:1]}")
    # Long and short files hold the same values in the same order: strings in quotes ("" is a quote), flags, bare
    # numbers.
    body = text.split('"TextGrid"', 1)[-1]
    pattern = r'"((?:[^"]|"")*)"|<(\w+)>|(?<![\w\[])(-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)(?![\w\]])'
    values = [(m[0] is not None, m[0].replace('""', '"')) if m[0] is not None else (False, m[1] or m[2])
              for m in (match.groups() for match in re.finditer(pattern, body))]  # fmt: skip
    tiers: dict[str, list[tuple[float, float, str]]] = {}
    at = 0
    while at < len(values):
        is_text, value = values[at]
        if not (is_text and value in ("IntervalTier", "TextTier")):
            at += 1
            continue
        label, count, at = values[at + 1][1], int(values[at + 4][1]), at + 5
        width = 3 if value == "IntervalTier" else 2
        if not 0 <= count <= (len(values) - at) // width:
            raise InputError(f"{path.name}: tier {label!r} should have {count} intervals, the file ends earlier")
        if value == "IntervalTier":
            cells = [values[at + width * i : at + width * (i + 1)] for i in range(count)]
            tiers[label] = [(float(a[1]), float(b[1]), c[1].strip()) for a, b, c in cells]
        at += width * count
    if not tiers:
        raise InputError(f"{path.name}: there is no interval tier in it")
    chosen = tier or next((name for name in tiers if name.strip().lower() in ("word", "words")), None)
    if chosen is None and len(tiers) == 1:
        chosen = next(iter(tiers))
    if chosen not in tiers:
        raise InputError(f"tier={tier!r}: {path.name} has the interval tiers {list(tiers)}")
    rows = [(word, a, b) for a, b, word in tiers[chosen] if word.lower() not in SILENCE]
    return pd.DataFrame(rows, columns=["word", "onset", "offset"])

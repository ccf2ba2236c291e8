"""Tables of brain series as people write them: which axis is time, where the names are, what is no series at all."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from os import PathLike, fspath
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from llmbrain._files import clear_damage
from llmbrain._validation import InputError, check_option
from llmbrain.brains.plain import comma_is_decimal, is_number, read_plain

Array = NDArray[np.float64]
ORIENTATIONS = ("auto", "volumes-first", "regions-first")
CLOCKS = {"", "time", "times", "t", "tr", "volume", "volumes", "vol", "frame", "index", "timepoint", "scan", "seconds"}
PEOPLE = {"subject", "subjects", "sub", "subj", "participant", "participantid", "subjectid", "listener"}
NOTHING = ("", "n/a", "nan", "na")
ROWS = {"roi", "rois", "parcel", "parcels", "region", "regions", "label", "labels", "code", "codes", "node"}
VOLUME = re.compile(r"(t|tr|vol|volume|time|frame|scan)[ _=-]?\d+")
SOUND = re.compile(r"(?i)snd_?pwr|sound_?(power|level)|rms|loudness|envelope")
CLEAR = np.log(1.25)  # two lengths that differ by less do not tell which of them is the story's


@dataclass
class Table:
    """One subject's series as they were written.

    Attributes
    ----------
    values : array ``(rows, columns)``
    regions : list of str or None
        Names, where the file has them.
    regions_first : bool or None
        Whether the rows are regions; None where the file does not say.
    """

    values: Array
    regions: list[str] | None = None
    regions_first: bool | None = None


def read_table(file: Path, name: str) -> dict[str, Table]:
    """Read ``.npy``, ``.npz`` or text; one `Table` a subject. `name` is the subject of a file that names none."""
    arrays = file.suffix.lower() in (".npy", ".npz")
    tables = _read_arrays(file, name) if arrays else _read_text(file, name)
    for owner, table in tables.items():
        if 0 in table.values.shape:
            raise InputError(f"fmri: {file.name}: {owner} has shape {table.values.shape}: no values")
    return tables


def _read_arrays(file: Path, name: str) -> dict[str, Table]:
    with clear_damage(file, "a file of arrays of numbers"):
        # Mapped, a header that says more than there is raises before anything is allocated.
        loaded = np.load(file, allow_pickle=False, mmap_mode="r")
        if isinstance(loaded, np.ndarray):
            content = {name: np.array(loaded)}
        else:
            with loaded:
                content = {key: loaded[key] for key in loaded.files}
    series = {key: a for key, a in content.items() if a.dtype.kind in "fiub" and a.ndim >= 2}
    series = series or {key: a for key, a in content.items() if a.dtype.kind in "fiub" and a.size > 1}
    labels = [[str(v) for v in a] for a in content.values() if a.dtype.kind in "US" and a.ndim == 1]
    if not series:
        raise InputError(f"fmri: {file.name} holds no array of numbers, but {sorted(content)}")
    tables: dict[str, Table] = {}
    for key, array in series.items():
        owner = name if len(series) == 1 else key
        values = np.asarray(array, dtype=np.float64)
        if values.ndim == 3:
            people = next((found for found in labels if len(found) == len(values)), None)
            people = people or [f"{owner}-{i:02d}" for i in range(len(values))]
            tables.update({who: _named(subject, labels) for who, subject in zip(people, values)})
        elif values.ndim <= 2:
            tables[owner] = _named(values[:, None] if values.ndim == 1 else values, labels)
        else:
            raise InputError(
                f"fmri: {file.name} holds an array of shape {values.shape}: (volumes, regions) is expected"
            )
    return tables


def _named(values: Array, labels: Sequence[list[str]]) -> Table:
    """With the names that fit one axis only."""
    for names in labels:
        fits = [n == len(names) for n in values.shape]
        if sum(fits) == 1:
            return Table(values, names, regions_first=fits[0])
    return Table(values)


def _read_text(file: Path, name: str) -> dict[str, Table]:
    text = read_plain(file, "fmri").split("\n")
    comments = [line for line in text if line.lstrip().startswith("#")]
    lines = [line for line in text if line.strip() and not line.lstrip().startswith("#")]
    if not lines:
        raise InputError(f"fmri: {file.name} is empty")
    separator = _separator(lines, file.suffix.lower())
    first = _cells(lines[0], separator)
    sample = [_cells(line, separator) for line in lines[1:41]]
    comma = separator != "," and comma_is_decimal([c for row in (sample or [first]) for c in row if is_number(c)])
    named = [cell for cell in first if cell.lower() not in NOTHING]
    words = not all(is_number(cell) if comma else _is_number(cell) for cell in named)
    has_header = words or (all(map(_is_number, named)) and (_counts(first) or _codes(first, sample)))
    body = lines[1:] if has_header else lines
    if separator == r"\s+":
        body = [line.strip().replace('"', "") for line in body]
    if not body:
        raise InputError(f"fmri: {file.name} has a header and no row")
    with clear_damage(file, "a table of numbers"):
        frame = pd.read_csv(
            io.StringIO("\n".join(body)), sep=separator, header=None, engine="python", na_values=["n/a"],
            skipinitialspace=True, index_col=False, decimal="," if comma else ".",
        )  # fmt: skip
    header = first if has_header else _cells(comments[-1].lstrip("# "), separator) if comments else []
    if has_header and not words:  # codes of an atlas, which some tools write as 7101.0
        header = [re.sub(r"\.0*$", "", cell) for cell in header]
    if len(header) == frame.shape[1] - 1 and has_header:
        header = ["", *header]  # written with an index
    if len(header) == frame.shape[1]:
        frame.columns = pd.Index(header)
    elif has_header:
        raise InputError(f"fmri: {file.name} has {len(header)} names for {frame.shape[1]} columns")
    return _split(frame, name, file.name, named=len(header) == frame.shape[1])


def _separator(lines: Sequence[str], suffix: str) -> str:
    for mark in ("\t", ";"):
        if mark in lines[0]:
            return mark
    if "," in lines[0]:
        pieces = lines[-1].split()
        spaced = len(pieces) > 1 and all(re.fullmatch(r"-?\d+,\d+([eE][-+]?\d+)?", piece) for piece in pieces)
        return r"\s+" if spaced else ","
    return {".csv": ",", ".tsv": "\t"}.get(suffix, r"\s+")


def _cells(line: str, separator: str) -> list[str]:
    return [cell.strip().strip("\"'") for cell in re.split(separator, line.strip() if separator == r"\s+" else line)]


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _whole(cell: str) -> bool:
    return re.fullmatch(r"\d+(\.0*)?", cell) is not None


def _codes(first: Sequence[str], body: Sequence[Sequence[str]]) -> bool:
    """Whether a first line of numbers names the columns, as the codes of an atlas do: whole, and unlike the rest."""
    codes = [cell for cell in first if cell.lower() not in NOTHING]
    if len(codes) < 3 or not body or not all(map(_whole, codes)) or len({float(c) for c in codes}) < len(codes):
        return False
    if len(codes) < len(first):  # one cell is empty, over a column of row numbers
        return first[0] == "" and len(codes) == len(first) - 1 and all(row[0] != "" for row in body)
    below = [cell for row in body for cell in row[-len(codes) :] if _is_number(cell)]
    if not all(map(_whole, below)):
        return sum(map(_whole, below)) < 0.5 * len(below)
    if len(body[0]) == len(first) + 1:
        return True
    values = [float(code) for code in codes]
    return len(values) > 4 and (all(b > a for a, b in pairwise(values)) or _apart(values, body))


def _apart(values: Sequence[float], body: Sequence[Sequence[str]]) -> bool:
    """Whether a row lies far from the columns below it."""
    columns = [[float(row[i]) for row in body if len(row) == len(values)] for i in range(len(values))]
    far = [bool(c) and abs(v - float(np.median(c))) > 5 * (max(c) - min(c) + 1) for v, c in zip(values, columns)]
    return sum(far) > 0.8 * len(far)


def _counts(cells: Sequence[str]) -> bool:
    """Whether these cells only number the columns, as pandas writes them."""
    numbers = [cell for cell in cells if cell.lower() not in NOTHING]
    if len(numbers) < 3 or len(numbers) < len(cells) - 1:
        return False
    values = [float(cell) for cell in numbers]
    return values[0] in (0, 1) and all(b - a == 1 for a, b in pairwise(values))


def _split(frame: pd.DataFrame, name: str, file: str, *, named: bool) -> dict[str, Table]:
    """Take clocks, subjects and names of regions out of the columns; what is left are series."""
    plain = [re.sub(r"[^a-z0-9]", "", str(column).lower()) if named else "" for column in frame.columns]
    if named and any(p in PEOPLE for p in plain):
        place = next(i for i, p in enumerate(plain) if p in PEOPLE)
        who, rest = frame.iloc[:, place], frame.drop(columns=frame.columns[place])
        tables: dict[str, Table] = {}
        for person in who.drop_duplicates():
            tables |= _split(rest[who == person].reset_index(drop=True), str(person), file, named=named)
        return tables
    codes = _row_codes(frame, plain, named=named)
    if codes is not None:
        return {name: Table(frame.iloc[:, 1:].to_numpy(np.float64), codes, True)}
    clocks = [i for i, p in enumerate(plain) if (p in CLOCKS if named else i == 0) and _is_clock(frame.iloc[:, i])]
    if clocks and frame.shape[1] > 1:
        found = str(frame.columns[clocks[0]]) if named else "the first column"
        warnings.warn(f"fmri: {file}: {found or 'the first column'!r} counts time and is no region: left out",
                      stacklevel=6)  # fmt: skip
        frame = frame.drop(columns=[frame.columns[i] for i in clocks])
    if named and _volume_rows(frame):
        frame = frame.iloc[:, 1:]
    text = [i for i in range(frame.shape[1]) if not pd.api.types.is_numeric_dtype(frame.iloc[:, i])]
    if text == [0] and frame.shape[1] > 2 and frame.iloc[:, 0].is_unique and frame.iloc[:, 0].notna().all():
        return {name: Table(frame.iloc[:, 1:].to_numpy(np.float64), frame.iloc[:, 0].astype(str).tolist(), True)}
    if text:
        column = frame.iloc[:, text[0]]
        what = repr(str(column.name)) if named else str(text[0])
        raise InputError(f"fmri: column {what} of {file} is not numbers (first value {column.iloc[0]!r})")
    names = [str(column) for column in frame.columns] if named else None
    volumes = names is not None and _name_volumes(names)
    return {name: Table(frame.to_numpy(np.float64), names, None if names is None or volumes else False)}


def _name_volumes(names: Sequence[str]) -> bool:
    """Whether names may be those of volumes: t0, vol_12, or numbers that count; numbers that do not are codes."""
    if all(name.isdigit() for name in names):
        return len(names) < 3 or _counts(names)
    return all(VOLUME.fullmatch(name.lower()) for name in names)


def _row_codes(frame: pd.DataFrame, plain: Sequence[str], *, named: bool) -> list[str] | None:
    """Names of rows in a first column of whole numbers: codes of regions, where the other columns are volumes."""
    if frame.shape[1] < 4:
        return None
    first, rest = frame.iloc[:, 0], frame.iloc[:, 1:]
    numbers = [pd.api.types.is_numeric_dtype(frame.iloc[:, i]) for i in range(frame.shape[1])]
    columns_are_regions = named and not _name_volumes([str(c) for c in frame.columns[1:]])
    if not all(numbers) or columns_are_regions or first.isna().any() or not first.is_unique:
        return None
    values = rest.to_numpy(np.float64)
    whole = float(np.mean(values == np.round(values)))
    if not (first == first.round()).all() or whole > 0.5 or (plain[0] not in ROWS and _is_clock(first)):
        return None
    return [str(int(code)) for code in first]


def _volume_rows(frame: pd.DataFrame) -> bool:
    """Whether the first column names volumes (vol0001, t=3): they are no regions, and no series."""
    first = frame.iloc[:, 0]
    if pd.api.types.is_numeric_dtype(first) or first.isna().any() or frame.shape[1] < 3:
        return False
    return all(VOLUME.fullmatch(str(cell).strip().lower()) for cell in first)


def _is_clock(column: pd.Series) -> bool:
    """Whether a column only counts: equal steps, which no measured series has."""
    if not pd.api.types.is_numeric_dtype(column) or len(column) < 5:
        return False
    steps = np.diff(column.to_numpy(float))
    return bool(np.isfinite(steps).all() and steps[0] > 0 and np.allclose(steps, steps[0], rtol=1e-3, atol=1e-9))


# -- which axis is time ------------------------------------------------------------------------------------------------


def orient(
    tables: Mapping[str, Table],
    *,
    orientation: str = "auto",
    regions: Sequence[str] | None = None,
    n_volumes: int | None = None,
    expected: float | None = None,
) -> tuple[dict[str, Array], list[str] | None]:
    """Bring every table to ``(volumes, regions)``.

    What a file says of itself counts first (names of rows or of columns), then the number of names in `regions`,
    `n_volumes`, which axis all subjects share, and which axis is as long as the stimulus (`expected` volumes).
    Nothing of this: rows are volumes. Turned tables and doubtful cases are said in a warning.

    Returns
    -------
    series : dict of array ``(volumes, regions)``
    regions : list of str or None
    """
    check_option("orientation", orientation, ORIENTATIONS)
    shapes = [table.values.shape for table in tables.values()]
    guess, why, sure = _guess(list(tables.values()), shapes, regions, n_volumes, expected)
    if orientation != "auto":
        guess, why, sure = orientation == "regions-first", "orientation says so", True
    series: dict[str, Array] = {}
    names: list[str] | None = list(regions) if regions is not None else None
    turned = 0
    for subject, table in tables.items():
        own = table.regions_first if orientation == "auto" and table.regions_first is not None else guess
        series[subject] = table.values.T if own else table.values
        turned += own
        if names is None and table.regions is not None and len(table.regions) == series[subject].shape[1]:
            names = table.regions
    first, rows = next(iter(tables.values())), shapes[0]
    if turned and first.regions_first is None and orientation == "auto":
        warnings.warn(f"fmri: tables are (regions, volumes): {rows[0]} rows are regions, {rows[1]} columns volumes, "
                      f"because {why}", stacklevel=3)  # fmt: skip
    elif not sure and first.regions_first is None and min(rows) > 1:
        warnings.warn(f"fmri: the {rows[0]} rows are taken as volumes and the {rows[1]} columns as regions ({why}); if "
                      "it is the other way round, say orientation='regions-first'", stacklevel=3)  # fmt: skip
    return series, names


def _guess(
    tables: Sequence[Table],
    shapes: Sequence[tuple[int, ...]],
    regions: Sequence[str] | None,
    n_volumes: int | None,
    expected: float | None,
) -> tuple[bool, str, bool]:
    """Whether rows are regions, why, and whether that is sure."""
    rows, columns = {s[0] for s in shapes}, {s[1] for s in shapes}
    if regions is not None and (rows == {len(regions)}) != (columns == {len(regions)}):
        return rows == {len(regions)}, f"there are {len(regions)} names of regions", True
    if n_volumes is not None and (rows == {n_volumes}) != (columns == {n_volumes}):
        return columns == {n_volumes}, f"n_volumes={n_volumes}", True
    if len(rows) == 1 and len(columns) > 1 and min(columns) > min(rows):
        return True, "subjects differ along the other axis", True
    if len(rows) > 1:
        return False, "subjects differ along it", True
    a, b = shapes[0]
    if a == b or min(a, b) == 1:
        return a == 1 and b > 1, "only one axis has values", a != b
    if expected is None or expected <= 0:
        return False, "nothing says more", a > b
    fits = [abs(np.log(n / expected)) < CLEAR for n in (a, b)]
    if fits[0] != fits[1]:
        return fits[1], f"the stimulus takes about {expected:.0f} volumes", True
    # Both axes are as long as the story, or none is (is tr right?): series are smooth in time.
    along = [_smoothness(table.values) for table in tables[:5]]
    down, across = np.mean(along, axis=0)
    both = f"{'both axes being' if fits[0] else 'no axis being'} as long as the story, about {expected:.0f} volumes"
    return bool(across > down + 0.2), f"series are smoother along it, {both}", False


def _smoothness(values: Array) -> tuple[float, float]:
    """Lag-1 correlation down the rows and across the columns, each after removing the mean of its own series."""
    found = []
    for x in (values, values.T):
        known = np.isfinite(x)
        mean = np.where(known, x, 0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
        z = np.where(known, x - mean, 0)
        found.append(float((z[1:] * z[:-1]).sum() / max((z * z).sum(), np.finfo(float).tiny)))
    return found[0], found[1]


def load_controls(files: Sequence[str | PathLike[str]], n_volumes: int) -> dict[str, Array]:
    """Control series at the volumes, by name: of the column, else of the file; sound power is recognized.

    Parameters
    ----------
    files : sequence of path
        Tables or arrays (see `read_table`), or ``name=FILE``.
    n_volumes : int
        Length that each series must have.
    """
    found: dict[str, Array] = {}
    for given in files:
        entry = fspath(given)
        name, equals, place = entry.partition("=")
        path = Path(place if equals and not Path(entry).is_file() else entry)
        if not path.is_file():
            raise FileNotFoundError(f"controls: no file at {path}")
        own = name if equals and not Path(entry).is_file() else path.stem
        for key, table in read_table(path, own).items():
            values = table.values.T if table.values.shape[1] == n_volumes != len(table.values) else table.values
            if len(values) != n_volumes:
                raise InputError(f"controls: {path.name} has {len(values)} values for {n_volumes} volumes")
            names = table.regions if table.regions and len(table.regions) == values.shape[1] else None
            if names is None:
                names = [key] if values.shape[1] == 1 else [f"{key} {i}" for i in range(values.shape[1])]
            for label, series in zip(names, values.T):
                found["sound power" if SOUND.search(label) and "sound power" not in found else label] = series
    return found

"""One file, whole or absent."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmbrain._files.errors import DamagedError, FileError, check_space, clear_errors
from llmbrain._files.parts import SUMS, flush, flush_folder, is_temporary, read_sums, sweep, temporary_of
from llmbrain._files.sets import transaction

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

SEAL = "sha256"  # entry of a sealed JSON file


@contextmanager
def writing(
    path: str | os.PathLike[str], *, needed: int | None = None, stands: str = "", fresh: bool = False
) -> Iterator[Path]:
    """Write one file whole or not at all.

    Parameters
    ----------
    path : path
        Its folder is made where it is missing. A file there stays until the new one is whole.
    needed : int, optional
        Bytes it will take; checked before, and said if the disk is full.
    stands : str, optional
        What is still there when it fails, for the end of the message.
    fresh : bool
        Nothing must be at `path` when the file is whole.

    Yields
    ------
    Path
        Of a hidden temporary file beside it, with the same ending; write it, and it gets its name.

    Raises
    ------
    FileError
        If the disk is full or read-only, or the folder vanished. What stood at `path` is unchanged.
    FileExistsError
        With `fresh`, if another process was faster.

    Examples
    --------
    >>> with writing("plan.json") as temporary:  # doctest: +SKIP
    ...     temporary.write_text("{}")
    """
    path = Path(path)
    if _is_described(path.parent):
        free = (lambda _: _refuse_there(path)) if fresh else None
        with transaction(path.parent, needed=needed, free=free) as folder:
            yield folder / path.name
            if not (folder / path.name).is_file():
                raise FileError(f"{path} was not written")
        return
    stood = stands or ("; what stood there is unchanged" if path.is_file() else "")
    temporary = temporary_of(path)
    with clear_errors(path, needed=needed, stands=stood):
        if needed is not None:
            check_space(path.parent, needed, path.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent, path.name)
        try:
            yield temporary
            flush(temporary)
            _place_fresh(temporary, path) if fresh else temporary.replace(path)
        finally:
            with suppress(OSError):
                temporary.unlink()
        flush_folder(path.parent)


def _place_fresh(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
    except FileExistsError:
        _refuse_there(path)
    except OSError:  # a disk without links
        _refuse_there(path)
        temporary.replace(path)


def _refuse_there(path: Path) -> None:
    if path.exists():
        raise FileExistsError(f"{path} exists already: another process was faster")


def write_bytes(path: str | os.PathLike[str], content: bytes) -> Path:
    """Write bytes, whole or not at all."""
    with writing(path, needed=len(content)) as temporary:
        temporary.write_bytes(content)
    return Path(path)


def write_text(path: str | os.PathLike[str], text: str, *, errors: str = "strict") -> Path:
    """Write UTF-8 text with ``\\n`` ends, whole or not at all."""
    return write_bytes(path, text.encode("utf-8", errors))


def write_json(
    path: str | os.PathLike[str],
    record: Mapping[str, Any],
    *,
    seal: bool = False,
    indent: int | None = 1,
    default: Callable[[Any], Any] | None = None,
) -> Path:
    """Write a record as JSON, whole or not at all.

    Parameters
    ----------
    seal : bool
        Add an entry ``sha256``: the checksum of the record, by which `read_json` knows that nothing was altered.
    default : callable, optional
        For what JSON does not know; numpy scalars and arrays, paths and sets are known.
    """
    content = json.loads(json.dumps(record, default=default or plain)) if seal else dict(record)
    if seal:
        content[SEAL] = seal_of(content)
    return write_text(path, json.dumps(content, indent=indent, ensure_ascii=False, default=default or plain) + "\n",
                      errors="surrogatepass")  # fmt: skip


def seal_of(record: Mapping[str, Any]) -> str:
    """Checksum of what a JSON record says, without its seal: the same however it is laid out."""
    content = {key: value for key, value in record.items() if key != SEAL}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def plain(value: Any) -> Any:
    """For ``json.dumps(default=)``: numpy scalars and arrays, paths, sets."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def write_table(path: str | os.PathLike[str], frame: pd.DataFrame, **options: Any) -> Path:
    """Write a DataFrame with `to_csv`, without its index unless told; tabs between columns unless it is a .csv."""
    defaults = {"sep": "," if str(path).endswith(".csv") else "\t", "index": False}
    with writing(path) as temporary:
        frame.to_csv(temporary, **(defaults | options))
    return Path(path)


def write_figure(path: str | os.PathLike[str], figure: Any, **options: Any) -> Path:
    """Write a matplotlib figure with its ``savefig``; the ending says the format."""
    with writing(path) as temporary:
        figure.savefig(temporary, **options)
    return Path(path)


def write_tensors(
    path: str | os.PathLike[str], arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str] | None = None
) -> Path:
    """Write numpy arrays as one safetensors file."""
    import numpy as np
    from safetensors.numpy import save_file

    ready = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    with writing(path, needed=sum(array.nbytes for array in ready.values())) as temporary:
        save_file(ready, temporary, metadata=dict(metadata) if metadata else None)
    return Path(path)


def write_image(path: str | os.PathLike[str], image: Any) -> Path:
    """Write a nibabel image."""
    with writing(path) as temporary:
        image.to_filename(temporary)
    return Path(path)


def _is_described(folder: Path) -> bool:
    """Whether a folder has checksums of ours, which a file that is written there must join."""
    if not (folder / SUMS).is_file() or is_temporary(folder):
        return False
    try:
        read_sums(folder)
    except (DamagedError, OSError):  # damaged, or not ours
        return False
    return True

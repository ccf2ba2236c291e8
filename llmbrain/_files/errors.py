"""One way to fail: what a disk says, as one line."""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmbrain._validation import InputError


class FileError(InputError):
    """A place cannot be written or read: full, read-only, gone; the message says what stands."""


class DamagedError(InputError):
    """A file is not what was written: truncated, altered, or of another format; the message names it."""


_SAID = {
    errno.ENOSPC: "no space is left on the disk",
    getattr(errno, "EDQUOT", -1): "the disk quota is used up",
    errno.EFBIG: "the file is larger than this disk or limit allows",
    errno.EROFS: "the disk is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "operation not permitted",
    errno.ENOENT: "the folder is gone",
    errno.EIO: "the disk reports an error",
    errno.EMFILE: "too many files are open",
    errno.ENAMETOOLONG: "the name is too long",
}


@contextmanager
def clear_errors(
    path: str | os.PathLike[str], *, needed: int | None = None, stands: str = "", doing: str = "written"
) -> Iterator[None]:
    """Turn what the system says while `path` is written, or read, into a `FileError` of one line.

    Parameters
    ----------
    path : path
        What is being made.
    needed : int, optional
        Bytes that it takes, where they are known.
    stands : str
        What is still there, for the end of the message.
    doing : {"written", "read"}

    Raises
    ------
    FileError
        In place of OSError, also where safetensors hides one. FileExistsError and InputError pass, and when reading
        FileNotFoundError.
    """
    try:
        yield
    except (InputError, FileExistsError):
        raise
    except Exception as error:
        if isinstance(error, FileNotFoundError) and doing == "read":
            raise
        found = error if isinstance(error, OSError) else hidden_oserror(error)
        if found is None:
            raise
        raise FileError(f"{path} cannot be {doing}: {what_happened(found, Path(path), needed)}{stands}") from error


def refuse_device(path: str | os.PathLike[str]) -> None:
    """A disk or a terminal has no end that could be read; what is not there is for the reader to say.

    Raises
    ------
    InputError
        If `path` is a device.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return
    if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        raise InputError(f"{path} is a device, not a file")


@contextmanager
def clear_damage(path: str | os.PathLike[str], what: str, anew: str = "") -> Iterator[None]:
    """Turn what is raised while a file is taken apart into a `DamagedError` of one line.

    Parameters
    ----------
    path : path
        The file.
    what : str
        What it should be: "a NIfTI image".
    anew : str
        What the user does to make it anew; ends the message.

    Raises
    ------
    DamagedError
        In place of what decoders and parsers raise. InputError and FileNotFoundError pass.
    FileError
        In place of OSError with a number: the disk's word.
    """
    refuse_device(path)
    try:
        yield
    except (InputError, FileNotFoundError, NameError, ImportError):
        raise
    except Exception as error:  # decoders raise whatever they like on damaged bytes: the list has no end
        if isinstance(error, OSError) and error.errno is not None:
            raise FileError(f"{path} cannot be read: {what_happened(error, Path(path))}") from error
        said = " ".join(str(error).split())[:200] or type(error).__name__
        said = f"{type(error).__name__} {said}" if isinstance(error, (KeyError, IndexError)) else said
        raise DamagedError(f"{path} is not {what}, or was truncated or altered: {said}{hint(anew)}") from error


def hidden_oserror(error: Exception) -> OSError | None:
    """safetensors says "I/O error: ... (os error 28)" in an error of its own."""
    code = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(code[1]), os.strerror(int(code[1]))) if code else None


def what_happened(error: OSError, path: Path, needed: int | None = None) -> str:
    """What the system said, with the space that is free where that is the trouble."""
    said = _SAID.get(error.errno or 0) or error.strerror or str(error) or type(error).__name__
    if error.errno in (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", -1)):
        there = next((p for p in (path, *path.parents) if p.exists()), Path())
        free = f"{bytes_text(shutil.disk_usage(there).free)} are free"
        said += f" ({f'{bytes_text(needed)} are needed, ' if needed else ''}{free})"
    return said


def bytes_text(n: float) -> str:
    """A number of bytes as people say it: ``3.2 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} TB"


def check_space(folder: str | os.PathLike[str], needed: int, what: str = "it") -> None:
    """Say before anything is written that a disk has not what is needed.

    Raises
    ------
    FileError
        If fewer than `needed` bytes are free where `folder` is, or will be.
    """
    place = Path(folder).absolute()
    there = next(p for p in (place, *place.parents) if p.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise FileError(f"{folder}: {what} needs {bytes_text(needed)}, but only {bytes_text(free)} are free there")


def hint(anew: str) -> str:
    """What to do about it, as the next sentence of a message."""
    return f". {anew[0].upper()}{anew[1:]}" if anew else ""

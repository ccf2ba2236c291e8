"""The one way to write a file, a set of files, and to read them back.

Writing
-------
``writing(path)``
    One file, whole or absent: a context manager that gives a temporary path beside the place (same ending), then
    flushes and renames. ``write_text``, ``write_bytes``, ``write_json``, ``write_table``, ``write_figure``,
    ``write_tensors`` and ``write_image`` are one line each on top of it.
``transaction(folder)``
    A set of files that belong together: gives a hidden folder to write into; at the end every file is checksummed into
    ``SHA256SUMS``, flushed, and the set is put in place by one rename. Readers see the old set or the new one. A
    process that is killed leaves the old set, or a set whose last moves the next reader or writer makes.

A folder that holds a ``SHA256SUMS`` stays described by it: ``writing`` into it lists the file there as well.

Reading
-------
``reading(folder)``
    The files of a set, each verified against ``SHA256SUMS`` when it is asked for; no writer changes them meanwhile.
``read_json(path)``, ``read_tensors(path)``
    One file; what is damaged is one line that names it. `write_json(..., seal=True)` puts a checksum into the file
    itself, which ``read_json`` compares.
``read_listed(path)``
    A record that carries no checksum itself, verified against ``SHA256SUMS``.
``clear_damage(path, what)``
    Around any other reader: what it raises on a damaged file becomes one line.
``damages(folder)``
    Every file of ``SHA256SUMS`` that is missing or altered.

Owning
------
``owner(folder)``
    One process at a time writes into a folder step by step (a scan, a dual regression, a table of lesions), or the
    ranks of one job together; a second one is told who does. ``append_sum`` adds a file that is whole to such a
    folder's ``SHA256SUMS``.
``refuse_other(folder, what)``, ``still_free(folder, what)``
    A folder holds one thing: a model does not go where a scan is.

Failing
-------
A full or read-only disk, a folder that vanished: `FileError`. A file that is not what was written: `DamagedError`. Both
are `InputError` with one line. Temporary files carry host and process in their name, and those of dead processes are
removed by the next writer.
"""

from __future__ import annotations

from llmbrain._files.contents import other_content, refuse_other, still_free
from llmbrain._files.digests import file_digest, file_pages, file_sha256, is_same
from llmbrain._files.errors import (
    DamagedError,
    FileError,
    bytes_text,
    check_space,
    clear_damage,
    clear_errors,
    refuse_device,
)
from llmbrain._files.one import (
    plain,
    seal_of,
    write_bytes,
    write_figure,
    write_image,
    write_json,
    write_table,
    write_tensors,
    write_text,
    writing,
)
from llmbrain._files.owner import LOCK, BusyError, owner
from llmbrain._files.parts import SUMS, append_sum, discard_sum, locked, read_sums, replace_sums, sweep
from llmbrain._files.reading import (
    AGAIN,
    StoredFiles,
    UnverifiedWarning,
    damages,
    read_json,
    read_listed,
    read_tensors,
    reading,
    refuse_newer,
    verify,
    verify_listed,
    verifying,
)
from llmbrain._files.sets import COMMIT, discard, discard_file, remove_folder, settle, transaction

__all__ = [
    "AGAIN",
    "COMMIT",
    "LOCK",
    "SUMS",
    "BusyError",
    "DamagedError",
    "FileError",
    "StoredFiles",
    "UnverifiedWarning",
    "append_sum",
    "bytes_text",
    "check_space",
    "clear_damage",
    "clear_errors",
    "damages",
    "discard",
    "discard_file",
    "discard_sum",
    "file_digest",
    "file_pages",
    "file_sha256",
    "is_same",
    "locked",
    "other_content",
    "owner",
    "plain",
    "read_json",
    "read_listed",
    "read_sums",
    "read_tensors",
    "reading",
    "refuse_device",
    "refuse_newer",
    "refuse_other",
    "remove_folder",
    "replace_sums",
    "seal_of",
    "settle",
    "still_free",
    "sweep",
    "transaction",
    "verify",
    "verify_listed",
    "verifying",
    "write_bytes",
    "write_figure",
    "write_image",
    "write_json",
    "write_table",
    "write_tensors",
    "write_text",
    "writing",
]

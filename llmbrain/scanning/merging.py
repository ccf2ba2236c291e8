"""Folders that ranks scanned into on different machines, joined to the study that a single process would write."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmbrain._files import (
    append_sum,
    bytes_text,
    check_space,
    clear_errors,
    file_sha256,
    is_same,
    owner,
    write_json,
    writing,
)
from llmbrain._validation import InputError
from llmbrain.scanning.scans import Scan
from llmbrain.scanning.shares import how_read, say_missing, settle_ranks
from llmbrain.scanning.store import (
    CorruptStoreError,
    FileShards,
    check_same_study,
    load_scans,
    read_manifest,
    refuse_others,
)


def merge(folders: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]) -> list[Scan]:
    """Join the folders of one scan whose ranks wrote apart (``--rank I --of N``, or `llmbrain.scanning.taking`).

    Every shard is compared with its checksum on the way. The same call goes on where it was stopped.

    Parameters
    ----------
    folders : sequence of path
        In any order; a shard may lie in several. None of them is changed.
    out : path
        Folder of the whole study: what a single process would have written. It may be begun already.

    Returns
    -------
    list of Scan
        As `load_scans` gives them.

    Raises
    ------
    InputError
        If the folders hold different studies, or shards that differ; if shards are missing, with the rank whose they
        are; nothing is written then.
    CorruptStoreError
        If a file does not match its checksum.
    """
    paths = [Path(folder) for folder in ([folders] if isinstance(folders, (str, os.PathLike)) else folders)]
    if not paths:
        raise InputError("folders is empty: name the folders that ranks scanned into")
    out = Path(out)
    if (out / "manifest.json").exists() and out.resolve() not in [path.resolve() for path in paths]:
        paths.append(out)
    manifests = [read_manifest(path) for path in paths]
    for path, manifest in zip(paths[1:], manifests[1:]):
        _check_same(paths[0], manifests[0], path, manifest)
    parts = [FileShards(path, manifest["rows"]) for path, manifest in zip(paths, manifests)]
    source = _sources(parts)
    missing = [index for index in range(parts[0].n_shards) if index not in source]
    if missing:
        who = next((said for path in paths if (said := say_missing(path, missing))), "")
        raise InputError(
            f"folders {', '.join(map(str, paths))} lack {len(missing)} of {parts[0].n_shards} shards{who}, first "
            f"{parts[0].name(missing[0])}. Name the folder that has them too, or run the same scan there again"
        )
    with owner(out):
        if not (out / "manifest.json").exists():
            refuse_others(out)
        _copy_runs(paths, out, manifests[0]["study"]["runs_sha256"])
        if not (out / "manifest.json").exists():
            write_json(out / "manifest.json", manifests[0], seal=True)
        there = FileShards(out, manifests[0]["rows"])
        needed = sum(_size(source[i], i) for i in source if source[i].folder != out)
        check_space(out, needed, f"the study ({bytes_text(needed)})")
        for index, part in sorted(source.items()):
            name = part.name(index)
            if there.is_done(index):
                there.verify(index)
                continue
            with writing(out / name, needed=_size(part, index)) as temporary:
                with clear_errors(part.folder / name, doing="read"):
                    shutil.copyfile(part.folder / name, temporary)
                if not is_same(temporary, part.sums[name], fully=True):
                    raise CorruptStoreError(
                        f"{part.folder / name} does not match its checksum: it was truncated or edited after it was "
                        f"written. Delete it and run the same scan into {part.folder} again to make it anew"
                    )
            append_sum(out, name, part.sums[name])
            there.sums[name] = part.sums[name]
        settle_ranks(out, [there.name(i) for i in range(there.n_shards)], there.sums)
    return load_scans(out)


def _check_same(first: Path, known: dict[str, Any], folder: Path, manifest: dict[str, Any]) -> None:
    try:
        check_same_study(folder, manifest, known)
    except InputError as error:
        said = str(error).partition(": its ")[2].partition(". Give")[0]
        raise InputError(f"{folder} holds another study than {first}: its {said}") from None
    if manifest["rows"] != known["rows"]:
        raise InputError(
            f"{folder} was cut into other shards than {first} ({len(manifest['rows']) - 1}, not "
            f"{len(known['rows']) - 1}): scan all with the same batch_size and the same version of llmbrain"
        )
    here, there = how_read(first), how_read(folder)
    for name in ("batch_size", "verify"):
        if name in here and name in there and here[name] != there[name]:
            raise InputError(
                f"{folder} was scanned with {name}={there[name]!r}, {first} with {here[name]!r}: all ranks must read "
                "alike"
            )


def _sources(parts: Sequence[FileShards]) -> dict[int, FileShards]:
    """Which folder each shard is taken from; folders that have it must agree."""
    source: dict[int, FileShards] = {}
    for part in parts:
        for index in range(part.n_shards):
            if not part.is_done(index):
                continue
            known = source.setdefault(index, part)
            name = part.name(index)
            if known.sums[name].partition("+")[0] != part.sums[name].partition("+")[0]:
                raise InputError(
                    f"{known.folder / name} and {part.folder / name} differ: the same text gave other numbers there "
                    "(another machine or library?). Leave one of the folders out, or delete one of the files"
                )
    return source


def _size(part: FileShards, index: int) -> int:
    with clear_errors(part.folder, doing="read"):
        return (part.folder / part.name(index)).stat().st_size


def _copy_runs(paths: Sequence[Path], out: Path, digest: str) -> None:
    """``runs.jsonl``, from a folder where it is whole."""
    for path in (out, *paths):
        if (path / "runs.jsonl").is_file() and file_sha256(path / "runs.jsonl") == digest:
            break
    else:
        raise CorruptStoreError(
            f"{paths[0] / 'runs.jsonl'} does not match its checksum: it was truncated or edited after it was written. "
            f"Run the same scan into {paths[0]} again to make it anew"
        )
    if path != out:
        with writing(out / "runs.jsonl") as temporary:
            shutil.copyfile(path / "runs.jsonl", temporary)

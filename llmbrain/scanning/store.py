"""The store of a study: safetensors shards by token block, a JSON manifest, the runs, and checksums.

::

    study/
      manifest.json       what was scanned and how; which tokens each shard holds
      runs.jsonl          one line a run: text, token ids, tokens, character spans, events
      SHA256SUMS          one line a finished shard, as `sha256sum -c` reads it
      shards/0000.safetensors ...
      ranks/              while several ranks write it: see `llmbrain.scanning.shares`

The tokens of all runs, one after another, are cut into shards. A shard holds one tensor ``(n_tokens, units)`` for each
site and layer, named ``site.layer``. It is whole or absent: written under a temporary name, flushed to disk, renamed.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmbrain._files import (
    SUMS,
    DamagedError,
    FileError,
    append_sum,
    clear_errors,
    file_digest,
    file_sha256,
    is_same,
    locked,
    read_json,
    read_sums,
    refuse_other,
    replace_sums,
    sweep,
    write_json,
    writing,
)
from llmbrain._validation import InputError
from llmbrain.anatomy.space import NeuronSpace
from llmbrain.hooks.text import Run, ScanWarning
from llmbrain.scanning.mixture import Mixture, MixtureSignals, VisitSignals
from llmbrain.scanning.scans import Scan, Signals
from llmbrain.scanning.shares import RANKS, Share, known_sums, say_missing, settle_ranks

FORMAT = "llmbrain-scan"
FORMAT_VERSION = 1
LARGEST = 1 << 40  # no count in a manifest comes near


class CorruptStoreError(DamagedError):
    """A file of a scan store is missing, truncated or edited; the message names it."""


def key_of(site: str, layer: int) -> str:
    """Name of a tensor in a shard."""
    return f"{site}.{layer}"


# -- where shards are ------------------------------------------------------------------------------------------------


class MemoryShards:
    """Shards that stay in memory, in the model's dtype."""

    def __init__(self, rows: Sequence[int]) -> None:
        self.rows = np.asarray(rows)
        self.tensors: dict[int, Mapping[str, Tensor]] = {}

    def name(self, index: int) -> str:
        """What errors call a shard."""
        return f"shard {index}"

    def write(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep a shard."""
        self.tensors[index] = tensors

    def read(self, index: int, keys: Sequence[str], start: int, stop: int) -> list[Tensor]:
        """Rows ``start..stop`` of some tensors of a shard."""
        return [self.tensors[index][key][start:stop] for key in keys]


class FileShards:
    """Shards in a folder; each is verified against its checksum before it is first read."""

    def __init__(self, folder: Path, rows: Sequence[int], share: Share | None = None) -> None:
        self.folder, self.rows, self.share = folder, np.asarray(rows), share or Share()
        self.sums = known_sums(folder)
        self.how: dict[str, Any] = {}  # of the scan that writes here: see `Share.check`
        self._verified: set[int] = set()

    @property
    def n_shards(self) -> int:
        """How many shards the finished study has."""
        return len(self.rows) - 1

    def name(self, index: int) -> str:
        """Path of a shard within the folder."""
        return f"shards/{index:04d}.safetensors"

    @property
    def missing(self) -> list[int]:
        """Shards that are not there, of any rank, as far as is known."""
        return [index for index in range(self.n_shards) if not self.is_done(index)]

    def is_done(self, index: int) -> bool:
        """Whether a shard was finished."""
        return self.name(index) in self.sums and (self.folder / self.name(index)).is_file()

    def write(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Write a shard and its checksum; only then does it exist."""
        from safetensors.torch import save_file

        path = self.folder / self.name(index)
        needed = sum(tensor.nbytes for tensor in tensors.values())
        stands = "; the shards before it are kept: the same scan into this folder goes on from them"
        if not self.folder.is_dir():
            raise FileError(f"{self.folder} is gone: it was removed while the scan wrote into it")
        self.share.check(self.folder, **self.how)
        with writing(path, needed=needed, stands=stands) as temporary:
            save_file(dict(tensors), temporary)
            digest = file_digest(temporary)
        with clear_errors(self.folder, stands=stands):
            append_sum(self.share.folder(self.folder), self.name(index), digest)
        self.sums[self.name(index)] = digest
        self._verified.discard(index)

    def read(self, index: int, keys: Sequence[str], start: int, stop: int) -> list[Tensor]:
        """Rows ``start..stop`` of some tensors of a shard; nothing else is read but for the checksum, once."""
        from safetensors import SafetensorError, safe_open

        self.verify(index)
        path = self.folder / self.name(index)
        try:
            with safe_open(path, framework="pt") as shard:
                return [shard.get_slice(key)[start:stop] for key in keys]
        except SafetensorError as error:
            raise CorruptStoreError(f"{path} does not hold what manifest.json says: {error}") from None

    def verify(self, index: int) -> None:
        """Compare a shard with its checksum, once.

        Raises
        ------
        CorruptStoreError
            If it is missing, or was truncated or edited.
        """
        if index in self._verified:
            return
        path = self.folder / self.name(index)
        if not self.is_done(index):
            raise CorruptStoreError(
                f"{path} is missing: the study is not complete. Run the same scan into {self.folder} again to finish it"
            )
        with clear_errors(path, doing="read"):
            same = is_same(path, self.sums[self.name(index)])
        if not same:
            raise CorruptStoreError(
                f"{path} does not match its checksum: it was truncated or edited after it was written. Delete it and "
                f"run the same scan into {self.folder} again to make it anew"
            )
        self._verified.add(index)

    def resume(self) -> list[int]:
        """Shards still to be made. Left-over temporary files go; a damaged shard is made anew, and that is said."""
        if (self.folder / "shards").is_dir():
            sweep(self.folder / "shards")
        own = self.share.folder(self.folder)
        known = self.sums if own == self.folder else read_sums(own, strict=False)
        if known:  # without a last line that a kill cut short, or lines twice
            with clear_errors(self.folder):
                replace_sums(own, known)
        missing = []
        for index in self.share.mine(self.n_shards):
            if self.is_done(index):
                try:
                    self.verify(index)
                    continue
                except CorruptStoreError as error:
                    warnings.warn(f"{str(error).partition('. ')[0]}: it is made anew", ScanWarning, stacklevel=3)
            missing.append(index)
        return missing

    def finish(self) -> None:
        """Where other ranks write too: see what they have made, and settle the study once all is there.

        In a process group, ranks wait for each other here.

        Raises
        ------
        InputError
            If ranks that talk to each other all say that they are done, and shards are missing.
        """
        if self.share.size == 1:
            if self.share.team.leads and (self.folder / RANKS).is_dir() and not self.missing:
                settle_ranks(self.folder, [self.name(i) for i in range(self.n_shards)], self.sums)
            if self.share.team.size > 1:
                self.share.team.meet("scan: whole")
                self.sums = known_sums(self.folder)
            return
        self.share.team.meet("scan: shards")
        self.sums = known_sums(self.folder)
        lacking = self.missing
        if not lacking and self.share.team.leads:
            settle_ranks(self.folder, [self.name(i) for i in range(self.n_shards)], self.sums)
        self.share.team.meet("scan: whole")
        if lacking and self.share.team.size > 1:
            raise FileError(
                f"{self.folder / self.name(lacking[0])} is missing though all ranks are done"
                f"{say_missing(self.folder, lacking)}: run the same scan again"
            )


Shards = MemoryShards | FileShards


class ShardSignals:
    """The rows of one run, for one site; see `llmbrain.scanning.scans.Signals`."""

    def __init__(self, shards: Shards, site: str, space: NeuronSpace, first_row: int, n_tokens: int) -> None:
        self.shards, self.site, self.space = shards, site, space
        self.first_row, self.n_tokens = first_row, n_tokens

    def read(self, layers: Sequence[int], start: int, stop: int) -> NDArray[np.float32]:
        """Units of `layers` at tokens ``start..stop`` of the run; float32 ``(stop - start, units)``."""
        columns = np.cumsum([0, *(self.space.widths[layer] for layer in layers)])
        values = np.empty((stop - start, int(columns[-1])), dtype=np.float32)
        target = torch.from_numpy(values)
        keys = [key_of(self.site, layer) for layer in layers]
        begin, end = self.first_row + start, self.first_row + stop
        first = int(np.searchsorted(self.shards.rows, begin, side="right")) - 1
        while keys and begin < end:
            low, high = (int(x) for x in self.shards.rows[first : first + 2])
            part = slice(begin - self.first_row - start, min(high, end) - self.first_row - start)
            tensors = self.shards.read(first, keys, begin - low, min(high, end) - low)
            for key, tensor, (a, b) in zip(keys, tensors, pairwise(columns)):
                if tensor.shape != target[part, a:b].shape:
                    name = self.shards.name(first)
                    raise CorruptStoreError(f"{name} does not hold what manifest.json says: {key} has another shape")
                target[part, a:b] = tensor
            begin, first = high, first + 1
        return values


def scans_of(
    shards: Shards,
    runs: Sequence[Run],
    widths: Mapping[str, Sequence[int]],
    block_size: int | None,
    model_id: str,
    mixture: Mixture | None = None,
    origin: Mapping[str, str] | None = None,
) -> list[Scan]:
    """One `Scan` a run over shards that hold them all; `widths` of each site that is stored."""
    widths = {**widths, **(mixture.stored() if mixture is not None else {})}
    spaces = {site: NeuronSpace(units) for site, units in widths.items()}
    scans, first = [], 0
    for run in runs:
        n = len(run.tokens)
        signals: dict[str, Signals] = {
            site: ShardSignals(shards, site, space, first, n) for site, space in spaces.items()
        }
        visits: Signals | None = None
        if mixture is not None:
            parts, signals = signals, {}
            for site in mixture.sites:
                signals[site] = parts[site] if site == "block_out" else MixtureSignals(mixture, site, parts, n)
            visits = VisitSignals(mixture, parts["visited"], n) if "visited" in parts else None
        scans.append(
            Scan(
                signals,
                name=run.name,
                text=run.text,
                token_ids=run.token_ids,
                tokens=run.tokens,
                offsets=run.offsets,
                block_size=block_size,
                events=run.events,
                model_id=model_id,
                visits=visits,
                origin=origin,
            )
        )
        first += n
    return scans


# -- the folder --------------------------------------------------------------------------------------------------------


def runs_sha256(runs: Sequence[Run]) -> str:
    """Checksum of ``runs.jsonl``."""
    digest = hashlib.sha256()
    for run in runs:
        for piece in run.to_json():
            digest.update(piece.encode())
    return digest.hexdigest()


def _write_runs(folder: Path, runs: Sequence[Run]) -> None:
    with writing(folder / "runs.jsonl") as path, path.open("w", encoding="utf-8", newline="\n") as file:
        for run in runs:
            file.writelines(run.to_json())


def open_study(
    folder: Path, manifest: dict[str, Any], runs: Sequence[Run], share: Share | None = None
) -> tuple[FileShards, dict[str, Any]]:
    """Begin a study in `folder`, or go on with the same one; returns its shards and the manifest that holds.

    In a process group rank 0 does so, and the others find it.

    Raises
    ------
    InputError
        If the folder holds another study; says what differs.
    """
    share = share or Share()
    if share.team.leads:
        manifest = _begun(folder, manifest, runs)
    share.meet_at(folder)
    if not share.team.leads:
        known = read_manifest(folder)
        check_same_study(folder, known, manifest)
        manifest = known
    return FileShards(folder, manifest["rows"], share), manifest


def _begun(folder: Path, manifest: dict[str, Any], runs: Sequence[Run]) -> dict[str, Any]:
    """The manifest that holds in a folder: what is there already, or a new one."""
    path = folder / "manifest.json"
    if not path.exists():
        with locked(folder, exclusive=True):
            if not path.exists():  # ranks may begin at the same time
                refuse_others(folder)
                with clear_errors(folder):
                    (folder / SUMS).unlink(missing_ok=True)
                _write_runs(folder, runs)
                write_json(path, manifest, seal=True)
                return manifest
    known = read_manifest(folder)
    check_same_study(folder, known, manifest)
    # The same as what the manifest's checksum says: a damaged file is put right.
    there = folder / "runs.jsonl"
    if not there.is_file() or file_sha256(there) != known["study"]["runs_sha256"]:
        _write_runs(folder, runs)
    return known


def refuse_others(folder: Path) -> None:
    """A new scan does not begin where another set is: its checksums stand where those of the shards will."""
    others = [name for name in read_sums(folder, strict=False) if not name.startswith(("shards/", "runs.jsonl"))]
    if others:
        raise InputError(f"out={str(folder)!r} already holds files that are no scan ({others[0]}): give another folder")
    refuse_other(folder, "a scan")


def check_same_study(folder: Path, known: dict[str, Any], manifest: dict[str, Any]) -> None:
    """Refuse a folder that holds another study; says what differs."""
    for what, value in manifest["study"].items():
        there = known["study"].get(what)
        if there != value:
            raise InputError(
                f"out={str(folder)!r} already holds another study: its {what} is {_short(there)}, not "
                f"{_short(value)}. Give another folder"
            )


def load_scans(folder: str | Path) -> list[Scan]:
    """Bring a study back: one `Scan` a run, as `llmbrain.scan` gave them. No model or tokenizer is needed.

    Parameters
    ----------
    folder : path
        What was given to `llmbrain.scan` as `out`.

    Raises
    ------
    InputError
        If the folder holds no study, or one that is not finished.
    CorruptStoreError
        If a file does not match its checksum. Shards are verified when they are first read.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    path = folder / "runs.jsonl"
    try:
        text = path.read_bytes()
    except OSError as error:
        raise CorruptStoreError(f"{path} can not be read: {error.strerror}") from None
    if hashlib.sha256(text).hexdigest() != manifest["study"]["runs_sha256"]:
        raise CorruptStoreError(
            f"{path} does not match its checksum: it was truncated or edited after it was written. Run the same scan "
            f"into {folder} again to make it anew"
        )
    try:
        runs = [Run.from_record(json.loads(line)) for line in text.decode().split("\n") if line]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptStoreError(f"{path} holds no runs: {error}") from None
    shards = FileShards(folder, manifest["rows"])
    missing = shards.missing
    if missing:
        raise CorruptStoreError(
            f"{folder / shards.name(missing[0])} is missing: the study has {len(missing)} of {shards.n_shards} shards "
            f"still to be made{say_missing(folder, missing)}. Run the same scan into this folder again to finish it"
        )
    study = manifest["study"]
    widths = {site: facts["widths"] for site, facts in study["sites"].items()}
    mixture = Mixture.from_record(study["mixture"]) if "mixture" in study else None
    return scans_of(shards, runs, widths, study["block_size"], manifest["model"]["id"], mixture, origin_of(manifest))


def origin_of(manifest: Mapping[str, Any]) -> dict[str, str]:
    """What tells a scan from others, and its model: see `Scan.origin`."""
    study = manifest["study"]
    digest = hashlib.sha256(json.dumps(study, sort_keys=True).encode()).hexdigest()
    return {"scan": digest, "weights": str(study["weights_sum"]), "model": str(manifest["model"]["id"])}


def unfinished(folder: str | Path) -> str:
    """What a study lacks, in words, while other ranks still write it; empty for a whole one."""
    folder = Path(folder)
    shards = FileShards(folder, read_manifest(folder)["rows"])
    missing = shards.missing
    return f"{len(missing)} of {shards.n_shards} shards{say_missing(folder, missing)}" if missing else ""


def read_manifest(folder: Path) -> dict[str, Any]:
    """What was scanned and how.

    Raises
    ------
    InputError
        If the folder holds no scan, or its manifest is damaged.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        raise InputError(f"{str(folder)!r} holds no scan: there is no manifest.json")
    try:
        manifest = read_json(path, anew=f"run the same scan into {folder} again, after removing it")
    except DamagedError as error:
        raise CorruptStoreError(str(error)) from None
    if manifest.get("format") != FORMAT:
        raise InputError(f"{path} is not the manifest of a scan (format {FORMAT!r})")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise CorruptStoreError(f"{path} has format version {manifest.get('format_version')!r}, not 1: it was edited")
    if not _is_manifest(manifest):
        raise CorruptStoreError(
            f"{path} lacks entries of a scan's manifest, or they are not of their kind: it was edited"
        )
    return manifest


def _is_manifest(manifest: dict[str, Any]) -> bool:
    """Whether the entries that reading relies on are there, of their kind and within bounds."""
    try:
        study, rows = manifest["study"], manifest["rows"]
        ascending = all(type(n) is int and 0 <= n < LARGEST for n in rows) and rows == sorted(rows) and rows[0] == 0
        widths = [facts["widths"] for facts in study["sites"].values()]
        counted = all(type(n) is int and 0 <= n < LARGEST for units in widths for n in units)
        size = study["block_size"]
        sized = size is None or (type(size) is int and 0 < size < LARGEST)
        named = all(isinstance(x, str) for x in (study["runs_sha256"], study["weights_sum"], manifest["model"]["id"]))
        named = named and all(site.isprintable() for site in study["sites"])  # half a surrogate pair is no name
    except (KeyError, TypeError, AttributeError, IndexError):
        return False
    return bool(rows) and bool(widths) and ascending and counted and sized and named


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."

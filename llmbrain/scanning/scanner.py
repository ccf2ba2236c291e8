"""The scanner: a model reads texts, hooks on its own modules record, shards go to disk as they fill."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmbrain._progress import bar
from llmbrain._validation import InputError, check_whole
from llmbrain.anatomy.experts import expert_anatomy, has_experts
from llmbrain.anatomy.families import anatomy, context_length
from llmbrain.anatomy.spread import is_spread
from llmbrain.distributed import ALONE
from llmbrain.hooks.listen import Kinds, Reader, Recorder, reading
from llmbrain.hooks.sites import check_sites, expert_taps, find_taps
from llmbrain.hooks.text import Block, Run, ScanWarning, blocks_of, cut_runs, embeddings, read_texts
from llmbrain.scanning.columns import Columns, check_spread, check_taps
from llmbrain.scanning.manifest import check_same, manifest_of, model_id, say_disk
from llmbrain.scanning.mixture import Mixture
from llmbrain.scanning.scans import Scan
from llmbrain.scanning.schedule import Schedule
from llmbrain.scanning.shares import Share
from llmbrain.scanning.store import FileShards, MemoryShards, Shards, key_of, open_study, origin_of, scans_of

UNKNOWN = 0.01  # share of unknown tokens that is said
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def scan(
    model: nn.Module,
    tokenizer: Any,
    texts: Iterable[str] | str,
    *,
    out: str | Path | None = None,
    site: str | Sequence[str] = "neuron",
    block_size: int | None = None,
    batch_size: int = 8,
    n_tokens: int | None = None,
    run_length: int | None = None,
    dtype: torch.dtype | str | None = None,
    verify: bool = True,
) -> list[Scan]:
    """Let a model read texts, and keep what every neuron did at every token.

    In a process group (or within `taking`) each rank makes its own part of the study in `out`; all get all of it. A
    scan that is kept in memory each rank makes by itself. A model that is spread over the ranks (``tp_plan``) is read
    by all of them together, each hears its own neurons, and rank 0 writes; sums over ranks round otherwise than those
    of one process (float32: by less than 1e-5 of a layer's largest signal).

    What is kept equals what the model's own modules compute in that forward pass, to the bit (unless `dtype` is
    narrower). Texts of a batch are padded on the right; padding is never recorded. A text longer than `block_size` is
    read in blocks, each from position 0 and with no begin-of-sequence token of its own; a `ScanWarning` says so.

    Parameters
    ----------
    model : torch.nn.Module
        A transformers model (decoder or encoder, with or without its head), on any device or spread over several.
    tokenizer : transformers tokenizer
        Its default special tokens are read and recorded too.
    texts : iterable of str
        One run each; a `Stimulus` brings its events and name.
    out : path, optional
        Folder to stream to: memory then does not grow with the number of tokens. The same scan into the same folder
        goes on where it was stopped. Default: keep all in memory.
    site : str or sequence of str
        ``"neuron"`` (what enters the MLP's down projection), its factors ``"gate"`` (activated) and ``"up"`` (output of
        the up or only input projection), ``"mlp_out"``, ``"block_out"``, ``"head"`` (L2 norm of each attention head's
        output, float32), or several in one pass. Of a mixture of experts: ``"neuron"`` (every neuron of every expert, 0
        where it is not called), ``"router"`` (the gate of every routed expert, 0 where it is not called),
        ``"block_out"``; stored by visit, see `Scan.visits`.
    block_size : int, optional
        Longest piece read at once, in tokens. Default: what the model's positions cover.
    batch_size : int
        Blocks read at once; fewer where their signals would exceed 1 GiB.
    n_tokens : int, optional
        Read at most so many tokens of each text.
    run_length : int, optional
        Cut longer texts into several runs of at most so many tokens, each with its part of the text and the events.
    dtype : torch.dtype or str, optional
        ``float16``, ``bfloat16`` or ``float32``: what to keep the numbers in. Default: what the model computes in.
    verify : bool
        Try on two texts whether the model gives the same for a text alone as in a batch, padded; where it does not,
        only texts of one length are read together.

    Returns
    -------
    list of Scan
        One a text, in order; several of a text that is cut.

    Raises
    ------
    InputError
        Empty texts, an unknown site or one this model does not have, a block longer than the context, NaN or infinite
        signals (named by layer, neuron, run and token), too little disk, a folder that holds another study.
    """
    spread = is_spread(model)
    share = Share.together() if spread else Share() if out is None else Share.now()
    with share.team.job("scan"):
        sites = check_sites(site)
        kept = _check_dtype(dtype)
        check_whole("batch_size", batch_size, 1)
        limit = context_length(model)
        if block_size is not None:
            check_whole("block_size", block_size, 1, limit)
        size = limit if block_size is None else int(block_size)
        mixed = has_experts(model)
        if spread:
            check_spread(model, share.team, mixed)
        body = expert_anatomy(model) if mixed else None
        dense = anatomy(model, spread=True) if body is None else None
        recorder = Recorder(expert_taps(body, sites) if body is not None else find_taps(dense or anatomy(model), sites))
        if spread:
            check_taps(recorder.taps)
        if run_length is not None:
            check_whole("run_length", run_length, 1)
        runs = cut_runs(read_texts(texts, tokenizer, n_tokens), run_length)
        check_ids(model, runs)
        say_unknown(tokenizer, runs)
        blocks = blocks_of(runs, size)
        say_blocks(runs, size)

        with reading(model, recorder, runs) as reader, ExitStack() as owned:
            if spread:
                owned.enter_context(share.team.watching("scan"))
            kinds = heard = reader.kinds(blocks[0], kept)
            columns = None
            if spread and dense is not None:
                columns, kinds = Columns.of(share.team, dense, heard)
            called = {layer: units for (kind, layer), (_, units) in kinds.items() if kind == "visited"}
            mixture = None if body is None else Mixture.of(body, sites, called)
            per_token = sum(dtype.itemsize * units for dtype, units in kinds.values())
            schedule = Schedule.make(blocks, per_token, int(batch_size))
            shards: Shards
            origin: dict[str, str] | None = None
            if out is None:
                shards, todo = MemoryShards(schedule.rows), list(range(len(schedule.shards)))
            else:
                manifest = manifest_of(model, tokenizer, runs, kinds, size, schedule, mixture)
                share.team.agree("scan", **manifest["study"], batch_size=int(batch_size), verify=bool(verify))
                owned.enter_context(share.owning(out))
                shards, manifest = open_study(Path(out), manifest, runs, share)
                origin = origin_of(manifest)
                schedule = Schedule(blocks, [(low, high) for low, high in manifest["blocks"]], per_token)
                todo = shards.resume() if columns is None else share.team.told("scan: to do", shards.resume)
                shards.how = {"batch_size": int(batch_size), "verify": bool(verify)}
                share.note(Path(out), len(shards.sums), **shards.how)
                if done := sorted(set(share.mine(len(schedule.shards))) - set(todo)):
                    look = partial(check_same, reader, schedule, shards, done[0], kinds, columns)
                    look() if columns is None else columns.agreed(look)
                say_disk(Path(out), schedule, todo if share.size == 1 or share.team is ALONE else shards.missing, share)
            if todo and verify:
                pads = reader.pads_well(schedule.most_padded(int(batch_size)))
                if not (pads if columns is None else columns.all(pads)):
                    schedule = replace(schedule, even=True)
            _record(reader, schedule, shards, todo, heard, int(batch_size), columns)
            if isinstance(shards, FileShards):
                shards.finish()
        widths = {name: [units for (site, _), (_, units) in kinds.items() if site == name] for name in sites}
        if mixture is not None:
            widths = {name: units for name, units in widths.items() if name == "block_out"}
        return scans_of(shards, runs, widths, size, model_id(model), mixture, origin)


# -- before the first token ------------------------------------------------------------------------------------------


def _check_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    known = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and known not in DTYPES:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise InputError(f"dtype={dtype!r} is not known: allowed are {allowed}")
    return known


def check_ids(model: nn.Module, runs: Sequence[Run]) -> None:
    """The model must have an embedding of every token id."""
    rows = getattr(embeddings(model), "num_embeddings", None)
    largest = max(int(run.token_ids.max()) for run in runs)
    if rows is not None and largest >= rows:
        raise InputError(f"tokenizer gives token id {largest}, but the model knows {rows}: do they belong together?")


def say_unknown(tokenizer: Any, runs: Sequence[Run]) -> None:
    """How much of a text is the token of all that a tokenizer does not know (GPT-2's is the end of a text, too)."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is None or unknown in {getattr(tokenizer, f"{role}_token_id", None) for role in ("bos", "eos", "pad")}:
        return
    share = sum(int((run.token_ids == unknown).sum()) for run in runs) / sum(len(run.token_ids) for run in runs)
    if share > UNKNOWN:
        warnings.warn(
            f"{share:.0%} of the tokens are {tokenizer.unk_token}, which stands for all that the tokenizer does not "
            "know: a perplexity of such a text is too low",
            ScanWarning,
            stacklevel=3,
        )


def say_blocks(runs: Sequence[Run], size: int | None) -> None:
    """Warn where a text is read in blocks, each of which knows nothing of the one before."""
    long = [len(run.tokens) for run in runs if size is not None and len(run.tokens) > size]
    if long:
        warnings.warn(
            f"{len(long)} of {len(runs)} texts are longer than {size} tokens (the longest has {max(long)}): they are "
            f"read in blocks of {size} tokens, each of which knows nothing of the one before",
            ScanWarning,
            stacklevel=3,
        )


# -- recording ---------------------------------------------------------------------------------------------------------


def _record(
    reader: Reader, schedule: Schedule, shards: Shards, todo: Sequence[int], kinds: Kinds, batch_size: int,
    columns: Columns | None = None,
) -> None:  # fmt: skip
    """Fill and write the shards that are to be made; one is written while the next is recorded.

    Of a model that is spread over ranks `kinds` are what this one hears, and rank 0 writes what all heard.
    """
    rows = schedule.rows
    total = sum(rows[i + 1] - rows[i] for i in todo)
    pool = _Buffers(kinds, reuse=isinstance(shards, FileShards))
    writing: Future[None] | None = None
    with (
        ThreadPoolExecutor(1) as writer,
        bar[None](total=total, desc="scan", unit="token") as progress,
    ):
        for index in todo:
            buffers = reader.recorder.buffers = pool.take(rows[index + 1] - rows[index])
            row = 0
            for low, high in schedule.batches(*schedule.shards[index], batch_size):
                n = reader.read(schedule.blocks[low:high], row)
                row += n
                progress.update(n)
            _settle(writing, columns)
            signals: Mapping[tuple[str, int], Tensor] = buffers
            if columns is not None:
                on_disk = isinstance(shards, FileShards)
                signals = columns.joined(buffers, to=0 if on_disk else None)
                if on_disk and not columns.team.leads:
                    continue
            writing = writer.submit(_finish, shards, index, signals, schedule, reader.runs)
        _settle(writing, columns)


def _settle(writing: Future[None] | None, columns: Columns | None) -> None:
    """Wait until a shard is written; of a model that is spread over ranks all hear if it was not."""

    def wait() -> None:
        if writing is not None:
            writing.result()

    wait() if columns is None else columns.agreed(wait)


class _Buffers:
    """Room for a shard; two in turn where they are written to disk, a new one each where they are kept."""

    def __init__(self, kinds: Kinds, reuse: bool) -> None:
        self.kinds, self.reuse = kinds, reuse
        self.pair: list[dict[tuple[str, int], Tensor]] = [{}, {}]

    def take(self, n_rows: int) -> dict[tuple[str, int], Tensor]:
        """One tensor ``(n_rows, units)`` for each site and layer."""
        buffers: dict[tuple[str, int], Tensor] = self.pair[0] if self.reuse else {}
        self.pair.reverse()
        for key, (dtype, units) in self.kinds.items():
            if key not in buffers or len(buffers[key]) < n_rows:
                buffers[key] = torch.empty((n_rows, units), dtype=dtype)
        return {key: buffer[:n_rows] for key, buffer in buffers.items()}


def _finish(
    shards: Shards, index: int, signals: Mapping[tuple[str, int], Tensor], schedule: Schedule, runs: Sequence[Run]
) -> None:
    """Check a full shard, and write it."""
    for (site, layer), signal in signals.items():
        if not signal.numel():
            continue  # of a layer whose MLP was dropped
        low, high = torch.aminmax(signal)
        if not (torch.isfinite(low) and torch.isfinite(high)):
            _refuse(site, layer, signal, schedule.blocks[slice(*schedule.shards[index])], runs)
    shards.write(index, {key_of(*key): signal for key, signal in signals.items()})


def _refuse(site: str, layer: int, signal: Tensor, blocks: Sequence[Block], runs: Sequence[Run]) -> None:
    """Name the first value that is not finite."""
    row, unit = (int(x) for x in (~torch.isfinite(signal)).nonzero()[0])
    value = float(signal[row, unit])
    ends = list(accumulate(len(block) for block in blocks))
    block, end = next((block, end) for block, end in zip(blocks, ends) if row < end)
    dtype = str(signal.dtype).removeprefix("torch.")
    hint = ": the signal may exceed what float16 holds (65504); try dtype='bfloat16'" if dtype == "float16" else ""
    raise InputError(
        f"{value} in {site} of layer {layer}, neuron {unit}, at token {block.stop - (end - row)} of "
        f"{runs[block.run].name}, recorded as {dtype}{hint}"
    )

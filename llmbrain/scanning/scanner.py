"""The scanner: a model reads texts, hooks on its own modules record, shards go to disk as they fill."""

from __future__ import annotations

import hashlib
import inspect
import json
import shutil
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import llmbrain
from llmbrain._validation import InputError, check_range
from llmbrain.architectures import anatomy, context_length
from llmbrain.scanning.runs import Block, Run, ScanWarning, blocks_of, read_texts
from llmbrain.scanning.scans import Scan
from llmbrain.scanning.sites import Recorder, check_sites, find_taps
from llmbrain.scanning.store import (
    FORMAT,
    FORMAT_VERSION,
    FileShards,
    MemoryShards,
    Shards,
    key_of,
    open_study,
    runs_to_text,
    scans_of,
)

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SHARD_BYTES = 64 * 2**20  # a shard is closed when it has this much; also what is lost when a run is killed
BATCH_BYTES = 2**30  # fewer texts are read at once where their signals would take more than this
# How far a second reading of the same block may lie from what is stored (relative): rounding, not another model.
SAME = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.05}


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
    dtype: torch.dtype | str | None = None,
) -> list[Scan]:
    """Let a model read texts, and keep what every neuron did at every token.

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
        output, float32), or several in one pass.
    block_size : int, optional
        Longest piece read at once, in tokens. Default: what the model's positions cover.
    batch_size : int
        Blocks read at once; fewer where their signals would exceed 1 GiB.
    n_tokens : int, optional
        Read at most so many tokens of each text.
    dtype : torch.dtype or str, optional
        ``float16``, ``bfloat16`` or ``float32``: what to keep the numbers in. Default: what the model computes in.

    Returns
    -------
    list of Scan
        One a text, in order.

    Raises
    ------
    InputError
        Empty texts, an unknown site or one this model does not have, a block longer than the context, NaN or infinite
        signals (named by layer, neuron, run and token), too little disk, a folder that holds another study.
    """
    sites = check_sites(site)
    kept = _check_dtype(dtype)
    check_range("batch_size", batch_size, 1)
    limit = context_length(model)
    if block_size is not None:
        check_range("block_size", block_size, 1, limit)
    size = limit if block_size is None else int(block_size)
    body = anatomy(model)
    taps = find_taps(body, sites)
    runs = read_texts(texts, tokenizer, n_tokens)
    _check_ids(model, runs)
    blocks = blocks_of(runs, size)
    _say_blocks(runs, size)

    with _reading(model) as reader:
        recorder = Recorder(taps)
        with recorder.listening():
            kinds = _kinds(reader, recorder, blocks[0], runs, kept)
            plan = _Plan.make(blocks, kinds, int(batch_size))
            manifest = _manifest(model, tokenizer, runs, sites, kinds, size, plan)
            shards: Shards
            if out is None:
                shards, todo = MemoryShards(plan.rows), list(range(len(plan.shards)))
            else:
                folder = Path(out)
                shards, manifest = open_study(folder, manifest, runs)
                plan = _Plan(blocks, manifest["blocks"], plan.per_token)
                todo = shards.resume()
                if len(todo) < len(plan.shards):
                    done = next(i for i in range(len(plan.shards)) if i not in todo)
                    _check_same(reader, recorder, runs, plan, shards, done, kinds)
                _say_disk(folder, plan, todo)
            _record(reader, recorder, runs, plan, shards, todo, kinds, int(batch_size))
    return scans_of(shards, runs, manifest)


# -- before the first token ------------------------------------------------------------------------------------------


def _check_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    known = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and known not in DTYPES:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise InputError(f"dtype={dtype!r} is not known: allowed are {allowed}")
    return known


def _check_ids(model: nn.Module, runs: Sequence[Run]) -> None:
    rows = getattr(_embeddings(model), "num_embeddings", None)
    largest = max(int(run.token_ids.max()) for run in runs)
    if rows is not None and largest >= rows:
        raise InputError(f"tokenizer gives token id {largest}, but the model knows {rows}: do they belong together?")


def _embeddings(model: Any) -> nn.Module | None:
    return model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None


def _say_blocks(runs: Sequence[Run], size: int | None) -> None:
    long = [len(run.tokens) for run in runs if size is not None and len(run.tokens) > size]
    if long:
        warnings.warn(
            f"{len(long)} of {len(runs)} texts are longer than {size} tokens (the longest has {max(long)}): they are "
            f"read in blocks of {size} tokens, each of which knows nothing of the one before",
            ScanWarning,
            stacklevel=3,
        )


def _say_disk(folder: Path, plan: _Plan, todo: Sequence[int]) -> None:
    tokens = sum(plan.rows[i + 1] - plan.rows[i] for i in todo)
    need = tokens * plan.per_token
    done = f" ({plan.rows[-1] - tokens:,} of {plan.rows[-1]:,} are there already)" if tokens < plan.rows[-1] else ""
    print(f"scan: {tokens:,} tokens need {_bytes(need)} of disk in {folder}{done}", file=sys.stderr)
    free = shutil.disk_usage(folder).free
    if need > free:
        raise InputError(f"out={str(folder)!r}: the scan needs {_bytes(need)}, but only {_bytes(free)} are free there")


def _bytes(n: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} TB"


@dataclass(frozen=True)
class _Plan:
    """Which blocks go into which shard: ``shards[i]`` is (first block, last block + 1)."""

    blocks: Sequence[Block]
    shards: Sequence[Sequence[int]]
    per_token: int

    @classmethod
    def make(cls, blocks: Sequence[Block], kinds: Mapping[str, tuple[torch.dtype, int]], batch_size: int) -> _Plan:
        """Whole batches a shard, until it is large enough."""
        per_token = sum(dtype.itemsize * units for dtype, units in kinds.values())
        shards, first, held = [], 0, 0
        plan = cls(blocks, [], per_token)
        for low, high in plan.batches(0, len(blocks), batch_size):
            held += per_token * sum(len(block) for block in blocks[low:high])
            if held >= SHARD_BYTES or high == len(blocks):
                shards.append([first, high])
                first, held = high, 0
        return cls(blocks, shards, per_token)

    @property
    def rows(self) -> list[int]:
        """First token of each shard, counted over all runs, and the total."""
        lengths = [sum(len(block) for block in self.blocks[low:high]) for low, high in self.shards]
        return list(accumulate(lengths, initial=0))

    def batches(self, first: int, last: int, batch_size: int) -> Iterator[tuple[int, int]]:
        """Blocks that are read at once."""
        while first < last:
            stop = min(first + batch_size, last)
            longest = 0
            for stop_here in range(first, stop):
                longest = max(longest, len(self.blocks[stop_here]))
                if stop_here > first and longest * (stop_here + 1 - first) * self.per_token > BATCH_BYTES:
                    stop = stop_here
                    break
            yield first, stop
            first = stop


def _kinds(
    reader: _Reader, recorder: Recorder, block: Block, runs: Sequence[Run], kept: torch.dtype | None
) -> dict[str, tuple[torch.dtype, int]]:
    """Dtype and number of units of each tensor, seen in a first reading of two tokens."""
    short = Block(block.run, block.start, min(block.start + 2, block.stop))
    heard = _read_alone(reader, recorder, runs, short)
    wide: dict[str, torch.dtype] = {}
    for tap in recorder.taps:
        signal = heard[key_of(tap.site, tap.layer)]
        wide[tap.site] = torch.promote_types(wide.get(tap.site, signal.dtype), signal.dtype)
    return {
        key_of(tap.site, tap.layer): (kept or wide[tap.site], heard[key_of(tap.site, tap.layer)].shape[1])
        for tap in recorder.taps
    }


def _manifest(
    model: nn.Module,
    tokenizer: Any,
    runs: Sequence[Run],
    sites: Sequence[str],
    kinds: Mapping[str, tuple[torch.dtype, int]],
    size: int | None,
    plan: _Plan,
) -> dict[str, Any]:
    """All facts of a study; those under ``study`` make it the same study or another."""
    import numpy
    import transformers

    config: Any = getattr(model, "config", None)
    settings = config.to_dict() if hasattr(config, "to_dict") else {}
    for volatile in ("_name_or_path", "transformers_version", "_commit_hash"):
        settings.pop(volatile, None)
    described = {}
    for name in sites:
        entries = [kind for key, kind in kinds.items() if key.rpartition(".")[0] == name]
        described[name] = {
            "dtype": str(entries[0][0]).removeprefix("torch."),
            "widths": [units for _, units in entries],
        }
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "study": {
            "model_config_sha256": _sha256(json.dumps(settings, sort_keys=True, default=str)),
            "weights_sum": _weights_sum(model),
            "runs_sha256": _sha256(runs_to_text(runs)),
            "block_size": size,
            "sites": described,
        },
        "model": {
            "id": str(getattr(config, "_name_or_path", "") or type(model).__name__),
            "class": type(model).__name__,
            "revision": getattr(config, "_commit_hash", None),
        },
        "tokenizer": {
            "id": str(getattr(tokenizer, "name_or_path", "")),
            "class": type(tokenizer).__name__,
            "vocabulary": len(tokenizer),
        },
        "runs": [{"name": run.name, "n_tokens": len(run.tokens), "text_sha256": _sha256(run.text)} for run in runs],
        "blocks": [list(pair) for pair in plan.shards],
        "rows": plan.rows,
        "versions": {
            "llmbrain": llmbrain.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": numpy.__version__,
        },
    }


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _weights_sum(model: nn.Module) -> str:
    """Sum of all weights' bit patterns, a parameter at a time: the same for the same weights on any device."""
    digest = hashlib.sha256()
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    for name, parameter in model.named_parameters():
        if parameter.is_meta:  # off-loaded by accelerate
            continue
        bits = parameter.detach().reshape(-1).view(whole[parameter.element_size()])
        digest.update(f"{name} {tuple(parameter.shape)} {int(bits.sum(dtype=torch.int64))}\n".encode())
    return digest.hexdigest()


# -- reading -----------------------------------------------------------------------------------------------------------


@dataclass
class _Reader:
    """Runs the model's body (without the vocabulary projection) over padded token ids."""

    body: nn.Module
    device: torch.device
    padding: int
    options: Mapping[str, Any]

    def batch(self, runs: Sequence[Run], blocks: Sequence[Block]) -> tuple[Tensor, Tensor]:
        """Token ids and mask (bool), both ``(blocks, longest)``, padded on the right."""
        ids = torch.full((len(blocks), max(len(block) for block in blocks)), self.padding)
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        for i, block in enumerate(blocks):
            ids[i, : len(block)] = torch.from_numpy(runs[block.run].token_ids[block.start : block.stop])
            mask[i, : len(block)] = True
        return ids, mask

    def __call__(self, ids: Tensor, mask: Tensor) -> None:
        """One forward pass."""
        attention = None if bool(mask.all()) else mask.to(self.device, torch.long)
        self.body(input_ids=ids.to(self.device), attention_mask=attention, **self.options)


@contextmanager
def _reading(model: nn.Module) -> Iterator[_Reader]:
    """The model in evaluation mode; its training mode comes back whatever happens."""
    from transformers import PreTrainedModel

    body = model.base_model if isinstance(model, PreTrainedModel) else model
    weight = getattr(_embeddings(model), "weight", None)
    weight = next(model.parameters()) if weight is None or weight.is_meta else weight
    device = weight.device if not weight.is_meta else torch.device("cpu")
    padding = getattr(getattr(body, "config", None), "pad_token_id", None)
    # A decoder would keep its keys and values for a next token that never comes.
    options = {"use_cache": False} if "use_cache" in inspect.signature(body.forward).parameters else {}
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        with torch.inference_mode():
            yield _Reader(body, device, padding if isinstance(padding, int) and padding >= 0 else 0, options)
    finally:
        for module in training:
            module.training = True


def _read_alone(reader: _Reader, recorder: Recorder, runs: Sequence[Run], block: Block) -> dict[str, Tensor]:
    """What one block gives when read by itself, by tensor name."""
    recorder.buffers = {}
    ids, mask = reader.batch(runs, [block])
    recorder.expect(mask, 0)
    reader(ids, mask)
    recorder.check_heard()
    return {key_of(*key): signal for key, signal in recorder.buffers.items()}


def _check_same(
    reader: _Reader,
    recorder: Recorder,
    runs: Sequence[Run],
    plan: _Plan,
    shards: FileShards,
    done: int,
    kinds: Mapping[str, tuple[torch.dtype, int]],
) -> None:
    """Read the first block of a finished shard again: a lesion or another intervention would show."""
    block = plan.blocks[plan.shards[done][0]]
    heard = _read_alone(reader, recorder, runs, block)
    keys = list(kinds)
    for key, stored in zip(keys, shards.read(done, keys, 0, len(block))):
        new, old = heard[key].to(stored.dtype).double(), stored.double()
        if float((new - old).norm()) > SAME[stored.dtype] * float(old.norm()):
            raise InputError(
                f"out={str(shards.folder)!r} already holds another study: {key} of {runs[block.run].name} was "
                "otherwise (is the model changed by an intervention now, or was it then?). Give another folder"
            )


def _record(
    reader: _Reader,
    recorder: Recorder,
    runs: Sequence[Run],
    plan: _Plan,
    shards: Shards,
    todo: Sequence[int],
    kinds: Mapping[str, tuple[torch.dtype, int]],
    batch_size: int,
) -> None:
    """Fill and write the shards that are to be made; one is written while the next is recorded."""
    from tqdm.auto import tqdm

    rows = plan.rows
    total = sum(rows[i + 1] - rows[i] for i in todo)
    pool = _Buffers(kinds, reuse=isinstance(shards, FileShards))
    writing: Future[None] | None = None
    with (
        ThreadPoolExecutor(1) as writer,
        tqdm(total=total, desc="scan", unit="token", unit_scale=True, disable=None) as progress,
    ):
        for index in todo:
            tensors = pool.take(rows[index + 1] - rows[index])
            recorder.buffers = {(tap.site, tap.layer): tensors[key_of(tap.site, tap.layer)] for tap in recorder.taps}
            row = 0
            for low, high in plan.batches(plan.shards[index][0], plan.shards[index][1], batch_size):
                ids, mask = reader.batch(runs, plan.blocks[low:high])
                recorder.expect(mask, row)
                reader(ids, mask)
                recorder.check_heard()
                row += recorder.n_rows
                progress.update(recorder.n_rows)
            if reader.device.type == "cuda":  # the copies to the CPU are asynchronous
                torch.cuda.synchronize()
            if writing is not None:
                writing.result()
            writing = writer.submit(_finish, shards, index, tensors, plan, runs)
        if writing is not None:
            writing.result()


class _Buffers:
    """Room for a shard; two in turn where they are written to disk, a new one each where they are kept."""

    def __init__(self, kinds: Mapping[str, tuple[torch.dtype, int]], reuse: bool) -> None:
        self.kinds, self.reuse = kinds, reuse
        self.pair: list[dict[str, Tensor]] = [{}, {}]

    def take(self, n_rows: int) -> dict[str, Tensor]:
        """One tensor ``(n_rows, units)`` a key."""
        buffers: dict[str, Tensor] = self.pair[0] if self.reuse else {}
        self.pair.reverse()
        for key, (dtype, units) in self.kinds.items():
            if key not in buffers or len(buffers[key]) < n_rows:
                buffers[key] = torch.empty((n_rows, units), dtype=dtype)
        return {key: buffer[:n_rows] for key, buffer in buffers.items()}


def _finish(shards: Shards, index: int, tensors: Mapping[str, Tensor], plan: _Plan, runs: Sequence[Run]) -> None:
    """Check a full shard, and write it."""
    for key, tensor in tensors.items():
        low, high = torch.aminmax(tensor)
        if not (torch.isfinite(low) and torch.isfinite(high)):
            _refuse(key, tensor, plan, plan.shards[index], runs)
    shards.write(index, tensors)


def _refuse(key: str, tensor: Tensor, plan: _Plan, shard: Sequence[int], runs: Sequence[Run]) -> None:
    """Name the first value that is not finite."""
    row, unit = (int(x) for x in (~torch.isfinite(tensor)).nonzero()[0])
    value = float(tensor[row, unit])
    block = plan.blocks[shard[0]]
    for block in plan.blocks[shard[0] : shard[1]]:
        if row < len(block):
            break
        row -= len(block)
    site, _, layer = key.rpartition(".")
    dtype = str(tensor.dtype).removeprefix("torch.")
    hint = ": the signal may exceed what float16 holds (65504); try dtype='bfloat16'" if dtype == "float16" else ""
    raise InputError(
        f"{value} in {site} of layer {layer}, neuron {unit}, at token {block.start + row} of {runs[block.run].name}, "
        f"recorded as {dtype}{hint}"
    )

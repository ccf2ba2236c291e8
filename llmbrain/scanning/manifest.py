"""What makes a study the same study: the facts in its manifest, and a second look at a stored signal."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmbrain._files.errors import bytes_text
from llmbrain._validation import InputError
from llmbrain._version import __version__
from llmbrain.anatomy.offload import present_alone
from llmbrain.anatomy.spread import whole
from llmbrain.hooks.listen import Kinds, Reader
from llmbrain.hooks.text import Run, ScanWarning
from llmbrain.scanning.columns import Columns
from llmbrain.scanning.mixture import Mixture
from llmbrain.scanning.schedule import Schedule
from llmbrain.scanning.shares import Share
from llmbrain.scanning.store import FORMAT, FORMAT_VERSION, FileShards, key_of, runs_sha256

# How far a second reading of the same block may lie from what is stored (relative): rounding, not another model.
SAME = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.05}


def model_id(model: nn.Module) -> str:
    """Hub id or path the model was loaded from, else its class."""
    return str(getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__)


def manifest_of(
    model: nn.Module,
    tokenizer: Any,
    runs: Sequence[Run],
    kinds: Kinds,
    block_size: int | None,
    schedule: Schedule,
    mixture: Mixture | None = None,
) -> dict[str, Any]:
    """All facts of a study, for JSON; those under ``study`` make it the same study or another."""
    import numpy
    import transformers

    config: Any = getattr(model, "config", None)
    settings = config.to_dict() if hasattr(config, "to_dict") else {}
    for volatile in ("_name_or_path", "transformers_version", "_commit_hash", "distributed_config"):
        settings.pop(volatile, None)
    sites: dict[str, Any] = {}
    for (site, _), (dtype, units) in kinds.items():
        facts = sites.setdefault(site, {"dtype": str(dtype).removeprefix("torch."), "widths": []})
        facts["widths"].append(units)
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "study": {
            "model_config_sha256": _sha256(json.dumps(settings, sort_keys=True, default=str)),
            "weights_sum": weights_sum(model),
            "runs_sha256": runs_sha256(runs),
            "block_size": block_size,
            "sites": sites,
            **({} if mixture is None else {"mixture": mixture.to_record()}),
        },
        "model": {
            "id": model_id(model),
            "class": type(model).__name__,
            "revision": getattr(config, "_commit_hash", None),
        },
        "tokenizer": {
            "id": str(getattr(tokenizer, "name_or_path", "")),
            "class": type(tokenizer).__name__,
            "vocabulary": len(tokenizer),
        },
        "runs": [{"name": run.name, "n_tokens": len(run.tokens), "text_sha256": _sha256(run.text)} for run in runs],
        "blocks": [list(pair) for pair in schedule.shards],
        "rows": schedule.rows,
        "versions": {
            "llmbrain": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": numpy.__version__,
        },
    }


def weights_sum(model: nn.Module, *, away: bool = True) -> str:
    """Checksum of all weights, from the sum of each parameter's bytes as 64-bit words: the same on any device.

    Parameters that accelerate keeps elsewhere are brought in, one module's at a time (`away` False: they are left out);
    of those that are spread over ranks all must ask.
    """
    digest = hashlib.sha256()
    for name, parameter in _parameters(model, away):
        flat = whole(parameter.detach()).reshape(-1)
        if flat.storage_offset() * flat.element_size() % 8:
            flat = flat.clone()  # a view as words must begin at one
        content = flat.view(torch.uint8)
        n = len(content) // 8 * 8
        total = int(content[:n].view(torch.int64).sum()), int(content[n:].sum())  # wraps around, which is no matter
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} {total}\n".encode())
    return digest.hexdigest()


def _parameters(model: nn.Module, away: bool) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters in the order of ``named_parameters``, each once, also those that are elsewhere."""
    tied, seen = getattr(model, "all_tied_weights_keys", None) or {}, set[int]()
    for path, module in model.named_modules():
        names = [name for name, _ in module.named_parameters(recurse=False)]
        elsewhere = away and any(getattr(module, name).is_meta for name in names)
        with present_alone(module) if elsewhere else nullcontext():
            for name in names:
                parameter, full = getattr(module, name), f"{path}.{name}" if path else name
                if parameter.is_meta or id(parameter) in seen or (elsewhere and full in tied):
                    continue
                if not elsewhere:
                    seen.add(id(parameter))
                yield full, parameter


def warn_of_other_model(found: object, here: nn.Module | Mapping[str, str]) -> None:
    """Say that networks were found in another model than the one they are used on.

    Parameters
    ----------
    found : FunctionalNetworks or GroupICA
        Says nothing where it does not know its scan; see `Scan.origin`.
    here : model, or the origin of a scan of it
    """
    provenance = getattr(found, "provenance", None)
    there = (provenance.get("origin") if isinstance(provenance, dict) else None) or getattr(found, "origin_", None)
    if not isinstance(there, Mapping) or not there.get("weights"):
        return
    if isinstance(here, nn.Module):
        if any(parameter.is_meta for parameter in here.parameters()):
            return
        here = {"weights": weights_sum(here), "model": model_id(here)}
    if here.get("weights", there["weights"]) != there["weights"]:
        warnings.warn(
            f"these networks were found in other weights: in {there.get('model')} ({there['weights'][:8]}), not in "
            f"{here.get('model')} ({here['weights'][:8]}); its neurons need not do the same",
            ScanWarning,
            stacklevel=3,
        )


def check_same(
    reader: Reader, schedule: Schedule, shards: FileShards, done: int, kinds: Kinds, columns: Columns | None = None
) -> None:
    """Read the first block of a finished shard again: a lesion or another intervention would show.

    Of a model that is spread over ranks (`columns`) each compares what it hears.

    Raises
    ------
    InputError
        If the signals differ by more than rounding.
    """
    block = schedule.blocks[schedule.shards[done][0]]
    heard = reader.read_alone(block)
    compared = [key for key in kinds if key[0] not in ("visited", "routed")]  # in an order that rounding may change
    for key, stored in zip(compared, shards.read(done, [key_of(*key) for key in compared], 0, len(block))):
        mine = stored if columns is None else columns.own(key, stored)
        new, old = heard[key].to(stored.dtype).double(), mine.double()
        if float((new - old).norm()) > SAME[stored.dtype] * float(old.norm()):
            raise InputError(
                f"out={str(shards.folder)!r} already holds another study: {key_of(*key)} of "
                f"{reader.runs[block.run].name} was otherwise (is the model changed by an intervention now, or was it "
                "then?). Give another folder"
            )


def say_disk(folder: Path, schedule: Schedule, todo: Sequence[int], share: Share) -> None:
    """Print what the shards still to be made will take; in a process group rank 0 does so for all.

    Parameters
    ----------
    todo : sequence of int
        Shards that this process will make, in a process group those of all ranks.

    Raises
    ------
    InputError
        If the disk has less.
    """
    rows = schedule.rows
    together = share.team.size == share.size or share.size == 1
    among = range(len(rows) - 1) if together else share.mine(len(rows) - 1)
    tokens, total = (sum(rows[i + 1] - rows[i] for i in of) for of in (todo, among))
    need = tokens * schedule.per_token
    done = f" ({total - tokens:,} of {total:,} are there already)" if tokens < total else ""
    who = (
        f", {share.team.size} ranks"
        if share.team.size > 1
        else ""
        if together
        else f", rank {share.rank} of {share.size}"
    )
    if share.team.leads:
        print(f"scan: {tokens:,} tokens need {bytes_text(need)} of disk in {folder}{who}{done}", file=sys.stderr)
    free = shutil.disk_usage(folder).free
    if need > free:
        raise InputError(
            f"out={str(folder)!r}: the scan needs {bytes_text(need)}, but only {bytes_text(free)} are free there"
        )


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()

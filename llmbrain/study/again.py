"""The same command once more: what it made before is known by a digest of all that went into it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmbrain._files import file_sha256, plain, read_json, settle
from llmbrain._files.parts import is_temporary
from llmbrain._validation import InputError
from llmbrain.checkpoints.gguf_reading import is_gguf, read_record
from llmbrain.checkpoints.loading import PROVENANCE
from llmbrain.scanning.manifest import model_id, weights_sum

if TYPE_CHECKING:
    from torch import nn

MADE = "made_from"  # entry of pruning.json


def made_from(
    command: str, model: nn.Module, texts: Sequence[str] | None = None, study: Path | None = None, **options: Any
) -> str:
    """Digest of a command and its inputs: the model's weights, texts, a study's scan and networks, options.

    Empty where it is not known to be the same again: `random_state` is None or a generator, an option is no JSON value.
    """
    if not isinstance(options.get("random_state", 0), int):
        return ""
    away: list[tuple[str, int, int]] = []
    if any(parameter.is_meta for parameter in model.parameters()):  # weights on the disk have no sum
        if not Path(model_id(model)).is_dir():
            return ""
        away = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(Path(model_id(model)).glob("*"))]
    files = []
    if study is not None:
        for name in ("manifest.json", "networks.safetensors"):
            found = sorted(path for path in study.rglob(name) if not is_temporary(path))
            files += [(path.relative_to(study).as_posix(), file_sha256(path)) for path in found]
    facts = {"command": command, "weights": weights_sum(model), "texts": texts and list(texts), "study": files,
             "away": away, "options": options}  # fmt: skip
    try:
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=plain).encode()).hexdigest()
    except TypeError:  # networks and the like in memory
        return ""


def check_free(out: str | Path, overwrite: bool, made: str | None = None) -> bool:
    """Before the work, not after it: `out` holds no model yet, may be written over, or holds what is asked for.

    Parameters
    ----------
    made : str, optional
        What `made_from` says of the call; None while that is not known, because the model is not read yet.

    Returns
    -------
    bool
        Whether the same call made what is there.

    Raises
    ------
    InputError
        If another model is there.
    """
    out = Path(out)
    settle(out)
    is_file = out.suffix.lower() == ".gguf"
    if overwrite or not (out if is_file else out / "config.json").exists():
        return False
    known = _known(out, is_file)
    if known and (made is None or known == made):
        return made is not None
    if is_file:
        raise InputError(f"out={str(out)!r} exists already: choose another name, or --overwrite")
    raise InputError(f"out={str(out)!r} holds a model already: choose another folder, or --overwrite")


def _known(out: Path, is_file: bool) -> str:
    """What the model there was made from; empty where that is not said, or cannot be read."""
    try:
        if is_file:
            record = read_record(out) if out.is_file() and is_gguf(out) else {}
        else:
            record = read_json(out / PROVENANCE)
    except (InputError, OSError):
        return ""
    return str(record.get(MADE) or "")

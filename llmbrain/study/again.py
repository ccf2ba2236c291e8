"""The same command once more: what it made before is known by a digest of all that went into it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmbrain._files import file_sha256, owner, plain, read_json, refuse_other, settle, sweep
from llmbrain._files.parts import is_temporary
from llmbrain._validation import InputError
from llmbrain.checkpoints import load_model, load_pruned
from llmbrain.checkpoints.gguf_reading import is_gguf, read_record
from llmbrain.checkpoints.loading import PROVENANCE
from llmbrain.checkpoints.shapes import RECORD
from llmbrain.distributed import ranks
from llmbrain.pruning import PruningPlan
from llmbrain.scanning.manifest import model_id, weights_sum

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

MADE = "made_from"  # entry of pruning.json
FOLDER, GGUF = "pruned", "pruned.gguf"  # of a study: its smaller model, in the one or the other form


def made_from(
    command: str, model: nn.Module, texts: Sequence[str] | None = None, study: Path | None = None, **options: Any
) -> str:
    """Digest of a command and its inputs: the model's weights, texts, a study's scan and networks, options.

    Empty where it is not known to be the same again: `random_state` is None or a generator, an option is no JSON value.
    """
    if not isinstance(options.get("random_state", 0), int):
        return ""
    away: list[tuple[str, int, int]] = []
    if any(parameter.is_meta for parameter in model.parameters()):  # weights on the disk are not read for this
        if not Path(model_id(model)).is_dir():
            return ""
        away = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(Path(model_id(model)).glob("*"))]
    files = []
    if study is not None:
        for name in ("manifest.json", "networks.safetensors"):
            found = sorted(path for path in study.rglob(name) if not is_temporary(path))
            files += [(path.relative_to(study).as_posix(), file_sha256(path)) for path in found]
    facts = {"command": command, "weights": weights_sum(model, away=False), "texts": texts and list(texts),
             "study": files, "away": away, "options": options}  # fmt: skip
    try:
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=plain).encode()).hexdigest()
    except TypeError:  # networks and the like in memory
        return ""


@contextmanager
def making(out: str | Path, overwrite: bool, made: str = "", what: str = "a model") -> Iterator[bool]:
    """Own the folder of a model while it is made; gives what `check_free` says, and its errors.

    Of several ranks one saves at the end, and owns the folder then.

    Raises
    ------
    BusyError
        If another process writes into it now.
    """
    with ExitStack() as held:
        check_free(out, overwrite, made, what)
        if not is_file(out) and ranks().size == 1:
            held.enter_context(owner(out))
        yield check_free(out, overwrite, made, what)


def is_file(out: str | Path) -> bool:
    """Whether a model is to be one file, a GGUF."""
    return Path(out).suffix.lower() == ".gguf"


def check_free(out: str | Path, overwrite: bool, made: str | None = None, what: str = "a model") -> bool:
    """Before the work, not after it: `out` holds no model yet, may be written over, or holds what is asked for.

    Parameters
    ----------
    made : str, optional
        What `made_from` says of the call; None while that is not known, because the model is not read yet.
    what : str
        What will be there: a value of `llmbrain._files.contents.MARKS`.

    Returns
    -------
    bool
        Whether the same call made what is there.

    Raises
    ------
    InputError
        If another model is there, or something else: a study, a scan. If a study has a model already.
    """
    out = Path(out)
    settle(out)
    if is_file(out):
        sweep(out.parent, out.name)  # of a process that was killed between its last two steps
    else:
        refuse_other(out, what)
    _check_one_model(out)
    if overwrite or not (out if is_file(out) else out / "config.json").exists():
        return False
    known = _known(out)
    if known and (made is None or known == made):
        return made is not None
    if is_file(out):
        raise InputError(f"out={str(out)!r} exists already: choose another name, or --overwrite")
    raise InputError(f"out={str(out)!r} holds a model already: choose another folder, or --overwrite")


def _check_one_model(out: Path) -> None:
    """A study has one smaller model: a folder or a GGUF."""
    if not (out.parent / "study.json").is_file():
        return
    other = {FOLDER: out.with_name(GGUF), GGUF: out.with_name(FOLDER)}.get(out.name)
    if other is not None and (other / "config.json" if other.name == FOLDER else other).exists():
        said = f"{out.parent} has a smaller model already, {other.name}"
        raise InputError(f"out={str(out)!r}: {said}: choose another name")


def _known(out: Path) -> str:
    """What the model there was made from; empty where that is not said, or cannot be read."""
    try:
        if is_file(out):
            record = read_record(out) if out.is_file() and is_gguf(out) else {}
        else:
            record = read_json(out / PROVENANCE)
    except (InputError, OSError):
        return ""
    return str(record.get(MADE) or "")


def made_before(
    out: str | Path, tokenizer: PreTrainedTokenizerBase | None, plan: PruningPlan | None, offload: bool
) -> tuple[nn.Module, PruningPlan | None]:
    """The model that the same call wrote, and its plan where its indices were recorded."""
    whole = is_gguf(out) or tokenizer is not None
    model, _ = load_model(out, offload=offload) if whole else load_pruned(out)
    if plan is None:
        record = getattr(model, RECORD)[-1]
        cuts = {"kept": record["kept"], "kept_heads": record["kept_heads"]}
        plan = None if record["kept"] is None else PruningPlan.from_dict({**record["plan"], **cuts})
    return model, plan


def check_plan_place(out: str | Path) -> None:
    """A plan does not go where that of another cut is: a study says by it what its smaller model lost.

    Raises
    ------
    InputError
        If `out` is the plan of a study with a smaller model.
    """
    folder = Path(out).parent
    if Path(out).name == "plan.json" and all((folder / name).is_file() for name in ("study.json", "plan.json")):
        said = f"out={str(out)!r} says what was cut in the study {folder}"
        raise InputError(f"{said}: give another name, such as {folder / 'next.json'}")

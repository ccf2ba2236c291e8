"""What the commands share: reading texts, opening models, folders, and how they speak."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmbrain._validation import InputError

if TYPE_CHECKING:
    import pandas as pd

MODEL = Annotated[str, typer.Argument(help="Folder or hub id of a transformers model; a pruned folder works too.")]
TEXT = Annotated[Path, typer.Option("--text", help=".txt, .json (list of strings) or .jsonl (a field 'text' a line).")]
OUT = Annotated[Path, typer.Option("--out", help="Folder to write.")]
COMPONENTS = Annotated[
    str, typer.Option("--components", help="Number of networks, a share of variance below 1, or 'auto'.")
]
RATIO = Annotated[float, typer.Option("--ratio", help="Share of the MLP neurons to remove, in (0, 1).")]
DEVICE = Annotated[str, typer.Option("--device", help="'auto', 'cpu', 'cuda', 'cuda:0', ...")]
METHOD = Annotated[str, typer.Option("--method", help="Pruning criterion: networks, published, magnitude, random, ...")]
COMPENSATE = Annotated[str, typer.Option("--compensate", help="none, bias or least-squares.")]
FIELD = Annotated[str, typer.Option("--field", help="Field of .json and .jsonl objects that holds the text.")]
OVERWRITE = Annotated[bool, typer.Option("--overwrite", help="Write over what --out holds.")]
SEED = Annotated[int, typer.Option("--seed", help="Seed of everything random.")]


def say(message: str = "") -> None:
    """Tell the user what is going on, on stderr; results go to stdout."""
    typer.echo(message, err=True)


def fail(error: BaseException) -> None:
    """One line for a person, exit code 2."""
    message = " ".join(str(error).split())
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        message = f"{error.filename} does not exist"
    typer.echo(f"error: {message}", err=True)
    sys.exit(2)


def read_texts(path: Path, field: str = "text") -> list[str]:
    """Read the texts of a file.

    Parameters
    ----------
    path : Path
        ``.json`` holds a list of strings (or of objects with `field`), ``.jsonl`` one string or object a line; any
        other file is one text.
    field : str
        Where the text is in an object.

    Raises
    ------
    InputError
        If the file holds no text, is not UTF-8 or not what its ending says.
    """
    try:
        content = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            records = json.loads(content)
        elif path.suffix == ".jsonl":
            records = [json.loads(line) for line in content.splitlines() if line.strip()]
        else:
            records = [content]
    except UnicodeDecodeError as error:
        raise InputError(f"text file {path} is not UTF-8 (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise InputError(f"text file {path} is not valid {path.suffix[1:]}: line {error.lineno}, {error.msg}") from None
    if not isinstance(records, list):
        raise InputError(f"text file {path} must hold a list of strings, not {type(records).__name__}")
    texts: list[str] = []
    for i, record in enumerate(records):
        text = record.get(field) if isinstance(record, dict) else record
        if not isinstance(text, str):
            known = f": fields are {sorted(record)} (choose one with --field)" if isinstance(record, dict) else ""
            raise InputError(f"text file {path}: entry {i} has no string in field {field!r}{known}")
        if text.strip():
            texts.append(text)
    if not texts:
        raise InputError(f"text file {path} is empty")
    return texts


def open_model(model: str, device: str) -> tuple[Any, Any]:
    """Load a model on a device, in evaluation mode, with its tokenizer."""
    from llmbrain._validation import resolve_device
    from llmbrain.checkpoints import load_model
    from llmbrain.hooks.text import evaluation_mode

    where = resolve_device(device)
    loaded, tokenizer = load_model(model)
    return evaluation_mode(loaded.to(where)), tokenizer


def parse_components(value: str) -> int | float | str:
    """``20`` -> 20 networks, ``0.9`` -> share of variance, ``auto`` -> estimated."""
    if value == "auto":
        return value
    try:
        number = float(value)
    except ValueError:
        raise InputError(f"--components={value!r} must be a whole number, a share below 1, or 'auto'") from None
    return int(number) if number >= 1 and number == int(number) else number


def write_json(path: Path, record: Any) -> None:
    """Write JSON whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(record, indent=2, default=_plain) + "\n", encoding="utf-8")
    temporary.replace(path)


def claim(folder: Path, settings: dict[str, Any], *, overwrite: bool = False) -> None:
    """Take a folder for a study, or go on with the same one.

    Raises
    ------
    InputError
        If the folder holds a study with other settings, or files that are no study.
    """
    mark = folder / "study.json"
    settings = json.loads(json.dumps(settings, default=_plain))
    if mark.is_file() and not overwrite:
        before = json.loads(mark.read_text(encoding="utf-8"))
        other = [k for k in settings.keys() | before.keys() if settings.get(k) != before.get(k)]
        if other:
            changed = ", ".join(f"{k}: {before.get(k)!r} there, {settings.get(k)!r} now" for k in sorted(other))
            raise InputError(f"--out={folder} already holds another study ({changed}): choose another, or --overwrite")
    elif folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise InputError(f"--out={folder} already holds files that are no study of llmbrain: choose another folder")
    write_json(mark, settings)


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


def print_table(frame: pd.DataFrame, title: str | None = None, digits: int = 3) -> None:
    """Print a table on stdout, in one look."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for name in frame.columns:
        table.add_column(str(name), justify="left" if frame[name].dtype == object else "right")
    for row in frame.itertuples(index=False):
        table.add_row(*(f"{v:.{digits}f}" if isinstance(v, float) else str(v) for v in row))
    console = Console()
    (console if console.is_terminal else Console(width=140)).print(table)


def provenance(model_id: str, texts: Sequence[str], **settings: Any) -> dict[str, Any]:
    """What is needed to repeat a result: inputs, settings, versions."""
    import hashlib
    import platform
    from importlib.metadata import version

    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    packages = ("llmbrain", "torch", "transformers", "nilearn", "nibabel", "scikit-learn", "numpy")
    return {
        "command": " ".join(["llmbrain", *sys.argv[1:]]),
        "model": model_id,
        "texts": {"n": len(texts), "sha256": digest},
        "settings": settings,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} does not go into JSON")

"""What the commands share: options, opening models, and how they speak."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmbrain._progress import say
from llmbrain._validation import InputError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["say"]

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


# What readers and disks raise, by name: their packages are not imported for a message.
EXPECTED = {"InputError", "SafetensorError", "ImageFileError", "HeaderDataError", "BadZipFile", "UnpicklingError",
            "ParserError", "EmptyDataError", "OSError", "UnicodeError", "JSONDecodeError", "EOFError"}  # fmt: skip


def is_expected(error: BaseException) -> bool:
    """Whether an error says something about the input or the disk: one line, without the place in the code."""
    return any(kind.__name__ in EXPECTED for kind in type(error).__mro__)


def fail(error: BaseException) -> None:
    """One line for a person, exit code 2."""
    message = " ".join(str(error).split())
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        message = f"{error.filename} does not exist"
    elif isinstance(error, OSError) and error.strerror and error.filename is not None:
        message = f"{error.filename}: {error.strerror}"
    elif type(error).__name__ == "SafetensorError":
        message = f"a safetensors file is damaged: {message}"
    typer.echo(f"error: {message}", err=True)
    sys.exit(2)


def open_model(model: str, device: str) -> tuple[Any, Any]:
    """Load a model on a device, in evaluation mode, with its tokenizer."""
    from llmbrain._validation import resolve_device
    from llmbrain.checkpoints import load_model

    where = resolve_device(device)
    return load_model(model, device=where)


def parse_components(value: str) -> int | float | str:
    """``20`` -> 20 networks, ``0.9`` -> share of variance, ``auto`` -> estimated."""
    if value == "auto":
        return value
    try:
        number = float(value)
    except ValueError:
        raise InputError(f"--components={value!r} must be a whole number, a share below 1, or 'auto'") from None
    return int(number) if number >= 1 and number == int(number) else number


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

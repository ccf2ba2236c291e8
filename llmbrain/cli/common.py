"""What the commands share: options, opening models, and how they speak."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmbrain._progress import say
from llmbrain._validation import InputError
from llmbrain.cli.lists import parts

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["say"]


def path_of(value: str) -> Path:
    """A path that says something: ``''`` would be the working folder."""
    if not str(value).strip():
        raise InputError(f"--out={value!r} is empty: name a folder or file")
    return Path(value)


MODEL = Annotated[
    str, typer.Argument(help="Folder or hub id of a transformers model, or a GGUF file; a pruned folder works too.")
]
TEXT = Annotated[Path, typer.Option("--text", help=".txt, .json (list of strings) or .jsonl (a field 'text' a line).")]
OUT = Annotated[Path, typer.Option("--out", parser=path_of, metavar="PATH", help="Folder to write.")]
COMPONENTS = Annotated[
    str, typer.Option("--components", help="Number of networks, a share of variance below 1, or 'auto'.")
]
RATIO = Annotated[float, typer.Option("--ratio", help="Share of the MLP neurons to remove, in (0, 1).")]
DEVICE = Annotated[str, typer.Option("--device", help="'auto', 'cpu', 'cuda', 'cuda:0', ...")]
DEVICE_MAP = Annotated[
    str,
    typer.Option(
        "--device-map",
        help="For models larger than a device: 'auto' (all GPUs, then CPU, then disk), JSON, or a .json file.",
    ),
]
MODEL_DTYPE = Annotated[
    str, typer.Option("--dtype", "--model-dtype", help="What the model computes in: float32, bfloat16, float16.")
]
METHOD = Annotated[str, typer.Option("--method", help="Pruning criterion: networks, published, magnitude, random, ...")]
COMPENSATE = Annotated[str, typer.Option("--compensate", help="none, bias or least-squares.")]
PROPAGATION = Annotated[
    float | None,
    typer.Option(
        "--propagation", min=0, max=1,
        help="Share of the error of earlier layers that least squares give a layer to make up. Default: .5 for models "
        "of 20 layers and more, else 0.",
    ),
]  # fmt: skip
FIELD = Annotated[str, typer.Option("--field", help="Field of .json and .jsonl objects that holds the text.")]
OVERWRITE = Annotated[bool, typer.Option("--overwrite", help="Write over what --out holds.")]
SEED = Annotated[int, typer.Option("--seed", min=0, max=2**32 - 1, help="Seed of everything random.")]
DTYPE = Annotated[str, typer.Option("--dtype", help="Recorded as float16, bfloat16 or float32; default the model's.")]
RUN_LENGTH = Annotated[
    int, typer.Option("--run-length", min=0, help="Longer texts become several runs of so many tokens; 0 never cuts.")
]
DRY_RUN = Annotated[bool, typer.Option("--dry-run", help="Say what it would cost (one batch is read), and stop.")]
FORMAT = Annotated[str, typer.Option("--format", help="per-layer, remote-code, uniform, padded, masked or gguf.")]
GGUF_TYPE = Annotated[str, typer.Option("--gguf-type", help="With --format gguf: f32, f16, bf16 or q8_0.")]
LIKE = Annotated[
    Path | None, typer.Option("--like", help="With --format gguf: a GGUF of the dense model, for its tokenizer.")
]
ALLOCATION = Annotated[
    str,
    typer.Option(
        "--allocation", help="uniform, global, clamped, networks, sensitivity or search; default: the method's own."
    ),
]
MULTIPLE = Annotated[int, typer.Option("--multiple-of", min=1, help="Widths are multiples of it (8 to 256).")]
PROTECT = Annotated[
    list[str] | None,
    typer.Option(
        "--protect",
        help="Layers that are not cut, or none; negative ones count from the end. Default: the method's own.",
    ),
]
HEADS = Annotated[
    float,
    typer.Option("--head-ratio", min=0.0, max=1.0, help="Share of the attention heads to remove, in key/value groups."),
]
DROP = Annotated[
    list[str] | None,
    typer.Option("--drop", help="Parts that may be set to nothing in some layers: mlp, attention, or both."),
]
EXPERTS = Annotated[
    float | None,
    typer.Option("--expert-ratio", help="Of a mixture of experts: share of each layer's routed experts to remove."),
]
PASSES = Annotated[
    float, typer.Option("--passes", min=0.0, help="Forward passes over the calibration text that a search may take.")
]
BALANCE = Annotated[
    float | None,
    typer.Option(
        "--token-balance", min=0.0, max=1.0,
        help="How much tokens that networks leave unexplained count more: 0 to 1. Default .5, for models of 20 layers "
        "and more 0.",
    ),
]  # fmt: skip
SELF_TEXT = Annotated[
    int | None,
    typer.Option(
        "--self-text",
        min=0,
        help="Windows of calibration text that the model writes itself, beside the text. Default: twice as many as the "
        "text fills for models of 20 layers and more, else none.",
    ),
]
KEEP = Annotated[list[str] | None, typer.Option("--keep", help="Conditions whose function stays.")]
SHARE = Annotated[
    float | None,
    typer.Option(
        "--ratio",
        help="Share of the MLP neurons to remove; default 0.3, with --forget as many as it takes "
        "(with --last 0: none, the repair forgets alone).",
    ),
]
FORGET = Annotated[list[str] | None, typer.Option("--forget", help="Conditions whose function goes.")]
LAST = Annotated[
    bool, typer.Option("--last", help="With --forget: so that it does not come back quickly; takes longer.")
]
INDICES = Annotated[
    bool, typer.Option("--indices/--no-indices", help="Whether files name the neurons that went (pruning.json, plan).")
]


# What readers and disks raise, by name: their packages are not imported for a message.
EXPECTED = {"InputError", "SafetensorError", "ImageFileError", "HeaderDataError", "BadZipFile", "UnpicklingError",
            "ParserError", "EmptyDataError", "OSError", "UnicodeError", "JSONDecodeError", "EOFError"}  # fmt: skip


def is_expected(error: BaseException) -> bool:
    """Whether an error says something about the input or the disk: one line, without the place in the code."""
    return is_memory(error) or any(kind.__name__ in EXPECTED for kind in type(error).__mro__)


def is_memory(error: BaseException) -> bool:
    """Whether Python, numpy or torch (which says it in a RuntimeError) found no memory."""
    named = any(kind.__name__ in ("MemoryError", "OutOfMemoryError") for kind in type(error).__mro__)
    return named or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def fail(error: BaseException) -> None:
    """One line for a person, exit code 2."""
    message = " ".join(str(error).split())
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        message = f"{error.filename} does not exist"
    elif isinstance(error, OSError) and error.strerror and error.filename is not None:
        message = f"{error.filename}: {error.strerror}"
    elif type(error).__name__ == "SafetensorError":
        message = f"a safetensors file is damaged: {message}"
    elif is_memory(error):
        said = re.sub(r"^.*?(?=you tried|Unable|Tried)", "", message)[:200]
        message = f"not enough memory ({said or 'no more was given'}); what was written is kept"
    typer.echo(f"error: {message}", err=True)
    sys.exit(2)


def open_model(
    model: str, device: str, *, dtype: str = "", device_map: str = "", offload: bool = False, tp_plan: str = ""
) -> tuple[Any, Any]:
    """Load a model on a device (or several), in evaluation mode, with its tokenizer."""
    from llmbrain._validation import resolve_device
    from llmbrain.checkpoints import load_model

    if model.endswith(".gguf"):
        say(f"reading {model}: its weights are dequantized")
    if tp_plan:
        if device != "auto" or device_map:
            raise InputError(
                f"--tp-plan {tp_plan} and {'--device-map' if device_map else '--device'} exclude each other"
            )
        return load_model(model, dtype=dtype or None, tp_plan=tp_plan)
    if device_map:
        if device != "auto" or offload:
            raise InputError(
                f"--device-map {device_map} and {'--offload' if offload else '--device'} exclude each other"
            )
        return load_model(model, dtype=dtype or None, device_map=_device_map(device_map))
    return load_model(model, dtype=dtype or None, device=resolve_device(device), offload=offload)


def _device_map(value: str) -> str | dict[str, int | str]:
    """A name, or modules and their devices as JSON."""
    if value.endswith(".json"):
        from llmbrain._files import read_json

        return read_json(value)
    if not value.lstrip().startswith("{"):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise InputError(f"--device-map={value[:80]!r} is not JSON: {error}") from None
    return {str(name): where for name, where in found.items()}


def one_process(what: str) -> None:
    """Refuse what several ranks would do, each for itself, in one folder."""
    from llmbrain.distributed import RankError, ranks

    if ranks().size > 1:
        raise RankError(f"llmbrain {what} is one process: start it without torchrun")


def is_given(context: typer.Context, name: str) -> bool:
    """Whether an option was typed, or stands in the file of options."""
    source = context.get_parameter_source(name)
    return source is not None and source.name in ("COMMANDLINE", "DEFAULT_MAP")


def parse_components(value: str) -> int | float | str:
    """``20`` -> 20 networks, ``0.9`` -> share of variance, ``auto`` -> estimated."""
    if value == "auto":
        return value
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf or (number > 1 and number % 1):
        raise InputError(f"--components={value!r} must be a whole number, a share below 1, or 'auto'")
    return int(number) if number >= 1 else number


def parse_layers(protect: list[str] | None) -> list[int] | None:
    if parts(protect) == ["none"]:
        return []
    try:
        return [int(layer) for layer in parts(protect)] or None
    except ValueError:
        raise InputError(
            f"--protect={' '.join(protect or ())} must be whole numbers, layers of the model, or none"
        ) from None


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

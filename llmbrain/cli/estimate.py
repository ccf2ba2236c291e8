"""What the steps would take, before anything is loaded: ``estimate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmbrain.cli.common import path_of, print_table, say
from llmbrain.cli.lists import ListCommand, parts


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("estimate", cls=ListCommand)(estimate)


def estimate(
    model: Annotated[str, typer.Argument(help="Folder, config.json, GGUF or hub id; its weights are not needed.")],
    gpu: str = typer.Option(
        "", help="h100, h200, a100, l40s or rtx4090, by its data sheet; default: this CPU, measured."
    ),
    gpus: int = typer.Option(1, help="How many of them.", min=1),
    dtype: str = typer.Option("", help="Of the weights: float32, bfloat16, float16; default the config's own."),
    methods: list[str] = typer.Option([], help="Pruning criteria; default all."),
    n_tokens: int = typer.Option(32768, help="Tokens to scan and calibrate on.", min=2),
    window: int = typer.Option(0, help="Tokens in a window; 0 is the model's context, at most 2,048.", min=0),
    run_length: int = typer.Option(2048, help="Tokens of a run.", min=2),
    components: int = typer.Option(32, help="Number of networks.", min=2),
    ratio: float = typer.Option(0.3, help="Share of the MLP neurons to remove, in (0, 1)."),
    passes: float = typer.Option(24, help="Forward passes that a search may take."),
    out: Path | None = typer.Option(None, "--out", parser=path_of, metavar="PATH", help="Write the table here (.csv)."),
) -> None:
    """Disk, memory and seconds of each step, from a config alone."""
    from llmbrain._files import write_table
    from llmbrain.study import estimate as compute

    found = compute(
        model, gpu=gpu or None, gpus=gpus, dtype=dtype or None, methods=parts(methods) or None, n_tokens=n_tokens,
        window=window or None, run_length=run_length, n_components=components, ratio=ratio, passes=passes,
    )  # fmt: skip
    for line in found.lines():
        say(line)
    frame = found.frame
    print_table(
        frame.assign(memory_GB=frame.pop("memory") / 1e9, disk_GB=frame.pop("disk") / 1e9), f"{model}, {found.machine}"
    )
    if out is not None:
        write_table(out, found.frame)

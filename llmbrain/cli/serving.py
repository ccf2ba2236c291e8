"""What comes after a cut: ``export`` to other engines, and ``latency`` in them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmbrain._validation import check_option
from llmbrain.cli.common import MODEL, OUT, OVERWRITE, open_model, print_table, say
from llmbrain.cli.lists import ListCommand

MODELS = Annotated[list[str], typer.Argument(help="Folders, hub ids or GGUF files; the first is the one to beat.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    for command in (export, latency):
        app.command(command.__name__, cls=ListCommand)(command)


def export(
    model: MODEL,
    out: OUT,
    format: str = typer.Option("onnx", help="onnx (a folder), or gguf (a file that ends in .gguf)."),
    gguf_type: str = typer.Option("f16", help="With --format gguf: f32, f16, bf16 or q8_0."),
    like: Path | None = typer.Option(None, help="With --format gguf: a GGUF of the dense model, for its tokenizer."),
    overwrite: OVERWRITE = False,
) -> None:
    """Write a model, pruned or not, for another engine."""
    from llmbrain.checkpoints import export_onnx, save_pruned
    from llmbrain.study.again import MADE, check_free, made_from, making

    check_option("--format", format, ("onnx", "gguf"))
    what = "an ONNX graph" if format == "onnx" else "a model"
    check_free(out, overwrite, what=what)
    loaded, tokenizer = open_model(model, "cpu")
    if format == "onnx" and loaded.dtype.itemsize < 4:
        say(f"the graph computes in float32: ONNX Runtime does {str(loaded.dtype)[6:]} in part only")
        loaded.float()
    made = made_from("export", loaded, format=format, gguf_type=gguf_type, like=like and str(like))
    note = {MADE: made}
    with making(out, overwrite, made, what) as is_there:
        if is_there:
            say("done before")
        elif format == "onnx":
            export_onnx(loaded, tokenizer, out, overwrite=overwrite, note=note)
        else:
            save_pruned(
                loaded, tokenizer, out, format="gguf", gguf_type=gguf_type, like=like, overwrite=overwrite, note=note
            )
    say(f"saved: {out}")


def latency(
    models: MODELS,
    engine: str = typer.Option("auto", help="auto (llama.cpp for GGUF files), transformers or llama.cpp."),
    batch: list[int] = typer.Option([1, 8, 32], help="Texts at once; several values."),
    prompt: int = typer.Option(128, min=1, help="Tokens read."),
    new_tokens: int = typer.Option(32, min=1, help="Tokens written."),
    repeats: int = typer.Option(5, min=1, help="Timed runs of each."),
    threads: int = typer.Option(0, min=0, help="CPU threads; 0 is torch's own."),
    dtype: str = typer.Option("", help="Of the weights in transformers; default as saved."),
    out: Path | None = typer.Option(None, help="A .tsv to write the table to."),
) -> None:
    """How fast models read and write, side by side, with their spread and peak memory."""
    from llmbrain._files import write_table
    from llmbrain.study.speed import latency_table

    table = latency_table(
        models, engine=engine, batch_sizes=batch, prompt=prompt, new_tokens=new_tokens, repeats=repeats,
        threads=threads or None, dtype=dtype or None,
    )  # fmt: skip
    shown = table.assign(peak_memory=(table["peak_memory"] / 2**20).round().astype(int)).rename(
        columns={"peak_memory": "peak MiB", "tokens_per_second": "tokens/s"}
    )
    print_table(shown.round({"tokens/s": 1, "seconds": 4, "seconds_low": 4, "seconds_high": 4, "relative": 3}))
    if out is not None:
        write_table(out, table)
        say(f"table: {out}")

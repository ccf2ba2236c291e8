"""The commands. Nothing heavy is imported before a command needs it, so that ``--help`` answers at once."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

import typer

from llmbrain._version import __version__
from llmbrain.cli import compare, demo, networks, pruning, run, serving, steps, view
from llmbrain.cli.common import fail, is_expected

__all__ = ["app", "main"]

app = typer.Typer(
    name="llmbrain",
    help="A neuroimaging toolkit whose subject is a large language model: scan it, find its functional networks, "
    "lesion them, cut away what belongs to none.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"llmbrain {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


for module in (demo, run, steps, networks, pruning, serving, compare, view):
    module.register(app)


def _warn(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
    typer.echo(f"warning: {' '.join(str(message).split())}", err=True)


def main() -> None:
    """Entry point: bad input is one line on stderr and exit code 2; `LLMBRAIN_DEBUG=1` shows the traceback."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # bars of loading: our own say what takes time
    warnings.showwarning = _warn  # a line a person can read, instead of the place in the code
    try:
        app()
    except Exception as error:
        if os.environ.get("LLMBRAIN_DEBUG") or not is_expected(error):
            raise
        fail(error)
    except (KeyboardInterrupt, SystemExit) as stopped:
        # typer makes an exit code of Ctrl-C: its word for it, or that of its older versions
        if isinstance(stopped, SystemExit) and stopped.code != 130 and not _from_ctrl_c(stopped):
            raise
        typer.echo("interrupted: what was written is kept; the same command goes on from there", err=True)
        sys.exit(130)


def _from_ctrl_c(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None

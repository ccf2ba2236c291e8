"""The commands. Nothing heavy is imported before a command needs it, so that ``--help`` answers at once."""

from __future__ import annotations

import io
import os
import sys
import warnings
from contextlib import nullcontext, redirect_stdout
from typing import Any

import typer

from llmbrain._progress import watched
from llmbrain._validation import InputError
from llmbrain._version import __version__
from llmbrain.cli import compare, demo, estimate, networks, pruning, run, serving, steps, view
from llmbrain.cli.common import fail, is_expected, one_process

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


UsageError: Any = typer.BadParameter.__base__  # of click, or of the click that typer brings along
CTRL_C = 130  # exit code of an interrupted command
SHARED = ("scan", "decompose", "dualreg", "lesion", "plan", "prune")  # commands that ranks share


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"llmbrain {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    if context.invoked_subcommand not in SHARED:
        one_process(str(context.invoked_subcommand))


for module in (demo, run, estimate, steps, networks, pruning, serving, compare, view):
    module.register(app)


def _warn(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
    typer.echo(f"warning: {' '.join(str(message).split())}", err=True)


def main() -> None:
    """Entry point: bad input is one line on stderr and exit code 2; `LLMBRAIN_DEBUG=1` shows the traceback.

    Where torchrun started several processes, they are ranks; rank 0 speaks for all, but each says its own errors.
    """
    from llmbrain.distributed import joined

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # bars of loading: our own say what takes time
    warnings.showwarning = _warn  # a line a person can read, instead of the place in the code
    try:
        with joined() as team:
            if not team.leads:
                warnings.showwarning = lambda message, *_, **__: _warn(f"rank {team.rank}: {message}", UserWarning)
            with nullcontext() if team.leads else redirect_stdout(io.StringIO()):
                _run()
    except InputError as error:  # a rank that never came, a port in use
        if os.environ.get("LLMBRAIN_DEBUG"):
            raise
        fail(error)


def _run() -> None:
    try:
        with nullcontext() if "view" in sys.argv[1:2] else watched():  # which waits for a browser, for hours
            code = app(standalone_mode=False) or 0
    except UsageError as error:  # one line, as for any other bad input
        where = f" (see {error.ctx.command_path} --help)" if error.ctx is not None else ""
        fail(InputError(error.format_message().rstrip(".") + where))
    except (KeyboardInterrupt, typer.Abort):
        code = CTRL_C
    except Exception as error:
        if os.environ.get("LLMBRAIN_DEBUG") or not is_expected(error):
            raise
        fail(error)
    if code == CTRL_C:
        typer.echo("interrupted: what was written is kept; the same command goes on from there", err=True)
    sys.exit(code)

"""``llmbrain view``: look at a study in the browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmbrain.cli.lists import ListCommand


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("view", cls=ListCommand)(view)


def view(
    study: Annotated[Path, typer.Argument(help="Folder that `llmbrain run` or `scan` wrote.")],
    port: int = typer.Option(0, help="Port on 127.0.0.1; 0 takes a free one.", min=0, max=65535),
    browser: bool = typer.Option(True, help="Open the page in the browser."),
) -> None:
    """Serve the viewer of a study on this machine only, until Ctrl-C."""
    from llmbrain.reporting.viewer import serve

    serve(study, port=port, open_browser=browser)

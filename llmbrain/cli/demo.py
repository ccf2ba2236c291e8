"""``llmbrain demo``: the main job on the embedded model, told in the words of both fields."""

from __future__ import annotations

import typer


def register(app: typer.Typer) -> None:
    """Add the command to the application."""

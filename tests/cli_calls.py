"""Commands called as the shell calls them, in this process."""

from __future__ import annotations

import sys

import pytest

from llmbrain.cli import main


def call(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of ``llmbrain ARGUMENTS``."""
    monkeypatch.setattr(sys, "argv", ["llmbrain", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err

"""The scanner: a model reads texts, and what every neuron did is kept.

Public: `scan`, `load_scans`, `Scan` (one run), `Stimulus` (a text with conditions).
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PUBLIC = {
    "CorruptStoreError": "store",
    "Scan": "scans",
    "Stimulus": "stimuli",
    "load_scans": "store",
    "scan": "scanner",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(import_module(f"llmbrain.scanning.{_PUBLIC[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'llmbrain.scanning' has no attribute {name!r}")

"""Two kinds of brain: networks of a model against networks of people, and models against each other.

Public: `compare` (all of it, as the command does), `load_words`, `load_fmri`, `align`, `word_regressor`, `couple`,
`noise_ceilings`, `prepare`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PUBLIC = {
    "Aligned": "alignment",
    "Coupling": "coupling",
    "FMRI": "fmri",
    "align": "alignment",
    "couple": "coupling",
    "load_fmri": "fmri",
    "load_words": "words",
    "noise_ceilings": "ceilings",
    "prepare": "series",
    "word_regressor": "alignment",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(import_module(f"llmbrain.comparison.{_PUBLIC[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'llmbrain.comparison' has no attribute {name!r}")

"""What `data/` ships and what can be made from a seed: the demo brain and the phantom.

Public: `load_demo`, `Demo` (the embedded model, its stimuli and its scores), `make_phantom` (synthetic scans with known
sources), `fetch_alice` (fMRI of people listening to a story; needs a network).
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PUBLIC = {"Demo": "demo", "fetch_alice": "alice", "load_demo": "demo", "make_phantom": "phantom"}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(f"llmbrain.datasets.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'llmbrain.datasets' has no attribute {name!r}")

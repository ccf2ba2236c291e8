"""Two kinds of brain: networks of a model against networks of people, and models against each other.

Public: `compare` (all of it, as the command does); its steps `load_words`, `load_fmri`, `align`, `word_regressor`,
`prepare`, `couple`, `noise_ceilings`, `encode`, `compare_similarity` (`debiased_cka`, `rsa`), `compare_structure`;
between models `fingerprint`, `networks_of`, `corrmap`; `make_paired_phantom`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PUBLIC = {
    "Aligned": "alignment",
    "Comparison": "api",
    "Coupling": "coupling",
    "Encoding": "encoding",
    "FMRI": "fmri",
    "Fingerprint": "fingerprints",
    "align": "alignment",
    "compare": "api",
    "compare_similarity": "similarity",
    "compare_structure": "structure",
    "corrmap": "fingerprints",
    "couple": "coupling",
    "debiased_cka": "similarity",
    "encode": "encoding",
    "fingerprint": "fingerprints",
    "load_fmri": "fmri",
    "load_words": "words",
    "make_paired_phantom": "phantom",
    "networks_of": "fingerprints",
    "noise_ceilings": "ceilings",
    "prepare": "series",
    "rsa": "similarity",
    "word_regressor": "alignment",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(import_module(f"llmbrain.comparison.{_PUBLIC[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'llmbrain.comparison' has no attribute {name!r}")

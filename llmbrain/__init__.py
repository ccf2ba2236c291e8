"""llmbrain: a neuroimaging toolkit whose subject is a large language model.

Names are imported on first use (PEP 562), so that ``import llmbrain`` and ``llmbrain --help`` answer at once and each
half works without the other's heavy packages.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "FunctionalNetworks": "networks",
    "GroupICA": "decomposition",
    "Heads": "intervention",
    "InputError": "_validation",
    "NeuronMasker": "imaging",
    "NeuronSpace": "space",
    "PruningPlan": "pruning",
    "Scan": "scanning",
    "Stimulus": "scanning",
    "TokenEvaluation": "intervention",
    "align": "comparison",
    "amplification_curve": "intervention",
    "amplify": "intervention",
    "compare": "comparison",
    "couple": "comparison",
    "describe": "networks",
    "dual_regression": "decomposition",
    "encode": "comparison",
    "evaluate": "evaluation",
    "export_bids": "imaging",
    "fingerprint": "comparison",
    "ica_stability": "decomposition",
    "keep_only": "intervention",
    "keep_only_curve": "intervention",
    "lesion": "intervention",
    "lesion_table": "intervention",
    "load_fmri": "comparison",
    "load_model": "checkpoints",
    "load_pruned": "checkpoints",
    "load_scans": "scanning",
    "load_words": "comparison",
    "localizer": "networks",
    "maps_to_nifti": "imaging",
    "match_networks": "networks",
    "perplexity": "evaluation",
    "plan_pruning": "pruning",
    "prune": "pruning",
    "read_ica": "decomposition",
    "read_nifti": "imaging",
    "recover": "pruning",
    "save_pruned": "checkpoints",
    "scan": "scanning",
    "top_tokens": "networks",
    "write_report": "reporting",
}
_ROOMS = {"architectures", "checkpoints", "comparison", "datasets", "decomposition", "evaluation", "imaging",
          "intervention", "networks", "plotting", "pruning", "reporting", "scanning", "space"}  # fmt: skip

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(import_module(f"llmbrain.{_PUBLIC[name]}"), name)
        globals()[name] = value
        return value
    if name in _ROOMS:
        return import_module(f"llmbrain.{name}")
    raise AttributeError(f"module 'llmbrain' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC, *_ROOMS})

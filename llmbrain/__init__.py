"""llmbrain: a neuroimaging toolkit whose subject is a large language model.

Names are imported on first use, so that ``import llmbrain`` and ``llmbrain --help`` answer at once and each half works
without the other's heavy packages.
"""

from __future__ import annotations

import lazy_loader

from llmbrain._version import __version__

ROOMS = [
    "anatomy",
    "brains",
    "checkpoints",
    "comparison",
    "datasets",
    "decomposition",
    "distributed",
    "evaluation",
    "hooks",
    "imaging",
    "intervention",
    "networks",
    "page",
    "plotting",
    "pruning",
    "reporting",
    "scanning",
    "stats",
    "study",
]
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=ROOMS,
    submod_attrs={
        "_validation": ["InputError"],
        "anatomy": ["NeuronSpace"],
        "brains": ["align", "load_fmri", "load_words"],
        "checkpoints": ["load_model", "load_pruned", "save_pruned"],
        "comparison": ["couple", "encode", "fingerprint"],
        "decomposition": ["GroupICA", "dual_regression", "ica_stability", "read_ica"],
        "evaluation": ["evaluate", "perplexity"],
        "imaging": ["NeuronMasker", "export_bids", "maps_to_nifti", "read_nifti"],
        "intervention": [
            "Experts",
            "Heads",
            "TokenEvaluation",
            "amplification_curve",
            "amplify",
            "keep_only",
            "keep_only_curve",
            "lesion",
            "lesion_table",
        ],
        "networks": ["FunctionalNetworks", "describe", "localizer", "match_networks", "top_tokens"],
        "pruning": ["PruningPlan", "plan_pruning", "prune", "prune_offloaded", "recover"],
        "reporting": ["report", "write_report"],
        "study": ["Study", "check", "compare", "estimate", "load_texts", "run"],
        "scanning": ["Scan", "Stimulus", "load_scans", "merge", "scan"],
    },
)
__all__ = ["__version__", *__all__]

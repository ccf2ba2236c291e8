"""Statistics that all rooms share, one of each: matching, nulls, tails, sparsity, bootstrap. Arrays in, arrays out."""

from __future__ import annotations

import lazy_loader

PUBLISHED_Z = 3.6  # |z| above which a neuron belongs to a network (arXiv 2502.20408)

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "bootstrap": ["bootstrap_mean"],
        "matching": ["best_pairs", "correlate_rows", "match_maps"],
        "nulls": ["circular_shift", "phase_randomize", "sign_flip_test", "surrogates"],
        "sparsity": ["gini", "hoyer", "overlap_matrix", "zscore_maps"],
        "tails": ["benjamini_hochberg", "permutation_p", "t_to_z"],
    },
)
__all__ = ["PUBLISHED_Z", *__all__]

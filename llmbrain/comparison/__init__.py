"""Networks of a model against networks of people, and models against each other.

Public: `compare` (all of it, as the command does); its steps `couple`, `noise_ceilings`, `encode`,
`compare_similarity` (`debiased_cka`, `rsa`), `compare_structure`; between models `fingerprint`,
`networks_of`, `corrmap`.
"""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "ceilings": ["noise_ceilings"],
        "coupling": ["Coupling", "couple"],
        "encoding": ["Encoding", "encode"],
        "fingerprints": ["Fingerprint", "corrmap", "fingerprint", "networks_of"],
        "similarity": ["compare_similarity", "debiased_cka", "rsa"],
        "story": ["Comparison", "compare"],
        "structure": ["compare_structure"],
    },
)

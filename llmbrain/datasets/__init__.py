"""What `data/` ships and what can be made from a seed: the demo brain and the phantom.

Public: `load_demo`, `Demo` (the embedded model, its stimuli and its scores), `condition_runs`, `condition_texts`,
`condition_rows` (eight kinds of text for real models), `contrast_texts` (functions that have names, each beside its
control), `unlearning_texts` (files of unlearning benchmarks), `make_phantom` (synthetic scans with known sources),
`fetch_alice` (fMRI of people listening to a story; needs a network).
"""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "alice": ["fetch_alice"],
        "conditions": ["condition_rows", "condition_runs", "condition_texts"],
        "contrasts": ["CONTRASTS", "contrast_lines", "contrast_texts", "control_of"],
        "demo": ["Demo", "load_demo"],
        "fmri_phantom": ["make_paired_phantom"],
        "phantom": ["make_phantom"],
        "unlearning": ["read_rows", "unlearning_texts"],
    },
)

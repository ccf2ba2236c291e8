"""The scanner: a model reads texts, and what every neuron did is kept.

Public: `scan`, `load_scans`, `live_scans` (nothing is kept), `Scan` (one run), `Stimulus` (a text with conditions);
`taking` and `merge` where several machines share a scan.
"""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "live": ["live_scans"],
        "merging": ["merge"],
        "scanner": ["scan"],
        "scans": ["Scan"],
        "shares": ["taking"],
        "stimuli": ["Stimulus"],
        "store": ["CorruptStoreError", "load_scans"],
    },
)

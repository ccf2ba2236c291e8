"""The human side: fMRI, timed words, tables, the hemodynamic response, one clock for model and brain.

Public: `load_fmri`, `FMRI`, `load_words`, `align`, `Aligned`, `word_regressor`, `prepare`.
"""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "alignment": ["Aligned", "align", "word_regressor"],
        "fmri": ["FMRI", "load_fmri"],
        "series": ["prepare"],
        "words": ["load_words"],
    },
)

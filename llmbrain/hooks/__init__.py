"""The only place that listens to or changes a running model: sites, listening, changing, text as tokens.

Public: `Recorder` and `reading` (hear sites while a model reads), `hear_inputs`, `hear_outputs`, `hear_calls`,
`change_inputs`, `Intervention` (edits that are always undone), `read_texts`, `as_windows`, `evaluating`.
"""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "change": ["Intervention", "change_inputs"],
        "listen": ["Recorder", "hear_calls", "hear_inputs", "hear_outputs", "reading"],
        "text": ["as_windows", "evaluating", "read_texts"],
    },
)

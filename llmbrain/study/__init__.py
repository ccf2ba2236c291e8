"""The folder of a study and the jobs that fill it: what each command does, as one call.

Public: `run` (the main job), `Study` (what is in a folder, read when asked for), `compare`; `decompose`,
`describe_networks`, `plan`, `cut`, `benchmark`, `demo` (what commands do); `load_texts`, `describe_path`, `estimate`,
`check` (whether every file is what was written).
"""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "checking": ["check"],
        "contents": ["describe_path"],
        "demonstration": ["demo"],
        "estimates": ["Estimate", "estimate"],
        "folder": ["Study"],
        "job": ["Forecast", "forecast", "run"],
        "networks": ["decompose", "describe_networks", "find_networks"],
        "settings": ["Settings"],
        "smaller": ["Evidence", "benchmark", "cut", "evidence_of", "plan"],
        "speed": ["latency_table"],
        "story": ["compare"],
        "texts": ["load_texts"],
    },
)

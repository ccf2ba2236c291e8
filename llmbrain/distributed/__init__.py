"""Several processes that do one job: who is which, who does what, and what they tell each other.

The engine is `torch.distributed`: torchrun (or SLURM, with the same variables) starts the processes, and `joined` makes
them ranks; a process group that a program made itself is used as it is. With one process everything here does nothing.

A job of ranks is a program that all of them run with the same input: what each does alone is `Ranks.mine`, what one
decides or finds for all is `Ranks.found_by`.
"""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "joining": ["joined"],
        "team": ["ALONE", "Parcel", "RankError", "Ranks", "alone", "ranks", "timeout"],
    },
)

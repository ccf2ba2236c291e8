"""Pruning: calibrate, score, allocate, cut, repair; plans before knives."""

from llmbrain.pruning.calibrate.windows import Calibration, write_windows
from llmbrain.pruning.offload import prune_offloaded
from llmbrain.pruning.plan import PruningPlan
from llmbrain.pruning.planner import PlanOptions, plan_pruning
from llmbrain.pruning.prune import prune
from llmbrain.pruning.recovery import recover

__all__ = [
    "Calibration",
    "PlanOptions",
    "PruningPlan",
    "plan_pruning",
    "prune",
    "prune_offloaded",
    "recover",
    "write_windows",
]

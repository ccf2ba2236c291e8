"""Pruning: criteria, allocation, compensation; plans before knives."""

from llmbrain.pruning.calibrate.windows import write_windows
from llmbrain.pruning.plan import PruningPlan
from llmbrain.pruning.planning import plan_pruning
from llmbrain.pruning.prune import prune
from llmbrain.pruning.recovery import recover

__all__ = ["PruningPlan", "plan_pruning", "prune", "recover", "write_windows"]

"""Lesion, keep or amplify networks of a living model, and measure what that does, beside its controls."""

from llmbrain.hooks.change import Intervention
from llmbrain.intervention.context import amplify, keep_only, lesion
from llmbrain.intervention.curves import amplification_curve, keep_only_curve
from llmbrain.intervention.evaluations import TokenEvaluation, score_conditions
from llmbrain.intervention.experts import Experts, experts_called_alike, random_experts
from llmbrain.intervention.table import LesionTable, lesion_table
from llmbrain.intervention.targets import Heads

__all__ = [
    "Experts",
    "Heads",
    "Intervention",
    "LesionTable",
    "TokenEvaluation",
    "amplification_curve",
    "amplify",
    "experts_called_alike",
    "keep_only",
    "keep_only_curve",
    "lesion",
    "lesion_table",
    "random_experts",
    "score_conditions",
]

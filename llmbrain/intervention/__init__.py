"""Lesion, keep or amplify networks of a living model, and measure what that does, beside its controls."""

from llmbrain.intervention.context import Intervention, amplify, keep_only, lesion
from llmbrain.intervention.targets import Heads

__all__ = ["Heads", "Intervention", "amplify", "keep_only", "lesion"]

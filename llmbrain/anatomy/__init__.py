"""Where a model's neurons, heads and their weights are, and how they are cut."""

from llmbrain.anatomy.experts import ExpertAnatomy, expert_anatomy, has_experts
from llmbrain.anatomy.families import (
    FAMILIES,
    Anatomy,
    Family,
    LayerAnatomy,
    PerHead,
    Projection,
    anatomy,
    context_length,
)
from llmbrain.anatomy.space import NeuronSpace, grid_of

__all__ = [
    "FAMILIES",
    "Anatomy",
    "ExpertAnatomy",
    "Family",
    "LayerAnatomy",
    "NeuronSpace",
    "PerHead",
    "Projection",
    "anatomy",
    "context_length",
    "expert_anatomy",
    "grid_of",
    "has_experts",
]

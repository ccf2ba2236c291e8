"""Where a model's neurons, heads and their weights are, and how they are cut."""

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
    "Family",
    "LayerAnatomy",
    "NeuronSpace",
    "PerHead",
    "Projection",
    "anatomy",
    "context_length",
    "grid_of",
]

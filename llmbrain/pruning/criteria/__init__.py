"""Which units of a layer matter: one file a criterion."""

from llmbrain.pruning.criteria import (
    flap,
    magnitude,
    networks,
    obs,
    obs_gradient,
    published,
    random,
    relp,
    taylor,
    wanda,
    whole,
)
from llmbrain.pruning.criteria.base import CRITERIA, NEEDS, Criterion, Evidence, Material, criterion, register

__all__ = [
    "CRITERIA",
    "NEEDS",
    "Criterion",
    "Evidence",
    "Material",
    "criterion",
    "flap",
    "magnitude",
    "networks",
    "obs",
    "obs_gradient",
    "published",
    "random",
    "register",
    "relp",
    "taylor",
    "wanda",
    "whole",
]

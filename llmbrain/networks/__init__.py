"""Functional networks: which neurons, which tokens, which task, how reproducible, how connected."""

from llmbrain.networks.functional import FunctionalNetworks, Network
from llmbrain.networks.localizer import Localizer, localizer
from llmbrain.networks.matching import match_networks, recurrence, single_run_networks, split_half, template_matches
from llmbrain.networks.meaning import describe, top_tokens
from llmbrain.networks.thresholds import NullNetworks, compare_thresholds, null_networks

__all__ = [
    "FunctionalNetworks",
    "Localizer",
    "Network",
    "NullNetworks",
    "compare_thresholds",
    "describe",
    "localizer",
    "match_networks",
    "null_networks",
    "recurrence",
    "single_run_networks",
    "split_half",
    "template_matches",
    "top_tokens",
]

"""Functional networks: which neurons, which tokens, which task, how reproducible, how connected."""

from llmbrain.networks.brain_localizer import brain_localizer, read_events
from llmbrain.networks.connectivity import (
    Connectivity,
    LayerFlow,
    connectivity,
    dynamic_connectivity,
    dynamics_test,
    layer_flow,
)
from llmbrain.networks.cutoff_table import compare_thresholds
from llmbrain.networks.functional import FunctionalNetworks, Network
from llmbrain.networks.graphs import graph_measures, hubs
from llmbrain.networks.localizer import Localizer, localizer
from llmbrain.networks.matching import match_networks, recurrence, single_run_networks, split_half, template_matches
from llmbrain.networks.meaning import describe, top_tokens
from llmbrain.networks.thresholds import NullNetworks, null_networks

__all__ = [
    "Connectivity",
    "FunctionalNetworks",
    "LayerFlow",
    "Localizer",
    "Network",
    "NullNetworks",
    "brain_localizer",
    "compare_thresholds",
    "connectivity",
    "describe",
    "dynamic_connectivity",
    "dynamics_test",
    "graph_measures",
    "hubs",
    "layer_flow",
    "localizer",
    "match_networks",
    "null_networks",
    "read_events",
    "recurrence",
    "single_run_networks",
    "split_half",
    "template_matches",
    "top_tokens",
]

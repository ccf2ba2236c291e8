"""Functional networks: which neurons, which tokens, which task, how reproducible, how connected."""

from llmbrain.networks.functional import FunctionalNetworks, Network
from llmbrain.networks.thresholds import NullNetworks, compare_thresholds, null_networks

__all__ = ["FunctionalNetworks", "Network", "NullNetworks", "compare_thresholds", "null_networks"]

"""Functional networks: which neurons, which tokens, which task, how reproducible, how connected."""

from llmbrain.networks.functional import FunctionalNetworks, Network

__all__ = ["FunctionalNetworks", "Network"]

"""Evaluation: perplexity, latency, memory, tasks."""

from llmbrain.evaluation.latency import latency, throughput
from llmbrain.evaluation.perplexity import perplexity

__all__ = ["latency", "perplexity", "throughput"]

"""Evaluation: perplexity, latency, memory, tasks."""

from llmbrain.evaluation.harness import evaluate
from llmbrain.evaluation.latency import latency, throughput
from llmbrain.evaluation.perplexity import perplexity

__all__ = ["evaluate", "latency", "perplexity", "throughput"]

"""Evaluation: perplexity, latency, memory, tasks."""

from llmbrain.evaluation.perplexity import perplexity

__all__ = ["perplexity"]

"""Evaluation: perplexity, latency, memory, tasks."""

from llmbrain.evaluation.harness import evaluate
from llmbrain.evaluation.latency import latency, throughput
from llmbrain.evaluation.llama_cpp import LlamaCpp, llama_cpp_latency
from llmbrain.evaluation.perplexity import perplexity

__all__ = ["LlamaCpp", "evaluate", "latency", "llama_cpp_latency", "perplexity", "throughput"]

"""How fast a model is: prefill and decode, warm and repeated, with their spread."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llmbrain._validation import InputError, check_count, check_whole
from llmbrain.anatomy.families import context_length
from llmbrain.hooks.text import evaluating, input_device

if TYPE_CHECKING:
    import pandas as pd


COLUMNS = ("phase", "batch", "tokens_per_second", "seconds", "seconds_low", "seconds_high")


def throughput(model: nn.Module, *, n_tokens: int = 2048, repeats: int = 5) -> float:
    """Tokens that a model reads in a second: the median of repeated forward passes over random tokens.

    Parameters
    ----------
    model : transformers model
    n_tokens : int
        Tokens in one pass, in windows of the context length or of 512 tokens, whichever is less.
    repeats : int
        Timed passes, after one that is not.

    Returns
    -------
    float
    """
    check_whole("n_tokens", n_tokens, 1)
    length = min(n_tokens, context_length(model) or 512, 512)
    ids = _random_ids(model, max(1, n_tokens // length), length)
    with evaluating(model):
        seconds = _times(lambda: model(input_ids=ids), model, repeats)
    return ids.numel() / float(np.median(seconds))


def latency(
    model: nn.Module,
    *,
    batch_sizes: Sequence[int] = (1, 8),
    prompt: int = 128,
    new_tokens: int = 32,
    repeats: int = 5,
) -> pd.DataFrame:
    """Time of prefill and decode.

    Prefill is one forward pass over `prompt` random tokens; decode is greedy generation of `new_tokens` after them,
    with the cache, less the prefill.

    Parameters
    ----------
    model : causal language model
    batch_sizes : sequence of int
    prompt, new_tokens : int
        Together at most the context.
    repeats : int
        Timed runs of each, after one that is not.

    Returns
    -------
    DataFrame
        A row a phase and batch size: ``phase``, ``batch``, ``tokens_per_second``, ``seconds`` (median), ``seconds_low``
        and ``seconds_high`` (quartiles), ``peak_memory`` (bytes allocated on the GPU; nan on the CPU).

    Raises
    ------
    InputError
        If the prompt and the new tokens do not fit the context, or the model does not generate.
    """
    import pandas as pd

    limit = context_length(model)
    if limit is not None and prompt + new_tokens > limit:
        raise InputError(f"prompt={prompt} and new_tokens={new_tokens} exceed the model's context of {limit} tokens")
    generator: Any = model
    if not hasattr(generator, "generate") or not generator.can_generate():
        raise InputError(f"model {type(model).__name__} does not generate: use throughput")
    rows = []
    with evaluating(model, cache=True):
        for batch in batch_sizes:
            ids = _random_ids(model, int(check_whole("batch_sizes", batch, 1)), prompt)
            options = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens, "do_sample": False}
            mask = torch.ones_like(ids)

            def generate(ids: Tensor = ids, mask: Tensor = mask, options: dict[str, Any] = options) -> Any:
                return generator.generate(input_ids=ids, attention_mask=mask, pad_token_id=0, **options)

            def read(ids: Tensor = ids) -> Any:
                return model(input_ids=ids)

            cuda = ids.device.type == "cuda"
            if cuda:
                torch.cuda.reset_peak_memory_stats(ids.device)
            prefill = _times(read, model, repeats)
            decode = _times(generate, model, repeats) - np.median(prefill)
            peak = float(torch.cuda.max_memory_allocated(ids.device)) if cuda else float("nan")
            rows += [(*row, peak) for row in phase_rows(batch, prefill, prompt, decode, new_tokens)]
    return pd.DataFrame(rows, columns=[*COLUMNS, "peak_memory"])


def phase_rows(
    batch: int, prefill: NDArray[np.float64], prompt: int, decode: NDArray[np.float64], new_tokens: int
) -> list[tuple[str, int, float, float, float, float]]:
    """Rows of `COLUMNS` from seconds of repeated runs; decode is what was left of a run less the median prefill.

    Where that is nothing, noise was larger than what was measured: nan, and a warning.
    """
    rows = []
    for phase, seconds, tokens in (("prefill", prefill, prompt), ("decode", decode, new_tokens)):
        low, middle, high = (float(x) for x in np.percentile(seconds, [25, 50, 75]))
        speed = batch * tokens / middle if middle > 0 else float("nan")
        if not middle > 0:
            warnings.warn(
                f"batch {batch}: writing {tokens} tokens took no longer than reading alone, within what runs differ: "
                "measure more new tokens, or on an idle machine",
                UserWarning,
                stacklevel=3,
            )
        rows.append((phase, batch, speed, middle, low, high))
    return rows


def _random_ids(model: nn.Module, batch: int, length: int) -> Tensor:
    """Tokens that exist, the same at every call."""
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    rows = int(embeddings.num_embeddings)  # type: ignore[union-attr]
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, rows, (batch, length), generator=generator).to(input_device(model))


def _times(call: Callable[[], Any], model: nn.Module, repeats: int) -> np.ndarray:
    """Seconds of each of `repeats` calls, after a warm-up."""
    device = input_device(model)
    seconds = []
    for _ in range(int(check_count("repeats", repeats, 1)) + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return np.array(seconds[1:])

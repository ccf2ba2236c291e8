"""How fast models are, each in a process of its own, so that its peak memory is its own too."""

from __future__ import annotations

import multiprocessing
import resource
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmbrain._validation import InputError, check_count, check_option, check_whole
from llmbrain.checkpoints.gguf_reading import is_gguf

if TYPE_CHECKING:
    import pandas as pd

ENGINES = ("auto", "transformers", "llama.cpp")


def latency_table(
    models: Sequence[str | Path],
    *,
    engine: str = "auto",
    batch_sizes: Sequence[int] = (1, 8, 32),
    prompt: int = 128,
    new_tokens: int = 32,
    repeats: int = 5,
    threads: int | None = None,
    dtype: str | None = None,
) -> pd.DataFrame:
    """Prefill and decode of models side by side.

    Parameters
    ----------
    models : sequence of paths
        Folders, hub ids or GGUF files.
    engine : {"auto", "transformers", "llama.cpp"}
        ``"auto"``: llama.cpp for GGUF files, transformers for others.
    batch_sizes : sequence of int
        Texts at once.
    prompt, new_tokens, repeats : int
        As for `latency`.
    threads : int, optional
        Default: torch's.
    dtype : str, optional
        Of the weights in transformers.

    Returns
    -------
    DataFrame
        A row a model, phase and batch size: ``model``, ``engine``, ``phase``, ``batch``, ``tokens_per_second``,
        ``seconds`` (median), ``seconds_low`` and ``seconds_high`` (quartiles), ``peak_memory`` (bytes: of the process,
        or what was allocated on a GPU), ``relative`` (tokens a second over the first model's with the same engine).

    Raises
    ------
    InputError
        If a model cannot run in the engine asked for, or prompt and new tokens do not fit its context.
    """
    import pandas as pd
    import torch

    check_option("engine", engine, ENGINES)
    if not models:
        raise InputError("models is empty: name at least one model")
    for batch in batch_sizes:
        check_whole("batch_sizes", batch, 1)
    options = {
        "batch_sizes": tuple(batch_sizes), "prompt": check_whole("prompt", prompt, 1),
        "new_tokens": check_whole("new_tokens", new_tokens, 1), "repeats": check_count("repeats", repeats, 1),
    }  # fmt: skip
    threads = torch.get_num_threads() if threads is None else check_whole("threads", threads, 1)
    frames = []
    for model in models:
        chosen = ("llama.cpp" if is_gguf(model) else "transformers") if engine == "auto" else engine
        if chosen == "llama.cpp" and not is_gguf(model):
            raise InputError(f"engine='llama.cpp' runs GGUF files, {model} is none: save it with format='gguf'")
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            try:
                frame = pool.submit(_measure, str(model), chosen, threads, dtype, options).result()
            except BrokenProcessPool as error:
                raise InputError(f"{model} could not be measured: its process was killed (out of memory?)") from error
        frame.insert(0, "engine", chosen)
        frame.insert(0, "model", str(model))
        frames.append(frame)
    table = pd.concat(frames, ignore_index=True)
    first = table.groupby(["engine", "phase", "batch"])["tokens_per_second"].transform("first")
    return table.assign(relative=table["tokens_per_second"] / first)


def _measure(model: str, engine: str, threads: int, dtype: str | None, options: dict[str, Any]) -> pd.DataFrame:
    """In a process of its own."""
    import torch

    from llmbrain.checkpoints import load_model
    from llmbrain.evaluation.latency import latency
    from llmbrain.evaluation.llama_cpp import llama_cpp_latency

    torch.set_num_threads(threads)
    if engine == "llama.cpp":
        frame = llama_cpp_latency(model, threads=threads, **options)
    else:
        frame = latency(load_model(model, dtype=dtype, device="auto")[0], **options)
    measured = frame["peak_memory"].fillna(peak_memory()) if "peak_memory" in frame else float(peak_memory())
    return frame.assign(peak_memory=measured)


def peak_memory() -> int:
    """Bytes that this process had at most.

    What the system says of a process's resources counts the memory of the one that started it too (Linux keeps it over
    the start of another program), so that the memory map itself is asked where that can be done.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

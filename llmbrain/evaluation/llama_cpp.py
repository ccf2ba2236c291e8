"""GGUF files in llama.cpp itself: a server on 127.0.0.1, what it answers, and how fast."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmbrain._validation import InputError, check_count, check_whole, soft_import
from llmbrain.checkpoints.gguf_opening import open_gguf
from llmbrain.evaluation.latency import COLUMNS, phase_rows

if TYPE_CHECKING:
    import pandas as pd

EXTRA = "serve"


class LlamaCpp:
    """A GGUF file in llama.cpp, through the wheel of ``xllamacpp``; listens on 127.0.0.1 only.

    Parameters
    ----------
    path : str or Path
        The file.
    context : int
        Tokens of one text.
    parallel : int
        Texts at once.
    threads : int
    exact : bool
        A float32 cache and no flash attention: for comparing numbers.

    Raises
    ------
    InputError
        If xllamacpp is not installed, or llama.cpp does not load the file.
    """

    def __init__(
        self, path: str | Path, *, context: int = 512, parallel: int = 1, threads: int = 1, exact: bool = False
    ) -> None:
        engine = soft_import("xllamacpp", EXTRA, "running GGUF files")
        if not Path(path).is_file():
            raise FileNotFoundError(f"GGUF file {path} does not exist")
        params = engine.CommonParams()
        params.model.path = str(path)
        params.n_parallel = check_whole("parallel", parallel, 1)
        params.n_ctx = check_whole("context", context, 1) * parallel
        params.n_gpu_layers, params.warmup, params.ui, params.verbosity = 0, False, False, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = check_whole("threads", threads, 1)
        if exact:
            params.cache_type_k = params.cache_type_v = engine.ggml_type.GGML_TYPE_F32
            params.flash_attn_type = engine.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        try:
            self.server = engine.Server(params)
        except (RuntimeError, ValueError) as error:
            raise InputError(f"llama.cpp does not load {path}: {error}") from error
        self.address: str = self.server.listening_address

    def ask(self, route: str, **body: Any) -> Any:
        """The answer to one POST of JSON, decoded."""
        request = urllib.request.Request(
            self.address + route, data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            raise InputError(f"llama.cpp refuses {route}: {error.read().decode(errors='replace')[:300]}") from error

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, with the special tokens that the file asks for."""
        return self.ask("/tokenize", content=text, add_special=True)["tokens"]

    def generate(self, ids: Sequence[int], n: int) -> list[int]:
        """`n` tokens, greedy, whatever they are."""
        answer = self.ask("/completion", prompt=list(ids), n_predict=n, temperature=0.0, return_tokens=True,
                          ignore_eos=True, cache_prompt=False)  # fmt: skip
        return answer["tokens"]

    def logprobs(self, ids: Sequence[int], vocabulary: int) -> dict[int, float]:
        """Log-probability of every token after a text.

        The bias only makes it write a token that is a whole character, without which it tells no probabilities; they
        are those of the unbiased logits.
        """
        answer = self.ask("/completion", prompt=list(ids), n_predict=1, n_probs=vocabulary, temperature=0.0,
                          logit_bias=[[self._writable(), 1000.0]], cache_prompt=True)  # fmt: skip
        return {entry["id"]: entry["logprob"] for entry in answer["completion_probabilities"][0]["top_logprobs"]}

    def _writable(self) -> int:
        return self.tokenize(" the")[-1]

    def logprob(self, ids: Sequence[int], token: int, vocabulary: int) -> float:
        """Log-probability of one token after a text, which is made to be written; of all where it is no character."""
        answer = self.ask("/completion", prompt=list(ids), n_predict=1, n_probs=1, temperature=0.0,
                          logit_bias=[[token, 1000.0]], cache_prompt=True)  # fmt: skip
        told = answer.get("completion_probabilities") or []
        if told and told[0].get("id") == token:
            return float(told[0]["logprob"])
        return self.logprobs(ids, vocabulary)[token]

    def negative_log_likelihood(self, windows: Sequence[Sequence[int]], vocabulary: int) -> float:
        """Mean over all tokens but the first of each window; exp of it is the perplexity. One request a token."""
        losses = [-self.logprob(ids[:i], ids[i], vocabulary) for ids in windows for i in range(1, len(ids))]
        return float(np.mean(losses))


def context_of(path: Path) -> int | None:
    """Tokens that the model of a GGUF file reads at once, if it says so."""
    if not path.is_file():
        raise FileNotFoundError(f"GGUF file {path} does not exist")
    fields = open_gguf(path).fields
    architecture = fields.get("general.architecture")
    found = None if architecture is None else fields.get(f"{architecture.contents()}.context_length")
    return None if found is None else int(found.contents())


def llama_cpp_latency(
    path: str | Path,
    *,
    batch_sizes: Sequence[int] = (1, 8),
    prompt: int = 128,
    new_tokens: int = 32,
    repeats: int = 5,
    threads: int = 1,
) -> pd.DataFrame:
    """Time of prefill and decode of a GGUF file in llama.cpp, defined as in `latency`.

    Returns
    -------
    DataFrame
        A row a phase and batch size, with the columns of `latency` but for the memory.
    """
    import pandas as pd

    check_count("repeats", repeats, 1)
    limit = context_of(Path(path))
    if limit is not None and prompt + new_tokens > limit:
        raise InputError(f"prompt={prompt} and new_tokens={new_tokens} exceed the model's context of {limit} tokens")
    rows = []
    for batch in batch_sizes:
        engine = LlamaCpp(path, context=prompt + new_tokens + 8, parallel=batch, threads=threads)
        rng = np.random.default_rng(0)
        known = engine.tokenize("The people of the town came to the river in the morning and sang of rain and bread.")
        texts = rng.choice(known, size=(repeats + 1, 2, batch, prompt)).tolist()

        def seconds(texts: list[list[int]], n: int, engine: LlamaCpp = engine) -> float:
            start = time.perf_counter()
            with ThreadPoolExecutor(len(texts)) as pool:
                for made in pool.map(lambda ids: engine.generate(ids, n), texts):
                    if len(made) != n:
                        raise InputError(f"llama.cpp wrote {len(made)} tokens instead of {n}")
            return time.perf_counter() - start

        prefill = np.array([seconds(pair[0], 1) for pair in texts][1:])
        decode = np.array([seconds(pair[1], 1 + new_tokens) for pair in texts][1:]) - np.median(prefill)
        rows += phase_rows(batch, prefill, prompt, decode, new_tokens)
    return pd.DataFrame(rows, columns=list(COLUMNS))

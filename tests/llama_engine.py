"""The real llama.cpp on 127.0.0.1, through the wheel of xllamacpp."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any


class Engine:
    """A server of one GGUF file: float32 cache, no flash attention, one thread."""

    def __init__(self, path: Path, context: int = 256) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.n_gpu_layers = context, 1, 0
        params.warmup, params.ui, params.verbosity = False, False, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server = xllamacpp.Server(params)

    def ask(self, route: str, **body: Any) -> Any:
        data = json.dumps(body).encode()
        request = urllib.request.Request(
            self.server.listening_address + route, data=data, headers={"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.loads(answer.read())

    def logprobs(self, ids: list[int], vocabulary: int) -> dict[int, float]:
        """Log-probability of every token after a prompt of token ids.

        The bias only makes it write a token that is a whole character, without which it tells no probabilities; they
        are those of the unbiased logits.
        """
        answer = self.ask("/completion", prompt=ids, n_predict=1, n_probs=vocabulary, temperature=0.0,
                          logit_bias=[[vocabulary - 100, 1000.0]], cache_prompt=False)  # fmt: skip
        return {entry["id"]: entry["logprob"] for entry in answer["completion_probabilities"][0]["top_logprobs"]}

    def greedy(self, ids: list[int], n: int) -> list[int]:
        answer = self.ask("/completion", prompt=ids, n_predict=n, temperature=0.0, return_tokens=True, ignore_eos=True,
                          cache_prompt=False)  # fmt: skip
        return answer["tokens"]

    def tokenize(self, text: str) -> list[int]:
        return self.ask("/tokenize", content=text, add_special=True)["tokens"]

"""Raw logits of llama.cpp: its C interface in the wheel of xllamacpp, whose server only tells log-probabilities.

The layout of its parameters is not promised: they are taken as bytes, and changed only where the defaults stand where
they are known to.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

F32, DISABLED = 0, 0  # llama.cpp's numbers of a type, and of flash attention that is off
SIZE = 1024  # bytes: more than any of its structs has


class Bytes(ctypes.Structure):
    """A struct of parameters."""

    _fields_ = [("content", ctypes.c_ubyte * SIZE)]


class Batch(ctypes.Structure):
    """``llama_batch``."""

    _fields_ = [
        ("n_tokens", ctypes.c_int32), ("token", ctypes.POINTER(ctypes.c_int32)), ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)), ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))), ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]  # fmt: skip


def library() -> Any:
    """The functions that are needed, with their types.

    Raises
    ------
    OSError, AttributeError, ImportError
        If the wheel has them not.
    """
    import xllamacpp

    found = ctypes.CDLL(str(Path(xllamacpp.__file__).parent / "xllamacpp.abi3.so"))
    pointer, number, text = ctypes.c_void_p, ctypes.c_int32, ctypes.c_char_p
    for name, result, arguments in (
        ("llama_model_default_params", Bytes, []), ("llama_context_default_params", Bytes, []),
        ("llama_model_load_from_file", pointer, [text, Bytes]), ("llama_init_from_model", pointer, [pointer, Bytes]),
        ("llama_model_get_vocab", pointer, [pointer]), ("llama_vocab_n_tokens", number, [pointer]),
        ("llama_batch_init", Batch, [number] * 3), ("llama_batch_free", None, [Batch]),
        ("llama_decode", number, [pointer, Batch]),
        ("llama_get_logits", ctypes.POINTER(ctypes.c_float), [pointer]), ("llama_free", None, [pointer]),
        ("llama_model_free", None, [pointer]), ("llama_backend_init", None, []),
    ):  # fmt: skip
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    return found


def places(defaults: bytes) -> dict[str, int] | None:
    """Where in the parameters of a context its size, its threads, flash attention and types of the cache stand.

    None where the defaults do not look as they are known to: 512 tokens; two numbers of threads that are alike; four
    choices that are -1, the last of them flash attention; and after two empty pointers twice float16 (1).
    """
    words = struct.unpack(f"<{len(defaults) // 4}i", defaults)
    choices = next((i for i in range(8, 16) if words[i : i + 4] == (-1, -1, -1, -1)), None)
    cache = next((i for i in range(16, 36) if words[i - 4 : i + 2] == (0, 0, 0, 0, 1, 1)), None)
    threads = next((i for i in range(4, 10) if words[i] == words[i + 1] > 1), None)
    if words[0] != 512 or choices is None or cache is None or threads is None:
        return None
    return {"context": 0, "threads": 4 * threads, "flash": 4 * (choices + 3), "cache": 4 * cache}


def raw_logits(path: str | Path, ids: Sequence[int], threads: int = 1) -> NDArray[np.float32]:
    """Logits at every token of a text, ``(tokens, vocabulary)``; a float32 cache, no flash attention.

    Raises
    ------
    NotImplementedError
        If the library is another than is known here.
    RuntimeError
        If llama.cpp does not load the file.
    """
    llama = library()
    llama.llama_backend_init()
    given = llama.llama_context_default_params()
    where = places(bytes(given.content)[:240])
    if where is None:
        raise NotImplementedError("the parameters of this llama.cpp lie otherwise")
    for at, value in (
        (where["context"], len(ids)), (where["threads"], threads), (where["threads"] + 4, threads),
        (where["flash"], DISABLED), (where["cache"], F32), (where["cache"] + 4, F32),
    ):  # fmt: skip
        struct.pack_into("<i", given.content, at, value)
    model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
    context = model and llama.llama_init_from_model(model, given)
    if not context:
        raise RuntimeError(f"llama.cpp does not load {path}")
    batch = llama.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
        batch.seq_id[i][0] = 0
    try:
        if llama.llama_decode(context, batch):
            raise RuntimeError(f"llama.cpp does not read these tokens with {path}")
        shape = (len(ids), llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model)))
        return np.ctypeslib.as_array(llama.llama_get_logits(context), shape=shape).copy()
    finally:
        llama.llama_batch_free(batch)
        llama.llama_free(context)
        llama.llama_model_free(model)

"""Numbers of a config that no model has, or that its weights cannot fill: refused before anything is built by them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llmbrain._validation import InputError, shown

MOST = {  # of entries by whose number modules are built, one by one
    "num_hidden_layers": 2048, "num_layers": 2048, "n_layer": 2048, "n_layers": 2048, "encoder_layers": 2048,
    "decoder_layers": 2048, "num_experts": 2**14, "num_local_experts": 2**14, "n_routed_experts": 2**14,
    "moe_num_experts": 2**14,
}  # fmt: skip
HIDDEN = ("hidden_size", "n_embd", "d_model")
SIZES = ("vocab_size", "intermediate_size", "n_inner", "ffn_dim", "num_attention_heads", "n_head")  # times it: a tensor
SMALL = 2**26  # entries that any machine has room for
PACKED = 16  # weights in a byte of a quantized file, at most


def check_file(path: str | Path) -> None:
    """`check_config` of a ``config.json``, or of the one in a folder, whose weights must have room for its sizes, too.

    transformers makes lists by its numbers while it reads it, and memory before it compares shapes.

    Raises
    ------
    InputError
        Naming the entries: the config was altered, or the weights were truncated.
    """
    path = Path(path)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():  # of a hub
        return
    try:
        record = json.loads(file.read_bytes())
    except (ValueError, RecursionError, OSError):
        return  # for the reader to say
    if isinstance(record, dict):
        check_config(record, file)
        _check_sizes(record, path)


def check_config(config: Any, name: object) -> None:
    """Refuse more layers or experts than any model has: they would be built, one after the other.

    Parameters
    ----------
    config : config of transformers, or what its JSON says
    name : object
        What errors call it.

    Raises
    ------
    InputError
        Naming the entry.
    """
    for part in _parts(config):
        for key, most in MOST.items():
            value = part.get(key)
            if isinstance(value, int) and value > most:
                raise InputError(f"{name}: its config says {key}={shown(value)}, and no model has more than {most}")


def _check_sizes(config: dict[str, Any], folder: Path) -> None:
    files = [p for pattern in ("*.safetensors", "*.bin") for p in folder.glob(pattern)]
    if not files:
        return
    packed = PACKED if config.get("quantization_config") else 1
    room = max(SMALL, packed * sum(p.stat().st_size for p in files))
    for part in _parts(config):
        hidden = next((part[key] for key in HIDDEN if isinstance(part.get(key), int)), 0)
        for key in SIZES:
            size = part.get(key)
            if key.endswith(("heads", "head")) and isinstance(part.get("head_dim"), int) and isinstance(size, int):
                size *= part["head_dim"]
            if isinstance(size, int) and hidden * size > room:
                raise InputError(
                    f"{folder} does not fit its config.json: {key} and the hidden size ask for {shown(hidden * size)} "
                    f"numbers, its weights have room for {room}"
                )


def _parts(config: Any) -> Iterator[Mapping[str, Any]]:
    """A config, and those within it (of the text, of an image)."""
    entries: Mapping[str, Any] = config if isinstance(config, Mapping) else vars(config)
    yield entries
    for value in entries.values():
        if isinstance(value, Mapping):
            yield value
        elif hasattr(value, "to_dict") and hasattr(value, "_attn_implementation"):
            yield vars(value)

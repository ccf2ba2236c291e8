"""A model reads padded token ids, in evaluation mode and without its vocabulary projection."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmbrain.hooks.sites import Recorder
from llmbrain.hooks.text import Block, Run

Kinds = Mapping[tuple[str, int], tuple[torch.dtype, int]]
"""Dtype and number of units of each site and layer."""


@dataclass
class Reader:
    """Runs the model's body over batches of blocks; a `Recorder` listens."""

    body: nn.Module
    recorder: Recorder
    runs: Sequence[Run]
    device: torch.device
    padding: int
    options: Mapping[str, Any]

    def read(self, blocks: Sequence[Block], first_row: int = 0) -> int:
        """One forward pass; what the recorder hears goes to its buffers from `first_row` on. Returns how many tokens.

        Padding is on the right: positions then are right without being told, and a mask is only given where needed.
        """
        ids = torch.full((len(blocks), max(len(block) for block in blocks)), self.padding)
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        for i, block in enumerate(blocks):
            ids[i, : len(block)] = torch.from_numpy(self.runs[block.run].token_ids[block.start : block.stop])
            mask[i, : len(block)] = True
        self.recorder.expect(mask, first_row)
        attention = None if bool(mask.all()) else mask.to(self.device, torch.long)
        self.body(input_ids=ids.to(self.device), attention_mask=attention, **self.options)
        self.recorder.check_heard()
        return self.recorder.n_rows

    def read_alone(self, block: Block) -> dict[tuple[str, int], Tensor]:
        """What one block gives when read by itself: ``(tokens, units)`` by site and layer."""
        self.recorder.buffers = {}
        self.read([block])
        return self.recorder.buffers

    def kinds(self, block: Block, kept: torch.dtype | None) -> Kinds:
        """What each signal looks like, seen in a first reading of two tokens; `kept` overrides the dtype."""
        heard = self.read_alone(Block(block.run, block.start, min(block.start + 2, block.stop)))
        wide: dict[str, torch.dtype] = {}
        for (site, _), signal in heard.items():
            wide[site] = torch.promote_types(wide.get(site, signal.dtype), signal.dtype)
        keys = [(tap.site, tap.layer) for tap in self.recorder.taps]
        return {key: (kept or wide[key[0]], heard[key].shape[1]) for key in keys}


@contextmanager
def reading(model: nn.Module, recorder: Recorder, runs: Sequence[Run]) -> Iterator[Reader]:
    """The model in evaluation mode with the recorder's hooks; both are undone on any exit."""
    from transformers import PreTrainedModel

    body = model.base_model if isinstance(model, PreTrainedModel) else model
    weight = getattr(embeddings(model), "weight", None)
    weight = next(model.parameters()) if weight is None or weight.is_meta else weight
    device = torch.device("cpu") if weight.is_meta else weight.device  # accelerate moves the ids from there itself
    padding = getattr(getattr(body, "config", None), "pad_token_id", None)
    padding = padding if isinstance(padding, int) and padding >= 0 else 0
    # A decoder would keep its keys and values for a next token that never comes.
    options = {"use_cache": False} if "use_cache" in inspect.signature(body.forward).parameters else {}
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        with torch.inference_mode(), recorder.listening():
            yield Reader(body, recorder, runs, device, padding, options)
    finally:
        for module in training:
            module.training = True


def embeddings(model: Any) -> nn.Module | None:
    """The table of token embeddings, where the model says which it is."""
    return model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None

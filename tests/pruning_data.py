"""What tests of pruning share: windows, logits, the zeroed model, networks, labelled texts."""

from __future__ import annotations

import numpy as np
import torch
from tiny_models import MODELS, VOCAB, tiny_tokenizer

from llmbrain import (
    FunctionalNetworks,
    NeuronSpace,
    Stimulus,
)
from llmbrain.anatomy.families import anatomy
from llmbrain.pruning.forget.conditions import token_conditions

FAMILIES = sorted(set(MODELS) - {"mixtral"})
CAUSAL = sorted(set(FAMILIES) - {"bert", "roberta", "distilbert", "modernbert"})
IDS = torch.arange(3, 3 + 24).reshape(2, 12) % VOCAB


def windows(n=40, length=16, seed=0):
    return torch.randint(3, VOCAB, (n, length), generator=torch.Generator().manual_seed(seed))


def stimuli(n=6):
    tokenizer, rng = tiny_tokenizer(), np.random.default_rng(0)
    texts = []
    for _ in range(n):
        segments = [("".join(rng.choice(list(letters), 12)), name)
                    for name, letters in (("low", "abc"), ("high", "xyz"))] * 2  # fmt: skip
        texts.append(Stimulus.from_segments(segments, tokenizer))
    return tokenizer, texts


def right_by_condition(model, scans, ids):
    with torch.no_grad():
        right = (model(input_ids=ids).logits[:, :-1].argmax(-1) == ids[:, 1:]).numpy()
    labels = token_conditions(scans, tuple(ids.shape))
    return {name: right[labels[0][:, 1:] == i].mean() for i, name in enumerate(labels[1])}


def make_networks(widths, k=3, seed=0):
    space = NeuronSpace(widths)
    return FunctionalNetworks(np.random.default_rng(seed).normal(size=(k, space.n_neurons)), space, threshold=1.5)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def with_zeros(model, kept):
    """The model with all other neurons' signals multiplied by zero, by hooks of our own."""
    handles = []
    for layer, units in zip(anatomy(model).layers, kept):
        mask = torch.zeros(layer.width).index_fill_(0, torch.as_tensor(units), 1.0)
        handles.append(layer.down.module.register_forward_pre_hook(lambda m, args, mask=mask: (args[0] * mask,)))
    out = logits(model)
    for handle in handles:
        handle.remove()
    return out

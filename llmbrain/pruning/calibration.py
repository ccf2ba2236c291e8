"""Text for calibration: windows from texts or scans, and whether they are enough."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from llmbrain._validation import InputError
from llmbrain.architectures import Anatomy
from llmbrain.evaluation.windows import as_windows, batches, evaluating, input_device, window_length
from llmbrain.scanning.scans import ArraySignals, Scan
from llmbrain.scanning.sites import Recorder, find_taps
from llmbrain.space import NeuronSpace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ENOUGH = 4  # tokens per neuron of the widest layer from which a fit is no longer limited by tokens
LEAST = 0.25


def calibration_windows(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    calibration: Sequence[str] | Tensor | None,
    scans: Sequence[Any] | None,
    window: int | None,
    max_windows: int | None,
) -> Tensor | None:
    """Windows ``(n, window)`` of the calibration texts; without any, of the tokens that the scans recorded."""
    if calibration is not None:
        return as_windows(model, tokenizer, calibration, window, max_windows)
    ids = [np.asarray(s.token_ids) for s in scans or () if len(s.token_ids) and int(np.min(s.token_ids)) >= 0]
    if not ids:
        return None
    joined = np.concatenate(ids)
    length = min(window_length(model, window), len(joined))
    n = len(joined) // length
    return torch.from_numpy(joined[: n * length].astype(np.int64)).reshape(n, length)[:max_windows]


def check_enough(windows: Tensor, width: int) -> None:
    """Refuse calibration with too few tokens for layers of `width` neurons, and say how many are enough."""
    least = int(np.ceil(LEAST * width))
    if windows.numel() < least:
        raise InputError(
            f"calibration has {windows.numel()} tokens, too few for layers of {width} neurons: at least {least} are "
            f"needed, {ENOUGH * width} are enough"
        )


def signals_of_windows(model: nn.Module, body: Anatomy, windows: Tensor, sites: Sequence[str]) -> list[Scan]:
    """One scan in memory for each window, of the sites asked for."""
    recorder = Recorder(find_taps(body, sites))
    scans: list[Scan] = []
    with recorder.listening(), evaluating(model):
        for batch in batches(windows):
            recorder.expect(torch.ones(batch.shape, dtype=torch.bool), 0)
            model(input_ids=batch.to(input_device(model)))
            heard = {key: v.float().numpy().reshape(*batch.shape, -1) for key, v in recorder.buffers.items()}
            recorder.buffers = {}
            for i, ids in enumerate(batch):
                signals = {}
                for site in sites:
                    parts = [heard[site, layer][i] for layer in range(len(body.layers))]
                    space = NeuronSpace([p.shape[1] for p in parts])
                    signals[site] = ArraySignals(np.concatenate(parts, axis=1), space)
                scans.append(Scan(signals, name=f"window-{len(scans) + 1:04d}", token_ids=ids.numpy()))
    return scans

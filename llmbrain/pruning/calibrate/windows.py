"""Text for calibration: windows from texts or scans, and whether they are enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from llmbrain._progress import bar
from llmbrain._validation import InputError, check_whole, seed_of
from llmbrain.anatomy.families import Anatomy
from llmbrain.anatomy.space import NeuronSpace
from llmbrain.evaluation.perplexity import predicts_next_token
from llmbrain.hooks.listen import Recorder
from llmbrain.hooks.sites import find_taps
from llmbrain.hooks.text import as_windows, batches, evaluating, input_device, window_length
from llmbrain.scanning.scans import ArraySignals, Scan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ENOUGH = 4  # tokens per neuron of the widest layer from which a fit is no longer limited by tokens
LEAST = 0.25
WRITTEN_AT_ONCE = 64  # windows that a model writes together


@dataclass(frozen=True)
class Calibration:
    """Text that pruning measures on, and how much each of its tokens counts.

    Parameters
    ----------
    source : texts, int64 windows ``(n, window)``, or scans
        Of scans the tokens that they recorded; None is no text.
    tokenizer : transformers tokenizer, optional
        Where the source is texts.
    window : int, optional
        Tokens in a window; default the model's context, at most 2,048.
    max_windows : int, optional
        At most so many are used; None is all.
    weights : float tensor ``(n_windows, window)``, optional
        How much each token counts; default all alike.
    """

    source: Sequence[str] | Sequence[Scan] | Tensor | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    window: int | None = None
    max_windows: int | None = 128
    weights: Tensor | None = None

    @classmethod
    def of(
        cls,
        calibration: Calibration | Sequence[str] | Sequence[Scan] | Tensor | None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **options: Any,
    ) -> Calibration:
        """What a user passed as `calibration`, as one object; `options` are the other fields.

        Raises
        ------
        InputError
            If options are given beside a `Calibration`, which holds them.
        """
        if not isinstance(calibration, cls):
            return cls(calibration, tokenizer, **options)  # type: ignore[arg-type]
        if options:
            raise InputError(f"calibration is a Calibration: give {sorted(options)} there")
        return replace(calibration, tokenizer=calibration.tokenizer or tokenizer)

    @property
    def scans(self) -> list[Scan] | None:
        """The source, where it is scans."""
        if not isinstance(self.source, (list, tuple)) or not self.source:
            return None
        found = [scan for scan in self.source if isinstance(scan, Scan)]
        return found if len(found) == len(self.source) else None

    def windows(self, model: nn.Module) -> Tensor | None:
        """Windows ``(n, window)`` of token ids; None where there is no text.

        Raises
        ------
        InputError
            If the scans carry no token ids.
        """
        scans = self.scans
        if self.source is None:
            return None
        if scans is None:
            return as_windows(model, self.tokenizer, self.source, self.window, self.max_windows)  # type: ignore[arg-type]
        found = calibration_windows(model, None, None, scans, self.window, self.max_windows)
        if found is None:
            raise InputError("calibration: these scans carry no token ids")
        return found


def calibration_windows(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    calibration: Sequence[str] | Tensor | None,
    scans: Sequence[Scan] | None,
    window: int | None,
    max_windows: int | None,
) -> Tensor | None:
    """Windows ``(n, window)`` of the calibration texts; without any, of the tokens that the scans recorded."""
    if calibration is not None:
        return as_windows(model, tokenizer, calibration, window, max_windows)
    if max_windows is not None:
        check_whole("max_windows", max_windows, 1)
    ids = [np.asarray(s.token_ids) for s in scans_with_tokens(scans)]
    if not ids:
        return None
    joined = np.concatenate(ids)
    length = min(window_length(model, window), len(joined))
    n = len(joined) // length
    return torch.from_numpy(joined[: n * length].astype(np.int64)).reshape(n, length)[:max_windows]


def scans_with_tokens(scans: Sequence[Scan] | None) -> list[Scan]:
    """The scans that know their tokens (those of arrays do not): windows and the conditions of tokens are of these."""
    return [scan for scan in scans or () if scan.n_tokens and int(np.min(scan.token_ids)) >= 0]


def write_windows(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    n_windows: int = 128,
    window: int | None = None,
    *,
    random_state: int | None = 0,
) -> Tensor:
    """Calibration windows that the model writes itself, sampled from its own distribution (arXiv 2410.17170).

    For models without a text at hand, and beside text that is narrower than what the model should go on doing.

    Parameters
    ----------
    model : transformers model
        With a next token.
    tokenizer : transformers tokenizer, optional
        Its BOS token (or EOS) starts each window; without one, a random token does.
    n_windows, window : int
        Size; default window as for texts.
    random_state : int
        Of the sampling; torch's global state stays as it is.

    Returns
    -------
    int64 tensor ``(n_windows, window)``

    Raises
    ------
    InputError
        If the model writes no text.
    """
    if not predicts_next_token(model) or not hasattr(model, "generate"):
        raise InputError(f"model {type(model).__name__} predicts no next token: it writes no calibration text")
    if n_windows < 1:
        raise InputError(f"n_windows={n_windows!r} must be at least 1")
    length, device, writer = window_length(model, window), input_device(model), cast(Any, model)
    first = next(
        (t for t in (getattr(tokenizer, n, None) for n in ("bos_token_id", "eos_token_id")) if t is not None), None
    )
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), evaluating(model, cache=True):
        torch.manual_seed(seed_of(random_state))
        vocabulary = writer.get_input_embeddings().weight.shape[0]
        starts = torch.randint(vocabulary, (n_windows, 1)) if first is None else torch.full((n_windows, 1), first)
        parts = [
            writer.generate(
                start.to(device), attention_mask=torch.ones_like(start).to(device), do_sample=True, temperature=1.0,
                top_k=0, top_p=1.0, min_new_tokens=length - 1, max_new_tokens=length - 1, pad_token_id=0,
            ).cpu()
            for start in bar(batches(starts, WRITTEN_AT_ONCE), desc="write", leave=False)
        ]  # fmt: skip
    return torch.cat(parts)


def mixed_windows(windows: Tensor | None, written: Tensor, *, random_state: int | None = 0) -> Tensor:
    """Windows of text and windows that the model wrote, in random order."""
    both = written if windows is None else torch.cat([windows, written])
    return both[torch.randperm(len(both), generator=torch.Generator().manual_seed(seed_of(random_state)))]


def check_enough(windows: Tensor, width: int) -> None:
    """Refuse calibration with too few tokens for layers of `width` neurons, and say how many are enough."""
    least = int(np.ceil(LEAST * width))
    if windows.numel() < least:
        raise InputError(
            f"calibration has {windows.numel()} tokens, too few for layers of {width} neurons: at least {least} are "
            f"needed, {ENOUGH * width} are enough"
        )


def check_weights(weights: Tensor | None, windows: Tensor) -> None:
    """Refuse weights that are not one for each calibration token, or that leave none."""
    if weights is None:
        return
    if tuple(weights.shape) != tuple(windows.shape):
        raise InputError(
            f"weights of shape {tuple(weights.shape)} do not fit calibration windows {tuple(windows.shape)} (at most "
            "max_windows of them are used)"
        )
    if not bool(torch.isfinite(weights).all()) or float(weights.min()) < 0 or float(weights.sum()) <= 0:
        raise InputError("weights must be at least 0, finite, and not all 0")


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

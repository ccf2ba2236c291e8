"""The sample of windows that the dense and the smaller model are both measured on, each window once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from llmbrain._validation import InputError
from llmbrain.hooks.text import TOKENIZING, as_windows, window_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FEW, SHORTEST = 4, 128  # windows that each part should have; windows are not made shorter than this for it
Array = NDArray[np.float64]


def count_tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> int:
    """Tokens of texts as they are read, special tokens included."""
    return sum(len(tokenizer(str(text), **TOKENIZING)["input_ids"]) for text in texts)


@dataclass(frozen=True)
class Sample:
    """Windows of a text, from the part that was calibrated on and from the part that was held out.

    Attributes
    ----------
    windows : int64 tensor ``(n, window)``
    held_out : bool array ``(n,)``
        Which windows lie in the held-out part.
    of : tuple of int
        Windows that the two parts (calibration, held out) have in all.
    """

    windows: Tensor
    held_out: NDArray[np.bool_]
    of: tuple[int, int]

    @classmethod
    def of_texts(
        cls, model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, n_calibration: int,
        tokens: int | None, max_windows: int | None = None, wanted: bool = False,
    ) -> Sample:  # fmt: skip
        """Windows spread evenly over both parts, half of them in the held-out one where the text is longer.

        Parameters
        ----------
        n_calibration : int
            Tokens of the part that is calibrated on; it comes first.
        tokens, max_windows : int, optional
            Size of the sample; None is the whole text.
        wanted : bool
            Whether the size was asked for: then a text that is shorter is an error.

        Raises
        ------
        InputError
            If the text has less than one window, or less than the sample that was asked for.
        """
        window = window_length(model)
        total = count_tokens(tokenizer, texts)
        while window > SHORTEST and (total - n_calibration) // window < FEW and total // window < 5 * FEW:
            window //= 2
        if max_windows is None and tokens is not None:
            while window > SHORTEST and tokens // window < 2 * FEW:  # of fewer windows the error is not known
                window //= 2
            max_windows = max(2, tokens // window)
        if wanted and max_windows is not None and total // window < max_windows:
            raise InputError(
                f"text of {total:,} tokens is shorter than the sample of {max_windows * window:,} that perplexity is "
                "to be measured on: give more text, or a smaller eval_tokens (max_windows)"
            )
        whole = as_windows(model, tokenizer, texts, window)
        first = min(len(whole), -(-n_calibration // window))
        parts = (first, len(whole) - first)
        chosen = np.arange(len(whole))
        if max_windows is not None and max_windows < len(whole):
            held = min(parts[1], max(max_windows // 2, max_windows - parts[0]))
            chosen = np.concatenate([_spread(parts[0], max_windows - held), first + _spread(parts[1], held)])
        return cls(whole[chosen], chosen >= first, parts)

    @property
    def share(self) -> float:
        """How much of the text the sample is."""
        return len(self.windows) / sum(self.of)

    def estimate(self, losses: Array, *, held_out: bool = False) -> tuple[float, float]:
        """Mean of a loss by window over the whole text (or its held-out part), and its standard error.

        Each part counts by its length in the text. nan where the error is not known: of one window.
        """
        groups = [(self.of[1], losses[self.held_out])]
        if not held_out:
            groups.append((self.of[0], losses[~self.held_out]))
        groups = [(n, values) for n, values in groups if len(values)]
        total = sum(n for n, _ in groups)
        mean = sum(n / total * float(values.mean()) for n, values in groups)
        if any(len(values) < 2 for _, values in groups):
            return mean, math.nan
        return mean, math.sqrt(sum((n / total) ** 2 * float(values.var(ddof=1)) / len(values) for n, values in groups))

    def perplexity(self, losses: Array, *, held_out: bool = False) -> tuple[float, float]:
        """Perplexity and its standard error (by the delta method)."""
        mean, error = self.estimate(losses, held_out=held_out)
        value = math.exp(min(mean, 709.0))
        return value, value * error


def _spread(n: int, count: int) -> NDArray[np.int64]:
    """`count` of `n` places, evenly spread."""
    return np.unique(np.linspace(0, n - 1, count).round().astype(np.int64)) if count else np.zeros(0, dtype=np.int64)

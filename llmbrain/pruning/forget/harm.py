"""What a repair that forgets costs what is to stay: on single lines that it was not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmbrain.hooks.text import evaluating, input_device
from llmbrain.pruning.calibrate.losses import log_odds
from llmbrain.pruning.forget.relearning import padded, placed_lines
from llmbrain.scanning.scans import Scan

SURE = 0.9  # what had this probability and falls below a half is broken
ITEM = 32  # tokens of a line that is taken as one thing (a question and its answer, say): it is whole or broken
TESTED = 64  # single lines of each condition that stays that tell whether it suffers


class SureLines:
    """Single lines of which a model was sure of some tokens: which share of these stretches another breaks.

    A stretch is a run of tokens that the model was sure of, one after the other (an answer, say). It is broken where
    any token of it falls below a half: an answer with one wrong token is wrong.

    Parameters
    ----------
    model : causal language model
        Dense.
    lines : sequence of int64 tensor
    """

    def __init__(self, model: nn.Module, lines: Sequence[Tensor]) -> None:
        self.ids, self.real = padded(lines)
        before = self._chances(model)
        self.sure = (before > SURE) & self.real[:, 1:]
        self._before = before[self.sure]
        begins = self.sure & ~torch.nn.functional.pad(self.sure, (1, 0))[:, :-1]
        self._stretch = (begins.flatten().cumsum(0) - 1)[self.sure.flatten()]
        line = torch.arange(len(self.ids))[:, None].expand_as(self.sure)[self.sure]
        short = (self.real.sum(1) <= ITEM)[line]
        self._item = torch.where(short, -1 - line, self._stretch).unique(return_inverse=True)[1]

    def broken(self, model: nn.Module) -> float:
        """Share of the stretches that are broken; 0 where there are none."""
        return self.harm(model)[0]

    def harm(self, model: nn.Module) -> tuple[float, float]:
        """Share of the stretches that are broken, and mean over them of the largest fall of a token's probability.

        The second has no steps, so that it tells which of two models does less harm from fewer lines.
        """
        n = int(self._stretch[-1]) + 1 if len(self._stretch) else 0
        if not n:
            return 0.0, 0.0
        now = self._chances(model)[self.sure]
        fell = len(self._stretch[now < 0.5].unique()) / n
        falls = torch.zeros(n).scatter_reduce(0, self._stretch, (self._before - now).clamp_min(0), "amax")
        return fell, float(falls.mean())

    def broken_items(self, model: nn.Module) -> float:
        """Share of what the model was sure of that is broken, a line of at most `ITEM` tokens counted as one.

        That is what a user meets: of eight stretches in a line seven may be what any model knows (the second half of a
        word), and the line is wrong with the eighth. Of longer lines each stretch counts.
        """
        n = int(self._item.max()) + 1 if len(self._item) else 0
        return len(self._item[self._chances(model)[self.sure] < 0.5].unique()) / n if n else 0.0

    def _chances(self, model: Any) -> Tensor:
        found = []
        with evaluating(model):
            for ids in self.ids.split(8):
                odds = log_odds(model(input_ids=ids.to(input_device(model))).logits, ids)
                found.append(odds.sigmoid().cpu())
        return torch.cat(found)


def lines_apart(scans: Sequence[Scan], condition: str, held: Tensor, window: int) -> tuple[list[Tensor], list[Tensor]]:
    """Lines of a condition to train on, and at most `TESTED` that lie in windows that are held out.

    Parameters
    ----------
    scans : sequence of Scan
        The windows are cut from their tokens, one run after the other.
    held : bool tensor ``(n_windows,)``
        Windows that are not trained on; a line that lies in both kinds is in neither list.
    window : int
        Tokens of one.

    Returns
    -------
    train, test
        Where no line lies in held-out windows alone, the second is of those to train on: it tells less then.
    """
    train, test = [], []
    for start, line, length in placed_lines(scans, [condition]):
        places = torch.arange(start // window, (start + length - 1) // window + 1)
        out = held[places[places < len(held)]]
        if not out.any():
            train.append(line)
        elif out.all() and len(out) == len(places):
            test.append(line)
    return train, (test or train)[:TESTED]

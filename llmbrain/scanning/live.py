"""Scans that keep nothing: the model reads the text again whenever numbers are asked for.

What reads every run once or twice (group ICA, dual regression) needs neither disk nor memory for the rest of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from llmbrain.anatomy.families import anatomy, context_length
from llmbrain.anatomy.space import NeuronSpace
from llmbrain.hooks.listen import Recorder, reading
from llmbrain.hooks.sites import check_sites, find_taps
from llmbrain.hooks.text import Run, blocks_of, cut_runs, read_texts
from llmbrain.scanning.manifest import model_id
from llmbrain.scanning.scanner import check_ids, say_blocks
from llmbrain.scanning.scans import Scan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class LiveSignals:
    """The signals of one run, read from the model each time; see `llmbrain.scanning.scans.Signals`."""

    def __init__(self, model: nn.Module, run: Run, site: str, space: NeuronSpace, block_size: int) -> None:
        self.model, self.run, self.site, self.space = model, run, site, space
        self.blocks = blocks_of([run], block_size)
        self.n_tokens = len(run.tokens)

    def read(self, layers: Sequence[int], start: int, stop: int) -> NDArray[np.float32]:
        """Units of `layers` at tokens ``start..stop`` of the run; float32 ``(stop - start, units)``."""
        columns = np.cumsum([0, *(self.space.widths[layer] for layer in layers)])
        values = np.empty((stop - start, int(columns[-1])), dtype=np.float32)
        target = torch.from_numpy(values)
        recorder = Recorder(find_taps(anatomy(self.model), (self.site,)))
        with reading(self.model, recorder, [self.run]) as reader:
            for block in self.blocks:
                low, high = max(block.start, start), min(block.stop, stop)
                if low >= high:
                    continue
                heard = reader.read_alone(block)
                for layer, (a, b) in zip(layers, pairwise(columns)):
                    target[low - start : high - start, a:b] = heard[self.site, layer][low - block.start :
                                                                                     high - block.start]  # fmt: skip
        return values


def live_scans(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str] | str, *, site: str = "neuron",
    run_length: int | None = None,
) -> list[Scan]:  # fmt: skip
    """Scans whose numbers the model gives anew each time they are asked for, up to the rounding of its batches.

    Parameters
    ----------
    model, tokenizer, texts, run_length
        As for `scan`. The model must stay as it is while the scans are used.
    site : str
        One site.

    Returns
    -------
    list of Scan

    Raises
    ------
    InputError
        As `scan`.
    """
    (site,) = check_sites(site)
    runs = cut_runs(read_texts(texts, tokenizer), run_length)
    check_ids(model, runs)
    size = context_length(model)
    say_blocks(runs, size)
    length = max(len(run.tokens) for run in runs) if size is None else size
    with reading(model, Recorder(find_taps(anatomy(model), (site,))), runs[:1]) as reader:
        kinds = reader.kinds(blocks_of(runs[:1], length)[0], None)
    space, name = NeuronSpace([units for _, units in kinds.values()]), model_id(model)
    scans = []
    for run in runs:
        signals = LiveSignals(model, run, site, space, length)
        scan = Scan(
            {site: signals}, name=run.name, text=run.text, token_ids=run.token_ids, tokens=run.tokens,
            offsets=run.offsets, block_size=size, events=run.events, model_id=name,
        )  # fmt: skip
        scans.append(scan)
    return scans

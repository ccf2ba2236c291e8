"""Runs are read again, one at a time."""

from __future__ import annotations

import weakref

import numpy as np
import torch
from ica_data import K, Run, planted

from llmbrain.decomposition import GroupICA
from llmbrain.decomposition.prepare.preprocess import Preprocessing
from llmbrain.decomposition.prepare.source import Source
from llmbrain.scanning.inputs import Runs


def test_one_run_is_in_memory_at_a_time():
    """However many runs there are: what was read is let go before the next is."""
    _, runs = planted(2)
    read: list[weakref.ref] = []
    alive = []

    class Lazy(Run):
        def data(self):
            alive.append(sum(array() is not None for array in read))
            array = self.array.copy()
            read.append(weakref.ref(array))
            return array

    GroupICA(K).fit([Lazy(runs[i % 2]) for i in range(12)])
    assert len(alive) >= 24
    assert max(alive) == 0


def test_source_reads_runs_again(data):
    _, runs = data
    source = Source(Runs(runs), Preprocessing(), torch.device("cpu"), torch.float32)
    first = [run.data.numpy() for run in source.prepared("first")]
    again = [run.data.numpy() for run in source.prepared("again")]
    np.testing.assert_array_equal(first, again)

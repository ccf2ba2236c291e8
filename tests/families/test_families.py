"""Families of transformers, built tiny: right, or refused; a few in every run, a third in the slow ones.

``LLMBRAIN_FAMILIES`` (0, 1, 2 or names with commas between) says which third; all of them: ``make families``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from known import KNOWN
from table import examine, mistakes, rows, third

# One of each kind that has gone wrong: fused and grouped rows, parameters by head, states beside attention, a config of
# its own for layers, wrappers, norms over neurons, and what must be refused.
KINDS = (
    "Phi3ForCausalLM", "StableLmForCausalLM", "BeamForCausalLM", "FalconH1ForCausalLM", "Gemma4ForCausalLM",
    "Gemma3nForCausalLM", "LlavaForConditionalGeneration", "BitNetForCausalLM", "RecurrentGemmaForCausalLM",
    "Lfm2ForCausalLM", "Llama4ForCausalLM", "MambaForCausalLM", "BartForConditionalGeneration", "AlbertForMaskedLM",
)  # fmt: skip
REFUSALS = {
    "JetMoeForCausalLM": "mixture of experts", "MambaForCausalLM": "hold a state space or recurrent layer",
    "BartForConditionalGeneration": "is an encoder-decoder", "AlbertForMaskedLM": "share one set of weights",
}  # fmt: skip


def check(names: list[str], *, formats: bool) -> None:
    found = examine(names, formats=formats)
    wrong = {name: bad for name, row in found.items() if (bad := mistakes(row)) and set(bad) - set(KNOWN.get(name, {}))}
    assert not wrong
    columns = {name: set(row) for name, row in found.items()}
    mended = {
        name: sorted(gone)
        for name, row in found.items()
        if (gone := set(KNOWN.get(name, {})) & columns[name] - set(mistakes(row)))
    }
    assert not mended, "take these from known.py"
    for name in set(names) & set(REFUSALS):
        assert REFUSALS[name] in found[name]["found"]


def test_kinds() -> None:
    check(list(KINDS), formats=False)


@pytest.mark.slow
def test_a_third() -> None:
    which = os.environ.get("LLMBRAIN_FAMILIES", "0")
    check(third(int(which)) if which.isdigit() else which.split(","), formats=True)


def test_there_are_many() -> None:
    assert len(rows()) >= 150
    assert not set(KNOWN) - set(rows())

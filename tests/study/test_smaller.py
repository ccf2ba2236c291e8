"""Calibration text of the steps plan and prune."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_models import tiny, tiny_tokenizer

from llmbrain import InputError
from llmbrain.study.cost import own_windows
from llmbrain.study.plan_cost import plan_cost
from llmbrain.study.settings import Settings
from llmbrain.study.smaller import cut, evidence_of, plan


def texts(n: int = 30) -> list[str]:
    rng = np.random.default_rng(0)
    return ["".join(rng.choice(list("abcdefghij "), 60)) for _ in range(n)]


def test_deep_models_write_twice_as_much_text_as_they_are_given():
    deep, tokenizer = tiny("llama", num_hidden_layers=20), tiny_tokenizer()
    said: list[str] = []
    mixed = evidence_of(deep, tokenizer, texts(), method="flap", progress=said.append).windows
    alone = evidence_of(deep, tokenizer, texts(), method="flap", self_text=0)
    assert alone.windows is None
    assert mixed is not None
    written = 2 * len(mixed) // 3
    assert written == 2 * (len(mixed) - written)
    assert any(f"writes {written} windows" in line for line in said)
    given = evidence_of(tiny("llama"), tokenizer, texts(), method="flap", self_text=1).windows
    assert given is not None
    assert len(mixed) - written == len(given) - 1
    assert evidence_of(tiny("llama"), tokenizer, texts(), method="flap").windows is None


def test_how_much_is_written():
    assert [own_windows(None, n, 5) for n in (19, 20)] == [0, 10]
    assert own_windows(7, 2, 5) == 7
    assert Settings().own_text is None
    assert Settings(forget=("a",)).own_text == 0
    assert Settings(protect=[]).protect == ()
    with pytest.raises(InputError, match="self_text=-1"):
        Settings(self_text=-1)


def test_conditions_have_no_text_of_the_models_own():
    deep, tokenizer = tiny("llama", num_hidden_layers=20), tiny_tokenizer()
    with pytest.raises(InputError, match="keep and forget need a study"):
        plan(deep, tokenizer, texts(), keep=["a"], method="flap")
    with pytest.raises(InputError, match="keep and forget need"):
        plan(deep, tokenizer, texts(), keep=["a"], method="flap", self_text=2)


def test_a_plan_of_neurons_inside_experts_is_cut_later(tmp_path):
    mixture = tiny("mixtral")
    made = plan(mixture, None, method="magnitude", ratio=0.25)
    small = cut(mixture, tiny_tokenizer(), texts(), out=tmp_path / "small", plan=made, compensate=None)[0]
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in mixture.parameters())


def test_cost_counts_text_of_the_models_own():
    deep = tiny("llama", num_hidden_layers=20)
    plain, more = (plan_cost(deep, tiny_tokenizer(), texts(), method="flap", self_text=n) for n in (0, None))
    assert plain is not None
    assert more is not None
    assert [part.name for part in more.parts] == ["text of the model's own", "plan (flap)"]
    assert more.parts[1].tokens > plain.parts[0].tokens
    kept = plan_cost(deep, tiny_tokenizer(), texts(), method="flap", keep=["low"])
    assert kept is not None
    assert len(kept.parts) == 1


def test_allocation_by_networks_finds_them():
    made = plan(tiny("llama"), tiny_tokenizer(), texts(), method="flap", allocation="networks", ratio=0.25)
    assert made.allocation == "networks"

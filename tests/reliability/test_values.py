"""Values that cannot be meant are refused in one line, by name, wherever they are given in Python."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_models import tiny, tiny_tokenizer

import llmbrain as lb
from llmbrain import InputError
from llmbrain.cli.common import fail, is_expected
from llmbrain.hooks.text import listed_texts

TEXT = "hello there, how are you? "
RUNS = [np.random.default_rng(seed).standard_normal((60, 12)) for seed in range(2)]
IDS = torch.arange(16).reshape(2, 8) + 3
WHOLE: dict[str, Callable[[object], object]] = {
    "block_size": lambda v: lb.scan(tiny("llama"), tiny_tokenizer(), TEXT, block_size=v),
    "batch_size": lambda v: lb.scan(tiny("llama"), tiny_tokenizer(), TEXT, batch_size=v),
    "n_tokens": lambda v: lb.scan(tiny("llama"), tiny_tokenizer(), TEXT, n_tokens=v),
    "run_length": lambda v: lb.scan(tiny("llama"), tiny_tokenizer(), TEXT, run_length=v),
    "n_components": lambda v: lb.GroupICA(n_components=v).fit(RUNS),
    "max_iter": lambda v: lb.GroupICA(n_components=2, max_iter=v).fit(RUNS),
    "n_init": lambda v: lb.GroupICA(n_components=2, n_init=v).fit(RUNS),
    "random_state": lambda v: lb.GroupICA(n_components=2, random_state=v).fit(RUNS),
    "multiple_of": lambda v: lb.plan_pruning(tiny("llama"), ratio=0.5, method="magnitude", multiple_of=v),
    "protect": lambda v: lb.plan_pruning(tiny("llama"), ratio=0.5, method="magnitude", protect=v),
    "window": lambda v: lb.perplexity(tiny("llama"), tiny_tokenizer(), TEXT, window=v),
    "max_windows": lambda v: lb.perplexity(tiny("llama"), None, IDS, max_windows=v),
    "n_volumes": lambda v: lb.load_fmri("nowhere.npy", n_volumes=v),
    "n_random": lambda v: lb.amplification_curve(tiny("llama"), np.arange(48) < 5, {"x": IDS}, n_random=v),
    "n_subspace": lambda v: lb.ica_stability(RUNS, 2, n_starts=2, n_subspace=v),
    "max_shard_size": lambda v: lb.save_pruned(tiny("llama"), None, "never", max_shard_size=v),
    "gap": lambda v: lb.encode(RUNS[0][:, :2], RUNS[1][:, :2], tr=2.0, gap=v),
}


@pytest.mark.parametrize("name", WHOLE)
def test_what_must_be_whole(name: str) -> None:
    for value in (-1, 1.5, np.float64(2.5), float("nan"), float("inf"), "x", [1.5], {}, 1j, -(10**30), True):
        if (name, value) in [("protect", {})]:  # no layer
            continue
        with pytest.raises(InputError, match=name) as said:
            WHOLE[name](value)
        assert "\n" not in str(said.value)


def test_what_must_be_a_list_of_numbers() -> None:
    x, y = RUNS[0][:, :2], RUNS[1][:, :2]
    model, mask = tiny("llama"), np.arange(48) < 5
    for name, use in {
        "lags": lambda v: lb.couple(x, y, n_permutations=19, lags=v),
        "delays": lambda v: lb.encode(x, y, tr=2.0, delays=v),
        "alphas": lambda v: lb.encode(x, y, tr=2.0, alphas=v),
        "gains": lambda v: lb.amplification_curve(model, mask, {"x": IDS}, n_random=1, gains=v),
        "shares": lambda v: lb.keep_only_curve(model, mask, {"x": IDS}, n_random=1, shares=v),
        "allocation": lambda v: lb.plan_pruning(model, ratio=0.5, method="magnitude", allocation=v),
    }.items():
        for value in (3, "ab", {1: 2}, None, [float("nan")], ["a"], [None], [10**400], np.ones((2, 2)), [1j]):
            if value is None and name in ("delays", "allocation"):  # the default
                continue
            with pytest.raises(InputError, match=name) as said:
                use(value)
            assert "\n" not in str(said.value)
    with pytest.raises(InputError, match=r"lags=1\.9"):
        lb.couple(x, y, n_permutations=19, lags=[1.9])


def test_what_is_no_plan_and_no_number() -> None:
    model = tiny("llama")
    for plan in (None, "plan.json", {}, 0.3, pd.DataFrame({"kept": [1]})):
        with pytest.raises(InputError, match=r"plan=.* is no plan") as said:
            lb.prune(model, plan)  # type: ignore[arg-type]
        assert "\n" not in str(said.value)
    for value in (float("inf"), float("nan"), 0, -1, "x", None, [], True, 10**400):
        with pytest.raises(InputError, match="passes"):
            lb.plan_pruning(model, ratio=0.5, method="flap", calibration=IDS, passes=value)


def test_seeds_that_no_generator_takes() -> None:
    with pytest.raises(InputError, match="random_state=4294967296 must be"):
        WHOLE["random_state"](2**32)
    with pytest.raises(InputError, match="random_state"):
        lb.plan_pruning(tiny("llama"), ratio=0.5, method="random", random_state=10**30)


@pytest.mark.parametrize(
    "texts",
    [pd.DataFrame({"text": [TEXT]}), {"a": TEXT}, {TEXT}, frozenset({TEXT}), b"abc", Path("a.txt"), None, 3, 1.5],
    ids=lambda texts: type(texts).__name__,
)
def test_what_is_no_list_of_texts(texts: object) -> None:
    """A table would be read by the names of its columns, a dict by its keys, a set in any order."""
    model, tokenizer = tiny("llama"), tiny_tokenizer()
    for use in (
        lambda: listed_texts(texts),
        lambda: lb.scan(model, tokenizer, texts),
        lambda: lb.run(model, tokenizer, texts, out="never"),
        lambda: lb.plan_pruning(model, ratio=0.5, method="flap", tokenizer=tokenizer, calibration=texts),
    ):  # fmt: skip
        with pytest.raises(InputError, match=r"text|calibration"):
            use()


def test_texts_in_their_order() -> None:
    assert listed_texts("abc") == ["abc"]
    assert listed_texts(pd.Series(["b", "a"])) == listed_texts(iter(["b", "a"])) == ["b", "a"]


def test_masked_values_are_not_taken_for_values() -> None:
    masked = [np.ma.masked_greater(run, 1) for run in RUNS]
    with pytest.raises(InputError, match="run 0 is a masked array with masked values"):
        lb.GroupICA(n_components=2).fit(masked)
    lb.GroupICA(n_components=2).fit([np.ma.array(run) for run in RUNS])


def test_more_often_than_anyone_could_wait() -> None:
    from llmbrain.study import Settings

    model, ids = tiny("llama"), torch.arange(16).reshape(2, 8) + 3
    sets = {"a": np.arange(48) < 5}
    for name, use in {
        "n_random": lambda: lb.lesion_table(model, sets, {"x": ids}, n_random=2**31),
        "n_bootstrap": lambda: lb.lesion_table(model, sets, {"x": ids}, n_bootstrap=2**31),
        "n_init": lambda: lb.GroupICA(n_components=2, n_init=2**31).fit(RUNS),
        "self_text": lambda: Settings(self_text=2**31),
        "n_starts": lambda: lb.ica_stability(RUNS, 2, n_starts=2**31),
    }.items():
        with pytest.raises(InputError, match=name):
            use()


def test_no_memory_is_one_line(capsys) -> None:
    for make in (lambda: np.empty(2**55), lambda: torch.empty(2**55), lambda: [0] * 2**60):
        with pytest.raises((MemoryError, RuntimeError)) as caught:
            make()
        assert is_expected(caught.value)
        with pytest.raises(SystemExit) as stop:
            fail(caught.value)
        assert stop.value.code == 2
        said = capsys.readouterr().err
        assert said.startswith("error: not enough memory (")
        assert said.count("\n") == 1
    assert not is_expected(RuntimeError("shapes do not fit"))


def test_a_rank_is_no_larger_than_the_model() -> None:
    for options in ({"rank": 2**31}, {"rank": 1.5}, {"batch_size": 0}):
        with pytest.raises(InputError, match=next(iter(options))):
            lb.recover(tiny("llama"), tiny_tokenizer(), [TEXT * 40], steps=1, **options)

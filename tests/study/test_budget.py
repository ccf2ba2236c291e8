"""Settings, what they cost, and what a budget leaves of them."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import tiny, tiny_tokenizer

import llmbrain as lb
from llmbrain import InputError
from llmbrain.anatomy.families import anatomy
from llmbrain.hooks.text import window_length
from llmbrain.study import Settings, forecast
from llmbrain.study.budget import fit, given_up
from llmbrain.study.cost import Subject, plan_passes, repair_passes, run_cost, writing_passes
from llmbrain.study.sample import FEW, Sample, count_tokens


def test_settings_come_back_from_their_file(tmp_path):
    how = Settings(
        n_components=0.9, ratio=0.5, method="flap", compensate=None, run_length=None, protect=[0, -1],
        keep=("a b", "c"), head_ratio=0.25, dtype="bfloat16",
    )  # fmt: skip
    path = tmp_path / "config.toml"
    path.write_text(how.to_toml(model='a "model"', text="text.txt"), encoding="utf-8")
    assert Settings.from_toml(path) == how
    assert 'model = "a \\"model\\""' in path.read_text()
    assert Settings.of(how, ratio=0.2) == replace(how, ratio=0.2)
    for text, said in (
        ("ratio = ", "is not TOML"),
        ("speed = 3", "'speed' is no option"),
        ("ratio = 2.0", "ratio=2.0"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=said):
            Settings.from_toml(path)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("n_components", float("inf")), ("n_components", -1), ("n_components", 2.5), ("n_components", "many"),
        ("random_state", -1), ("random_state", 2**32), ("n_tokens", 0), ("n_tokens", 1.5), ("run_length", 1),
        ("eval_tokens", -5), ("max_windows", 0), ("ratio", float("nan")), ("threshold", -1.0), ("passes", 0),
        ("head_ratio", 1.0), ("token_balance", 2.0), ("multiple_of", 0), ("self_text", -1), ("format", "zip"),
        ("dtype", "int8"), ("method", "guess"), ("site", "soul"), ("compensate", "prayer"), ("speed", 3),
    ],
)  # fmt: skip
def test_every_setting_has_its_range(option, value):
    with pytest.raises(InputError, match="speed" if option == "speed" else option):
        Settings.of(**{option: value})


def test_parts_to_drop_are_settings_and_cost(tmp_path):
    how = Settings(method="flap", drop="mlp")
    assert how.drop == ("mlp",)
    path = tmp_path / "config.toml"
    path.write_text(how.to_toml(), encoding="utf-8")
    assert Settings.from_toml(path) == how
    assert plan_passes("flap", None, 12.0, drop=how.drop) == plan_passes("flap", None, 12.0) + 8
    assert plan_passes("networks", None, 12.0, n_layers=20) == plan_passes("networks", "uniform", 12.0) - 2
    assert plan_passes("networks", None, 12.0, n_layers=19) == plan_passes("networks", "search", 12.0)
    for wrong in (
        {"drop": "heads"},
        {"drop": "mlp", "head_ratio": 0.2},
        {"drop": "mlp", "keep": ("a",)},
        {"drop": "mlp", "method": "shortgpt"},
        {"drop": "mlp", "expert_ratio": 0.5, "method": "random"},
    ):
        with pytest.raises(InputError, match="drop"):
            Settings(**wrong)


def counted(model, call) -> float:
    """Tokens through the blocks of a model while `call` runs; a backward pass counts twice."""
    seen = [0.0]
    layers = anatomy(model).layers

    def forward(module, args, options, output):
        states = args[0] if args else options["hidden_states"]
        n = states.shape[0] * states.shape[1] / len(layers)
        seen[0] += n
        given = output[0] if isinstance(output, tuple) else output
        if given.requires_grad and torch.is_grad_enabled():
            given.register_hook(lambda gradient: seen.__setitem__(0, seen[0] + 2 * n))

    handles = [layer.block.register_forward_hook(forward, with_kwargs=True) for layer in layers]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    return seen[0]


@pytest.mark.parametrize(
    ("method", "allocation", "passes"),
    [("random", None, 24), ("flap", None, 24), ("flap", "sensitivity", 12), ("taylor", None, 24), ("obs", None, 24),
     ("obs-gradient", None, 24), ("obs-gradient", "global", 24), ("networks", "uniform", 24), ("networks", None, 24),
     ("networks", None, 8), ("flap", "search", 24)],
)  # fmt: skip
def test_passes_are_what_a_plan_takes(method, allocation, passes):
    model = tiny("llama", seed=3, intermediate_size=40, num_hidden_layers=6)
    rng = np.random.default_rng(0)
    windows = torch.from_numpy(rng.integers(3, 40, size=(64, 64)))
    networks = None
    if method == "networks":
        scans = lb.scan(model, tiny_tokenizer(), ["".join(rng.choice(list("abcdef "), 300)) for _ in range(8)])
        networks = lb.FunctionalNetworks.from_ica(lb.GroupICA(3, random_state=0).fit(scans), threshold=2.0)
    options = {"ratio": 0.3, "method": method, "allocation": allocation, "passes": passes, "calibration": windows}
    made = []
    took = counted(model, lambda: made.append(lb.plan_pruning(model, networks, **options))) / windows.numel()
    assert took == pytest.approx(plan_passes(method, allocation, passes), rel=0.2, abs=0.3)


@pytest.mark.parametrize("balance", [None, 0.5])
def test_a_deep_model_weighs_no_tokens_and_is_counted_so(balance):
    model = tiny("llama", seed=3, intermediate_size=40, num_hidden_layers=20)
    windows = torch.from_numpy(np.random.default_rng(0).integers(3, 40, size=(64, 64)))
    maps = np.random.default_rng(1).standard_normal((2, 800)).astype(np.float32)
    networks = lb.FunctionalNetworks(maps, lb.NeuronSpace([40] * 20), threshold=2.0)
    options = {"ratio": 0.3, "calibration": windows, "token_balance": balance}
    made = []
    took = counted(model, lambda: made.append(lb.plan_pruning(model, networks, **options))) / windows.numel()
    assert took == pytest.approx(plan_passes("networks", None, 24, n_layers=20, balance=balance), rel=0.2, abs=0.3)
    assert made[0].details["networks"]["token_balance"] == (balance or 0.0)
    assert (made[0].token_weights(windows) is None) == (balance is None)


@pytest.mark.parametrize("n_layers", [6, 20])
def test_repair_takes_two_passes_and_of_deep_models_three(n_layers):
    model = tiny("llama", seed=3, intermediate_size=40, num_hidden_layers=n_layers)
    windows = torch.from_numpy(np.random.default_rng(0).integers(3, 40, size=(64, 64)))
    plan = lb.plan_pruning(model, ratio=0.3, method="magnitude")
    options = {"calibration": windows, "compensate": "least-squares", "inplace": True}
    took = counted(model, lambda: lb.prune(model, plan, **options)) / windows.numel()
    # and a little to see that the stream is the model
    assert took == pytest.approx(repair_passes("least-squares", n_layers), rel=0.25)


def test_a_budget_gives_up_what_does_not_fit_and_keeps_what_was_asked_for(subject):
    sizes = Subject.of(subject[0])

    def cost(how, rate=1e-3):
        return run_cost(sizes, how, n_tokens=how.n_tokens, eval_tokens=how.eval_tokens, window=64, per_token=rate)

    full = cost(Settings()).seconds
    how, gave_up = fit(10 * full, Settings(), cost)
    assert (how, gave_up) == (Settings(), [])
    previous = full
    for share in (0.9, 0.5, 0.2, 0.05):
        how, gave_up = fit(share * full, Settings(), cost)
        assert cost(how).seconds <= 0.8 * share * full
        assert cost(how).seconds <= previous
        previous = cost(how).seconds
        assert gave_up
        assert sorted(given_up(Settings(), how)) == sorted(gave_up)
    how, _ = fit(0.2 * full, Settings(), cost, pinned=["method", "passes"])
    assert (how.method, how.passes) == ("networks", 24)
    with pytest.raises(InputError, match=r"too small: the least .* takes about"):
        fit(0.001 * full, Settings(), cost)
    with pytest.raises(InputError, match="too small"):
        fit(0.2 * full, Settings(), cost, pinned=["method", "passes", "n_tokens"])


def test_a_budget_gives_up_half_of_the_own_text_before_the_rest_of_it():
    sizes = Subject.of(tiny("llama", num_hidden_layers=20))
    how = Settings(n_tokens=8192, eval_tokens=8192, method="obs-gradient")

    def cost(how):
        return run_cost(sizes, how, n_tokens=how.n_tokens, eval_tokens=how.eval_tokens, window=64, per_token=1e-3)

    chosen, gave_up = fit(1.2 * cost(how).seconds, how, cost, window=64)
    assert (chosen.self_text, chosen.method) == (128, "obs-gradient")
    assert gave_up == ["text that the model writes itself: as much as is given instead of 2 times as much as is given"]
    chosen, _ = fit(0.05 * cost(how).seconds, how, cost, window=64)
    assert chosen.self_text == 0
    assert given_up(how, chosen)[-1] == "text that the model writes itself: none instead of 2 times as much as is given"
    shallow = Subject.of(tiny("llama"))
    _, gave_up = fit(8.0, how, lambda how: run_cost(shallow, how, n_tokens=how.n_tokens, eval_tokens=how.eval_tokens,
                                                     window=64, per_token=1e-6), window=64)  # fmt: skip
    assert not any("writes itself" in line for line in gave_up)


def test_a_model_that_is_not_asked_for_text_of_its_own_is_not_charged_for_it(monkeypatch):
    """Deep models write as much as they are given; not those whose weights come from elsewhere for every token."""
    from llmbrain.study import smaller

    model, texts = tiny("llama", num_hidden_layers=20), ["the cat sat on the mat. " * 60]
    often = {"settings": Settings(n_tokens=512, eval_tokens=256, n_components=3, passes=4)}
    wrote = []
    monkeypatch.setattr(smaller, "_written", lambda *_: wrote.append(1) or torch.full((4, 64), 5))
    for placed in (False, True):
        if placed:
            model.hf_device_map = {"": "cpu"}
        names = [part.name for part in forecast(model, tiny_tokenizer(), texts, **often).cost.parts]
        assert ("text of the model's own" in names) == (not placed)
        found = smaller.evidence_of(model, tiny_tokenizer(), texts, method="magnitude", progress=False)
        assert (found.windows is None) == placed
    assert len(wrote) == 1
    asked = forecast(model, tiny_tokenizer(), texts, **often, self_text=2).cost.parts
    assert "text of the model's own" in [part.name for part in asked]


def test_a_forecast_reads_one_batch_and_writes_nothing(subject, texts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, tokenizer = subject
    made = forecast(model, tokenizer, texts, n_components=4)
    assert made.cost.seconds > 0
    assert any("passes over" in line for line in made.lines())
    assert "tokens a second" in made.lines()[-1]
    assert list(tmp_path.iterdir()) == []
    took = counted(model, lambda: forecast(model, tokenizer, texts))
    assert took < 0.6 * count_tokens(tokenizer, texts)
    with pytest.raises(InputError, match="is no time"):
        forecast(model, tokenizer, texts, budget="soon")
    with pytest.raises(InputError, match="too small"):
        forecast(model, tokenizer, texts, budget=0.1)


def test_the_sample_is_spread_and_its_error_is_that_of_the_mean(subject, texts):
    model, tokenizer = subject
    total = count_tokens(tokenizer, texts)
    whole = Sample.of_texts(model, tokenizer, texts, n_calibration=int(0.8 * total), tokens=None)
    losses = np.random.default_rng(0).normal(3, 1, len(whole.windows))
    mean, error = whole.estimate(losses)
    assert mean == pytest.approx(losses.mean())
    held = losses[whole.held_out]
    assert whole.estimate(losses, held_out=True) == pytest.approx((held.mean(), held.std(ddof=1) / len(held) ** 0.5))
    assert whole.perplexity(losses) == pytest.approx((np.exp(mean), np.exp(mean) * error))
    few = Sample.of_texts(model, tokenizer, texts, n_calibration=int(0.8 * total), tokens=640)
    assert len(few.windows) == 10
    assert few.held_out.sum() == 5
    rows = {tuple(w.tolist()) for w in whole.windows}
    assert {tuple(w.tolist()) for w in few.windows} <= rows
    with pytest.raises(InputError, match="is shorter than the sample of"):
        Sample.of_texts(model, tokenizer, texts, n_calibration=total, tokens=10**6, wanted=True)


def test_a_small_sample_has_shorter_windows_so_that_its_error_is_known(subject, texts, monkeypatch):
    model, tokenizer = subject
    monkeypatch.setattr("llmbrain.study.sample.SHORTEST", 8)
    total = count_tokens(tokenizer, 20 * texts)
    two = 2 * window_length(model)
    few = Sample.of_texts(model, tokenizer, 20 * texts, n_calibration=int(0.8 * total), tokens=two)
    assert few.windows.numel() == two
    assert few.held_out.sum() >= FEW <= (~few.held_out).sum()


def test_a_job_says_what_it_costs_and_leaves_what_repeats_it(subject, texts, tmp_path):
    model, tokenizer = subject
    said = []
    study = lb.run(
        model, tokenizer, texts, out=tmp_path / "s", n_components=3, method="flap", run_length=100, budget="5m",
        dtype="bfloat16", progress=said.append, source={"model": "tiny"},
    )  # fmt: skip
    assert said[0].startswith("cost: ")
    assert max(run.n_tokens for run in study.scans) <= 100
    assert study.summary["sample"]["windows"] == 37
    assert study.summary["held_out"]["loss_added_se"] > 0
    how = Settings.from_toml(tmp_path / "s" / "config.toml")
    assert (how.method, how.run_length, how.dtype) == ("flap", 100, "bfloat16")
    again = lb.run(model, tokenizer, texts, out=tmp_path / "t", settings=how, progress=False)
    assert [k.tolist() for k in again.plan.kept] == [k.tolist() for k in study.plan.kept]
    assert json.loads((tmp_path / "t" / "summary.json").read_text())["pruned"]["perplexity"] == pytest.approx(
        study.summary["pruned"]["perplexity"]
    )
    with pytest.raises(InputError, match="is shorter than the sample"):
        lb.run(model, tokenizer, texts, out=tmp_path / "u", eval_tokens=10**6, progress=False)
    assert not (tmp_path / "u").exists()


def test_another_study_is_written_over_whole(subject, texts, tmp_path):
    model, tokenizer = subject
    options = {"out": tmp_path / "s", "n_components": 3, "method": "flap", "progress": False}
    lb.run(model, tokenizer, texts, **options)
    (tmp_path / "s" / "lesions").mkdir()
    (tmp_path / "s" / "lesions" / "lesions.json").touch()
    study = lb.run(model, tokenizer, texts[:6], **options, overwrite=True)
    assert len(study.scans) < len(texts)
    assert not study.has("lesions")
    assert not (tmp_path / "s" / "lesions").exists()
    assert lb.Study(tmp_path / "s").summary == json.loads(json.dumps(study.summary))


def test_a_cheaper_method_spares_the_layers_that_the_default_does():
    class Taken:
        def __init__(self, how):
            self.seconds = {"networks": 400.0, "obs-gradient": 200.0, "flap": 50.0}[how.method] + how.passes

    left, gave_up = fit(100.0, Settings(), Taken, ends=(0, 1, 28, 29))
    assert (left.method, left.protect) == ("flap", (0, 1, 28, 29))
    assert [line.split(":")[0] for line in gave_up] == ["passes", "method"]
    assert "6 instead of 24" in gave_up[0]
    assert fit(100.0, Settings(protect=()), Taken, ends=(0, 1, 28, 29))[0].protect == ()
    assert fit(1000.0, Settings(), Taken, ends=(0, 1, 28, 29))[0].protect is None


def test_writing_costs_a_reading_of_all_weights_a_token_however_little_is_written():
    assert writing_passes(64 * 512) == pytest.approx(4.1, abs=0.1)
    assert writing_passes(4 * 512) * 4 == pytest.approx(writing_passes(512), rel=0.1)


def test_a_job_that_goes_on_says_again_what_its_budget_gave_up(subject, texts, tmp_path, monkeypatch):
    from llmbrain.study import job

    class Stopped(Exception):
        pass

    def stop(*args, **more):
        raise Stopped

    monkeypatch.setattr(job, "measured_batch", lambda *args: 1e-3)
    asked = {"out": tmp_path / "out", "n_components": 3, "budget": 40}
    with monkeypatch.context() as patch:
        patch.setattr(job, "GroupICA", stop)
        with pytest.raises(Stopped):
            lb.run(*subject, texts, **asked)
    said = []
    study = lb.run(*subject, texts, progress=said.append, **asked)
    assert any(line.startswith("given up for the budget: method: ") for line in said)
    assert any(line.startswith("method: ") for line in study.summary["gave_up"])

"""Everything that runs on a device gives there what it gives on the CPU.

Each case runs on a device that only pretends to be elsewhere (`far_device`: any operation that mixes devices fails), on
every machine; and, marked ``gpu``, on CUDA, where it skips if there is none (``make gpu``).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from far_device import FAR, FarDevice
from pruning_data import stimuli
from tiny_models import tiny, tiny_tokenizer

import llmbrain as lb
from llmbrain.anatomy.families import anatomy
from llmbrain.pruning import write_windows
from llmbrain.pruning.criteria import CRITERIA
from llmbrain.stats import match_maps

CUDA = pytest.param("cuda", marks=[
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
])  # fmt: skip
TEXTS = ["the cat sat on the mat. ", "who is there? nobody, said the bird. ", "a dog ran away, and a cat ran too. "]
WINDOWS = torch.randint(2, 34, (24, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["far", CUDA])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    if request.param == "cuda":
        yield torch.device("cuda")
        return
    with FarDevice():
        yield FAR


def pair(name: str, device: torch.device, **changes: Any) -> tuple[Any, Any]:
    """A model on the CPU, and a copy on the device. Its attention is plain code: kernels are CUDA's own."""
    model: Any = tiny(name, **changes)
    model.set_attn_implementation("eager")
    if name == "mixtral":
        model.set_experts_implementation("eager")
    there = copy.deepcopy(model)
    return model, there.to(device)


def same(one: Any, other: Any, tolerance: float = 1e-4) -> None:
    one, other = (x.detach().cpu().double().numpy() if isinstance(x, torch.Tensor) else x for x in (one, other))
    np.testing.assert_allclose(other, one, rtol=tolerance, atol=tolerance * max(1e-12, float(np.abs(one).max())))


def runs(seed: int = 0) -> list[np.ndarray]:
    """Four sparse maps with sparse time courses: what ICA finds there does not hang on rounding."""
    rng = np.random.default_rng(9)
    maps = np.zeros((4, 900))
    for k, members in enumerate(np.array_split(rng.permutation(400), 4)):
        maps[k, members] = rng.uniform(0.5, 2, members.size) * rng.choice([-1, 1], members.size, p=[0.3, 0.7])
    noise = np.where(maps.any(axis=0), 0.2, 1.0)
    rng = np.random.default_rng(seed)
    return [
        (rng.laplace(size=(60, 4)) @ maps + noise * rng.normal(size=(60, 900))).astype(np.float32) for _ in range(3)
    ]


@pytest.mark.parametrize("site", ["neuron", "gate", "up", "mlp_out", "block_out", "head"])
def test_scan(device: torch.device, site: str) -> None:
    for one, other in zip(*(lb.scan(m, tiny_tokenizer(), TEXTS, site=site) for m in pair("llama", device))):
        same(one.data(), other.data())


@pytest.mark.parametrize(
    "options",
    [
        {}, {"axis": "time"}, {"cca": True}, {"method": "picard"}, {"method": "dictlearning"}, {"n_components": "auto"},
        {"n_components": 0.4}, {"outliers": "clip", "detrend": 2}, {"outliers": "mask"},
        {"n_init": 2, "fun": "logcosh"},
        {"dtype": "float64"}, {"center_tokens": False}, {"drop_first": 2},
    ],
    ids=str,
)  # fmt: skip
def test_group_ica(device: torch.device, options: dict[str, Any]) -> None:
    options = {"n_components": 4, "random_state": 0, **options}
    fits = [lb.GroupICA(**options, device=str(d)).fit(runs()) for d in ("cpu", device)]
    assert fits[0].n_components_ == fits[1].n_components_
    assert match_maps(fits[0].components_, fits[1].components_)[1].min() > 0.999
    for one, other in zip(*(fit.transform(runs(1)) for fit in fits)):
        assert one.shape == other.shape


def test_dual_regression_and_stability(device: torch.device) -> None:
    fit = lb.GroupICA(4, random_state=0, device="cpu").fit(runs())
    networks = lb.FunctionalNetworks.from_ica(fit)
    half = [run.astype(np.float16) for run in runs()]
    for data, how in ((runs(), {}), (half, {}), (half, {"drop_first": 3, "standardize": True})):
        one, other = (lb.dual_regression(networks, data, device=d, **how) for d in ("cpu", device))
        for name in ("maps", "time_courses", "z_maps"):
            for a, b in zip(getattr(one, name), getattr(other, name)):
                assert a.dtype == b.dtype
                same(a, b, 1e-3)
    fits = [lb.GroupICA(4, random_state=0, device=str(d)).fit(half) for d in ("cpu", device)]
    assert match_maps(fits[0].components_, fits[1].components_)[1].min() > 0.999
    frames = [
        lb.ica_stability(runs(), n_components=4, n_starts=3, random_state=0, device=str(d)).to_frame()
        for d in ("cpu", device)
    ]
    same(*(frame.select_dtypes("number").to_numpy() for frame in frames), 1e-2)


def test_lesions_and_perplexity(device: torch.device) -> None:
    models, tokenizer = pair("llama", device), tiny_tokenizer()
    scans = lb.scan(models[0], tokenizer, TEXTS)
    networks = lb.FunctionalNetworks.from_ica(lb.GroupICA(3, random_state=0, device="cpu").fit(scans), threshold=1.0)
    ways: list[Callable[[Any], Any]] = [
        lambda m: lb.lesion(m, networks[0]), lambda m: lb.keep_only(m, networks[0]),
        lambda m: lb.amplify(m, networks[0], 2.0), lambda m: lb.lesion(m, lb.Heads([(0, 1)])),
        lambda m: lb.lesion(m, networks[0], value="mean", reference=WINDOWS),
        lambda m: lb.lesion(m, networks[0], value="mean", reference=scans),
        lambda m: lb.lesion(m, networks[0], value="resample", reference=WINDOWS, random_state=0),
        lambda m: nullcontext(),
    ]  # fmt: skip
    for way in ways:
        said = []
        for model in models:
            with way(model), torch.no_grad():
                said.append(model(input_ids=WINDOWS[:4].to(model.device), use_cache=False).logits)
        same(*said)
    same(*(np.array(lb.perplexity(m, tokenizer, WINDOWS)) for m in models))
    tables = [
        lb.lesion_table(m, networks, {"a": TEXTS}, tokenizer=tokenizer, n_random=2, window=16, value=value,
                        random_state=0).frame
        for value in ("zero", "mean") for m in models
    ]  # fmt: skip
    for one, other in ((tables[0], tables[1]), (tables[2], tables[3])):
        for column in ("effect", "random_effect"):
            same(one[column].to_numpy(), other[column].to_numpy(), 1e-3)
    curves = [
        lb.amplification_curve(
            m, networks[0], {"a": TEXTS}, tokenizer=tokenizer, gains=(0.5, 2.0), window=16, n_random=2
        )
        for m in models
    ]
    same(curves[0].select_dtypes("number").to_numpy(), curves[1].select_dtypes("number").to_numpy(), 1e-3)


@pytest.mark.parametrize("method", sorted(set(CRITERIA) - {"shortgpt", "2ssp"}))  # those drop whole blocks
def test_plans(device: torch.device, method: str) -> None:
    models = pair("llama", device)
    networks = None
    if method == "networks":
        rng = np.random.default_rng(0)
        widths = anatomy(models[0]).widths
        networks = lb.FunctionalNetworks(rng.laplace(size=(3, sum(widths))), lb.NeuronSpace(widths), threshold=1.5)
    how: dict[str, Any] = {"ratio": 0.4, "method": method, "calibration": WINDOWS, "passes": 7, "random_state": 0}
    if method not in ("published", "relp"):
        how["head_ratio"] = 0.5
    if method == "published":
        how["rule"] = {"n_components": 3}  # as many maps as signals are noise, and hang on rounding
    plans = [lb.plan_pruning(model, networks, **how) for model in models]
    for name in ("kept", "kept_heads"):
        for one, other in zip(getattr(plans[0], name) or (), getattr(plans[1], name) or ()):
            assert np.array_equal(one, other)
    assert plans[0].digest == plans[1].digest


@pytest.mark.parametrize("allocation", ["global", "clamped", "sensitivity"])
def test_allocations(device: torch.device, allocation: str) -> None:
    how: dict[str, Any] = {"ratio": 0.4, "method": "flap", "allocation": allocation, "calibration": WINDOWS}
    plans = [lb.plan_pruning(m, **how) for m in pair("gpt2", device)]
    assert plans[0].widths == plans[1].widths


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon", "bert"])
@pytest.mark.parametrize("compensate", [None, "bias", "least-squares"])
def test_repair_and_cut(device: torch.device, name: str, compensate: str | None) -> None:
    models = pair(name, device)
    heads = {"head_ratio": 0.5} if name == "llama" else {}
    plan = lb.plan_pruning(models[0], ratio=0.3, method="magnitude", **heads)
    weights = torch.rand(WINDOWS.shape, generator=torch.Generator().manual_seed(0)) if name == "llama" else None
    small = [
        lb.prune(m, plan, calibration=None if compensate is None else WINDOWS, compensate=compensate, inplace=inplace,
                 **({"weights": weights} if compensate else {}))
        for m, inplace in zip(models, (False, name == "gpt2"))
    ]  # fmt: skip
    for (key, one), other in zip(small[0].state_dict().items(), small[1].state_dict().values()):
        assert other.device.type == device.type, key
        same(one, other, 1e-3)


def test_keeping_a_function(device: torch.device) -> None:
    models = pair("llama", device)
    tokenizer, texts = stimuli()
    scans = lb.scan(models[0], tokenizer, texts)
    plans = [lb.plan_pruning(m, None, scans, window=16, method="obs", keep=["low"], ratio=0.3) for m in models]
    for one, other in zip(plans[0].kept, plans[1].kept):
        assert np.array_equal(one, other)
    how = {"calibration": scans, "compensate": "least-squares", "window": 16}
    small = [lb.prune(m, plans[0], **how) for m in models]
    name = "model.layers.0.mlp.down_proj.weight"
    same(small[0].state_dict()[name], small[1].state_dict()[name], 1e-3)


def test_experts(device: torch.device) -> None:
    models, tokenizer = pair("mixtral", device), tiny_tokenizer()
    scans = [lb.scan(m, tokenizer, TEXTS, site=("neuron", "router")) for m in models]
    for one, other in zip(*scans):
        same(one.data(site="neuron"), other.data(site="neuron"))
        same(one.data(site="router"), other.data(site="router"))
    for value in ("zero", "reroute"):
        said = []
        for model in models:
            with lb.lesion(model, lb.Experts([(0, 1)]), value=value), torch.no_grad():
                said.append(model(input_ids=WINDOWS[:2].to(model.device), use_cache=False).logits)
        same(*said)
    for method in ("reap", "man", "frequency", "random"):
        plans = [lb.plan_pruning(m, expert_ratio=0.25, method=method, calibration=WINDOWS) for m in models]
        assert plans[0].kept == plans[1].kept
    small = [lb.prune(model, plans[0]) for model in models]
    same(*(m(input_ids=WINDOWS[:2].to(m.device), use_cache=False).logits for m in small))


def test_text_of_the_models_own(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("torch has no generator of random numbers on the device that pretends")
    written = write_windows(pair("llama", device)[1], tiny_tokenizer(), 3, 16, random_state=0)
    assert written.device.type == "cpu"
    assert written.shape == (3, 16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("format", ["per-layer", "remote-code", "uniform", "padded", "masked"])
def test_what_is_saved_from_a_gpu_loads(format: str, tmp_path: Path) -> None:
    model: Any = tiny("llama", dtype=torch.bfloat16).cuda()
    plan = lb.plan_pruning(model, ratio=0.5, method="wanda-sp", calibration=WINDOWS)
    small = lb.prune(model, plan, calibration=WINDOWS, compensate="least-squares", intercept=format != "uniform")
    lb.save_pruned(small, tiny_tokenizer(), tmp_path / "m", format=format)
    if format == "per-layer":
        for name, one in lb.load_pruned(tmp_path / "m")[0].state_dict().items():
            same(small.state_dict()[name].float(), one.float(), 1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_half_precision_repairs_agree() -> None:
    model: Any = tiny("llama", dtype=torch.bfloat16)
    there = copy.deepcopy(model).cuda()
    plan = lb.plan_pruning(model, ratio=0.4, method="obs", calibration=WINDOWS)
    small = [lb.prune(m, plan, calibration=WINDOWS, compensate="least-squares") for m in (model, there)]
    for one, other in zip(small[0].state_dict().values(), small[1].state_dict().values()):
        assert float((one.float() - other.cpu().float()).norm() / one.float().norm().clamp_min(1e-9)) < 2e-2


def test_mixing_devices_is_found() -> None:
    with FarDevice():
        there = torch.ones(3).to(FAR)
        with pytest.raises(RuntimeError, match="same device"):
            there + torch.ones(3)
        with pytest.raises(RuntimeError, match="same device"):
            torch.arange(3)[there.long()]
        with pytest.raises(TypeError, match=r"use Tensor.cpu\(\) first"):
            there.numpy()
        assert float(there.sum()) == 3.0

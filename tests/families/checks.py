"""What is checked of every family: each check is a plain re-computation, in which llmbrain has no part.

An outcome is ``"ok"``, ``"refused: why"`` (an `InputError`), ``"wrong: what"`` or ``"error: Type: message"``; the last
two are mistakes of llmbrain.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny_models import tiny_tokenizer
from torch import Tensor, nn

import llmbrain as lb
from llmbrain._validation import InputError
from llmbrain.anatomy.families import Anatomy, anatomy
from llmbrain.anatomy.units import NEURONS
from llmbrain.evaluation.perplexity import next_token_losses, predicts_next_token
from llmbrain.hooks.text import evaluating
from llmbrain.intervention import Heads, lesion
from llmbrain.pruning.calibrate.stream import walk

CHECKS = ("recorded", "batch", "lesion", "neurons", "heads", "moments", "causal")
FORMATS = ("per-layer", "remote-code", "uniform", "padded", "masked")
COLUMNS = ("found", *CHECKS, *FORMATS)
IDS = torch.randint(3, 35, (2, 12), generator=torch.Generator().manual_seed(0))
WINDOWS = torch.randint(3, 35, (16, 12), generator=torch.Generator().manual_seed(1))
CLOSE = 1e-4  # of the largest number compared


class Wrong(Exception):
    """A number is not what it should be."""


def outcome(check: Callable[[], str | None]) -> str:
    """What came of a check, in one line."""
    try:
        return check() or "ok"
    except InputError as error:
        return f"refused: {_line(error)}"
    except Wrong as error:
        return f"wrong: {error}"
    except Exception as error:  # whatever it is, it is a row of the table
        return f"error: {type(error).__name__}: {_line(error)}"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:400]


def same(got: Tensor, wanted: Tensor, what: str) -> None:
    """Both hold the same numbers."""
    if got.shape != wanted.shape:
        raise Wrong(f"{what}: shape {tuple(got.shape)} for {tuple(wanted.shape)}")
    if not bool(torch.isfinite(got).all()):
        raise Wrong(f"{what}: not finite")
    error = float((got.double() - wanted.double()).abs().max())
    if error > CLOSE * max(1.0, float(wanted.abs().max())):
        raise Wrong(f"{what}: off by {error:.2g} of {float(wanted.abs().max()):.2g}")


def answer(model: Any, ids: Tensor = IDS) -> Tensor:
    """What a model says to token ids: its logits, or the first thing it gives."""
    with torch.no_grad():
        out = model(input_ids=ids)
    value = getattr(out, "logits", None)
    value = out[0] if value is None else value
    while not isinstance(value, Tensor):
        value = value[0]
    return value


def heard(model: Any, body: Anatomy, ids: Tensor) -> list[Tensor]:
    """What enters each down projection in one plain pass, ``(tokens, neurons)`` a layer."""
    modules = dict(model.named_modules())
    found: dict[int, Tensor] = {}
    paths = [layer.down.path for layer in body.layers]
    names = {id(m): n for n, m in modules.items()}
    handles = [
        modules[names[id(layer.down.module)]].register_forward_pre_hook(
            lambda m, a, i=i: found.__setitem__(i, a[0].detach().reshape(-1, a[0].shape[-1]).clone())
        )
        for i, layer in enumerate(body.layers)
    ]
    answer(model, ids)
    for handle in handles:
        handle.remove()
    if len(found) < len(paths):
        raise Wrong(f"{paths[min(set(range(len(paths))) - set(found))]} does not run")
    return [found[i] for i in range(len(paths))]


# -- the checks ------------------------------------------------------------------------------------------------------


def recorded(model: Any, body: Anatomy) -> None:
    """A scan holds what plain hooks hear."""
    tokenizer, text = tiny_tokenizer(), "hello there, you."
    scans = lb.scan(model, tokenizer, [text])
    for layer, wanted in enumerate(heard(model, body, torch.tensor([tokenizer(text).input_ids]))):
        same(torch.from_numpy(scans[0].data(layer)).float(), wanted, f"layer {layer}")


def batch(model: Any, body: Anatomy) -> None:
    """A text read beside a longer one is a text read alone."""
    texts = ["hello there, you.", "what is it about, then? no one knows"]
    alone = lb.scan(model, tiny_tokenizer(), texts[:1])
    together = lb.scan(model, tiny_tokenizer(), texts)
    same(torch.from_numpy(together[0].data()), torch.from_numpy(alone[0].data()), "beside a longer text")


def zeroed(model: Any, body: Anatomy, gone: dict[int, Any], *, heads: bool = False) -> Any:
    """A copy whose output projections have zeros where units go: their columns, counted by plain arithmetic."""
    other = copy.deepcopy(model)
    names = {id(m): n for n, m in model.named_modules()}
    for i, units in gone.items():
        layer = body.layers[i]
        place = layer.out if heads else layer.down
        assert place is not None
        weight = other.get_submodule(names[id(place.module)]).weight
        conv1d = type(place.module).__name__ == "Conv1D"
        inner = weight.shape[0] if conv1d else weight.shape[1]
        size = inner // (layer.n_heads if heads else layer.width)
        with torch.no_grad():
            for unit in units:
                columns = slice(int(unit) * size, (int(unit) + 1) * size)
                (weight if conv1d else weight.T)[columns] = 0
    return other


def lesions(model: Any, body: Anatomy) -> None:
    """A lesion of neurons, and of heads where there are any, is zeros in the weights, and changes something."""
    dense = answer(model)
    pairs = [(i, u) for i, layer in enumerate(body.layers) for u in range(0, layer.width, 2)]
    with lesion(model, pairs):
        got = answer(model)
    wanted = answer(zeroed(model, body, {i: range(0, layer.width, 2) for i, layer in enumerate(body.layers)}))
    same(got, wanted, "neurons")
    if torch.equal(got, dense):
        raise Wrong("a lesion of half the neurons changes nothing")
    with_heads = [i for i, layer in enumerate(body.layers) if layer.out is not None and layer.n_heads]
    if with_heads:
        with lesion(model, Heads([(i, 0) for i in with_heads])):
            got = answer(model)
        same(got, answer(zeroed(model, body, {i: [0] for i in with_heads}, heads=True)), "heads")


def neurons(model: Any, body: Anatomy) -> None:
    """Cut equals zeroed."""
    plan = lb.plan_pruning(model, ratio=0.5, method="random", allocation="uniform")
    gone = {i: sorted(set(range(w)) - set(k.tolist())) for i, (w, k) in enumerate(zip(body.widths, plan.kept))}
    same(answer(lb.prune(model, plan)), answer(zeroed(model, body, gone)), "cut")


def heads(model: Any, body: Anatomy) -> None:
    """Cut equals zeroed, heads too."""
    plan = lb.plan_pruning(model, ratio=0.25, head_ratio=0.5, method="random", allocation="uniform")
    small = lb.prune(model, plan)
    gone = {i: sorted(set(range(w)) - set(k.tolist())) for i, (w, k) in enumerate(zip(body.widths, plan.kept))}
    assert plan.kept_heads is not None
    gone_heads = {}
    for i, (layer, kept) in enumerate(zip(body.layers, plan.kept_heads)):
        if layer.out is not None:
            per_group = layer.n_heads // layer.out.units
            groups = set(range(layer.out.units)) - set(kept.tolist())
            gone_heads[i] = [g * per_group + h for g in sorted(groups) for h in range(per_group)]
    if not any(gone_heads.values()):
        raise Wrong("no head is gone")
    other = zeroed(model, body, gone)
    same(answer(small), answer(zeroed(other, anatomy(other), gone_heads, heads=True)), "cut")


def moments(model: Any, body: Anatomy) -> None:
    """Calibration sees what a plain pass sees."""
    plain = [torch.cat(parts) for parts in zip(*(heard(model, body, w[None]) for w in WINDOWS))]
    seen: dict[int, Any] = {}
    keep: Any = lambda site: seen.__setitem__(site.layer.index, site.all)  # noqa: E731
    walk(model, body, WINDOWS, {NEURONS: keep}, sequential=False)
    for i, wanted in enumerate(plain):
        same(seen[i].mean, wanted.double().mean(0), f"mean of layer {i}")
        same(seen[i].mean_square, wanted.double().square().mean(0), f"mean square of layer {i}")


def causal(model: Any, body: Anatomy) -> str | None:
    """Where a model has a perplexity, later tokens change no earlier loss."""
    lb.perplexity(model, None, WINDOWS[:2])
    if not predicts_next_token(model):
        raise Wrong("a perplexity without a next token")
    changed = IDS.clone()
    changed[:, 6:] = (changed[:, 6:] + 5) % 30 + 3
    with evaluating(model):
        before, after = next_token_losses(model, IDS), next_token_losses(model, changed)
    same(after[:, :5], before[:, :5], "losses before the change")
    return None


def saved(model: Any, body: Anatomy, folder: Path, format: str, use_heads: bool) -> Tensor:
    """Write a pruned model; what it says."""
    equal = format in ("uniform", "masked")
    widths = [w // 2 if equal else w // 2 + i % 2 for i, w in enumerate(body.widths)]
    ratio = 1 - sum(widths) / sum(body.widths)
    options: dict[str, Any] = {"head_ratio": 0.5} if use_heads and format in FORMATS[:2] else {}
    plan = lb.plan_pruning(model, ratio=ratio, method="random", allocation=widths, **options)
    repair: dict[str, Any] = {} if equal or format == "padded" else {"compensate": "bias", "calibration": WINDOWS}
    small = lb.prune(model, plan, **repair)
    lb.save_pruned(small, None, folder, format=format)
    return answer(small)


def check(name: str, model: nn.Module, folder: Path | None = None) -> dict[str, str]:
    """All outcomes of one family; folders of the formats are left in `folder`, for a fresh process to open."""
    row: dict[str, str] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: list[Anatomy] = []
        row["found"] = outcome(lambda: found.append(anatomy(model)) or found[0].family)
        if not found:
            return row
        body = found[0]
        tests = {"recorded": recorded, "batch": batch, "lesion": lesions, "neurons": neurons, "heads": heads,
                 "moments": moments, "causal": causal}  # fmt: skip
        for column, test in tests.items():
            row[column] = outcome(lambda t=test: t(model, body))  # type: ignore[misc]
        for form in FORMATS if folder is not None else ():
            row[form] = outcome(lambda f=form: _keep_saved(name, model, body, folder, f, row["heads"] == "ok"))
    return row


def _keep_saved(name: str, model: Any, body: Anatomy, root: Any, form: str, use_heads: bool) -> None:
    folder = root / f"{name}.{form}"
    wanted = saved(model, body, folder, form, use_heads)
    torch.save(wanted, root / f"{name}.{form}.pt")
    if form == "per-layer":
        same(answer(lb.load_pruned(folder)[0]), wanted, "loaded")

"""What is checked of every mixture of experts: each check is a plain re-computation, in which llmbrain has no part.

Neurons and experts are silenced in copies of the weights (columns of down projections, by plain arithmetic), so that
what a lesion or a cut does is held against the model's own code.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checks import IDS, WINDOWS, Wrong, answer, outcome, same
from tiny_models import tiny_tokenizer
from torch import nn

import llmbrain as lb
from llmbrain.anatomy.experts import ExpertAnatomy, expert_anatomy
from llmbrain.intervention import lesion

CHECKS = ("recorded", "lesion", "experts", "neurons", "repair")
FORMATS = ("per-layer", "remote-code", "uniform", "uneven")
COLUMNS = ("found", *CHECKS, *FORMATS)
CALIBRATION = {"calibration": WINDOWS}


def zeroed(model: Any, body: ExpertAnatomy, gone: dict[int, set[int]]) -> Any:
    """A copy with zeros in the columns of down projections where neurons of a layer's slice go."""
    other = copy.deepcopy(model)
    names = {id(m): n for n, m in model.named_modules()}
    with torch.no_grad():
        for layer in body.layers:
            start = 0
            for mlp in layer.shared:
                down = other.get_submodule(names[id(mlp.down.module)]).weight
                for u in range(mlp.width):
                    if u in gone[layer.index]:
                        down[:, u] = 0
                start += mlp.width
            if layer.routed is None:
                continue
            module = other.get_submodule(names[id(layer.routed.module)])
            for expert in range(module.down_proj.shape[0]):
                matrix = module.down_proj[expert]
                columns = matrix if layer.routed.transposed else matrix.T
                for u in range(columns.shape[0]):
                    if start + u in gone[layer.index]:
                        columns[u] = 0
                start += columns.shape[0]
    return other


def recorded(model: Any, body: ExpertAnatomy) -> None:
    """A scan holds, for every token and expert called, what a plain pass through its weights gives."""
    tokenizer, text = tiny_tokenizer(), "hello there, you."
    scan = lb.scan(model, tokenizer, [text], site=("neuron", "router"))[0]
    heard: dict[int, Any] = {}
    handles = [
        routed.module.register_forward_pre_hook(
            lambda m, a, k, i=i: heard.__setitem__(i, (*a, *k.values())), with_kwargs=True
        )
        for i, routed in body.routed
    ]
    answer(model, torch.tensor([tokenizer(text).input_ids]))
    for handle in handles:
        handle.remove()
    for i, routed in body.routed:
        m, first = routed.module, len(body.layers[i].shared)
        data, router = scan.data(i), scan.data(i, site="router")
        if routed.gate_first:
            gate_first(heard[i][0], routed, body, i, data, router)
            continue
        x, index, gates = heard[i][:3]
        for token, expert, gate in zip(*torch.where(index < routed.count), gates[index < routed.count]):
            e = int(index[token, expert])
            rows = m.gate_up_proj if m.has_gate else m.up_proj
            y = x[token] @ (rows[e] if m.is_transposed else rows[e].T)
            if m.has_bias:
                y = y + (m.gate_up_proj_bias if m.has_gate else m.up_proj_bias)[e]
            h = (m._apply_gate(y[None])[0] if m.has_gate else m.act_fn(y)).detach()
            at = body.space.expert_slice(i, first + e).start - body.space.offsets[i]
            same(torch.from_numpy(data[int(token), at : at + routed.width]).float(), h.float(), f"layer {i}")
            same(torch.tensor(router[int(token), e]), gate.detach().float(), f"gate of layer {i}")


def gate_first(x: Any, routed: Any, body: ExpertAnatomy, i: int, data: Any, router: Any) -> None:
    """Of Llama-4, whose experts get every token once an expert, times its gate: zero where it is not called."""
    first, m, heard = len(body.layers[i].shared), routed.module, 0
    for expert, rows in enumerate(x.unflatten(0, (routed.count, -1))):
        gate, up = (rows @ m.gate_up_proj[expert]).chunk(2, dim=-1)
        h = (m.act_fn(gate) * up).detach().float()
        at = body.space.expert_slice(i, first + expert).start - body.space.offsets[i]
        same(torch.from_numpy(data[:, at : at + routed.width]).float(), h, f"layer {i}")
        called = torch.from_numpy(router[:, expert] != 0)
        if not torch.equal(called, (rows != 0).any(dim=-1)):
            raise Wrong(f"layer {i}: called otherwise than the router says")
        heard += int(called.sum())
    if heard != len(data) * routed.top_k:
        raise Wrong(f"layer {i}: {heard} visits")


def lesions(model: Any, body: ExpertAnatomy) -> None:
    """A lesion of every other neuron is zeros in the weights, and changes something."""
    chosen = np.arange(0, body.space.n_neurons, 2)
    with lesion(model, chosen):
        got = answer(model)
    gone = {i: {int(c - body.space.offsets[i]) for c in chosen} for i in range(len(body.layers))}
    same(got, answer(zeroed(model, body, gone)), "neurons")
    if torch.equal(got, answer(model)):
        raise Wrong("a lesion of half the neurons changes nothing")


def neurons(model: Any, body: ExpertAnatomy) -> None:
    """Neurons that are cut are zeros in the weights."""
    plan = lb.plan_pruning(model, ratio=0.5, method="random")
    gone = {i: set(range(w)) - set(k.tolist()) for i, (w, k) in enumerate(zip(body.widths, plan.kept))}
    if not any(gone.values()):
        raise Wrong("no neuron is gone")
    same(answer(lb.prune(model, plan)), answer(zeroed(model, body, gone)), "cut")


def cut_experts(model: Any, body: ExpertAnatomy) -> None:
    """A model without some experts says what it says when routers choose among the others."""
    plan = lb.plan_pruning(model, expert_ratio=0.5, method="random")
    small = lb.prune(model, plan)
    gone = lb.Experts([(i, e) for i, r in body.routed for e in range(r.count) if e not in plan.kept[i]])
    with lesion(model, gone, value="reroute"):
        same(answer(small), answer(model), "cut")
    if sum(p.numel() for p in small.parameters()) != plan.parameters - plan.parameters_removed:
        raise Wrong("parameters are not as many as the plan says")


def repair(model: Any, body: ExpertAnatomy) -> None:
    """Both repairs run, by statistics of the tokens of each expert."""
    plan = lb.plan_pruning(model, ratio=0.5, method="flap", **CALIBRATION)
    answer(lb.prune(model, plan, compensate="least-squares", **CALIBRATION))
    plan_experts = lb.plan_pruning(model, expert_ratio=0.5, method="frequency", **CALIBRATION)
    small = lb.prune(model, plan_experts, compensate="least-squares", **CALIBRATION)
    for before, after in small.llmbrain_pruning[-1]["repair"].values():
        if after > before * 1.000001:
            raise Wrong(f"repair of experts adds error: {before} to {after}")


def saved(model: Any, body: ExpertAnatomy, folder: Path, form: str) -> torch.Tensor:
    """Write a model without half of its experts and of their neurons; what it says."""
    options: dict[str, Any] = {}
    if form == "uneven":
        routed = dict(body.routed)
        options["allocation"] = [
            (routed[i].count // 2 + (i == max(routed)) * routed[i].n_groups) if i in routed else 0
            for i in range(len(body.layers))
        ]
        counts = [n for n in options["allocation"] if n]
        options["expert_ratio"] = 1 - sum(counts) / sum(r.count for r in routed.values())
    plan = lb.plan_pruning(model, method="random", **{"expert_ratio": 0.5, **options})
    small = lb.prune(model, plan)
    small = lb.prune(small, lb.plan_pruning(small, ratio=0.5, method="random"))
    lb.save_pruned(small, None, folder, format="per-layer" if form == "uneven" else form)
    if form == "uneven":  # what is written is held against the model
        lb.save_pruned(small, None, folder.with_suffix(".uneven-code"), format="remote-code")
    return answer(small)


def check(name: str, model: nn.Module, folder: Path | None = None) -> dict[str, str]:
    """All outcomes of one family; folders of the formats are left in `folder`, for a fresh process to open."""
    row: dict[str, str] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: list[ExpertAnatomy] = []
        row["found"] = outcome(lambda: found.append(expert_anatomy(model)) or found[0].family)
        if not found:
            return row
        body = found[0]
        tests = {"recorded": recorded, "lesion": lesions, "experts": cut_experts, "neurons": neurons, "repair": repair}
        for column, test in tests.items():
            row[column] = outcome(lambda t=test: t(model, body))  # type: ignore[misc]
        for form in FORMATS if folder is not None else ():
            row[form] = outcome(lambda f=form: _keep_saved(name, model, body, folder, f))
    return row


def _keep_saved(name: str, model: Any, body: ExpertAnatomy, root: Any, form: str) -> None:
    folder = root / f"{name}.{'per-layer' if form == 'uneven' else form}"
    wanted = saved(model, body, folder if form != "uneven" else root / f"{name}.uneven", form)
    if form == "uneven":
        same(answer(lb.load_pruned(root / f"{name}.uneven")[0]), wanted, "loaded")
        return
    torch.save(wanted, root / f"{name}.{form}.pt")
    if form != "uniform":
        same(answer(lb.load_pruned(folder)[0]), wanted, "loaded")


__all__ = ["CHECKS", "COLUMNS", "FORMATS", "IDS", "check"]

"""Prune whole experts of a mixture of experts: plan, then cut.

Every layer keeps as many experts where nothing else is said, so that stock transformers loads what is left. Scores,
from calibration text: ``frequency`` (share of tokens that call the expert), ``reap`` (mean over its tokens of gate
times L2 norm of its output: Lasby et al., arXiv 2510.13999), ``man`` (the same without the gate); without: ``random``,
and ``networks`` (how much of the networks lies in it: the sum over networks of the share of ``|z|`` above the cut-off).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llmbrain._files import read_json, write_json
from llmbrain._validation import InputError, check_option, check_range, seed_of
from llmbrain._version import __version__
from llmbrain.anatomy.expert_surgery import check_kept, cut_experts
from llmbrain.anatomy.experts import ExpertAnatomy, Routed, expert_anatomy
from llmbrain.anatomy.offload import check_in_memory, present
from llmbrain.checkpoints.expert_shapes import record_expert_shapes
from llmbrain.checkpoints.shapes import RECORD
from llmbrain.hooks.change import refuse_changed
from llmbrain.hooks.experts import Visits, changing_experts, hearing_experts, rerouted
from llmbrain.hooks.probe import nearly_equal, ordinary_ids
from llmbrain.hooks.text import batches, digest, evaluating, input_device
from llmbrain.networks import FunctionalNetworks
from llmbrain.pruning.allocate.experts import how_many, ranked
from llmbrain.pruning.plan import PruningPlan, whole_numbers
from llmbrain.pruning.repair.mixture import repair_experts
from llmbrain.pruning.repair.undo import down_projections, unchanged

if TYPE_CHECKING:
    import pandas as pd

METHODS = ("reap", "man", "frequency", "random", "networks")
PROBE = 48  # tokens on which the cut model is held against the dense one that may not choose what was cut


@dataclass(frozen=True)
class ExpertPlan:
    """Which routed experts of a model stay.

    Attributes
    ----------
    method : str
    ratio : float
        Share of the routed experts that was asked to be removed; `removed` is what the plan removes.
    kept : tuple of tuple of int
        For each layer the experts that stay, ascending; empty in dense layers.
    before : tuple of int
        Routed experts of each layer before.
    digest : str
        Of the weights the plan was made for.
    parameters, parameters_removed : int
    details : dict
        Scores of every expert, how often each was called, calibration; plain JSON values.
    """

    method: str
    ratio: float
    kept: tuple[tuple[int, ...], ...]
    before: tuple[int, ...]
    digest: str
    parameters: int = 0
    parameters_removed: int = 0
    details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        before = whole_numbers("before", self.before, 0)
        if isinstance(self.kept, (str, bytes)) or not isinstance(self.kept, (Sequence, np.ndarray)):
            raise InputError(f"kept={self.kept!r} of this plan is no list of layers")
        kept = tuple(whole_numbers("kept", layer, 0) for layer in self.kept)
        check_range("ratio", self.ratio, 0, 1)
        for name in ("parameters", "parameters_removed"):
            object.__setattr__(self, name, whole_numbers(name, [getattr(self, name)], 0)[0])
        for name in ("method", "digest"):
            if not isinstance(getattr(self, name), str):
                raise InputError(f"{name}={getattr(self, name)!r} of this plan is no text")
        if not isinstance(self.details, dict):
            raise InputError(f"details={self.details!r} of this plan is no dict")
        fits = len(kept) == len(before) and all(
            list(k) == sorted(set(k)) and (not k or (k[0] >= 0 and k[-1] < n)) for k, n in zip(kept, before)
        )
        if not fits or any(n and not k for k, n in zip(kept, before)):
            raise InputError("kept of this plan must hold, for each layer, experts that it had: ascending, each once")
        object.__setattr__(self, "kept", kept)
        object.__setattr__(self, "before", before)

    @property
    def widths_before(self) -> tuple[int, ...]:
        """`before`, by the name that plans of neurons have for it."""
        return self.before

    @property
    def removed(self) -> float:
        """Share of the routed experts that goes."""
        return 1 - sum(map(len, self.kept)) / sum(self.before)

    @property
    def parameters_share(self) -> float:
        """Share of all parameters that goes."""
        return self.parameters_removed / max(self.parameters, 1)

    def to_frame(self) -> pd.DataFrame:
        """One row a layer: routed experts before, kept, removed, share removed."""
        import pandas as pd

        frame = pd.DataFrame({"layer": range(len(self.before)), "before": self.before})
        frame["kept"] = [len(k) for k in self.kept]
        frame["removed"] = frame["before"] - frame["kept"]
        frame["share_removed"] = frame["removed"] / frame["before"].clip(lower=1)
        return frame

    def summary(self) -> str:
        """What the plan does, in a few lines."""
        return "\n".join([
            f"{self.method}: {sum(map(len, self.kept))} of {sum(self.before)} routed experts stay "
            f"({self.removed:.1%} removed, {self.ratio:.1%} asked)",
            f"{self.parameters_removed:,} of {self.parameters:,} parameters go ({self.parameters_share:.1%})",
            f"experts per layer {[len(k) for k in self.kept]} (before {list(self.before)})",
        ])  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain JSON values."""
        record = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {**record, "kept": [list(k) for k in self.kept], "before": list(self.before)}

    def save(self, path: str | Path) -> Path:
        """Write the plan as JSON, whole or not at all."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        return write_json(path, {"llmbrain": "expert plan", **self.to_dict()}, seal=True, indent=None)

    @classmethod
    def load(cls, path: str | Path) -> ExpertPlan:
        """Read a plan that `save` wrote."""
        record = read_json(path, anew="make the plan again")
        if record.pop("llmbrain", None) != "expert plan":
            raise InputError(f"{path} is not a plan of experts")
        try:
            return cls(**record)
        except (TypeError, ValueError) as error:
            raise InputError(f"{path}: this is not a plan of experts: {error}") from error

    def check_model(self, model: nn.Module) -> ExpertAnatomy:
        """The anatomy of a model that this plan was made for; another model is an `InputError`."""
        body = expert_anatomy(model)
        counts = _counts(body)
        if counts != self.before:
            raise InputError(
                f"plan was made for layers of {list(self.before)} routed experts, this model has {list(counts)}"
            )
        own = weights_digest(body)
        if own != self.digest:
            raise InputError(f"plan was made for weights {self.digest}, this model has {own}: make a new plan")
        return body


def read_plan(path: str | Path) -> PruningPlan | ExpertPlan:
    """Read a plan of neurons or of experts.

    Raises
    ------
    InputError
        If it is neither.
    """
    kind = read_json(path, anew="make the plan again (llmbrain plan)").get("llmbrain")
    return ExpertPlan.load(path) if kind == "expert plan" else PruningPlan.load(path)


def plan_experts(
    model: nn.Module,
    expert_ratio: float,
    method: str,
    windows: Tensor | None = None,
    *,
    networks: FunctionalNetworks | None = None,
    allocation: str | Sequence[int] | None = None,
    random_state: int | None = 0,
) -> ExpertPlan:
    """Choose which routed experts go; nothing is cut yet.

    Parameters
    ----------
    model : transformers model
        A mixture of experts; not changed.
    expert_ratio : float
        Share of each layer's routed experts to remove, in (0, 1), to the nearest whole expert (where the router chooses
        among groups: as many of each group).
    method : str
        One of `METHODS`.
    windows : (n, window) int64, optional
        Calibration text.
    networks : FunctionalNetworks, optional
        Found in scans of this model; for ``"networks"``.
    allocation : str or sequence of int, optional
        ``"uniform"`` (default): as many of every layer, so that stock transformers loads what is left. ``"global"``:
        all layers ranked together by scores standardized within a layer, none below what its router needs. Or how many
        experts each layer keeps, 0 for dense ones.
    random_state : int, optional
        Of ``"random"``.

    Raises
    ------
    InputError
        If the ratio leaves fewer experts than a token visits or removes none, the router can not be cut, what the
        method needs is missing, or an expert is never called in the calibration text.
    """
    check_option("method", method, METHODS)
    check_range("expert_ratio", expert_ratio, 0, 1, open_low=True, open_high=True)
    refuse_changed(model, "plan_pruning")
    body = expert_anatomy(model)
    stay = how_many(body, expert_ratio, allocation)
    for layer, routed in body.routed:  # fails before any work
        size = routed.count // routed.n_groups
        first = [g * size + e for g in range(routed.n_groups) for e in range(stay[layer] // routed.n_groups)]
        check_kept(body, {**{i: list(range(r.count)) for i, r in body.routed}, layer: first}, planned=True)
    details: dict[str, Any] = {}
    if method == "random":
        rng = np.random.default_rng(seed_of(random_state))
        scores = {layer: rng.random(routed.count) for layer, routed in body.routed}
    elif method == "networks":
        scores = _by_networks(body, networks)
    else:
        if windows is None:
            raise InputError(f"method={method!r} needs calibration texts (and their tokenizer)")
        scores, calls = _measured(model, body, windows, method)
        details["calls"] = {str(layer): of.tolist() for layer, of in calls.items()}
        details["calibration"] = {"hash": digest(windows), "shape": list(windows.shape)}
    if allocation == "global":
        stay = ranked(body, expert_ratio, scores)
    details["scores"] = {str(layer): [float(s) for s in of] for layer, of in scores.items()}
    kept = {layer: _best(routed, scores[layer], stay[layer]) for layer, routed in body.routed}
    check_kept(body, kept, planned=True)
    removed = sum((routed.count - len(kept[layer])) * _of_one(routed) for layer, routed in body.routed)
    return ExpertPlan(
        method, float(expert_ratio), tuple(tuple(kept.get(i, ())) for i in range(len(body.layers))), _counts(body),
        weights_digest(body), sum(p.numel() for p in model.parameters()), removed, details,
    )  # fmt: skip


def prune_experts(
    model: Any,
    plan: ExpertPlan,
    *,
    windows: Tensor | None = None,
    weights: Tensor | None = None,
    compensate: str | None = None,
    ridge: float | None = None,
    sequential: bool = True,
    inplace: bool = False,
    verify: bool = True,
) -> Any:
    """Cut the experts that a plan removes; parameters as in `llmbrain.prune`.

    Without repair the result equals the model whose routers may choose only among the experts that stay;
    ``"least-squares"`` refits these to the layer's output: see `llmbrain.pruning.repair.mixture`.
    """
    refuse_changed(model, "prune")
    check_in_memory(model, "prune")
    body = plan.check_model(model)
    kept = {layer: list(plan.kept[layer]) for layer, _ in body.routed}
    check_kept(body, kept)
    _check_repair(body, compensate)
    small: Any = None
    if verify:
        with rerouted(dict(body.routed), kept):
            wanted = answer(model)
        small = copy.deepcopy(model)
        _cut(small, kept)
        routes = {routed.module: lambda i, w: (i, w) for _, routed in expert_anatomy(small).routed}
        with changing_experts(routes=routes):  # both are computed the same way
            got = answer(small)
        if not nearly_equal(got, wanted):
            raise InputError(
                f"model {type(model).__name__}: without these experts it says something else than with a router that "
                "may not choose them: its experts cannot be cut"
            )
    repaired = None
    if inplace or windows is not None or small is None:
        del small
        small = model if inplace else copy.deepcopy(model)
        if windows is not None:
            body = expert_anatomy(small)
            with unchanged(down_projections(body), always=False) if inplace else nullcontext():
                repaired = repair_experts(
                    small, body, windows, kept, ridge=ridge, sequential=sequential, weights=weights
                )
        _cut(small, kept)
    record = {
        "experts_before": list(plan.before), "kept_experts": [list(k) for k in plan.kept], "plan": plan.to_dict(),
        "compensate": compensate, "repair": repaired,
        "calibration": None if windows is None else {"hash": digest(windows), "shape": list(windows.shape)},
        "versions": {"llmbrain": __version__, "torch": version("torch")},
    }  # fmt: skip
    setattr(small, RECORD, [*getattr(small, RECORD, []), record])
    return small


def _check_repair(body: ExpertAnatomy, compensate: str | None) -> None:
    if compensate not in (None, "least-squares"):
        raise InputError(f"compensate={compensate!r}: whole experts are repaired by 'least-squares', or not (None)")
    for layer, routed in body.routed if compensate else ():
        if getattr(routed.module, "has_post_expert_norm", False):
            raise InputError(
                f"compensate={compensate!r}: a norm follows the down projection of the experts of layer {layer}: there "
                "is no least squares for them, pass None"
            )


def _cut(model: Any, kept: dict[int, list[int]]) -> None:
    for layer, routed in expert_anatomy(model).routed:
        cut_experts(routed, kept[layer])
    record_expert_shapes(model)


def answer(model: Any) -> Tensor:
    """What a model says to a few ordinary tokens."""
    ids = ordinary_ids(model, PROBE)[None].to(input_device(model))
    with evaluating(model):
        out = model(input_ids=ids)
    value = getattr(out, "logits", None)
    return (out[0] if value is None else value).detach()


# -- scores ------------------------------------------------------------------------------------------------------------


def _measured(
    model: nn.Module, body: ExpertAnatomy, windows: Tensor, method: str
) -> tuple[dict[int, NDArray[np.float64]], dict[int, NDArray[np.int64]]]:
    """Score of every expert, and how many tokens called it."""
    routed = dict(body.routed)
    sums = {layer: np.zeros(r.count) for layer, r in routed.items()}
    calls = {layer: np.zeros(r.count, dtype=np.int64) for layer, r in routed.items()}

    def listener(layer: int) -> Any:
        def listen(visits: Visits) -> None:
            assert visits.outputs is not None
            norms = torch.linalg.vector_norm(visits.outputs.double(), dim=-1)
            weighted = norms * visits.weights.double() if method == "reap" else norms
            called = visits.experts >= 0
            index = visits.experts[called].cpu().numpy()
            np.add.at(sums[layer], index, weighted[called].cpu().numpy())
            np.add.at(calls[layer], index, 1)

        return listen

    with hearing_experts({r.module: listener(i) for i, r in routed.items()}, outputs=True), evaluating(model):
        for ids in batches(windows):
            model(input_ids=ids.to(input_device(model)))
    if method == "frequency":
        return {layer: of / windows.numel() for layer, of in calls.items()}, calls
    never = {layer: np.flatnonzero(of == 0).tolist() for layer, of in calls.items() if (of == 0).any()}
    if never:
        named = ", ".join(f"{of} of layer {layer}" for layer, of in list(never.items())[:4])
        raise InputError(
            f"calibration calls some experts never (experts {named}): method={method!r} is a mean over the tokens of "
            "an expert, and says nothing of these: give other text, or method='frequency' (for which they count 0)"
        )
    return {layer: sums[layer] / calls[layer] for layer in sums}, calls


def _by_networks(body: ExpertAnatomy, networks: FunctionalNetworks | None) -> dict[int, NDArray[np.float64]]:
    if networks is None:
        raise InputError("method='networks' needs networks of this model")
    space = body.space
    if networks.space != space:
        raise InputError(f"the networks lie in {networks.space}, the model has {space}: find them in a scan of it")
    size = np.abs(networks.maps).astype(np.float64) * networks.masks
    total = size.sum(axis=1)
    if not total.any():
        raise InputError("the networks hold no neuron at their threshold: choose another")
    share = (size[total > 0] / total[total > 0, None]).sum(axis=0)
    scores = {}
    for layer, routed in body.routed:
        first = len(body.layers[layer].shared)
        parts = [space.expert_slice(layer, first + e) for e in range(routed.count)]
        scores[layer] = np.array([share[part].sum() for part in parts])
    return scores


def _best(routed: Routed, scores: NDArray[np.float64], stay: int) -> list[int]:
    """Experts with the highest scores, as many of each group; of equal ones those that come first."""
    size, chosen = routed.count // routed.n_groups, list[int]()
    for group in range(routed.n_groups):
        order = np.argsort(-scores[group * size : (group + 1) * size], kind="stable")
        chosen += (group * size + order[: stay // routed.n_groups]).tolist()
    return sorted(chosen)


def _counts(body: ExpertAnatomy) -> tuple[int, ...]:
    routed = dict(body.routed)
    return tuple(routed[i].count if i in routed else 0 for i in range(len(body.layers)))


def _of_one(routed: Routed) -> int:
    """Parameters that go with one expert, its row of the router included."""
    parts = [t.value for t in (*routed.weights, *routed.router) if isinstance(t.value, nn.Parameter)]
    return sum(value.numel() // routed.count for value in parts)


def weights_digest(body: ExpertAnatomy) -> str:
    """Hash of a sample of the weights of all MLPs, experts and routers, on any device: 16 hexadecimal digits."""
    found = sha256()
    for layer in body.layers:
        with present(layer.block):
            weights = [p.weight() for mlp in layer.shared for p in (*mlp.inputs, mlp.down)]
            if layer.routed is not None:
                weights += [tensor.value for tensor in (*layer.routed.weights, *layer.routed.router)]
            for weight in weights:
                flat = weight.detach().reshape(-1)
                found.update(flat[:: max(1, flat.numel() // 4096)].float().cpu().numpy().tobytes())
    return found.hexdigest()[:16]

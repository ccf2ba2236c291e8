"""Cut whole experts: their weights, rows of the router, correction biases, and every count of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmbrain._validation import InputError
from llmbrain.anatomy.experts import ExpertAnatomy, ExpertTensor, Routed
from llmbrain.anatomy.offload import is_away
from llmbrain.anatomy.surgery import check_no_adapter

# What modules and configs call the number of routed experts.
COUNTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "num_routed_experts", "n_experts")


def check_kept(body: ExpertAnatomy, kept: Mapping[int, Sequence[int]], *, planned: bool = False) -> None:
    """Refuse what no router could choose from, or weights that can not be cut; nothing is changed.

    Where a cut is only `planned`, the weights may be offloaded.

    Raises
    ------
    InputError
        Naming the layer.
    """
    for layer, routed in body.routed:
        check_no_adapter(body.layers[layer].block)
        stays = list(kept[layer])
        if routed.fixed and len(stays) < routed.count:
            raise InputError(
                f"{routed.path}: the experts of this model cannot be cut: {routed.fixed} (allocation= can say how many "
                f"each layer keeps: all {routed.count} here)"
            )
        if stays != sorted(set(stays)) or not stays or stays[0] < 0 or stays[-1] >= routed.count:
            raise InputError(f"{routed.path}: kept={stays} must be ascending, each once, of {routed.count} experts")
        if len(stays) < routed.top_k:
            raise InputError(f"{routed.path}: {len(stays)} experts would stay, but a token visits {routed.top_k}")
        _check_groups(routed, stays)
        for tensor in (*routed.weights, *routed.router):
            if tensor.value.is_meta and not (planned and is_away(tensor.owner)):
                raise InputError(f"{tensor.path} is not in memory (offloaded): load the model whole to cut it")


def _check_groups(routed: Routed, stays: Sequence[int]) -> None:
    if routed.n_groups == 1:
        return
    size = routed.count // routed.n_groups
    sizes = [sum(e // size == g for e in stays) for g in range(routed.n_groups)]
    if len(set(sizes)) > 1:
        raise InputError(f"{routed.path}: its router chooses among groups: they would keep {sizes} experts, not equal")
    if sizes[0] < 2 or sizes[0] * routed.groups_visited < routed.top_k:
        raise InputError(
            f"{routed.path}: {sizes[0]} experts in each of {routed.n_groups} groups would stay: its router needs 2, "
            f"and {routed.top_k} in the {routed.groups_visited} groups that a token may visit"
        )


def cut_router(routed: Routed, kept: Sequence[int]) -> Callable[[], None]:
    """Leave a router only the experts `kept`; gives what undoes it. The experts themselves stay."""
    undo: list[Callable[[], None]] = []
    for tensor in routed.router:
        undo.append(_set(tensor, tensor.value.detach(), old=True))
        _set(tensor, _chosen(tensor, kept))
    undo += _count(routed.parent, routed.count, len(kept), skip=routed.module)
    for owner in {id(t.owner): t.owner for t in routed.router}.values():
        if isinstance(owner, nn.Linear) and owner.out_features == routed.count:
            undo.append(_attribute(owner, "out_features", len(kept)))

    def back() -> None:
        for step in reversed(undo):
            step()

    return back


def cut_experts(routed: Routed, kept: Sequence[int]) -> None:
    """Leave a layer only the experts `kept`: call `check_kept` first, and look the anatomy up again afterwards."""
    cut_router(routed, kept)
    for tensor in routed.weights:
        _set(tensor, _chosen(tensor, kept))
    _count(routed.module, routed.count, len(kept))


def tell_count(config: Any, before: int, after: int) -> None:
    """Let a config say how many routed experts there are."""
    for name in COUNTS:
        value = getattr(config, name, None)
        if isinstance(value, int) and value == before:
            setattr(config, name, after)


def _chosen(tensor: ExpertTensor, kept: Sequence[int]) -> Tensor:
    value = tensor.value.detach()
    return value.index_select(tensor.axis, torch.tensor(list(kept)).to(value.device)).contiguous()


def _set(tensor: ExpertTensor, value: Tensor, *, old: bool = False) -> Callable[[], None]:
    """Put a value into its place; with `old` only give what puts the thing that is there now back."""
    owner, name = tensor.owner, tensor.name
    table: dict[str, Any] = owner._buffers if name in owner._buffers else owner._parameters
    before = table[name]
    if not old:
        grad = bool(before is not None and before.requires_grad)
        table[name] = value if table is owner._buffers else nn.Parameter(value, requires_grad=grad)

    def back() -> None:
        table[name] = before

    return back


def _count(parent: nn.Module, before: int, after: int, skip: nn.Module | None = None) -> list[Callable[[], None]]:
    """What modules know of the number of experts."""
    return [
        _attribute(module, name, after)
        for path, module in parent.named_modules()
        if module is not skip and "shared" not in path
        for name in COUNTS
        if type(getattr(module, name, None)) is int and getattr(module, name) == before
    ]


def _attribute(owner: Any, name: str, value: int) -> Callable[[], None]:
    before = getattr(owner, name)
    setattr(owner, name, value)

    def back() -> None:
        setattr(owner, name, before)

    return back

"""Heads of an attention by key/value group: rows of its projections, columns of its output, and what goes with them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from llmbrain.anatomy.family import Family
from llmbrain.anatomy.layers import PerHead, Projection, get, is_linear, projection, sizes
from llmbrain.anatomy.nothing import Nothing

STREAM_NORM = re.compile(r"((self_attn_)?layer_?norm|ln|norm)\.", re.IGNORECASE)


def attention_of(path: str, block: nn.Module, family: Family, config: object | None, fixed: str) -> dict[str, Any]:
    """The fields of a `LayerAnatomy` that tell of its attention; none where the block has none.

    Parameters
    ----------
    path : str
        Of the block.
    fixed : str
        Why heads of this model can not be cut, where that is known.
    """
    attention = get(block, family.attention) if family.attention else None
    out = None if attention is None else get(attention, family.out)
    if attention is None or out is None or not is_linear(out):
        return {}
    if isinstance(attention, Nothing):
        out_ = projection(out, f"{path}.{family.attention}.{family.out}", 0, size=0, out=False)
        return {"attention": attention, "out": out_, "gives": family.gives}
    none = {"attention": attention}
    inner = sizes(out)[0]
    owners = [attention, get(attention, "self")]
    head_dim = _first_int(owners, ("head_dim", "attention_head_size", "head_size"))
    counts = ("num_attention_heads", "num_heads", "n_heads", "n_head")
    modules = [m for name in family.qkv if (m := get(attention, name)) is not None and is_linear(m)]
    separate = len(modules) in (1, 3)
    if head_dim is None or not separate or inner % head_dim:
        heads = _first_int([*owners, config], counts)
        if not heads or inner % heads:
            return none
        head_dim = inner // heads
    n_heads = inner // head_dim
    path = f"{path}.{family.attention}"
    if not separate:
        why = fixed or "queries, keys and values are not apart by head"
        columns = projection(out, f"{path}.{family.out}", n_heads, size=head_dim, out=False)
        return _fields(attention, (), columns, n_heads, n_heads, head_dim, (), family, why)
    if len(modules) == 3:
        n_kv = sizes(modules[1])[1] // head_dim
    else:
        n_kv = (sizes(modules[0])[1] // head_dim - n_heads) // 2
    if n_kv < 1 or n_heads % n_kv:
        return {**none, "n_heads": n_heads, "head_dim": head_dim}
    per_group = n_heads // n_kv * head_dim
    columns = projection(out, f"{path}.{family.out}", n_kv, size=per_group, out=False)
    heads_ = _rows(path, modules, family, n_kv, per_group, head_dim)
    per_head, unknown = _beside(attention, family, n_heads, n_kv, head_dim)
    why = fixed
    if not why and any(p.units * p.size > sizes(p.module)[1] for p in heads_):
        why = "queries, keys and values are not apart by head"
    if not why and unknown:
        why = f"{family.attention}.{unknown} goes with all heads at once"
    return _fields(attention, () if why else heads_, columns, n_heads, n_kv, head_dim, per_head, family, why)


def _fields(
    attention: nn.Module, heads: tuple[Projection, ...], out: Projection, n_heads: int, n_kv: int, head_dim: int,
    per_head: tuple[PerHead, ...], family: Family, why: str,
) -> dict[str, Any]:  # fmt: skip
    return {
        "attention": attention, "heads": heads, "out": out, "n_heads": n_heads, "n_kv_heads": n_kv,
        "head_dim": head_dim, "per_head": per_head, "reads_config": family.reads_config, "heads_fixed": why,
        "gives": family.gives,
    }  # fmt: skip


def _rows(
    path: str, modules: Sequence[nn.Module], family: Family, n_kv: int, per_group: int, head_dim: int
) -> tuple[Projection, ...]:
    """Query, key and value rows of each group."""
    names = [f"{path}.{name}" for name in family.qkv]
    if len(modules) == 3:
        # The rows of the queries may hold a gate beside each query (Qwen3-Next): all that is of one group is one run.
        query = max(per_group, sizes(modules[0])[1] // n_kv)
        return tuple(
            projection(module, name, n_kv, size=size)
            for module, name, size in zip(modules, names, (query, head_dim, head_dim))
        )
    if family.qkv_layout == "grouped":
        return (projection(modules[0], names[0], n_kv, size=per_group + 2 * head_dim),)
    starts = (0, n_kv * per_group, n_kv * (per_group + head_dim))
    return tuple(
        projection(modules[0], names[0], n_kv, start=start, size=size)
        for start, size in zip(starts, (per_group, head_dim, head_dim))
    )


def _beside(
    attention: nn.Module, family: Family, n_heads: int, n_kv: int, head_dim: int
) -> tuple[tuple[PerHead, ...], str]:
    """What else goes with heads: what the row names, and the first thing that it does not."""
    known = []
    for name in family.per_head:
        owner: Any = attention
        *parents, last = name.split(".")
        for parent in parents:
            owner = getattr(owner, parent, None)
        thing = getattr(owner, last, None)
        if isinstance(thing, nn.Module) and not isinstance(thing, nn.ModuleList):
            parts = [PerHead(thing, p, len(value) // n_kv) for p, value in thing.named_parameters(recurse=False)]
            lengths = [len(value) for _, value in thing.named_parameters(recurse=False)]
        elif isinstance(thing, (nn.ModuleList, nn.Parameter)):
            parts, lengths = [PerHead(owner, last, len(thing) // n_kv)], [len(thing)]
        else:
            continue
        if all(length % n_kv == 0 for length in lengths):
            known += parts
    named = [*family.qkv, family.out, *family.per_head]
    by_head = {n_heads * head_dim, n_kv * head_dim, n_heads, n_kv} - {1}
    for name, parameter in attention.named_parameters():
        if any(name == n or name.startswith(f"{n}.") for n in named):
            continue
        # A norm over one head has as many gains as a head has numbers, which may be as many as there are heads.
        of_one_head = parameter.ndim == 1 and len(parameter) == head_dim
        outside = name.startswith("output.") or STREAM_NORM.match(name)  # a norm of the residual stream
        if not of_one_head and not outside and any(size in by_head for size in parameter.shape):
            return tuple(known), name.removesuffix(".weight").removesuffix(".bias")
    return tuple(known), ""


def _first_int(owners: Sequence[object | None], names: Sequence[str]) -> int | None:
    for owner in owners:
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None

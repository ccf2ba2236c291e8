"""Where each model family keeps its MLP neurons and its attention heads.

One row of `FAMILIES` describes a family by the paths inside one of its blocks; which axis of a weight the neurons lie
on follows from the class of the module. A model is matched by structure: the row all of whose paths exist in every
block. A model that no row fits is recognised by the shapes of its linear layers where those are unambiguous, else one
error says what was looked for. To teach llmbrain a new family, add a row.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmbrain._validation import InputError


@dataclass(frozen=True)
class Family:
    """Paths inside one block. ``gate`` and ``up`` of a gated MLP may be one fused module (gate rows first).

    ``qkv_layout`` says how a fused attention projection is ordered: ``"split"`` is all queries, all keys, all values;
    ``"grouped"`` is one run of rows a key/value group (its queries, its key, its value).
    """

    name: str
    down: str
    up: str
    gate: str | None = None
    act: str | None = None
    attention: str = "self_attn"
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    qkv_layout: str = "split"
    out: str = "o_proj"

    def paths(self) -> list[str]:
        """What a block of this family must have."""
        mlp = [p for p in (self.gate, self.up, self.down, self.act) if p]
        return [*mlp, *(f"{self.attention}.{p}" for p in (*self.qkv, self.out))]


FAMILIES: tuple[Family, ...] = (
    Family("llama (Mistral, Qwen2, Qwen3, Gemma, OLMo, ...)", gate="mlp.gate_proj", up="mlp.up_proj",
           down="mlp.down_proj", act="mlp.act_fn"),
    Family("phi3", gate="mlp.gate_up_proj", up="mlp.gate_up_proj", down="mlp.down_proj", act="mlp.activation_fn",
           qkv=("qkv_proj",)),
    Family("gpt2", up="mlp.c_fc", down="mlp.c_proj", act="mlp.act", attention="attn", qkv=("c_attn",), out="c_proj"),
    Family("opt", up="fc1", down="fc2", act="activation_fn", out="out_proj"),
    Family("gpt_neox", up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h", act="mlp.act", attention="attention",
           qkv=("query_key_value",), qkv_layout="grouped", out="dense"),
    Family("bloom", up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h", act="mlp.gelu_impl", attention="self_attention",
           qkv=("query_key_value",), qkv_layout="grouped", out="dense"),
    Family("falcon", up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h", act="mlp.act", attention="self_attention",
           qkv=("query_key_value",), qkv_layout="grouped", out="dense"),
    Family("gptj", up="mlp.fc_in", down="mlp.fc_out", act="mlp.act", attention="attn", out="out_proj"),
    Family("phi", up="mlp.fc1", down="mlp.fc2", act="mlp.activation_fn", out="dense"),
    Family("starcoder2", up="mlp.c_fc", down="mlp.c_proj", act="mlp.act"),
    Family("bert (RoBERTa, ELECTRA, ...)", up="intermediate.dense", down="output.dense",
           act="intermediate.intermediate_act_fn", attention="attention", qkv=("self.query", "self.key", "self.value"),
           out="output.dense"),
    Family("distilbert", up="ffn.lin1", down="ffn.lin2", act="ffn.activation", attention="attention",
           qkv=("q_lin", "k_lin", "v_lin"), out="out_lin"),
    Family("modernbert", gate="mlp.Wi", up="mlp.Wi", down="mlp.Wo", act="mlp.act", attention="attn", qkv=("Wqkv",),
           out="Wo"),
)  # fmt: skip


@dataclass(frozen=True)
class Projection:
    """A run of units (neurons, or key/value groups of heads) along one axis of a weight.

    Unit ``u`` is the ``size`` consecutive entries from ``start + u * size`` on, along `axis` of ``module.weight``;
    where the units are the module's outputs, its bias has them too.
    """

    module: nn.Module
    path: str
    axis: int
    units: int
    start: int = 0
    size: int = 1
    is_output: bool = True

    def rows(self, units: Tensor | Sequence[int]) -> Tensor:
        """Positions of the given units along the axis, in order; int64 on the CPU."""
        index = torch.as_tensor(units, dtype=torch.long).reshape(-1, 1) * self.size
        return (self.start + index + torch.arange(self.size)).reshape(-1)

    def weight(self) -> Tensor:
        """View of the weight with the units first: ``(units * size, other)``."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        weight = weight if self.axis == 0 else weight.T
        return weight[self.start : self.start + self.units * self.size]

    def bias(self) -> Tensor | None:
        """View of the bias entries of the units, where they are outputs and there is a bias."""
        bias = getattr(self.module, "bias", None)
        if not self.is_output or not isinstance(bias, Tensor):
            return None
        return bias[self.start : self.start + self.units * self.size]


@dataclass(frozen=True)
class LayerAnatomy:
    """The MLP and the attention of one block.

    Attributes
    ----------
    block : module
        The whole transformer block; its output is the site ``block_out``.
    inputs : tuple of Projection
        What makes the neurons: ``(up,)`` or ``(gate, up)``.
    down : Projection
        What the neurons enter; its input is the site ``neuron``, its output ``mlp_out``.
    act : module or None
        The activation; in a gated MLP its output is the site ``gate``.
    heads : tuple of Projection
        Query, key and value rows by key/value group; empty where heads can not be cut.
    out : Projection or None
        Output projection of the attention, by key/value group.
    """

    index: int
    path: str
    block: nn.Module
    inputs: tuple[Projection, ...]
    down: Projection
    act: nn.Module | None
    attention: nn.Module | None = None
    heads: tuple[Projection, ...] = ()
    out: Projection | None = None
    n_heads: int = 0
    n_kv_heads: int = 0
    head_dim: int = 0

    @property
    def gated(self) -> bool:
        """Whether a neuron is the product of a gate and an up signal."""
        return len(self.inputs) == 2

    @property
    def width(self) -> int:
        """Number of neurons."""
        return self.down.units

    @property
    def neuron_projections(self) -> tuple[Projection, ...]:
        """Every weight that holds a row or column a neuron."""
        return (*self.inputs, self.down)


@dataclass(frozen=True)
class Anatomy:
    """Where a model keeps its neurons: one `LayerAnatomy` a block."""

    family: str
    layers: list[LayerAnatomy] = field(repr=False)

    @property
    def widths(self) -> tuple[int, ...]:
        """Neurons per layer."""
        return tuple(layer.width for layer in self.layers)

    @property
    def n_heads(self) -> tuple[int, ...]:
        """Attention heads per layer."""
        return tuple(layer.n_heads for layer in self.layers)


def anatomy(model: nn.Module) -> Anatomy:
    """Find the neurons and heads of a model.

    Parameters
    ----------
    model : torch.nn.Module
        A transformers model, or any module built of like blocks in a ``ModuleList``.

    Returns
    -------
    Anatomy

    Raises
    ------
    InputError
        If no row of `FAMILIES` fits and the shapes are not unambiguous; says what was looked for.
    """
    stacks = list(_stacks(model))
    for family in FAMILIES:
        fits = [s for s in stacks if all(_has(block, family) for block in s[1])]
        if len(fits) == 1:
            path, blocks = fits[0]
            config = _config(model)
            return Anatomy(family.name, [_layer(i, f"{path}.{i}", b, family, config) for i, b in enumerate(blocks)])
        if len(fits) > 1:
            raise InputError(
                f"model {type(model).__name__} has {len(fits)} stacks of {family.name} blocks "
                f"({', '.join(p for p, _ in fits)}): pass the one to look at, e.g. model.get_submodule('{fits[0][0]}')"
            )
        partial = [(p, [_has(b, family) for b in s]) for p, s in stacks]
        for path, has in partial:
            if any(has):
                raise InputError(
                    f"model {type(model).__name__}: blocks {[i for i, h in enumerate(has) if not h]} of {path} are not "
                    f"{family.name} blocks as the others are (mixture-of-experts layers have no single MLP)"
                )
    found = [recognised for path, blocks in stacks if (recognised := _by_structure(path, blocks))]
    if len(found) == 1:
        return Anatomy("recognised by structure", found[0])
    raise InputError(
        f"model {type(model).__name__} is of no known family and its blocks are ambiguous: looked for a ModuleList of "
        f"blocks with the paths of one of {[f.name for f in FAMILIES]}, or for exactly one MLP a block (linear layers "
        f"hidden->width, width->hidden outside the attention). Found stacks: {[p for p, _ in stacks] or 'none'}. Add a "
        "row to llmbrain.anatomy.families.FAMILIES"
    )


def context_length(model: nn.Module) -> int | None:
    """Longest text, in tokens, that the model's positions cover; None where there is no limit."""
    config = _config(model)
    if config is None or getattr(config, "alibi", False) or getattr(config, "model_type", "") == "bloom":
        return None
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")
    length = next((getattr(config, n) for n in names if isinstance(getattr(config, n, None), int)), None)
    if length is None or length < 1:  # XLNet says -1
        return None
    for name, module in model.named_modules():  # RoBERTa counts positions from padding_idx + 1
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(length) - int(module.padding_idx) - 1
    return int(length)


# -- matching by table -----------------------------------------------------------------------------------------------


def _config(model: nn.Module) -> object | None:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _stacks(model: nn.Module) -> Iterator[tuple[str, list[nn.Module]]]:
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module):
            yield path, list(module)


def _get(module: nn.Module, path: str) -> nn.Module | None:
    for name in path.split("."):
        child = getattr(module, name, None)
        if not isinstance(child, nn.Module):
            return None
        module = child
    return module


def _has(block: nn.Module, family: Family) -> bool:
    return all(_get(block, path) is not None for path in family.paths())


def _sizes(module: nn.Module) -> tuple[int, int]:
    """``(in, out)`` of a linear module: torch keeps (out, in), GPT-2's Conv1D (in, out)."""
    a, b = module.weight.shape  # type: ignore[union-attr, misc]
    return (int(a), int(b)) if _is_conv1d(module) else (int(b), int(a))  # type: ignore[arg-type]


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"


def _projection(module: nn.Module, path: str, units: int, *, start: int = 0, size: int = 1, out: bool) -> Projection:
    axis = (1 if out else 0) if _is_conv1d(module) else (0 if out else 1)
    return Projection(module, path, axis, units, start, size, out)


def _layer(index: int, path: str, block: nn.Module, family: Family, config: object | None) -> LayerAnatomy:
    def get(name: str) -> nn.Module:
        module = _get(block, name)
        assert module is not None  # checked by _has
        return module

    mlp = _mlp(path, get(family.down), family.down, [(get(p), p) for p in (family.gate, family.up) if p])
    act = get(family.act) if family.act else None
    attention = get(family.attention)
    heads, out, *sizes = _attention(f"{path}.{family.attention}", attention, family, config)
    return LayerAnatomy(index, path, block, *mlp, act, attention, heads, out, *sizes)


def _mlp(
    path: str, down: nn.Module, down_name: str, inputs: list[tuple[nn.Module, str]]
) -> tuple[tuple[Projection, ...], Projection]:
    width = _sizes(down)[0]
    fused = len({id(module) for module, _ in inputs}) < len(inputs)
    projections = [
        _projection(module, f"{path}.{name}", width, start=i * width if fused else 0, out=True)
        for i, (module, name) in enumerate(inputs)
    ]
    wanted = width * (2 if fused else 1)
    for p in projections:
        if _sizes(p.module)[1] != wanted:
            raise InputError(f"{p.path} has {_sizes(p.module)[1]} outputs where {wanted} fit {path}.{down_name}")
    return tuple(projections), _projection(down, f"{path}.{down_name}", width, out=False)


def _attention(
    path: str, attention: nn.Module, family: Family, config: object | None
) -> tuple[tuple[Projection, ...], Projection | None, int, int, int]:
    """Heads by key/value group: (query, key and value rows), output columns, n_heads, n_kv_heads, head_dim."""
    out = _get(attention, family.out)
    modules = [_get(attention, name) for name in family.qkv]
    assert out is not None
    inner = _sizes(out)[0]
    head_dim = _first_int([attention, _get(attention, "self")], ("head_dim", "attention_head_size", "head_size"))
    if head_dim is None:
        heads = _first_int([attention, config], ("num_attention_heads", "num_heads", "n_heads", "n_head"))
        if not heads or inner % heads:
            return (), None, 0, 0, 0
        head_dim = inner // heads
    n_heads = inner // head_dim
    if len(modules) == 3:
        n_kv = _sizes(modules[1])[1] // head_dim  # type: ignore[arg-type]
    else:
        n_kv = (_sizes(modules[0])[1] // head_dim - n_heads) // 2  # type: ignore[arg-type]
    if n_kv < 1 or n_heads % n_kv:
        return (), None, n_heads, 0, head_dim
    per_group = n_heads // n_kv * head_dim
    projections: list[Projection] = []
    names = [f"{path}.{name}" for name in family.qkv]
    if len(modules) == 3:
        for module, name, size in zip(modules, names, (per_group, head_dim, head_dim)):
            projections.append(_projection(module, name, n_kv, size=size, out=True))  # type: ignore[arg-type]
    elif family.qkv_layout == "grouped":
        size = per_group + 2 * head_dim
        projections.append(_projection(modules[0], names[0], n_kv, size=size, out=True))  # type: ignore[arg-type]
    else:
        starts = (0, inner, inner + n_kv * head_dim)
        for start, size in zip(starts, (per_group, head_dim, head_dim)):
            projections.append(_projection(modules[0], names[0], n_kv, start=start, size=size, out=True))  # type: ignore[arg-type]
    # A norm over all heads together (OLMo 2) mixes them: none can be cut without changing the others.
    norms = [_get(attention, name) for name in ("q_norm", "k_norm")]
    mixed = any(n is not None and getattr(n, "weight", torch.empty(head_dim)).numel() > head_dim for n in norms)
    columns = _projection(out, f"{path}.{family.out}", n_kv, size=per_group, out=False)
    return (() if mixed else tuple(projections)), columns, n_heads, n_kv, head_dim


def _first_int(owners: Sequence[object | None], names: Sequence[str]) -> int | None:
    for owner in owners:
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None


# -- recognition by structure ----------------------------------------------------------------------------------------


def _by_structure(path: str, blocks: list[nn.Module]) -> list[LayerAnatomy] | None:
    layers = [_mlp_by_shape(i, f"{path}.{i}", block) for i, block in enumerate(blocks)]
    return [x for x in layers if x is not None] if all(x is not None for x in layers) else None


def _mlp_by_shape(index: int, path: str, block: nn.Module) -> LayerAnatomy | None:
    """The one MLP of a block, by the shapes of its linear layers, or None where there is none or more than one."""
    linear = [
        (name, module, *_sizes(module))
        for name, module in block.named_modules()
        if getattr(getattr(module, "weight", None), "ndim", 0) == 2
        and (isinstance(module, nn.Linear) or _is_conv1d(module))
        and not re.search(r"att(entio)?n|lora", name, re.IGNORECASE)
    ]
    found = []
    for down_name, down, width, hidden in linear:
        ups = [(m, n) for n, m, i, o in linear if n != down_name and i == hidden and o == width]
        fused = [(m, n) for n, m, i, o in linear if n != down_name and i == hidden and o == 2 * width]
        if width != hidden and len(ups) in (1, 2) and not fused:
            found.append((down_name, down, sorted(ups, key=lambda x: "gate" not in x[1])))
        elif width != hidden and len(fused) == 1 and not ups:
            found.append((down_name, down, fused * 2))
    # hidden->width and width->hidden is one MLP; with the two swapped it is the same pair read backwards.
    if len(found) > 1:
        order = [name for name, *_ in linear]  # what makes the neurons is declared before what they enter
        declared = [f for f in found if all(order.index(n) < order.index(f[0]) for _, n in f[2])]
        found = declared or [f for f in found if _sizes(f[1])[0] >= _sizes(f[1])[1]]
    if len(found) != 1:
        return None
    down_name, down, inputs = found[0]
    inputs_, down_ = _mlp(path, down, down_name, inputs)
    parent = block.get_submodule(down_name.rpartition(".")[0])
    act = [
        m for n, m in parent.named_children() if not list(m.parameters()) and re.search("act|gelu|relu|silu", n, re.I)
    ]
    return LayerAnatomy(index, path, block, inputs_, down_, act[0] if len(act) == 1 else None)

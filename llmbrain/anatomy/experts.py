"""Mixtures of experts: where their neurons, their routers and what goes with them are.

What transformers builds on its common interface of experts is read (`use_experts_implementation`): one module holds
the weights of all routed experts of a block, ``(experts, rows, columns)``; and Llama-4's experts, whose gate multiplies
what enters them (`GATE_FIRST`). Beside them a block may have MLPs that every
token passes (shared experts, of one name or another); some blocks of a model may be dense. A block that holds anything
else is refused: what is not known could be part of what its neurons do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from llmbrain._validation import InputError
from llmbrain.anatomy.families import anatomy
from llmbrain.anatomy.layers import Projection, get, is_linear
from llmbrain.anatomy.space import NeuronSpace
from llmbrain.anatomy.spread import refuse_spread
from llmbrain.anatomy.structure import OUTSIDE, TOWERS, mlp_of

# How the linear layers of a dense MLP or shared expert are called: (gate, up, down); one name twice is a fused layer.
MLPS = (
    ("gate_proj", "up_proj", "down_proj"),
    ("gate_up_proj", "gate_up_proj", "down_proj"),
    ("input_linear", "input_linear", "output_linear"),
    ("w1", "w3", "w2"),
    ("", "up_proj", "down_proj"),
)
FLOATS = {torch.float64, torch.float32, torch.bfloat16, torch.float16}
TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts", "num_selected_experts")
GROUPS = ("n_group", "num_group", "n_groups", "num_expert_group")


@dataclass(frozen=True)
class Mlp:
    """An MLP that every token passes: a shared expert, or all of a dense layer.

    Attributes
    ----------
    inputs : tuple of Projection
        ``(up,)`` or ``(gate, up)``.
    down : Projection
    """

    path: str
    inputs: tuple[Projection, ...]
    down: Projection

    @property
    def width(self) -> int:
        """Number of neurons."""
        return self.down.units


@dataclass(frozen=True)
class ExpertTensor:
    """A parameter or buffer that has one entry an expert, along `axis`."""

    owner: nn.Module
    name: str
    axis: int
    path: str

    @property
    def value(self) -> Tensor:
        """The tensor as it is now."""
        tensor = getattr(self.owner, self.name)
        assert isinstance(tensor, Tensor)
        return tensor


@dataclass(frozen=True)
class Routed:
    """The routed experts of a block.

    Attributes
    ----------
    module : module
        Called with ``(hidden_states, top_k_index, top_k_weights)``.
    count, width : int
        Experts, and neurons of each.
    top_k : int
        Experts that a token visits.
    n_groups : int
        Groups of experts that the router chooses among first; 1 where it does not.
    gated, transposed, interleaved, has_bias : bool
        The layout: whether there is a gate beside the up projection; whether weights are ``(experts, in, out)``;
        whether gate and up alternate; whether both projections have a bias.
    weights : tuple of ExpertTensor
        Of the experts themselves.
    router : tuple of ExpertTensor
        Rows of the router and correction biases.
    parent : module
        What holds the experts and their router.
    fixed : str
        Why experts can not be cut; "" where they can.
    groups_visited : int
        Groups that a token may visit.
    gate_first : bool
        Whether the gate multiplies what enters an expert, instead of what it gives.
    """

    path: str
    module: nn.Module
    count: int
    width: int
    top_k: int
    n_groups: int
    gated: bool
    transposed: bool
    interleaved: bool
    has_bias: bool
    weights: tuple[ExpertTensor, ...]
    router: tuple[ExpertTensor, ...]
    parent: nn.Module
    fixed: str = ""
    groups_visited: int = 1
    gate_first: bool = False


@dataclass(frozen=True)
class ExpertLayer:
    """One block: MLPs that every token passes, and routed experts (None in a dense block).

    A block of attention or a state space alone has neither: no neurons.
    """

    index: int
    path: str
    block: nn.Module
    shared: tuple[Mlp, ...]
    routed: Routed | None

    @property
    def attention(self) -> None:
        """Of a mixture of experts heads are not looked at."""

    @property
    def expert_widths(self) -> tuple[int, ...]:
        """Neurons of each expert, shared ones first."""
        routed = () if self.routed is None else (self.routed.width,) * self.routed.count
        return (*(mlp.width for mlp in self.shared), *routed)

    @property
    def width(self) -> int:
        """Neurons of all experts together."""
        return sum(self.expert_widths)


@dataclass(frozen=True)
class ExpertAnatomy:
    """Where a mixture of experts keeps its neurons: one `ExpertLayer` a block."""

    family: str
    layers: list[ExpertLayer] = field(repr=False)

    @cached_property
    def space(self) -> NeuronSpace:
        """All neurons: a layer's experts side by side in its slice, shared ones first."""
        return NeuronSpace([x.width for x in self.layers], experts=[x.expert_widths for x in self.layers])

    @property
    def widths(self) -> tuple[int, ...]:
        """Neurons per layer."""
        return tuple(layer.width for layer in self.layers)

    @property
    def routed(self) -> Iterator[tuple[int, Routed]]:
        """Number and routed experts of the layers that have them."""
        return ((layer.index, layer.routed) for layer in self.layers if layer.routed is not None)


GATE_FIRST = {"Llama4TextExperts"}
"""Classes of experts that get every token once an expert, multiplied with its gate: ``(experts * tokens, hidden)``."""
_BLOCKS: WeakKeyDictionary[nn.Module, Callable[[], nn.Module | None]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Layout:
    """How experts keep their weights; see `Routed`."""

    gated: bool
    transposed: bool
    interleaved: bool
    has_bias: bool
    gate_first: bool = False
    normed: bool = False

    @classmethod
    def of(cls, module: nn.Module) -> Layout:
        """Of a module for which `is_experts` is true."""
        m: Any = module
        if type(m).__name__ in GATE_FIRST:
            return cls(gated=True, transposed=True, interleaved=False, has_bias=False, gate_first=True)
        normed = bool(getattr(m, "has_post_expert_norm", False))
        return cls(
            bool(m.has_gate), bool(m.is_transposed), not bool(m.is_concatenated), bool(m.has_bias), normed=normed
        )


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds routed experts on the common interface of transformers, or those of Llama-4."""
    down = getattr(module, "down_proj", None)
    known = all(hasattr(module, n) for n in ("has_gate", "is_transposed", "has_bias", "_apply_gate"))
    return (known or type(module).__name__ in GATE_FIRST) and isinstance(down, Tensor) and down.ndim == 3


ROW = 16  # bytes: what a row of a matrix must be a multiple of, for torch to multiply groups of them at once


def multiplies_in_groups(module: nn.Module) -> bool:
    """Whether torch can multiply the matrices of routed experts in groups; stock transformers does not look."""
    weight = module.down_proj
    assert isinstance(weight, Tensor)
    return not any(n * weight.element_size() % ROW for n in weight.shape[1:])


def block_of(module: nn.Module) -> nn.Module:
    """What holds experts and their router, once their anatomy was looked up."""
    found = _BLOCKS[module]()
    assert found is not None
    return found


def has_experts(model: nn.Module) -> bool:
    """Whether a model has routed experts that `expert_anatomy` may know."""
    return any(is_experts(module) for module in model.modules())


def widths_of(model: nn.Module) -> tuple[int, ...]:
    """Neurons of every layer, of a dense model or of a mixture of experts."""
    return expert_anatomy(model).widths if has_experts(model) else anatomy(model).widths


def expert_anatomy(model: nn.Module) -> ExpertAnatomy:
    """Find the experts of a model.

    Parameters
    ----------
    model : torch.nn.Module
        A mixture of experts of transformers.

    Returns
    -------
    ExpertAnatomy

    Raises
    ------
    InputError
        If there are none, or they or what is beside them is of no known layout; says what.
    """
    name = type(model).__name__
    refuse_spread(model, f"model {name}, a mixture of experts")
    stacks = [
        (path, list(module))
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and not TOWERS & set(path.split("."))
        and any(is_experts(m) for m in module.modules())
        and not any(is_experts(m) for m in module)
    ]
    if not stacks:
        named = [f"{type(m).__name__} at {p}" for p, m in model.named_modules() if "Experts" in type(m).__name__]
        theirs = f"its own ({named[0]})" if named else "its experts, if it has any,"
        raise InputError(
            f"model {name} has no routed experts on the common interface of transformers: {theirs} are of no known "
            "layout"
        )
    if len(stacks) > 1:
        raise InputError(
            f"model {name} has {len(stacks)} stacks of blocks with experts ({', '.join(p for p, _ in stacks)}): pass "
            f"the one to look at, e.g. model.get_submodule('{stacks[0][0].rpartition('.')[0]}')"
        )
    path, blocks = stacks[0]
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    layers = [_layer(name, i, f"{path}.{i}", block, text) for i, block in enumerate(blocks)]
    return ExpertAnatomy(str(getattr(text, "model_type", name)), layers)


def _layer(model: str, index: int, path: str, block: nn.Module, config: object) -> ExpertLayer:
    found = [(p, m) for p, m in block.named_modules() if is_experts(m)]
    if len(found) > 1:
        raise InputError(f"model {model}: {path} holds {len(found)} sets of experts ({', '.join(p for p, _ in found)})")
    inside = [p for p, _ in found]
    mlps, known = _mlps(path, block, inside)
    routed, ours = _routed(path, block, *found[0], config) if found else (None, [])
    _refuse_rest(model, path, block, [*inside, *known, *ours])
    if len(mlps) > 1:
        raise InputError(
            f"model {model}: {path} has {len(mlps)} MLPs beside its experts ({', '.join(m.path for m in mlps)}): this "
            "mixture of experts is of no known layout"
        )
    return ExpertLayer(index, path, block, tuple(mlps), routed)


def _mlps(path: str, block: nn.Module, experts: Sequence[str]) -> tuple[list[Mlp], list[str]]:
    """MLPs of a block outside its experts, and the paths of their linear layers."""
    mlps, known = [], []
    for name, module in block.named_modules():
        if any(name == e or name.startswith(f"{e}.") for e in experts) or OUTSIDE.search(_own(block, name)):
            continue
        for gate, up, down in MLPS:
            names = [n for n in (gate, up) if n]
            parts = [(get(module, n), n) for n in names]
            into = get(module, down)
            if into is None or not is_linear(into) or any(m is None or not is_linear(m) for m, _ in parts):
                continue
            prefix = f"{path}.{name}" if name else path
            linear = [(m, n) for m, n in parts if m is not None]
            inputs, output = mlp_of(prefix, into, down, linear)
            mlps.append(Mlp(prefix, inputs, output))
            known += [f"{name}.{n}" if name else n for n in {*names, down}]
            break
    return mlps, known


def _own(block: nn.Module, name: str) -> str:
    """A path without the name of Nemotron-H's only part, where that is neither attention nor a state space."""
    if OUTSIDE.search(type(getattr(block, "mixer", None)).__name__):
        return name
    return name.removeprefix("mixer.") if name != "mixer" else ""


def _routed(path: str, block: nn.Module, name: str, module: nn.Module, config: object) -> tuple[Routed, list[str]]:
    m: Any = module
    layout = Layout.of(module)
    transposed, gated = layout.transposed, layout.gated
    count = int(m.down_proj.shape[0])
    width = int(m.down_proj.shape[1 if transposed else 2])
    rows = m.gate_up_proj if gated else m.up_proj
    full = f"{path}.{name}"
    wanted = width * (2 if gated else 1)
    if rows.ndim != 3 or rows.shape[0] != count or rows.shape[2 if transposed else 1] != wanted:
        raise InputError(
            f"{full}: weights of {tuple(rows.shape)} and {tuple(m.down_proj.shape)} are of no known layout"
        )
    dtypes = {p.dtype for p in m.parameters()}
    if not dtypes <= FLOATS:
        raise InputError(f"{full} is quantized ({', '.join(map(str, dtypes))}): load the model in floating point")
    weights = tuple(ExpertTensor(m, n, 0, f"{full}.{n}") for n, p in m.named_parameters() if p.shape[:1] == (count,))
    if len(weights) != len(list(m.named_parameters())):
        raise InputError(f"{full} holds more than one entry an expert: it is of no known layout")
    parent_name = name.rpartition(".")[0]
    parent: Any = block.get_submodule(parent_name) if parent_name else block
    router, ours, fixed = _router(f"{path}.{parent_name}" if parent_name else path, parent, count)
    owners = [*(t.owner for t in router), parent, config]
    top_k = _whole(owners, ("top_k", *TOP_K))
    if top_k is None:
        raise InputError(f"{full}: how many experts a token visits is said nowhere")
    prefix = f"{parent_name}." if parent_name else ""
    routed = Routed(
        full, m, count, width, top_k, _whole(owners, GROUPS) or 1, gated, transposed, layout.interleaved,
        layout.has_bias, weights, router, parent, fixed, _whole(owners, ("topk_group", "n_limited_groups")) or 1,
        layout.gate_first,
    )  # fmt: skip
    _BLOCKS[module] = ref(parent)
    return routed, [f"{prefix}{n}" for n in ours]


ROUTER = re.compile(r"^(gate|router|expert_bias|e_score_correction_bias|shared_expert_gate)(\.|$)")


def _router(path: str, parent: nn.Module, count: int) -> tuple[tuple[ExpertTensor, ...], list[str], str]:
    """What has one entry an expert beside the experts, all names that belong to the router, and why it is fixed."""
    found, names, fixed = [], [], ""
    for name, tensor in [*parent.named_parameters(), *parent.named_buffers()]:
        if not ROUTER.match(name):
            continue
        names.append(name)
        if name.startswith("shared_expert_gate"):
            continue
        *above, last = name.split(".")
        owner = parent.get_submodule(".".join(above))
        if name.endswith("weight") and tensor.ndim == 2 and len(tensor) == count:
            found.append(ExpertTensor(owner, last, 0, f"{path}.{name}"))
        elif tensor.is_floating_point() and tensor.numel() == count and tensor.shape[-1] == count:
            found.append(ExpertTensor(owner, last, tensor.ndim - 1, f"{path}.{name}"))
        elif tensor.numel() > 1 and not (name.endswith("scale") and tensor.ndim == 1):  # of what enters (Gemma 4)
            fixed = fixed or f"its router has {name} {tuple(tensor.shape)}, which is not one entry an expert"
    rows = [t for t in found if t.value.ndim == 2 and t.axis == 0]
    if not fixed and len(rows) != 1:
        fixed = f"its router has {len(rows)} matrices with one row an expert"
    return tuple(found), names, fixed


# What stands before or behind attention and experts: norms, the mixing of several residual streams (hyper-connections),
# the projections into and out of the space that experts work in (Nemotron-3), embeddings of each layer (Gemma 3n).
AROUND = re.compile(
    r"norm|(^|[._])hc([._]|$)|hyper_connection|^(mixer\.)?fc[12]_latent_proj\.|^per_layer_(input_gate|projection)\."
)


def _refuse_rest(model: str, path: str, block: nn.Module, known: Sequence[str]) -> None:
    """Refuse a matrix outside attention, norms and what is known."""
    for name, p in block.named_parameters():
        mine = any(name == k or name.startswith(f"{k}.") for k in known)
        if p.ndim > 1 and not mine and not OUTSIDE.search(_own(block, name)) and not AROUND.search(name):
            raise InputError(
                f"model {model}: {path}.{name} {tuple(p.shape)} is neither part of an attention, a router, an expert "
                "nor an MLP of known names: this mixture of experts is of no known layout"
            )


def _whole(owners: Sequence[object], names: Sequence[str]) -> int | None:
    for owner in owners:
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None

"""The class that a `remote-code` folder carries, for people without llmbrain."""

from __future__ import annotations

import inspect
from pathlib import Path
from string import Template
from typing import Any

from torch import Tensor, nn

from llmbrain._files import read_json, write_json, write_text
from llmbrain._validation import InputError
from llmbrain.anatomy.experts import has_experts
from llmbrain.anatomy.families import anatomy
from llmbrain.anatomy.nothing import Nothing
from llmbrain.anatomy.surgery import ConfigOfLayer
from llmbrain.anatomy.units import HEADS
from llmbrain.checkpoints.shapes import OURS, STANDARD, build_empty, own_layers, stock_config, text_config

FILE = "modeling_pruned.py"

CODE = Template('''"""$base whose layers differ in size (`per_layer_config` in config.json). Written by llmbrain."""

import torch
from torch import nn
from transformers import $imported

# what llmbrain says of single layers; the rest of per_layer_config is the family's own
OURS = $ours

# module: {parameter: its shape}, where they are not those of the stock class
PARAMETERS = $parameters

# the same of buffers that are saved (a router's correction bias)
BUFFERS = $buffers

# modules that the stock class has and this one has not
DROPPED = $dropped

# module: what it notes about its own size
ATTRIBUTES = $attributes

# module: what its config says otherwise than that of the model
CONFIGS = $configs

# parts of blocks that are not there: what they are to know
NOTHING = $nothing

# linear layers of such parts: the shape of what is left
EMPTY = $empty

$code_of_nothing

class ConfigOfLayer:
    """The model's config as one layer sees it."""

    def __init__(self, config, own):
        self.__dict__.update(_config=config, own=own, **own)

    def __getattr__(self, name):
        if name.startswith("__") or name == "_config":
            raise AttributeError(name)
        return getattr(self._config, name)


class Pruned:
    PREFIX = ""  # where the names of the tables begin in this class

    @classmethod
    def is_custom_code(cls):
        return False  # all that needs initial values is stock: buffers that a parent fills are skipped otherwise

    def __init__(self, config, *args, **kwargs):
        text = config.get_text_config()
        layers = text.to_dict().get("per_layer_config") or {}
        own = {int(i): {n: v for n, v in entry.items() if n not in OURS} for i, entry in layers.items()}
        own = {i: entry for i, entry in own.items() if entry}
        text.per_layer_config = own or None  # the stock class refuses a config whose layers differ
        try:
            super().__init__(config, *args, **kwargs)
        finally:
            if layers and not own:
                text.per_layer_config = layers
        for name in DROPPED:
            if name.startswith(self.PREFIX):
                parent, _, child = name[len(self.PREFIX):].rpartition(".")
                delattr(self.get_submodule(parent), child)
        for name, known in self.mine(NOTHING):
            module = self.get_submodule(name)
            for parameter in list(module._parameters):
                module._parameters[parameter] = None
            module.nothing = known
            module.__class__ = type("Dropped" + type(module).__name__, (Nothing, type(module)), {})
        for name, shape in self.mine(EMPTY):
            module = self.get_submodule(name)
            value = module._parameters.pop("weight").new_empty(shape)
            module.register_buffer("weight", value, persistent=False)
            module.bias = None
        for name, shapes in self.mine(PARAMETERS):
            module = self.get_submodule(name)
            like = next(module.parameters(recurse=False))
            for parameter, shape in shapes.items():
                value = torch.zeros(shape, dtype=like.dtype, device=like.device)
                setattr(module, parameter, nn.Parameter(value))
        for name, shapes in self.mine(BUFFERS):
            module = self.get_submodule(name)
            for buffer, shape in shapes.items():
                module._buffers[buffer] = module._buffers[buffer].new_zeros(shape)
        for name, values in self.mine(ATTRIBUTES):
            for attribute, value in values.items():
                setattr(self.get_submodule(name), attribute, value)
        for name, values in self.mine(CONFIGS):
            module = self.get_submodule(name)
            module.config = ConfigOfLayer(module.config, values)

    def mine(self, table):
        return [(name[len(self.PREFIX):], values) for name, values in table.items() if name.startswith(self.PREFIX)]
$classes''')

CLASS = Template("""

class Pruned$base(Pruned, $base):
    PREFIX = $prefix
""")


def write_remote_code(model: nn.Module, path: Path) -> None:
    """Put the class into a folder that `save_pretrained` wrote, and point its config to it."""
    base = type(model).__name__
    stock = dict(build_empty(type(model), stock_config(model.config)).named_modules())
    kinds = ("parameters", "buffers", "attributes", "configs", "nothing", "empty")
    tables: dict[str, dict[str, Any]] = {kind: {} for kind in kinds}
    names = set()
    for name, module in model.named_modules():
        names.add(name)
        if isinstance(module, Nothing):
            tables["nothing"][name] = dict(module.nothing)
        if isinstance(left := module._buffers.get("weight"), Tensor) and not left.numel():
            tables["empty"][name] = list(left.shape)
        if name not in stock:  # made while the model ran
            if any(True for _ in module.parameters(recurse=False)):
                raise InputError(f"format='remote-code': a plain {base} has no module {name}")
            continue
        ours, theirs = _parameters(module), _parameters(stock[name])
        changed = {k: shape for k, shape in ours.items() if theirs.get(k) != shape}
        if changed:
            tables["parameters"][name] = changed
        saved = {k: shape for k, shape in _buffers(module).items() if _buffers(stock[name]).get(k, shape) != shape}
        if saved:
            tables["buffers"][name] = saved
        sizes = {k: v for k, v in vars(module).items() if type(v) is int and vars(stock[name]).get(k) != v}
        if sizes:
            tables["attributes"][name] = sizes
        config = getattr(module, "config", None)
        if isinstance(config, ConfigOfLayer):
            tables["configs"][name] = dict(config.own)
    dropped = [n for n in stock if n not in names and n.rpartition(".")[0] in names and _has_weights(stock[n])]
    bases = {base: ""} | _inner(model)
    # Where the family itself tells layers apart (Gemma 4's head_dim), the standard names are its own.
    ours_here = OURS if own_layers(model.config) is not None else (*OURS, *STANDARD)
    code = CODE.substitute(
        base=base, imported=", ".join(sorted(bases)), ours=repr(ours_here), dropped=repr(dropped),
        code_of_nothing=f"from typing import Any\n\n\n{inspect.getsource(Nothing)}" if tables["nothing"] else "",
        classes="".join(CLASS.substitute(base=n, prefix=repr(prefix)) for n, prefix in bases.items()),
        **{k: _literal(table) for k, table in tables.items()},
    )  # fmt: skip
    write_text(path / FILE, code)
    config = read_json(path / "config.json")
    if base.endswith("ForMaskedLM"):
        auto = "AutoModelForMaskedLM"
    else:
        auto = "AutoModelForCausalLM" if base.endswith(("ForCausalLM", "LMHeadModel")) else "AutoModel"
    module = FILE.removesuffix(".py")
    config["auto_map"] = {auto: f"{module}.Pruned{base}"}
    # vLLM builds the model without its head, by AutoModel.from_config
    config["auto_map"].setdefault("AutoModel", f"{module}.Pruned{list(bases)[-1]}")
    _say_standard(model, config)
    write_json(path / "config.json", config, indent=2)


def _inner(model: Any) -> dict[str, str]:
    """Class of the model without its head, and where it lies."""
    import transformers

    inner = getattr(model, "base_model", model)
    return (
        {}
        if inner is model or not hasattr(transformers, type(inner).__name__)
        else {type(inner).__name__: f"{model.base_model_prefix}."}
    )


def _say_standard(model: nn.Module, config: dict[str, Any]) -> None:
    """Sizes of every layer by the names that other programs read, where layers differ and the family says nothing."""
    text = config.get("text_config", config)
    entries = text.get("per_layer_config")
    if not entries or own_layers(model.config) is not None or has_experts(model):
        return
    layers = anatomy(model).layers
    head_dim = max(layer.head_dim for layer in layers)
    kind = type(text_config(model.config))
    divides = isinstance(getattr(kind, "head_dim", None), property)  # Falcon divides by the number of heads
    for i, layer in enumerate(layers):
        entry = entries.setdefault(str(i), {})
        entry["intermediate_size"] = layer.width
        if layer.n_kv_heads or (HEADS.is_gone(layer) and not divides):
            for name, value in zip(STANDARD, (layer.n_heads, layer.n_kv_heads, layer.head_dim or head_dim)):
                if not isinstance(getattr(kind, name, None), property):
                    entry[name] = value
                    if value:
                        text.setdefault(name, value)  # Qwen2 has no head_dim of its own
    text["allow_global_per_layer_attribute_access"] = True  # stock code reads the model's own, as it always did


def _has_weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _parameters(module: nn.Module) -> dict[str, list[int]]:
    return {name: list(p.shape) for name, p in module.named_parameters(recurse=False)}


def _buffers(module: nn.Module) -> dict[str, list[int]]:
    temporary = module._non_persistent_buffers_set
    return {name: list(b.shape) for name, b in module.named_buffers(recurse=False) if name not in temporary}


def _literal(table: dict[str, Any]) -> str:
    return "{\n" + "".join(f"    {name!r}: {value!r},\n" for name, value in table.items()) + "}"

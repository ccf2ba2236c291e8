"""The class that a `remote-code` folder carries, for people without llmbrain."""

from __future__ import annotations

import json
from pathlib import Path
from string import Template
from typing import Any

from torch import nn

from llmbrain.checkpoints.shapes import build_empty, stock_config

FILE = "modeling_pruned.py"

CODE = Template('''"""$base whose layers differ in size (`per_layer_config` in config.json). Written by llmbrain."""

import torch
from torch import nn
from transformers import $base

# module: (shape of its weight, whether it has a bias, along which axis of the weight the bias runs)
WEIGHTS = $weights

# module: what it notes about its own size
ATTRIBUTES = $attributes


class Pruned$base($base):
    def __init__(self, config, *args, **kwargs):
        text = config.get_text_config()
        layers = text.to_dict().get("per_layer_config")
        text.per_layer_config = None  # the stock class refuses a config whose layers differ
        try:
            super().__init__(config, *args, **kwargs)
        finally:
            text.per_layer_config = layers
        for name, (shape, has_bias, axis) in WEIGHTS.items():
            module = self.get_submodule(name)
            like = {"dtype": module.weight.dtype, "device": module.weight.device}
            module.weight = nn.Parameter(torch.empty(shape, **like))
            module.bias = nn.Parameter(torch.zeros(shape[axis], **like)) if has_bias else None
        for name, values in ATTRIBUTES.items():
            for attribute, value in values.items():
                setattr(self.get_submodule(name), attribute, value)
''')


def write_remote_code(model: nn.Module, path: Path) -> None:
    """Put the class into a folder that `save_pretrained` wrote, and point its config to it."""
    base = type(model).__name__
    weights: dict[str, tuple[list[int], bool, int]] = {}
    attributes: dict[str, dict[str, int]] = {}
    stock = dict(build_empty(type(model), stock_config(model.config)).named_modules())
    for name, module in model.named_modules():
        ours, theirs = _parameters(module), _parameters(stock[name])
        if ours != theirs:
            flipped = type(module).__name__ == "Conv1D"
            weights[name] = (ours["weight"], "bias" in ours, 1 if flipped else 0)
        sizes = {k: v for k, v in vars(module).items() if type(v) is int and vars(stock[name]).get(k) != v}
        if sizes:
            attributes[name] = sizes
    code = CODE.substitute(base=base, weights=_literal(weights), attributes=_literal(attributes))
    (path / FILE).write_text(code, encoding="utf-8")
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    if base.endswith("ForMaskedLM"):
        auto = "AutoModelForMaskedLM"
    else:
        auto = "AutoModelForCausalLM" if base.endswith(("ForCausalLM", "LMHeadModel")) else "AutoModel"
    config["auto_map"] = {auto: f"{FILE.removesuffix('.py')}.Pruned{base}"}
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _parameters(module: nn.Module) -> dict[str, list[int]]:
    return {name: list(p.shape) for name, p in module.named_parameters(recurse=False)}


def _literal(table: dict[str, Any]) -> str:
    return "{\n" + "".join(f"    {name!r}: {value!r},\n" for name, value in table.items()) + "}"

"""What was saved loads: a folder is opened in its format's own way and held against the model in memory."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmbrain._validation import InputError
from llmbrain.checkpoints.gguf_reading import norms_that_nothing_reads, read_written
from llmbrain.checkpoints.loading import load_pruned
from llmbrain.checkpoints.remote import FILE
from llmbrain.hooks.experts import run_one_by_one
from llmbrain.hooks.text import evaluating, evaluation_mode, input_device

N_TOKENS = 8  # of the pass that is compared
CLOSE = {torch.float64: 1e-6, torch.float32: 1e-3}  # of the largest number; rounding only
ANSWER_OF_ROUNDED = 0.3  # the same where every weight was rounded; the weights themselves are compared closely
CLOSE_HALF = 5e-2  # of 16-bit models, which add up in another order elsewhere


def answer(model: Any) -> Tensor:
    """What a model says to a few tokens, on the CPU.

    Raises
    ------
    InputError
        If it can not read them.
    """
    n = next((p.shape[0] for p in model.get_input_embeddings().parameters()), N_TOKENS + 1)
    ids = (torch.arange(1, N_TOKENS + 1) % n)[None].to(input_device(model))
    try:
        with evaluating(model):
            out = model(input_ids=ids)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise InputError(
            f"model {type(model).__name__} cannot run ({type(error).__name__}: {error}): it is not saved, since it "
            "could not be compared with what is loaded (verify=False saves it all the same)"
        ) from error
    value = getattr(out, "logits", None)
    value = out[0] if value is None else value
    while not isinstance(value, Tensor):
        value = value[0]
    return value.detach().cpu()


def check_loads(model: nn.Module, said: Tensor, folder: Path, format: str) -> None:
    """Open what was written, and compare shapes and one forward pass.

    Parameters
    ----------
    model : module
        What was written.
    said : Tensor
        Its `answer`.
    folder : Path
    format : str

    Raises
    ------
    InputError
        If a tensor has another shape, or the loaded model says something else.
    """
    loaded = _open(model, folder, format)
    if format in ("per-layer", "remote-code"):
        ours = {name: tuple(p.shape) for name, p in model.named_parameters()}
        theirs = {name: tuple(p.shape) for name, p in loaded.named_parameters()}
        for name in sorted(ours.keys() | theirs.keys()):
            if ours.get(name) != theirs.get(name):
                raise InputError(
                    f"format={format!r}: saved and loaded again, {name} has shape {theirs.get(name)} for "
                    f"{ours.get(name)}: this model cannot be saved so"
                )
    loaded.to(input_device(model))
    got = answer(loaded)
    error = float((got.double() - said.double()).abs().max()) if got.shape == said.shape else float("nan")
    size = max(1.0, float(said.double().abs().max()))
    if not error <= CLOSE.get(said.dtype, CLOSE_HALF) * size:
        raise InputError(
            f"format={format!r}: saved and loaded again, the model says something else (difference {error:.2g} of "
            f"{size:.2g}): this model cannot be saved so"
        )


ROUNDED = {"f32": 1e-6, "f16": 1e-3, "bf16": 1e-2, "q8_0": 1e-2}
"""How far a stored number may lie from the model's, relative to the largest of its tensor (or to 1)."""


def check_gguf(model: nn.Module, said: Tensor, file: Path, gguf_type: str) -> None:
    """Read a written GGUF back: every tensor within what its type rounds, and one forward pass that says the same.

    Parameters
    ----------
    model : module
        What was written.
    said : Tensor
        Its `answer`.
    file : Path
    gguf_type : str

    Raises
    ------
    InputError
        Naming the tensor.
    """
    loaded: Any = read_written(file)
    ours, theirs = model.state_dict(), loaded.state_dict()
    idle = norms_that_nothing_reads(model, list(ours))
    for name in sorted((ours.keys() | theirs.keys()) - idle):
        if name not in ours or name not in theirs or ours[name].shape != theirs[name].shape:
            raise InputError(f"format='gguf': written and read again, {name} is not what it was: nothing was written")
        mine, read = ours[name].detach().float().cpu(), theirs[name].float()
        size = max(1.0, float(mine.abs().max())) if gguf_type == "f32" else float(mine.abs().max())
        apart = float((mine - read).abs().max())
        if not apart <= ROUNDED[gguf_type] * size:
            raise InputError(
                f"format='gguf': written and read again, {name} is off by {apart:.2g} of {size:.2g}: nothing was "
                "written"
            )
    got = answer(loaded)
    size = max(1.0, float(said.double().abs().max()))
    error = float((got.double() - said.double()).abs().max()) if got.shape == said.shape else float("nan")
    # What is read computes in float32: a model of 16 bits says the same only as far as these reach.
    exact = gguf_type == "f32" and said.dtype in CLOSE
    if not error <= (CLOSE[torch.float32] if exact else ANSWER_OF_ROUNDED) * size:
        raise InputError(
            f"format='gguf': written and read again, the model says something else (difference {error:.2g} of "
            f"{size:.2g}): nothing was written"
        )


def _open(model: nn.Module, folder: Path, format: str) -> nn.Module:
    if format == "per-layer":
        return load_pruned(folder)[0]
    model_class: Any = _class_of_folder(folder) if format == "remote-code" else type(model)
    loaded, found = model_class.from_pretrained(folder, output_loading_info=True, dtype="auto")
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(str(key) for key in found.get(kind) or [])
        if names:
            raise InputError(f"format={format!r}: saved and loaded again, {names[0]} is among the {kind}")
    run_one_by_one(loaded)
    return evaluation_mode(loaded)


def _class_of_folder(folder: Path) -> Any:
    """The class that the folder's own code defines, as transformers finds it, but without a copy in its cache."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    name = next(iter(config["auto_map"].values())).rpartition(".")[2]
    spec = importlib.util.spec_from_file_location(f"llmbrain_saved_{abs(hash(folder))}", folder / FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # transformers asks for the module of a class
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    return getattr(module, name)

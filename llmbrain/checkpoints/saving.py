"""Save a pruned model in one of six formats."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmbrain._files import read_json, refuse_other, still_free, transaction, write_json
from llmbrain._validation import InputError, check_option, check_whole, shown
from llmbrain._version import __version__
from llmbrain.anatomy.experts import expert_anatomy, has_experts
from llmbrain.anatomy.families import LayerAnatomy, Projection, anatomy
from llmbrain.anatomy.offload import check_in_memory
from llmbrain.anatomy.surgery import check_no_adapter
from llmbrain.anatomy.units import HEADS
from llmbrain.checkpoints.expert_shapes import record_expert_shapes, shapes_text
from llmbrain.checkpoints.expert_stock import stock_mixture
from llmbrain.checkpoints.gguf_writing import GGUF_TYPES, check_folder_path, check_gguf_path, target_of, write_gguf
from llmbrain.checkpoints.loading import PROVENANCE
from llmbrain.checkpoints.proof import answer, check_gguf, check_loads
from llmbrain.checkpoints.remote import write_remote_code
from llmbrain.checkpoints.shapes import (
    RECORD,
    build_empty,
    layer_shapes,
    record_shapes,
    set_widths,
    shapes_of,
    stock_config,
    text_config,
)
from llmbrain.checkpoints.shrinking import kept_layers, prefixes_of_nothing, renumber, shrink_config
from llmbrain.hooks.change import refuse_changed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODEL = "a model"  # what is put into a folder, as `llmbrain._files.contents` calls it
FORMATS = ("per-layer", "remote-code", "uniform", "padded", "masked", "gguf")


def save_pruned(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    path: str | Path,
    *,
    format: str = "per-layer",
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    multiple_of: int = 1,
    gguf_type: str = "f16",
    like: str | Path | None = None,
    verify: bool = True,
    note: Mapping[str, Any] | None = None,
    beside: Callable[[Path], object] | None = None,
) -> Path:
    """Write a model to a folder, or to a GGUF file, that loads again.

    Parameters
    ----------
    model : transformers model
        Pruned or not.
    tokenizer : tokenizer or None
        Saved beside it.
    path : str or Path
    format : str
        ``"per-layer"``: widths in ``per_layer_config``; `load_model` and `load_pruned` open it. ``"remote-code"``: the
        same and a class in the folder; plain transformers open it with ``trust_remote_code=True``. ``"uniform"``: an
        ordinary checkpoint; needs one width in all layers (those that were dropped whole are left out). ``"padded"``:
        an ordinary checkpoint, with zeros up to the widest layer. ``"masked"``: an ordinary checkpoint with the shapes
        of the uncut model and zeros where neurons were. ``"gguf"``: one file for llama.cpp; see `write_gguf`.
    max_shard_size : int or str
        Bytes in one safetensors file, e.g. ``"5GB"``.
    overwrite : bool
        Replace a model that is there already.
    multiple_of : int
        With ``"padded"``, the width is rounded up to a multiple of it.
    gguf_type : {"f32", "f16", "bf16", "q8_0"}
        With ``"gguf"``, what matrices are stored as.
    like : str or Path, optional
        With ``"gguf"``, a GGUF of the dense model whose tokenizer is taken.
    verify : bool
        Open what was written in the format's own way, and compare shapes and one forward pass with `model`, before it
        is put into its place. Needs memory for a second copy.
    note : dict, optional
        More entries of ``pruning.json`` (of the record in a GGUF): JSON values.
    beside : callable, optional
        Called with a folder, to write more files of the same set: all of it gets into its place, or none. Not for GGUF.

    Returns
    -------
    Path
        The file, or the folder: config, weights, generation config, tokenizer and ``pruning.json`` (what was cut,
        with which calibration and versions).

    Raises
    ------
    FileExistsError
        If the folder holds a model already.
    InputError
        If it holds a study, a scan or the like; if the format can not hold this model, it carries an adapter, cannot
        run, or what was written does not load as the same model; nothing is written.
    """
    import transformers

    refuse_changed(model, "save_pruned")
    check_option("format", format, FORMATS)
    path = Path(path)
    check_whole("multiple_of", multiple_of, 1)
    check_option("gguf_type", gguf_type, GGUF_TYPES)
    if not isinstance(max_shard_size, str):
        check_whole("max_shard_size", max_shard_size, 1)
    elif not re.fullmatch(r"(?i)(?=.*[1-9])\d+(\.\d+)?\s*[TGMK]B", max_shard_size):
        raise InputError(f"max_shard_size={shown(max_shard_size)} must be a size such as '5GB', or a number of bytes")
    if format == "gguf":
        return _save_gguf(model, tokenizer, path, gguf_type, like, overwrite, note or {}, verify)
    if like is not None:
        raise InputError(f"like={str(like)!r} is for format='gguf', this is format={format!r}")
    check_folder_path(path, format)
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file, not a folder")
    if (path / "config.json").exists() and not overwrite:
        raise FileExistsError(f"{path} holds a model already: give another folder, or overwrite=True")
    refuse_other(path, MODEL)
    _check_saveable(model)
    name = type(model).__name__
    if format in ("per-layer", "remote-code") and not hasattr(transformers, name):
        raise InputError(
            f"format={format!r}: transformers loads no {name} by its name: save the model that it is part of"
        )
    mixture = has_experts(model)
    said = answer(model) if verify else None
    if mixture:
        record_expert_shapes(model)
    else:
        record_shapes(model)
    if mixture and format == "uniform" and layer_shapes(model.config):
        raise InputError(
            f"format='uniform': the config of {name} cannot say the shapes of these experts ({shapes_text(model)}): "
            "use 'per-layer'"
        )
    exported: Any = model
    if mixture and format in ("padded", "masked"):
        exported = stock_mixture(model, format, multiple_of)
    elif mixture:
        pass  # the config says it all
    elif format == "uniform":
        exported = _stock_copy(model, format, width=_one_width(model), keep=kept_layers(model, format))
    elif format == "padded":
        widest = max(1, *anatomy(model).widths)  # an MLP of no neuron is none that a config says
        exported = _stock_copy(model, format, width=-(-widest // multiple_of) * multiple_of)
    elif format == "masked":
        exported = _stock_copy(model, format, width=None)
    needed = sum(p.numel() * p.element_size() for p in exported.parameters())
    free = partial(still_free, what=MODEL, mark="" if overwrite else "config.json")
    with transaction(path, replaces=OLD, needed=needed, free=free) as new:
        write_model(exported, new, format, max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        if format == "remote-code":
            write_remote_code(model, new)
        told = provenance(exported if format == "uniform" else model, format)
        write_json(new / PROVENANCE, told | dict(note or {}))
        if said is not None:
            check_loads(model, said, new, format)
        if beside is not None:
            beside(new)
    return path


def _check_saveable(model: nn.Module) -> None:
    if not hasattr(model, "save_pretrained"):
        raise InputError(f"model {type(model).__name__} is not a transformers model: it cannot be saved")
    check_in_memory(model, "save_pruned")
    check_no_adapter(model)


def _save_gguf(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    path: Path,
    gguf_type: str,
    like: str | Path | None,
    overwrite: bool,
    note: Mapping[str, Any],
    verify: bool,
) -> Path:
    if path.exists() and (path.is_dir() or not overwrite):
        raise FileExistsError(f"{path} exists already: give another name that ends in .gguf, or overwrite=True")
    _check_saveable(model)
    if has_experts(model):
        record_expert_shapes(model)
    else:
        record_shapes(model)
    record = provenance(model, "gguf") | dict(note)
    for cut in record["cuts"]:  # the file need not carry what only llmbrain's folders use
        cut.get("plan", {}).pop("scores", None)
    check: Callable[[Path], None] | None = None
    if verify:
        check_option("gguf_type", gguf_type, GGUF_TYPES)
        check_gguf_path(path)
        target_of(model)  # why there is no place for it, before the model is read
        said = answer(model)

        def check(file: Path) -> None:
            check_gguf(model, said, file, gguf_type)

    return write_gguf(
        model, tokenizer, path, gguf_type=gguf_type, like=like, record=record, check=check, overwrite=overwrite
    )


# What an earlier model leaves in a folder that is written anew.
OLD = (
    *("*.safetensors", "*.safetensors.index.json", "pytorch_model*", "generation_config.json", "modeling_*.py"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template.*"),
    "*.model",
)


def write_model(
    exported: Any, folder: Path, format: str, max_shard_size: int | str, state: dict[str, Tensor] | None = None
) -> None:
    """Config, weights (or those of `state`) and generation config; what is noted in the config thereby is undone."""
    config, generation = exported.config, getattr(exported, "generation_config", None)
    before = {name: getattr(config, name, None) for name in ("dtype", "architectures")}
    try:
        if generation is not None:  # transformers refuses to write what it read (no sampling, but a temperature)
            exported.generation_config = type(generation)()
        # Stock code renames old keys by the name of its class: what the folder's own class loads must have the new.
        exported.save_pretrained(
            folder, state_dict=state, max_shard_size=max_shard_size, save_original_format=format != "remote-code"
        )
    finally:
        if generation is not None:
            exported.generation_config = generation
        for name, value in before.items():
            setattr(config, name, value)
    if generation is not None and (folder / "generation_config.json").is_file():
        generation.to_json_file(folder / "generation_config.json", use_diff=True, keys_to_pop=["compile_config"])
    if format in ("per-layer", "remote-code") and layer_shapes(config):
        _rename(folder / "config.json")


def _rename(file: Path) -> None:
    """Layers that differ need a class of their own: programs that know the stock one by name must not take it."""
    record = read_json(file)
    record["architectures"] = [f"Pruned{name.removeprefix('Pruned')}" for name in record.get("architectures") or []]
    write_json(file, record, indent=2)


def provenance(model: nn.Module, format: str) -> dict[str, Any]:
    packages = {name: version(name) for name in ("torch", "transformers", "safetensors")}
    return {
        "format": format,
        "class": type(model).__name__,
        "widths": list((expert_anatomy(model) if has_experts(model) else anatomy(model)).widths),
        "versions": {"llmbrain": __version__, **packages},
        "cuts": getattr(model, RECORD, []),
    }


def _one_width(model: nn.Module) -> int:
    layers = [anatomy(model).layers[i] for i in kept_layers(model, "uniform")]
    widths = sorted({layer.width for layer in layers})
    if len(widths) > 1:
        raise InputError(
            f"format='uniform' needs one width in all layers, this model has {widths[0]} to {widths[-1]}: plan with "
            "allocation='uniform' and nothing protected, or use 'per-layer', 'remote-code', 'padded' or 'masked'"
        )
    cuts = getattr(model, RECORD, [])
    cut = any(record.get("kept_heads") is not None or record.get("indices") for record in cuts)
    if cut and len({layer.out.units for layer in layers if layer.out is not None}) > 1:
        raise InputError(
            "format='uniform' needs the same heads in all layers: use 'per-layer', 'remote-code', 'padded' or 'masked'"
        )
    return widths[0]


def _stock_copy(model: Any, format: str, *, width: int | None, keep: list[int] | None = None) -> nn.Module:
    """The same function in the shapes that a plain config builds, sharing what needs no change.

    With `keep` only these layers are there; the others hold nothing.
    """
    config = stock_config(model.config)
    text = text_config(config)
    cuts = getattr(model, RECORD, [])
    if width is None and any(cut.get("indices") for cut in cuts):
        raise InputError("format='masked' needs to know which neurons went: this model was cut without record_indices")
    layers = anatomy(model).layers
    before = cuts[0]["widths_before"] if cuts else [layer.width for layer in layers]
    if width is None and any("kept_layers" in cut for cut in cuts):
        raise InputError(f"format={format!r}: layers of this model were left out when it was saved: use another format")
    if keep is not None and len(keep) < len(layers):
        shrink_config(text, keep, len(layers))
        cuts = [*cuts, {"kept_layers": keep}]
        layers = [layers[i] for i in keep]
    target = list(before) if width is None else [width] * len(layers)
    _ask_for_biases(model, text)
    if width is not None:
        _ask_for_heads(model, text)
    padded = format == "padded"
    if [s["intermediate_size"] for s in shapes_of(type(model), config)] != target:
        set_widths(type(model), config, target)
    empty = build_empty(type(model), config)
    stock = anatomy(empty).layers
    if [s.width for s in stock] != target:
        raise InputError(
            f"format={format!r}: {type(model).__name__} has no config entry for the width of its MLP (it is always "
            f"{stock[0].width}): use 'per-layer', 'remote-code' or 'masked'"
        )
    if (
        width is not None
        and not padded
        and any(a.out is not None and b.out is not None and a.out.units != b.out.units for a, b in zip(layers, stock))
    ):
        raise InputError(
            f"format='uniform': the config of {type(model).__name__} cannot say that heads are fewer and no wider: use "
            "'per-layer', 'remote-code', 'padded' or 'masked'"
        )
    state = dict(model.state_dict())
    if len(layers) < len(anatomy(model).layers):
        state = renumber(state, layers)
    else:
        state |= _padded(layers, stock, None if padded else cuts if width is None else [])
    nothing = prefixes_of_nothing(model)
    for name, tensor in empty.state_dict().items():
        if (name.startswith(nothing) and keep is None) or (name not in state and name.endswith("bias")):
            state[name] = torch.zeros(tensor.shape, dtype=model.dtype)
        elif name not in state or state[name].shape != tensor.shape:
            raise InputError(
                f"format={format!r}: a plain {type(model).__name__} has {name} of shape {tuple(tensor.shape)}"
            )
    extra = sorted(set(state) - set(empty.state_dict()))
    if extra:
        raise InputError(
            f"format={format!r}: a plain {type(model).__name__} has no {extra[0]} (the intercept of the compensation): "
            "prune with intercept=False, or use 'per-layer' or 'remote-code'"
        )
    empty.load_state_dict(state, strict=True, assign=True)
    empty.tie_weights()
    if getattr(model, "generation_config", None) is not None:
        empty.generation_config = model.generation_config
    setattr(empty, RECORD, cuts)
    return empty


def _ask_for_heads(model: nn.Module, text: Any) -> None:
    """Say in the config how many heads there are, where it can say so without changing their size."""
    layer = max(anatomy(model).layers, key=lambda layer: layer.n_kv_heads)
    names = ("num_attention_heads", "num_key_value_heads", "head_dim")
    cut = layer.out is not None and layer.n_heads != getattr(text, "num_attention_heads", layer.n_heads)
    if cut and all(hasattr(text, name) for name in names):
        for name, value in zip(names, (layer.n_heads, layer.n_kv_heads, layer.head_dim)):
            setattr(text, name, value)


def _ask_for_biases(model: nn.Module, text: Any) -> None:
    """Compensation may have given the output projections a bias; some families have a switch for it."""
    for layer in anatomy(model).layers:
        if getattr(layer.down.module, "bias", None) is not None and hasattr(text, "mlp_bias"):
            text.mlp_bias = True
        if (
            layer.out is not None
            and getattr(layer.out.module, "bias", None) is not None
            and hasattr(text, "attention_bias")
        ):
            text.attention_bias = True


def _padded(
    layers: list[LayerAnatomy], stock: list[LayerAnatomy], cuts: list[dict[str, Any]] | None
) -> dict[str, Tensor]:
    """State-dict entries of the weights that were cut, with zeros where units are missing.

    Units stand where they stood before the `cuts`; None: one after the other, with the zeros behind them.
    """

    def places(name: str, i: int, units: int) -> Tensor | None:
        return torch.arange(units) if cuts is None else _kept(cuts, name, i)

    state: dict[str, Tensor] = {}
    for i, (small, full) in enumerate(zip(layers, stock)):
        jobs = [(small.neuron_projections, full.neuron_projections, places("kept", i, small.width))]
        if small.out is not None and full.out is not None and not HEADS.is_gone(small):
            heads = ((*small.heads, small.out), (*full.heads, full.out))
            jobs.append((*heads, places("kept_heads", i, small.out.units)))
        for smalls, fulls, kept in jobs:
            if kept is None or len(kept) == fulls[0].units:
                continue
            for name in ("weight", "bias"):
                _pad(state, smalls, fulls, kept, name)
    return state


def _kept(cuts: list[dict[str, Any]], name: str, layer: int) -> Tensor | None:
    """Original positions of the units that all cuts together left in a layer."""
    kept: Tensor | None = None
    for cut in cuts:
        if cut.get(name) is None:
            continue
        step = torch.tensor(cut[name][layer], dtype=torch.long)
        kept = step if kept is None else kept[step]
    return kept


def _pad(
    state: dict[str, Tensor], smalls: tuple[Projection, ...], fulls: tuple[Projection, ...], kept: Tensor, name: str
) -> None:
    for small, full in zip(smalls, fulls):
        value = getattr(small.module, name, None)
        if value is None or (name == "bias" and not small.is_output):
            continue
        key, axis = f"{full.path}.{name}", full.axis if name == "weight" else 0
        if key not in state:
            state[key] = torch.zeros(getattr(full.module, name).shape, dtype=value.dtype, device=value.device)
        rows = small.rows(range(small.units)).to(value.device)
        state[key].index_copy_(axis, full.rows(kept).to(value.device), value.detach().index_select(axis, rows))

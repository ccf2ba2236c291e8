"""GGUF files in: dequantized into ordinary linear layers, with their tokenizer, free of marks of quantization.

transformers reads the tensors; what it would pass over without a word (tensors and keys that it does not know, the
pre-tokenizer, Llama 3's rotary factors) is put right here or refused.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from llmbrain._files import clear_damage
from llmbrain._validation import InputError
from llmbrain.anatomy.experts import has_experts
from llmbrain.anatomy.families import anatomy
from llmbrain.anatomy.units import HEADS, NEURONS
from llmbrain.checkpoints import gguf_experts
from llmbrain.checkpoints.bounds import check_config
from llmbrain.checkpoints.expert_shapes import apply_expert_shapes
from llmbrain.checkpoints.gguf_configs import as_llama, complete, config_of_gemma, set_factors, set_scaling
from llmbrain.checkpoints.gguf_layout import (
    CLASS,
    CONFIG,
    NORM_OF_ATTENTION,
    PROVENANCE,
    ROPE_FACTORS,
    TARGETS,
    WHOLE,
    ZEROS_OF_ATTENTION,
    ZEROS_OF_MLP,
    Target,
    split_halves,
)
from llmbrain.checkpoints.gguf_mixtures import MIXTURES
from llmbrain.checkpoints.gguf_opening import MAGIC, first_line, open_gguf
from llmbrain.checkpoints.gguf_quiet import quiet
from llmbrain.checkpoints.gguf_rebuilding import load_tokenizer
from llmbrain.checkpoints.shapes import RECORD, apply_shapes, layer_shapes, stock_config, text_config
from llmbrain.checkpoints.shrinking import blocks_of, is_empty
from llmbrain.hooks.experts import run_one_by_one
from llmbrain.hooks.text import evaluation_mode

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_WHAT = "a GGUF file that can be read"


def is_gguf(path: str | Path) -> bool:
    """Whether a path names a GGUF file: by its ending, or by its first bytes."""
    path = Path(path)
    if path.suffix.lower() == ".gguf":
        return True
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == MAGIC


def load_gguf(
    path: str | Path, *, dtype: torch.dtype | str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a GGUF file as an ordinary model of transformers and its tokenizer.

    Parameters
    ----------
    path : str or Path
        A file of one part, of an architecture that transformers reads.
    dtype : torch.dtype or str, optional
        Of the dequantized weights; default float32.

    Returns
    -------
    (model, tokenizer)
        In evaluation mode. The tokenizer is that of a ``tokenizer.json`` beside the file where there is one, else it is
        rebuilt from the file, chat template included.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    InputError
        If the file is truncated, split, of an unknown architecture, holds what the model would not use, or its
        tokenizer cannot be rebuilt.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"GGUF file {path} does not exist")
    reader = open_gguf(path)
    with clear_damage(path, _WHAT):  # entries are decoded, and numbers compared, when they are asked for
        return _loaded(path, reader, dtype)


def _loaded(
    path: Path, reader: Any, dtype: torch.dtype | str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    fields = {name: field.contents() for name, field in reader.fields.items() if name.split(".")[-1] not in _LONG}
    architecture = str(fields.get("general.architecture", ""))
    if CONFIG in fields:
        model = _own_model(path, reader, fields, architecture, dtype)
    else:
        model = _foreign_model(path, reader, fields, architecture, dtype)
    for name, tensor in model.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise InputError(f"{path}: tensor {name} holds values that are not finite: the file is damaged")
    return evaluation_mode(model), load_tokenizer(path, reader, fields, int(config_vocabulary(model)))


def read_record(path: Path) -> dict[str, Any]:
    """What llmbrain noted in a file that it wrote: what was cut, and from what; empty for other files."""
    field = open_gguf(path).fields.get(PROVENANCE)
    with clear_damage(path, _WHAT):
        record = {} if field is None else json.loads(field.contents())
    return record if isinstance(record, dict) else {}


def read_written(path: Path) -> PreTrainedModel:
    """The model of a file that llmbrain wrote, without its tokenizer; float32."""
    reader = open_gguf(path)
    with clear_damage(path, _WHAT):
        fields = {name: field.contents() for name, field in reader.fields.items() if name.split(".")[-1] not in _LONG}
        return evaluation_mode(_own_model(path, reader, fields, str(fields.get("general.architecture", "")), None))


def config_vocabulary(model: Any) -> int:
    """Rows of the embedding."""
    return int(model.get_input_embeddings().weight.shape[0])


def _foreign_model(
    path: Path, reader: Any, fields: dict[str, Any], architecture: str, dtype: torch.dtype | str | None
) -> PreTrainedModel:
    _refuse(path, architecture, fields)
    if _experts_in(fields, architecture):
        return _foreign_mixture(path, reader, fields, architecture, dtype)
    config = _dense_config(path, reader, fields, architecture)
    if architecture == "gemma":
        return _foreign_gemma(path, reader, config, dtype)
    model = _model(path, config, dtype)
    if architecture == "llama" and "llama.attention.head_count_kv" not in fields:
        _split_halves(model)
    _refuse_unused(path, reader, model, architecture)
    return model


def _dense_config(path: Path, reader: Any, fields: dict[str, Any], architecture: str) -> PretrainedConfig:
    from transformers import AutoConfig

    shapes = {t.name: t.shape for t in reader.tensors}
    if architecture == "gemma":
        config = config_of_gemma(path, fields, shapes)
    else:
        try:
            config = as_llama(AutoConfig.from_pretrained(path.parent, gguf_file=path.name))
        except (ValueError, KeyError, NotImplementedError, TypeError, OSError) as error:
            raise InputError(
                f"{path}: its architecture {architecture!r} is not one that transformers reads: {first_line(error)}"
            ) from error
    check_config(config, path)
    complete(path, reader, fields, architecture, config, shapes)
    return config


def _experts_in(fields: dict[str, Any], architecture: str) -> bool:
    return int(fields.get(f"{architecture}.expert_count", 0) or 0) > 0


def config_of(path: Path, reader: Any) -> PretrainedConfig:
    """The config of a file that another program wrote."""
    fields = {name: field.contents() for name, field in reader.fields.items() if name.split(".")[-1] not in _LONG}
    architecture = str(fields.get("general.architecture", ""))
    _refuse(path, architecture, fields)
    if not _experts_in(fields, architecture):
        return _dense_config(path, reader, fields, architecture)
    shapes = {t.name: t.shape for t in reader.tensors}
    return gguf_experts.config_of(path, architecture, fields, shapes)  # type: ignore[no-any-return]


def _foreign_mixture(
    path: Path, reader: Any, fields: dict[str, Any], architecture: str, dtype: torch.dtype | str | None
) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    config = gguf_experts.config_of(path, architecture, fields, {t.name: t.shape for t in reader.tensors})
    check_config(config, path)
    set_scaling(path, fields, architecture, config)
    set_factors(path, reader, config)
    mixture = MIXTURES[config.model_type]
    try:
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(config)
    except (ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:
        raise InputError(f"{path}: no model can be built from its keys: {first_line(error)}") from error
    gguf_experts.check_entries(path, model, mixture, fields)
    arrays = _arrays(reader)
    arrays.pop(ROPE_FACTORS, None)
    _fill(path, model, gguf_experts.state_of(path, model, arrays, mixture))
    model.config._name_or_path = str(path)
    run_one_by_one(model)
    return model.to(torch.float32 if dtype in (None, "auto") else _dtype(dtype))  # type: ignore[no-any-return]


def _foreign_gemma(
    path: Path, reader: Any, config: PretrainedConfig, dtype: torch.dtype | str | None
) -> PreTrainedModel:
    """A file of the first Gemma, which transformers does not read: as one of llmbrain, with the config of its keys."""
    from transformers import GemmaForCausalLM
    from transformers.initialization import no_init_weights

    with no_init_weights():
        model = GemmaForCausalLM(config)
    _fill(path, model, _state(path, model, _arrays(reader), TARGETS["gemma"][0]))
    model.config._name_or_path = str(path)
    return model.to(torch.float32 if dtype in (None, "auto") else _dtype(dtype))  # type: ignore[no-any-return]


def _arrays(reader: Any) -> dict[str, Tensor]:
    import gguf

    return {t.name: torch.from_numpy(np.array(gguf.dequantize(t.data, t.tensor_type))) for t in reader.tensors}


def _fill(path: Path, model: Any, state: dict[str, Tensor]) -> None:
    """Load a state dict; what is missing must be tied, or read by nothing."""
    missing = model.load_state_dict(state, strict=False)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    unread = norms_that_nothing_reads(model, missing.missing_keys)
    with torch.no_grad():
        for name in unread:
            model.get_parameter(name).fill_(1)
    lacking = sorted(set(missing.missing_keys) - tied - unread)
    if lacking:
        raise InputError(f"{path} does not fill its model: it lacks {lacking[0]} ({len(lacking)} in all)")
    model.tie_weights()


def _own_model(
    path: Path, reader: Any, fields: dict[str, Any], architecture: str, dtype: torch.dtype | str | None
) -> PreTrainedModel:
    """A file that llmbrain wrote, also one whose layers differ."""
    import transformers
    from transformers.initialization import no_init_weights

    config_class, model_class = None, getattr(transformers, str(fields.get(CLASS)), None)
    try:
        written = json.loads(fields[CONFIG])
        check_config(written, path)
        config_class = transformers.CONFIG_MAPPING[written["model_type"]]
        config = config_class.from_dict(written)
        kind = written["model_type"]
        targets = (MIXTURES[kind],) if kind in MIXTURES else TARGETS[kind]
        target = next(t for t in targets if t is not None and t.arch == architecture)
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise InputError(f"{path}: what llmbrain wrote of its config cannot be read: {first_line(error)}") from error
    if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
        raise InputError(f"{path}: {fields.get(CLASS)!r} is no model class of transformers")
    shapes = layer_shapes(config)
    with no_init_weights():
        model = model_class(stock_config(config))
    if shapes:
        (apply_shapes if isinstance(target, Target) else apply_expert_shapes)(model, shapes)
        text_config(model.config).per_layer_config = dict(enumerate(shapes))
    arrays = _arrays(reader)
    if isinstance(target, Target):
        state = _state(path, model, arrays, target)
    else:
        arrays.pop(ROPE_FACTORS, None)
        state = gguf_experts.state_of(path, model, arrays, target)
    _fill(path, model, state)
    run_one_by_one(model)
    if PROVENANCE in fields:
        setattr(model, RECORD, json.loads(fields[PROVENANCE]).get("cuts", []))
    return model.to(torch.float32 if dtype in (None, "auto") else _dtype(dtype))


def norms_that_nothing_reads(model: Any, missing: Sequence[str]) -> set[str]:
    """Those of some names that are weights of norms whose attention, or whole layer, was dropped."""
    found: set[str] = set()
    for layer in () if has_experts(model) else anatomy(model).layers:
        if is_empty(layer):
            found |= {name for name in missing if name.startswith(f"{layer.path}.")}
        elif HEADS.is_gone(layer):
            found |= {name for name in missing if name == f"{layer.path}.{NORM_OF_ATTENTION}.weight"}
    return found


def _dtype(dtype: Any) -> torch.dtype:
    return dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype))


def _state(path: Path, model: Any, arrays: dict[str, Tensor], target: Target) -> dict[str, Tensor]:
    """Entries of the state dict, put back to transformers' names and order of rows."""
    state: dict[str, Tensor] = {}
    for i, layer in enumerate(blocks_of(anatomy(model).layers)):
        head, block = layer.head_dim, f"blk.{i}."
        for units, names in ((NEURONS, ZEROS_OF_MLP), (HEADS, ZEROS_OF_ATTENTION)):
            for name in names if units.is_gone(layer) else ():
                zeros = arrays.pop(f"{block}{name}.weight", None)
                if zeros is not None and zeros.any():
                    raise InputError(
                        f"{path} does not fit its config: {block}{name} is not zero, of a part that is gone"
                    )
        for suffix in ("weight", "bias"):
            whole = arrays.pop(f"{block}attn_qkv.{suffix}", None)
            if whole is not None:
                sizes = [layer.n_heads * head, layer.n_kv_heads * head, layer.n_kv_heads * head]
                for part, name in zip(whole.split(sizes), ("attn_q", "attn_k", "attn_v")):
                    arrays[f"{block}{name}.{suffix}"] = part
            for module, name in target.names.items():
                value = arrays.pop(f"{block}{name}.{suffix}", None)
                if value is None:
                    continue
                if module.endswith(("q_proj", "k_proj")) and target.interleaved:
                    value = split_halves(value, head)
                state[f"{layer.path}.{module}.{suffix}"] = value
    for module, name in WHOLE.items():
        for suffix in ("weight", "bias"):
            value = arrays.pop(f"{name}.{suffix}", None)
            if value is not None:
                state[f"{module}.{suffix}"] = value
    arrays.pop(ROPE_FACTORS, None)  # the config has the rule that makes them
    if arrays:
        raise InputError(f"{path} holds {len(arrays)} tensors that the model does not use, such as {min(arrays)}")
    if target.shifted_norms:
        state = {n: v - 1 if n.split(".")[-2].endswith("norm") else v for n, v in state.items()}
    expected = model.state_dict()
    for name, value in state.items():
        if name not in expected or expected[name].shape != value.shape:
            shape = tuple(expected[name].shape) if name in expected else "no such tensor"
            raise InputError(f"{path} does not fit its config: {name} is {tuple(value.shape)}, wanted {shape}")
    return state


_LONG = {"tokens", "merges", "scores", "token_type"}


def _refuse(path: Path, architecture: str, fields: dict[str, Any]) -> None:
    if int(fields.get("split.count", 0) or 0) > 1:
        raise InputError(
            f"{path} is one part of {fields['split.count']}: join them first (llama-gguf-split --merge FIRST OUT)"
        )
    if not architecture:
        raise InputError(f"{path} does not say its architecture (general.architecture)")
    for key in ("feed_forward_length", "attention.head_count", "attention.head_count_kv"):
        value = fields.get(f"{architecture}.{key}")
        if isinstance(value, (list, tuple)) and len(set(value)) > 1:
            raise InputError(f"{path} has layers of different {key}: load the folder that it was written from")


def _model(path: Path, config: PretrainedConfig, dtype: torch.dtype | str | None) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    try:
        with quiet():
            model, found = AutoModelForCausalLM.from_pretrained(
                path.parent,
                gguf_file=path.name,
                config=config,
                dtype=torch.float32 if dtype in (None, "auto") else dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
            )
    except (ValueError, KeyError, IndexError, NotImplementedError, RuntimeError, TypeError, OSError) as error:
        raise InputError(f"{path} cannot be dequantized into a model: {first_line(error)}") from error
    for name, there, wanted in found.get("mismatched_keys") or ():
        raise InputError(f"{path} does not fit its keys: {name} is {tuple(there)}, wanted {tuple(wanted)}")
    for kind in ("missing_keys", "unexpected_keys"):
        if found.get(kind):
            keys = sorted(map(str, found[kind]))
            raise InputError(f"{path} does not fill its model: {kind.replace('_', ' ')} {keys[0]} ({len(keys)} in all)")
    for mark in ("hf_quantizer", "is_quantized", "quantization_method"):
        model.__dict__.pop(mark, None)
    for part in (model.config, model.config.get_text_config()):
        part.__dict__.pop("quantization_config", None)
        part._name_or_path = str(path)
    return model


def _split_halves(model: Any) -> None:
    """Put rows of queries and keys in transformers' order, which it does only where a file counts key/value heads."""
    with torch.no_grad():
        for layer in anatomy(model).layers:
            attention: Any = layer.attention
            for part in (attention.q_proj, attention.k_proj) if attention is not None else ():
                for parameter in part.parameters():
                    parameter.copy_(split_halves(parameter, layer.head_dim))


def _refuse_unused(path: Path, reader: Any, model: PreTrainedModel, architecture: str) -> None:
    """Every tensor of the file must have a place in the model; transformers drops the others without a word."""
    import gguf

    arch = next((key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), None)
    if arch is None:
        return  # another name of a family: `found` has told that all of the model was filled
    names = gguf.get_tensor_name_map(arch, model.config.get_text_config().num_hidden_layers)
    used = {ROPE_FACTORS}
    for full in model.state_dict():
        name, _, suffix = full.rpartition(".")
        for candidate in (name, name.removeprefix("model."), name.replace("language_model.", "")):
            mapped = names.get_name(candidate)
            if mapped is not None:
                used.add(f"{mapped}.{suffix}")
    left = sorted(t.name for t in reader.tensors if t.name not in used)
    if left:
        raise InputError(f"{path} holds {len(left)} tensors that the model does not use, such as {left[0]}")

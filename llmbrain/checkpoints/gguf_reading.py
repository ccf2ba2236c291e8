"""GGUF files in: dequantized into ordinary linear layers, with their tokenizer, free of marks of quantization.

transformers reads the tensors; what it would pass over without a word (tensors and keys that it does not know, the
pre-tokenizer, Llama 3's rotary factors) is put right here or refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from llmbrain._files import clear_damage
from llmbrain._progress import bar
from llmbrain._validation import InputError
from llmbrain.anatomy.experts import has_experts
from llmbrain.anatomy.families import anatomy
from llmbrain.anatomy.units import HEADS, NEURONS
from llmbrain.checkpoints import gguf_experts
from llmbrain.checkpoints.bounds import check_config
from llmbrain.checkpoints.expert_shapes import apply_expert_shapes
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
    rotary_factors,
    split_halves,
)
from llmbrain.checkpoints.gguf_mixtures import MIXTURES
from llmbrain.checkpoints.gguf_opening import MAGIC, first_line, open_gguf
from llmbrain.checkpoints.gguf_tokenizers import PRE_TOKENIZERS, alike, read_whole, set_pre_tokenizer
from llmbrain.checkpoints.gguf_tokenizers import WHOLE as WHOLE_TOKENIZER
from llmbrain.checkpoints.shapes import RECORD, apply_shapes, layer_shapes, stock_config, text_config
from llmbrain.checkpoints.shrinking import blocks_of, is_empty
from llmbrain.hooks.experts import run_one_by_one
from llmbrain.hooks.text import evaluation_mode

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

LLAMA3_ROPE = tuple(
    {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 8192} for factor in (8.0, 32.0, 16.0)
)  # fmt: skip


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
    from transformers import AutoConfig

    _refuse(path, architecture, fields)
    if _experts_in(fields, architecture):
        return _foreign_mixture(path, reader, fields, architecture, dtype)
    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    except (ValueError, KeyError, NotImplementedError, TypeError, OSError) as error:
        raise InputError(
            f"{path}: its architecture {architecture!r} is not one that transformers reads: {first_line(error)}"
        ) from error
    check_config(config, path)
    _set_rope(path, reader, config)
    model = _model(path, config, dtype)
    _refuse_unused(path, reader, model, architecture)
    return model


def _experts_in(fields: dict[str, Any], architecture: str) -> bool:
    return int(fields.get(f"{architecture}.expert_count", 0) or 0) > 0


def config_of_mixture(path: Path, reader: Any) -> PretrainedConfig | None:
    """The config of a mixture of experts that another program wrote, None where a file holds none."""
    fields = {name: field.contents() for name, field in reader.fields.items() if name.split(".")[-1] not in _LONG}
    architecture = str(fields.get("general.architecture", ""))
    if not _experts_in(fields, architecture):
        return None
    shapes = {t.name: t.shape for t in reader.tensors}
    return gguf_experts.config_of(path, architecture, fields, shapes)  # type: ignore[no-any-return]


def _foreign_mixture(
    path: Path, reader: Any, fields: dict[str, Any], architecture: str, dtype: torch.dtype | str | None
) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    config = gguf_experts.config_of(path, architecture, fields, {t.name: t.shape for t in reader.tensors})
    check_config(config, path)
    _set_rope(path, reader, config)
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
    scaling = fields.get(f"{architecture}.rope.scaling.type", "none")
    if scaling != "none":
        raise InputError(f"{path} scales its rotary positions ({scaling!r}), which a GGUF does not say in full: "
                         "load its transformers folder")  # fmt: skip
    for key in ("feed_forward_length", "attention.head_count", "attention.head_count_kv"):
        value = fields.get(f"{architecture}.{key}")
        if isinstance(value, (list, tuple)) and len(set(value)) > 1:
            raise InputError(f"{path} has layers of different {key}: load the folder that it was written from")


def _set_rope(path: Path, reader: Any, config: PretrainedConfig) -> None:
    """Llama 3's rotary factors: the file holds them as a tensor, transformers wants the rule that makes them."""
    factors = next((t for t in reader.tensors if t.name == ROPE_FACTORS), None)
    if factors is None:
        return
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    text = config.get_text_config()
    base = dict(text.rope_parameters)
    stored = torch.tensor(np.array(factors.data, dtype=np.float32))
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if torch.equal(stored, torch.ones_like(stored)):
        return
    if stored.shape != (head // 2,):
        raise InputError(f"{path}: {ROPE_FACTORS} has {stored.numel()} values, its heads are {head} wide")
    for rule in LLAMA3_ROPE:
        text.rope_parameters = {**base, **rule}
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](text, torch.device("cpu"))
        if torch.allclose(rotary_factors(scaled, base["rope_theta"], head), stored, rtol=1e-4):
            return
    text.rope_parameters = base
    raise InputError(f"{path}: its rotary factors ({ROPE_FACTORS}) follow no known rule: load its transformers folder")


def _model(path: Path, config: PretrainedConfig, dtype: torch.dtype | str | None) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    try:
        with _quiet_bars():
            model, found = AutoModelForCausalLM.from_pretrained(
                path.parent,
                gguf_file=path.name,
                config=config,
                dtype=torch.float32 if dtype in (None, "auto") else dtype,
                output_loading_info=True,
            )
    except (ValueError, KeyError, IndexError, NotImplementedError, RuntimeError, TypeError, OSError) as error:
        raise InputError(f"{path} cannot be dequantized into a model: {first_line(error)}") from error
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if found.get(kind):
            keys = sorted(map(str, found[kind]))
            raise InputError(f"{path} does not fill its model: {kind.replace('_', ' ')} {keys[0]} ({len(keys)} in all)")
    for mark in ("hf_quantizer", "is_quantized", "quantization_method"):
        model.__dict__.pop(mark, None)
    for part in (model.config, model.config.get_text_config()):
        part.__dict__.pop("quantization_config", None)
        part._name_or_path = str(path)
    return model


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


def load_tokenizer(
    path: Path, reader: Any, fields: dict[str, Any], vocabulary: int | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a GGUF file: of a ``tokenizer.json`` beside it, else rebuilt and checked against its tokens."""
    from transformers import AutoTokenizer

    beside = (path.parent / "tokenizer.json").is_file() and (path.parent / "tokenizer_config.json").is_file()
    kind, pre = str(fields.get("tokenizer.ggml.model", "none")), str(fields.get("tokenizer.ggml.pre", "default"))
    try:
        if WHOLE_TOKENIZER in fields:
            tokenizer = read_whole(fields)
        elif beside:
            tokenizer = AutoTokenizer.from_pretrained(path.parent)
        else:
            if kind == "gpt2" and pre not in PRE_TOKENIZERS:
                raise InputError(
                    f"{path}: its tokenizer splits text as {pre!r}, which is unknown here: lay its tokenizer.json and "
                    "tokenizer_config.json beside the file"
                )
            with _quiet_bars():
                tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
            if kind == "gpt2":
                set_pre_tokenizer(tokenizer, pre, bool(fields.get("tokenizer.ggml.add_space_prefix", False)))
    except InputError:
        raise
    except Exception as error:  # the tokenizers library raises bare exceptions
        raise InputError(f"{path}: its tokenizer ({kind!r}) cannot be rebuilt: {first_line(error)}") from error
    written = reader.fields.get("tokenizer.ggml.tokens")
    if written is None:
        raise InputError(f"{path} holds no tokenizer: lay its tokenizer.json and tokenizer_config.json beside the file")
    _check_tokens(path, written.contents(), tokenizer, vocabulary)
    return tokenizer


def _check_tokens(path: Path, tokens: list[str], tokenizer: Any, vocabulary: int | None) -> None:
    """A rebuilt (or other) tokenizer must give every token the number that it has in the file."""
    if vocabulary is not None and len(tokens) > vocabulary:
        raise InputError(f"{path}: its tokenizer has {len(tokens)} tokens, its model {vocabulary}")
    known = tokenizer.convert_ids_to_tokens(range(min(len(tokens), len(tokenizer))))
    padding = ("[PAD", "<pad", "<unused", "[unused", "<|dummy")
    for i, token in enumerate(tokens):
        other = known[i] if i < len(known) else None
        if not (other is not None and alike(token, other)) and not (other is None and token.startswith(padding)):
            raise InputError(
                f"{path}: its tokenizer cannot be rebuilt: token {i} is {token!r}, the rebuilt one says {other!r}"
            )


@contextmanager
def _quiet_bars() -> Iterator[None]:
    """Within the block transformers' bars of loading are off, or our own, which are for terminals only."""
    from transformers import modeling_gguf_pytorch_utils as reading
    from transformers.utils import logging

    shown, theirs = logging.is_progress_bar_enabled(), getattr(reading, "tqdm", None)
    logging.disable_progress_bar()
    if theirs is not None:  # it is tqdm's own, which nothing turns off
        reading.tqdm = bar
    try:
        yield
    finally:
        if theirs is not None:
            reading.tqdm = theirs
        if shown:
            logging.enable_progress_bar()

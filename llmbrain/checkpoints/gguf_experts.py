"""Mixtures of experts to and from GGUF files, by the table of `llmbrain.checkpoints.gguf_mixtures`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmbrain._validation import InputError
from llmbrain.checkpoints.expert_shapes import expert_shapes, shapes_text
from llmbrain.checkpoints.gguf_layout import WHOLE
from llmbrain.checkpoints.gguf_mixtures import MIXTURES, OTHERWISE, SIGMOID, SOFTMAX, Mixture, View, head_size, paired

INSTEAD = "save as 'uniform' (plain transformers), 'per-layer' or 'remote-code'"
ALIKE = (
    "layers must be alike there: plan with allocation='uniform', or save as 'padded' where it can be, load that and "
    "save it as 'gguf'"
)
# What llama.cpp takes where a key is missing.
MISSING: dict[str, Any] = {
    "expert_weights_norm": False, "expert_weights_scale": 1.0, "leading_dense_block_count": 0,
    "attention.q_lora_rank": None,
}  # fmt: skip


def mixture_of(model: nn.Module) -> Mixture:
    """Where llmbrain puts a mixture of experts in llama.cpp, or why there is no place for it.

    Raises
    ------
    InputError
        If there is none.
    """
    config: Any = model.config
    kind, name = str(config.model_type), type(model).__name__
    if kind in OTHERWISE:
        raise InputError(f"format='gguf': {OTHERWISE[kind]}: {INSTEAD}")
    if kind not in MIXTURES or not name.endswith("ForCausalLM"):
        raise InputError(
            f"format='gguf' knows the mixtures of experts {', '.join(sorted(MIXTURES))}, not {name}: {INSTEAD}"
        )
    mixture = MIXTURES[kind]
    why = _taken_otherwise(config, mixture)
    if why:
        raise InputError(f"format='gguf': llama.cpp reads no {kind} model with {why}: {INSTEAD}")
    _sizes(model, mixture)
    for entry in model.state_dict():
        _places(entry, mixture, config)
    return mixture


def _taken_otherwise(config: Any, mixture: Mixture) -> str:
    """What llama.cpp would compute in another way than transformers does; "" where nothing."""
    for entry, granted in mixture.granted.items():
        value = getattr(config, entry, granted)
        if value != granted:
            return f"{entry}={value} (it takes {granted} for granted)"
    rope = dict(config.rope_parameters)
    scaling = rope.get("rope_type", "default")
    if scaling == "yarn" and (why := _yarn_otherwise(rope, mixture)):
        return why
    if scaling not in ("default", "yarn") and not (scaling == "llama3" and mixture.factors):
        return f"rotary positions of type {scaling!r}"
    if rope.get("partial_rotary_factor", 1.0) != 1.0 and mixture.arch != "glm4moe":
        return f"partial_rotary_factor={rope['partial_rotary_factor']}"
    heads = config.num_attention_heads
    if mixture.square and heads * head_size(config) != config.hidden_size:
        return f"{heads} heads of {head_size(config)} in a model of {config.hidden_size}"
    if mixture.arch == "olmoe" and config.num_key_value_heads != heads:
        return f"{config.num_key_value_heads} key/value heads for {heads} heads"
    return mixture.check(config) if mixture.check is not None else ""


YARN = {"beta_fast": 32, "beta_slow": 1, "truncate": True, "attention_factor": None}
"""What llama.cpp takes for granted of YaRN."""


def _yarn_otherwise(rope: dict[str, Any], mixture: Mixture) -> str:
    """What llmbrain writes of YaRN, or rather what it does not; "" where all."""
    for entry, granted in YARN.items():
        value = rope.get(entry)
        if value is not None and value != granted:
            return f"rotary positions of type 'yarn' with {entry}={value} (it takes {granted} for granted)"
    latent = mixture.arch == "deepseek2"
    scales = rope.get("mscale"), rope.get("mscale_all_dim")
    if (latent and (scales[0] != scales[1] or not scales[0])) or (not latent and any(scales)):
        return f"rotary positions of type 'yarn' with mscale={scales[0]} and mscale_all_dim={scales[1]}"
    return "" if mixture.yarn else "rotary positions of type 'yarn'"


def _sizes(model: nn.Module, mixture: Mixture) -> dict[str, int]:
    """Keys that tell how many experts there are and how wide; refuses what one number a key can not say."""
    config: Any = model.config
    shapes = expert_shapes(model)
    routed = [shape for shape in shapes if shape["routed_experts"]]
    dense = [shape["shared_width"] for shape in shapes if not shape["routed_experts"]]
    if any(shape != routed[0] for shape in routed) or len(set(dense)) > 1:
        raise InputError(
            f"format='gguf': llama.cpp reads no {config.model_type} model whose layers differ "
            f"({shapes_text(model)}): {ALIKE}"
        )
    count, width, shared = routed[0].values()
    kinds = [bool(shape["routed_experts"]) for shape in shapes]
    if dense and not mixture.leading and mixture.arch != "llama4":
        raise InputError(
            f"format='gguf': llama.cpp reads no {config.model_type} model with blocks without experts: {INSTEAD}"
        )
    if dense and mixture.leading and kinds != sorted(kinds):
        raise InputError(
            f"format='gguf': llama.cpp reads a {config.model_type} model with blocks without experts only where they "
            f"come first: {INSTEAD}"
        )
    keys = mixture.keys
    experts = keys.get("expert_feed_forward_length", "intermediate_size")
    found = {"expert_count": count, "expert_feed_forward_length": width}
    if dense:
        found["feed_forward_length"] = dense[0]
    elif keys["feed_forward_length"] == experts:
        found["feed_forward_length"] = width
    if mixture.shared == "free":
        found["expert_shared_feed_forward_length"] = shared
    if mixture.shared == "times":
        found |= {"expert_shared_count": -(-shared // width), "leading_dense_block_count": kinds.index(True)}
        if mixture.arch == "llama4" and bool(config.use_qk_norm) == (count == 128):  # by it llama.cpp knows the model
            raise InputError(
                f"format='gguf': llama.cpp reads no {config.model_type} model with use_qk_norm={config.use_qk_norm} "
                f"and {count} experts: {INSTEAD}"
            )
        if mixture.arch == "llama4" and shared > width:
            raise InputError(
                f"format='gguf': llama.cpp reads no {config.model_type} model whose shared expert is wider than the "
                f"others ({shared} and {width}): {INSTEAD}"
            )
    return {key: value for key, value in found.items() if key in keys}


def entries(model: nn.Module, mixture: Mixture) -> dict[str, int | float | bool | str]:
    """All keys of a file that say what kind of mixture it holds, without the architecture."""
    config: Any = model.config
    found: dict[str, Any] = {key: getattr(config, entry) for key, entry in mixture.keys.items()}
    found |= {**mixture.always, **_sizes(model, mixture)}
    rope = dict(config.rope_parameters)
    size = head_size(config)
    found["rope.freq_base"] = float(rope["rope_theta"])
    found["vocab_size"] = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    if mixture.arch == "deepseek2":
        found |= {
            "attention.key_length": config.kv_lora_rank + config.qk_rope_head_dim,
            "attention.value_length": config.kv_lora_rank,
            "attention.key_length_mla": config.qk_nope_head_dim + config.qk_rope_head_dim,
        }
    else:
        found |= {
            "attention.key_length": size,
            "attention.value_length": size,
            "rope.dimension_count": int(size * rope.get("partial_rotary_factor", 1.0)),
        }
    if rope.get("rope_type") == "yarn":
        found |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(rope["factor"]),
            "rope.scaling.original_context_length": int(rope["original_max_position_embeddings"]),
        }
        if mixture.arch == "deepseek2":  # llama.cpp divides it by .1 again
            found["rope.scaling.yarn_log_multiplier"] = 0.1 * float(rope["mscale_all_dim"])
    groups, visited = getattr(config, "n_group", None) or 1, getattr(config, "topk_group", None) or 1
    chosen = mixture.always.get("expert_gating_func") == SIGMOID  # the greedy router of DeepSeek-V2 looks at no groups
    if chosen and visited < groups:  # where a token may visit all of them, there are none to llama.cpp
        found |= {"expert_group_count": groups, "expert_group_used_count": visited}
    return {key: value for key, value in found.items() if value is not None}


def write_entries(writer: Any, model: nn.Module, mixture: Mixture) -> None:
    """Write `entries`."""
    for key, value in entries(model, mixture).items():
        name = f"{mixture.arch}.{key}"
        if isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif key in _FLOATS:
            writer.add_float32(name, float(value))
        else:
            writer.add_uint32(name, int(value))


_FLOATS = (
    "attention.scale", "embedding_scale", "residual_scale", "logit_scale", "expert_weights_scale",
    "attention.layer_norm_rms_epsilon",
)  # fmt: skip


def _places(name: str, mixture: Mixture, config: Any) -> tuple[tuple[str, View], ...]:
    """Tensors of the file that an entry of the state dict is written as, with the number of its block."""
    module, _, suffix = name.rpartition(".")
    if module in WHOLE and suffix == "weight":
        tied = module == "lm_head" and config.tie_word_embeddings and not mixture.output
        return () if tied else ((f"{WHOLE[module]}.weight", _all),)
    *_, number, inner = ("", *name.removeprefix("model.layers.").split(".", 1))
    linear = inner.rpartition(".")[0]
    if inner.endswith(".bias") and linear.startswith("self_attn.") and linear not in mixture.biases:
        raise InputError(
            f"format='gguf': llama.cpp's {mixture.arch} has no place for {name} (attention_bias): {INSTEAD}"
        )
    if not number.isdigit() or inner not in mixture.places:
        raise InputError(f"format='gguf': llama.cpp's {mixture.arch} has no place for {name}: {INSTEAD}")
    return tuple((f"blk.{number}.{tensor}", view) for tensor, view in mixture.places[inner])


def _all(value: Tensor, config: Any) -> Tensor:
    return value


def _wide(tensor: str, value: Tensor, mixture: Mixture, width: int) -> Tensor:
    """A matrix of shared experts with zeros up to a whole number of experts: neurons that say nothing."""
    if mixture.shared != "times" or "_shexp." not in tensor:
        return value
    axis = 1 if "ffn_down" in tensor else 0
    more = -value.shape[axis] % width
    return F.pad(value, (0, more) if axis else (0, 0, 0, more))


def tensors(model: nn.Module, mixture: Mixture) -> Iterator[tuple[str, Tensor]]:
    """``(name, values)`` of every tensor of a file."""
    config: Any = model.config
    width = next(shape["expert_width"] for shape in expert_shapes(model) if shape["routed_experts"])
    for name, value in model.state_dict().items():
        for tensor, view in _places(name, mixture, config):
            part = view(value.detach(), config)
            yield tensor, _wide(tensor, part.flatten(0, 2) if view is paired else part, mixture, width)


def stays_float(tensor: str) -> bool:
    """Whether a tensor is never rounded: biases, and routers, where rounding would call other experts."""
    return tensor.endswith(".bias") or "ffn_gate_inp" in tensor or tensor.endswith("attn_sinks.weight")


def state_of(path: object, model: nn.Module, arrays: dict[str, Tensor], mixture: Mixture) -> dict[str, Tensor]:
    """Entries of the state dict, out of the tensors of a file (which are taken out of `arrays`).

    Raises
    ------
    InputError
        If one is missing, left over or of another shape.
    """
    config: Any = model.config
    width = next(shape["expert_width"] for shape in expert_shapes(model) if shape["routed_experts"])
    state: dict[str, Tensor] = {}
    used: set[str] = set()
    for name, value in model.state_dict().items():
        full = torch.empty(value.shape, dtype=torch.float32)
        places = _places(name, mixture, config)
        for tensor, view in places:
            used.add(tensor)
            if tensor not in arrays:
                raise InputError(f"{path} does not fill its model: it lacks {tensor}, which is {name} there")
            target, array = view(full, config), arrays[tensor]
            flat = target.flatten(0, 2) if view is paired else target
            wanted = _wide(tensor, torch.empty(flat.shape, device="meta"), mixture, width).shape
            if array.shape != wanted:
                raise InputError(
                    f"{path} does not fit its config: {tensor} is {tuple(array.shape)}, wanted {tuple(wanted)}"
                )
            small = array[tuple(slice(n) for n in flat.shape)]
            if array.any() and array.count_nonzero() != small.count_nonzero():
                raise InputError(f"{path} does not fit its config: {tensor} is not zero behind its neurons")
            target.copy_(small.reshape(target.shape))
        if places:
            state[name] = full
    left = sorted(set(arrays) - used - ({"output.weight"} if config.tie_word_embeddings else set()))
    if left:
        raise InputError(f"{path} holds {len(left)} tensors that the model does not use, such as {left[0]}")
    return state


def config_of(path: object, architecture: str, fields: Mapping[str, Any], shapes: Mapping[str, Any]) -> Any:
    """The config of a mixture that another program wrote.

    Parameters
    ----------
    fields : mapping
        Keys of the file.
    shapes : mapping
        Of its tensors, by their names.

    Raises
    ------
    InputError
        If it is of no family that is known here, or lacks a key.
    """
    import transformers

    prefix = f"{architecture}."
    own = {key.removeprefix(prefix): _one(path, key, v) for key, v in fields.items() if key.startswith(prefix)}
    kind = next((k for k, m in MIXTURES.items() if m.arch == architecture and _is(m, own)), None)
    if kind is None:
        known = sorted({mixture.arch for mixture in MIXTURES.values()})
        raise InputError(
            f"{path} is a mixture of experts of architecture {architecture!r}, of which {', '.join(known)} are read: "
            "load its transformers folder"
        )
    mixture = MIXTURES[kind]
    own.setdefault("vocab_size", int(shapes["token_embd.weight"][-1]) if "token_embd.weight" in shapes else 0)
    own.setdefault("attention.head_count_kv", own.get("attention.head_count"))
    found: dict[str, Any] = {entry: value for entry, value in mixture.granted.items() if entry != "hidden_act"}
    more = {"deepseek2": ("attention.key_length_mla",), "glm4moe": ("rope.dimension_count",)}.get(architecture, ())
    lacking = [key for key in (*mixture.keys, *more) if key not in own and key not in MISSING]
    if lacking:
        raise InputError(f"{path} lacks the key {architecture}.{lacking[0]}: load its transformers folder")
    for key, entry in mixture.keys.items():
        value = own.get(key, MISSING.get(key))
        found[entry] = float(f"{value:.7g}") if isinstance(value, float | np.floating) else value
    if mixture.arch == "deepseek2":
        found["qk_nope_head_dim"] = own["attention.key_length_mla"] - own["rope.dimension_count"]
    else:
        found["head_dim"] = own.get("attention.key_length", found["hidden_size"] // found["num_attention_heads"])
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(own.get("rope.freq_base", 10000.0))}
    if mixture.arch == "glm4moe":
        rope["partial_rotary_factor"] = own["rope.dimension_count"] / found["head_dim"]
    found |= {"n_group": own.get("expert_group_count", 1), "topk_group": own.get("expert_group_used_count", 1)}
    found["tie_word_embeddings"] = "output.weight" not in shapes
    biased = any(".attn_q.bias" in name for name in shapes)
    found |= {"attention_bias": biased, "qkv_bias": biased}
    found["use_qk_norm"] = any(".attn_q_norm." in name for name in shapes)
    config_class = transformers.CONFIG_MAPPING[kind]
    blank = config_class()
    if mixture.arch == "llama4":
        found["use_qk_norm"] = found["num_local_experts"] != 128
    config = config_class(
        **{k: v for k, v in found.items() if k == "head_dim" or hasattr(blank, k)}, rope_parameters=rope
    )
    why = _taken_otherwise(config, mixture)
    if why:
        raise InputError(f"{path}: llama.cpp reads no {kind} model with {why}: load its transformers folder")
    return config


def _one(path: object, key: str, value: Any) -> Any:
    """The number of a key that may have one a block."""
    if not isinstance(value, (list, tuple, np.ndarray)):
        return value
    if len({*value}) != 1:
        raise InputError(f"{path} has blocks of different {key}: load the folder that it was written from")
    return value[0]


def check_entries(path: object, model: nn.Module, mixture: Mixture, fields: Mapping[str, Any]) -> None:
    """What a file says of its mixture is what the model that was built from it says, and there is nothing else to say.

    Raises
    ------
    InputError
        Naming the key.
    """
    ours = entries(model, mixture)
    for name, value in fields.items():
        key = name.removeprefix(f"{mixture.arch}.")
        if key == name or (key not in ours and not _TELLS.match(key)):
            continue
        mine: Any = ours.get(key, MISSING.get(key, 0))
        if abs(float(_one(path, name, value)) - float(mine)) > 1e-6 * abs(float(mine)):
            raise InputError(f"{path}: {name} is {value}, where llmbrain reads {mine}: load its transformers folder")


_TELLS = re.compile(r"expert|attention|rope|.*scale|.*softcapping|sliding")


def _is(mixture: Mixture, own: Mapping[str, Any]) -> bool:
    """Whether a file may be of this family, of those of one architecture."""
    shared = own.get("expert_shared_feed_forward_length", 0)
    if mixture.shared != "times" and bool(shared) != (mixture.shared == "free"):
        return False
    gating = mixture.always.get("expert_gating_func")
    return gating is None or mixture.arch != "deepseek2" or own.get("expert_gating_func", SOFTMAX) == gating

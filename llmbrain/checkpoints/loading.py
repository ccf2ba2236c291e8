"""Open models: plain folders, hub ids, and pruned folders of any format."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llmbrain._files import SUMS, DamagedError, clear_damage, read_json, reading, verify, verifying
from llmbrain._files.parts import is_temporary
from llmbrain._files.sets import COMMIT
from llmbrain._validation import InputError
from llmbrain.anatomy.experts import has_experts
from llmbrain.checkpoints.bounds import check_file
from llmbrain.checkpoints.expert_shapes import apply_expert_shapes
from llmbrain.checkpoints.gguf_reading import is_gguf, load_gguf
from llmbrain.checkpoints.placing import NO_PLAN, DeviceMap, Placement, TpPlan
from llmbrain.checkpoints.shapes import (
    RECORD,
    apply_shapes,
    layer_shapes,
    own_layers,
    per_layer_entries,
    text_config,
)
from llmbrain.hooks.experts import run_one_by_one
from llmbrain.hooks.text import evaluation_mode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROVENANCE = "pruning.json"
ANEW = "prune and save the model again, or copy it again"
READ = (".safetensors", ".json", ".py", ".txt", ".model", ".jinja")  # what loading reads of a folder
# What transformers has by itself; anything else names code elsewhere.
IMPLEMENTATIONS = (
    "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention", "paged|eager",
    "paged|sdpa", "paged|flash_attention_2", "grouped_mm", "batched_mm",
)  # fmt: skip


def load_model(
    path_or_id: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    device_map: DeviceMap | None = None,
    offload: bool = False,
    offload_folder: str | Path | None = None,
    tp_plan: TpPlan | None = None,
    trust_remote_code: bool = False,
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Load a model, in evaluation mode, and its tokenizer.

    Parameters
    ----------
    path_or_id : str or Path
        A folder (also one that `save_pruned` wrote), a GGUF file, or an id on the Hugging Face hub.
    dtype : torch.dtype or str, optional
        Default: as saved; float32 for a GGUF file.
    device : str or device, optional
        Default: CPU. ``"auto"`` takes CUDA where there is one.
    device_map : str or mapping, optional
        For models larger than a device, in place of `device`: ``"auto"`` spreads the blocks over all GPUs, then the
        CPU's memory, then the disk (accelerate); a mapping names modules and their devices (``0``, ``"cpu"``,
        ``"disk"``). Such a model can be scanned, lesioned, evaluated and planned for.
    offload : bool
        The blocks stay in the checkpoint's files and each is read when it runs; all else goes to `device`. For models
        of which only a block fits.
    offload_folder : path, optional
        For weights that can not be read from the checkpoint as they are; default a temporary folder.
    tp_plan : str or mapping, optional
        ``"auto"`` (or a plan of transformers') spreads every layer over the ranks of the process group, on a GPU each
        where there are any. Such a model can be scanned, and read; all else refuses it.
    trust_remote_code : bool
        Run code that comes with the model. Pruned folders never need it here.

    Returns
    -------
    (model, tokenizer)
        The model is of the class that its config names; else a causal language model, else the bare encoder.

    Raises
    ------
    FileNotFoundError
        If a folder, or what must be in it, is not there.
    InputError
        If the checkpoint does not fit its config: a tensor that is missing, left over or of another shape is named; or
        if `device`, `device_map`, `offload` and `tp_plan` exclude each other; if there is no plan for such a model.
    """
    where = Placement(device, device_map, offload, offload_folder, tp_plan)
    if is_gguf(path_or_id):
        model, tokenizer = load_gguf(path_or_id, dtype=_checked(dtype))
        return where.dispatch(model), tokenizer
    with _verified(path_or_id):
        source = _source(path_or_id)
        model = _load(source, _checked(dtype), where, trust_remote_code)
        return model, _tokenizer(source, trust_remote_code)


def load_pruned(
    path: str | Path, *, dtype: torch.dtype | str | None = None, device: str | torch.device | None = None
) -> tuple[nn.Module, PreTrainedTokenizerBase | None]:
    """Load what `save_pruned` wrote into a folder, as `load_model`; None for a tokenizer that was not saved.

    What was cut, when and from what stands in the model's ``llmbrain_pruning`` attribute.
    """
    if not Path(path).is_dir():
        raise FileNotFoundError(f"{path} is not a folder")
    with _verified(path) as names:
        source = _source(path)
        model = _load(source, _checked(dtype), Placement(device), False)
        saved = any(name.startswith("tokenizer") for name in {*names, *(p.name for p in Path(path).iterdir())})
        return model, _tokenizer(source, False) if saved else None


def _tokenizer(source: str, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    with clear_damage(source, "a folder with a tokenizer that can be read"):
        try:
            return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        except (OSError, ValueError, KeyError) as error:
            raise FileNotFoundError(f"no tokenizer can be loaded from {source}: {_first_line(error)}") from error


@contextmanager
def _verified(path_or_id: str | Path) -> Iterator[list[str]]:
    """Hold a folder of ours while it is read, and compare its files with their checksums; gives their names.

    Records are compared before they are read, weights beside it. A folder of other people's is read as it is.
    """
    folder = Path(path_or_id)
    if (
        not folder.is_dir()
        or is_temporary(folder)
        or not any((folder / name).exists() for name in (SUMS, COMMIT, PROVENANCE))
    ):
        with clear_damage(path_or_id, "a model that can be read"):
            yield []
        return
    with reading(folder, anew=ANEW, required=True) as files:
        sums = {folder / name: digest for name, digest in files.sums.items() if name.endswith(READ)}
        for name in sorted(p.name for p in folder.iterdir()) if files.sums else ():
            if name not in files.sums and (name in ("config.json", PROVENANCE) or name.endswith(".safetensors")):
                files.path(name)  # says that it is not listed
        for path, digest in sums.items():
            if path.suffix != ".safetensors":
                verify(path, digest, anew=ANEW)
        weights = {path: digest for path, digest in sums.items() if path.suffix == ".safetensors"}
        with verifying(weights, anew=ANEW), clear_damage(folder, "a model that can be read", ANEW):
            yield list(files.sums)


def _source(path_or_id: str | Path) -> str:
    path = Path(path_or_id)
    files = sorted(path.glob("*.gguf")) if path.is_dir() and not (path / "config.json").is_file() else []
    if files:
        raise FileNotFoundError(f"{path} holds no config.json but GGUF files: name one of them, such as {files[0]}")
    if path.is_dir() and not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path} holds no config.json: it is not a model folder")
    if not path.is_dir() and (isinstance(path_or_id, Path) or path.is_absolute() or str(path_or_id).startswith(".")):
        raise FileNotFoundError(f"model folder {path} does not exist")
    return str(path_or_id)


def _checked(dtype: torch.dtype | str | None) -> torch.dtype | str | None:
    known = getattr(torch, dtype, None) if isinstance(dtype, str) and dtype != "auto" else dtype
    if known is not None and known != "auto" and not (isinstance(known, torch.dtype) and known.is_floating_point):
        raise InputError(f"dtype={dtype!r} is no type that a model computes in: float32, bfloat16, float16 or float64")
    if isinstance(dtype, str) and known is None:
        raise InputError(f"dtype={dtype!r} is not known: float32, bfloat16, float16 or float64")
    return known


def _load(source: str, dtype: Any, where: Placement, trust_remote_code: bool) -> nn.Module:
    from transformers import AutoConfig

    check_file(source)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except OSError as error:
        raise FileNotFoundError(
            f"model {source!r} is neither a folder nor found on the hub: {_first_line(error)}"
        ) from error
    except (ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"{source}: its config.json cannot be read: {_first_line(error)}") from error
    if not trust_remote_code:
        _refuse_foreign_code(source, config)
    model_class = model_class_of(config, trust_remote_code)
    shapes, layers = layer_shapes(config), per_layer_entries(config)
    if shapes and where.tp_plan is not None:
        raise InputError(f"tp_plan={where.tp_plan!r}: {NO_PLAN}")
    if shapes:  # stock classes refuse to be built from a config whose layers differ
        text_config(config).per_layer_config = own_layers(config)
    loader = _with_shapes(model_class, shapes) if shapes else model_class
    # Only for auto classes: whether code in the folder may run is theirs to know.
    extra = {} if isinstance(model_class, type) and hasattr(model_class, "forward") else {
        "trust_remote_code": trust_remote_code}  # fmt: skip
    try:
        model, found = loader.from_pretrained(
            source,
            config=config,
            dtype=dtype or "auto",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that the names come back; any that does is refused below
            **extra,
            **where.options(loader, config, **extra),
        )
    except OSError as error:
        raise FileNotFoundError(f"{source}: {_first_line(error)}") from error
    except ValueError as error:
        if where.tp_plan is not None:
            raise where.no_plan(config, _first_line(error)) from error
        if where.device_map is not None:
            raise where.misfit(_first_line(error)) from error
        raise
    except RuntimeError as error:
        raise InputError(f"{source} does not fit its config.json: {_first_line(error)}") from error
    if shapes:
        model.__class__ = model_class
        text_config(model.config).per_layer_config = layers
    _refuse_mismatch(source, found, pruned=bool(shapes) or _provenance(source) is not None)
    record = _provenance(source)
    if record is not None:
        setattr(model, RECORD, record["cuts"])
    run_one_by_one(model)
    return evaluation_mode(where.finish(model))


def _refuse_foreign_code(source: str, config: Any) -> None:
    """A config may name a repository of kernels, which transformers would fetch and run.

    Raises
    ------
    InputError
        If it does.
    """
    parts = [
        config,
        *(v for v in vars(config).values() if hasattr(v, "to_dict") and hasattr(v, "_attn_implementation")),
    ]
    for part in parts:
        for name in ("_attn_implementation", "_experts_implementation"):
            asked = getattr(part, name, None)
            values = asked.values() if isinstance(asked, dict) else [asked]
            if any(value is not None and value not in IMPLEMENTATIONS for value in values):
                raise InputError(
                    f"{source}: its config.json asks for {name.strip('_')}={asked!r}, code that is not in "
                    "transformers: it is not run unless trust_remote_code=True"
                )


def model_class_of(config: Any, trust_remote_code: bool) -> Any:
    """The class that a config names; else an auto class."""
    import transformers

    names = getattr(config, "architectures", None) or []
    if trust_remote_code and getattr(config, "auto_map", None):
        return transformers.AutoModelForCausalLM
    known = [getattr(transformers, n, None) or getattr(transformers, n.removeprefix("Pruned"), None) for n in names]
    if known and known[0] is not None:
        return known[0]
    if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return transformers.AutoModelForCausalLM
    return transformers.AutoModel


def _with_shapes(model_class: type[nn.Module], shapes: list[dict[str, Any]]) -> Any:
    """A subclass that shrinks its layers to `shapes` when it is built, for `from_pretrained` to fill."""
    if not hasattr(model_class, "forward"):
        raise InputError("config.json has per_layer_config but its 'architectures' names no class of transformers")

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, config, *args, **kwargs)  # type: ignore[misc]
        (apply_expert_shapes if has_experts(self) else apply_shapes)(self, shapes)

    return type(model_class.__name__, (model_class,), {"__init__": __init__, "__module__": model_class.__module__})


def _refuse_mismatch(source: str, found: dict[str, Any], *, pruned: bool) -> None:
    """Missing weights would be random. Of other people's checkpoints only the heads may be new or left over."""
    for kind in ("mismatched_keys", "missing_keys", "unexpected_keys"):
        keys = sorted(str(k) for k in found.get(kind) or [])
        if keys and (pruned or kind != "unexpected_keys"):
            word = {"missing_keys": "lacks", "unexpected_keys": "has an unexpected"}.get(kind, "has another shape for")
            raise InputError(f"{source} does not fit its config.json: it {word} tensor {keys[0]} ({len(keys)} in all)")


def _provenance(source: str) -> dict[str, Any] | None:
    file = Path(source) / PROVENANCE
    if not file.is_file():
        return None
    record = read_json(file, anew=ANEW)
    if not isinstance(record.get("cuts"), list):
        raise DamagedError(f"{file} does not say what was cut. {ANEW}")
    return record


def _first_line(error: Exception) -> str:
    """The part of a long message that names what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if "shape" in line or "size mismatch" in line]
    return (named or lines or [type(error).__name__])[0]

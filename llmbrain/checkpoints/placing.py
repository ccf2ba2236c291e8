"""Where the weights of a model go: one device, several, the memory of the CPU, or the files that they came from."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmbrain._validation import InputError, resolve_device
from llmbrain.anatomy.experts import expert_anatomy, has_experts
from llmbrain.anatomy.families import anatomy
from llmbrain.checkpoints.shapes import build_empty

DeviceMap = str | Mapping[str, int | str]
NAMES = ("auto", "balanced", "balanced_low_0", "sequential")


class Placement:
    """What was asked for, checked, and as transformers wants it.

    Parameters
    ----------
    device : str or device, optional
    device_map : str or mapping, optional
        One of `NAMES`, or what accelerate takes: module names and devices (a number, ``"cpu"``, ``"disk"``).
    offload : bool
        The blocks stay in the checkpoint, all else goes to `device`.
    offload_folder : path, optional
        For weights that must be written anew to be read one by one; default a temporary folder.

    Raises
    ------
    InputError
        If they exclude each other.
    """

    def __init__(
        self,
        device: str | torch.device | None = None,
        device_map: DeviceMap | None = None,
        offload: bool = False,
        offload_folder: str | Path | None = None,
    ) -> None:
        if device_map is not None and (offload or device is not None):
            other = "offload=True" if offload else f"device={str(device)!r}"
            raise InputError(f"device_map={device_map!r} and {other} exclude each other: both say where weights go")
        if isinstance(device_map, str) and device_map not in NAMES:
            device_map = {"": str(resolve_device(device_map))}
        if device_map is not None and not isinstance(device_map, str):
            if not device_map or not all(isinstance(k, str) for k in device_map):
                raise InputError(f"device_map={device_map!r} must name modules and their devices, or be one of {NAMES}")
            device_map = dict(device_map)
        self.device = None if device is None else resolve_device(device)
        self.device_map, self.offload = device_map, offload
        self._folder = offload_folder

    @property
    def spread(self) -> bool:
        """Whether accelerate places the weights."""
        return self.offload or self.device_map is not None

    def options(self, model_class: Any, config: Any, **extra: Any) -> dict[str, Any]:
        """Keywords of ``from_pretrained``."""
        if not self.spread:
            return {}
        return {"device_map": self._map(model_class, config, extra), "offload_folder": str(self.folder())}

    def folder(self) -> Path:
        """The folder for weights that are written anew."""
        if self._folder is None:
            self._folder = tempfile.mkdtemp(prefix="llmbrain-offload-")
            self._own = True
        return Path(self._folder)

    def finish(self, model: Any) -> Any:
        """The model where it belongs; a temporary folder goes when the model does."""
        if getattr(self, "_own", False):
            weakref.finalize(model, shutil.rmtree, str(self._folder), ignore_errors=True)
        return model if self.device is None or self.spread else model.to(self.device)

    def dispatch(self, model: Any) -> Any:
        """The same for a model that is in memory already (of a GGUF, which is dequantized whole)."""
        if self.offload:
            raise InputError(
                "offload=True reads blocks from safetensors, a GGUF is dequantized whole: save it as a folder first "
                "(load_model, then save_pruned with format='uniform')"
            )
        if self.device_map is None:
            return self.finish(model)
        from accelerate import dispatch_model, infer_auto_device_map
        from accelerate.utils import get_balanced_memory

        where: Any = self.device_map
        classes = list(getattr(model, "_no_split_modules", None) or [])
        if isinstance(where, str):
            most = None if where == "sequential" else get_balanced_memory(
                model, no_split_module_classes=classes, low_zero=where == "balanced_low_0"
            )  # fmt: skip
            where = infer_auto_device_map(model, max_memory=most, no_split_module_classes=classes)
        disk = {"offload_dir": str(self.folder())} if "disk" in where.values() else {}
        skip = getattr(model, "_skip_keys_device_placement", None)
        return self.finish(dispatch_model(model, device_map=where, skip_keys=skip, **disk))

    def _map(self, model_class: Any, config: Any, extra: Mapping[str, Any]) -> Any:
        if not self.offload:
            return self.device_map
        return blocks_on_disk(empty_of(model_class, config, extra), str(self.device or "cpu"))


def empty_of(model_class: Any, config: Any, extra: Mapping[str, Any]) -> nn.Module:
    """The model of a config without memory for its weights, by its class or an auto class."""
    if not hasattr(model_class, "from_config"):
        built: nn.Module = build_empty(model_class, config)
        return built
    from transformers.initialization import no_init_weights

    with torch.device("meta"), no_init_weights():  # an auto class
        made: nn.Module = model_class.from_config(config, **extra)
    return made


def blocks_on_disk(model: nn.Module, device: str) -> dict[str, str]:
    """A device map that leaves the blocks of a model on disk, and puts all else (embeddings, head) on a device."""
    layers = (expert_anatomy(model) if has_experts(model) else anatomy(model)).layers
    blocks = {id(layer.block) for layer in layers}
    where: dict[str, str] = {}

    def cover(module: nn.Module, prefix: str) -> None:
        for name, _ in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            where[f"{prefix}{name}"] = device
        for name, child in module.named_children():
            inside = {id(part) for part in child.modules()}
            if id(child) in blocks:
                where[f"{prefix}{name}"] = "disk"
            elif inside & blocks:
                cover(child, f"{prefix}{name}.")
            else:
                where[f"{prefix}{name}"] = device

    cover(model, "")
    return where

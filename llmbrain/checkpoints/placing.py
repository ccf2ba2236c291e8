"""Where the weights of a model go: one device, several, the memory of the CPU, or the files that they came from."""

from __future__ import annotations

import os
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
from llmbrain.anatomy.spread import is_part, is_spread
from llmbrain.checkpoints.shapes import build_empty
from llmbrain.distributed import ranks

DeviceMap = str | Mapping[str, int | str]
TpPlan = str | Mapping[str, str]
NAMES = ("auto", "balanced", "balanced_low_0", "sequential")
NO_PLAN = "a GGUF and a pruned folder with layers of its own are not spread over ranks: use device_map='auto'"


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
    tp_plan : str or mapping, optional
        ``"auto"``, or what transformers takes: each rank of the process group holds some columns of every layer.

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
        tp_plan: TpPlan | None = None,
    ) -> None:
        if tp_plan is not None:
            _check_tp_plan(tp_plan, device, device_map, offload)
        if device_map is not None and (offload or device is not None):
            other = "offload=True" if offload else f"device={str(device)!r}"
            raise InputError(f"device_map={device_map!r} and {other} exclude each other: both say where weights go")
        if isinstance(device_map, str) and device_map not in NAMES:
            device_map = {"": str(resolve_device(device_map))}
        if device_map is not None and not isinstance(device_map, str):
            if not isinstance(device_map, Mapping) or not device_map or not all(isinstance(k, str) for k in device_map):
                raise InputError(f"device_map={device_map!r} must name modules and their devices, or be one of {NAMES}")
            device_map = {name: _checked_place(name, where) for name, where in device_map.items()}
        self.device = None if device is None else resolve_device(device)
        self.device_map, self.offload, self.tp_plan = device_map, offload, tp_plan
        self._folder = offload_folder

    @property
    def spread(self) -> bool:
        """Whether accelerate places the weights."""
        return self.offload or self.device_map is not None or self.tp_plan is not None

    def options(self, model_class: Any, config: Any, **extra: Any) -> dict[str, Any]:
        """Keywords of ``from_pretrained``."""
        if not self.spread:
            return {}
        if self.tp_plan is not None:
            from transformers.distributed import DistributedConfig

            plan = self.tp_plan if isinstance(self.tp_plan, str) else dict(self.tp_plan)
            return {"distributed_config": DistributedConfig(tp_plan=plan, tp_size=ranks().size)}
        return {"device_map": self._map(model_class, config, extra), "offload_folder": str(self.folder())}

    def folder(self) -> Path:
        """The folder for weights that are written anew."""
        if self._folder is None:
            self._folder = tempfile.mkdtemp(prefix="llmbrain-offload-")
            self._own = True
        return Path(self._folder)

    def finish(self, model: Any) -> Any:
        """The model where it belongs; a temporary folder goes when the model does."""
        if self.tp_plan is not None:
            if not is_spread(model):
                raise self.no_plan(model.config)
            _check_heads(model, self.tp_plan)
        if getattr(self, "_own", False):
            weakref.finalize(model, shutil.rmtree, str(self._folder), ignore_errors=True)
        return model if self.device is None or self.spread else model.to(self.device)

    def no_plan(self, config: Any, why: str = "") -> InputError:
        """What is said of a model that transformers does not spread."""
        names = ", ".join(getattr(config, "architectures", None) or [type(config).__name__])
        more = f" ({why})" if why else ""
        return InputError(
            f"tp_plan={self.tp_plan!r}: transformers has no tensor-parallel plan for {names}: use device_map='auto' "
            f"(--device-map auto){more}"
        )

    def misfit(self, why: str) -> InputError:
        """What is said of a map that does not fit the model."""
        said = why if len(why) <= 200 else f"{why[:197]}..."
        return InputError(f"device_map={self.device_map!r} does not fit this model: {said}")

    def dispatch(self, model: Any) -> Any:
        """The same for a model that is in memory already (of a GGUF, which is dequantized whole)."""
        if self.offload:
            raise InputError(
                "offload=True reads blocks from safetensors, a GGUF is dequantized whole: save it as a folder first "
                "(load_model, then save_pruned with format='uniform')"
            )
        if self.tp_plan is not None:
            raise InputError(f"tp_plan={self.tp_plan!r}: {NO_PLAN}")
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
        try:
            placed = dispatch_model(model, device_map=where, skip_keys=skip, **disk)
        except ValueError as error:
            raise self.misfit(str(error)) from error
        return self.finish(placed)

    def _map(self, model_class: Any, config: Any, extra: Mapping[str, Any]) -> Any:
        if not self.offload:
            return self.device_map
        return blocks_on_disk(empty_of(model_class, config, extra), str(self.device or "cpu"))


def _checked_place(name: str, where: int | str) -> int | str:
    """A place that a map names: the number of a device, a device, or the disk."""
    if isinstance(where, int) and not isinstance(where, bool):
        here = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
        if not 0 <= where < here:
            raise InputError(f"device_map: {name!r} goes to device {where}, and there are {here} here, counted from 0")
        return where
    if where != "disk":
        resolve_device(str(where))
    return where


def _check_tp_plan(
    tp_plan: TpPlan, device: str | torch.device | None, device_map: DeviceMap | None, offload: bool
) -> None:
    if device_map is not None or offload or device is not None:
        other = "offload=True" if offload else "device" if device_map is None else "device_map"
        raise InputError(f"tp_plan={tp_plan!r} and {other} exclude each other: both say where weights go")
    if tp_plan != "auto" and not (isinstance(tp_plan, Mapping) and tp_plan):
        raise InputError(f"tp_plan={tp_plan!r} must be 'auto', or name modules and how each is cut")
    if ranks().size == 1:
        raise InputError(
            f"tp_plan={tp_plan!r} spreads every layer over the ranks of a process group, and this process is alone: "
            "torchrun --nproc-per-node 2 -m llmbrain scan MODEL --tp-plan auto ..."
        )
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if here and int(os.environ.get("LOCAL_RANK") or 0) >= here:
        raise InputError(
            f"tp_plan={tp_plan!r}: {ranks()!r} has no GPU of its own, there are {here} here: start as many processes "
            "(--nproc-per-node)"
        )


def _check_heads(model: nn.Module, tp_plan: TpPlan) -> None:
    """Heads that do not divide into ranks would be read wrongly, or not at all."""
    if has_experts(model):
        return  # a scan says that it does not take it
    size = ranks().size
    for layer in anatomy(model, spread=True).layers:
        split = layer.out is not None and is_part(layer.out.module.weight)
        if split and (layer.n_heads % size or layer.n_kv_heads % size):
            raise InputError(
                f"tp_plan={tp_plan!r}: the {layer.n_heads} heads ({layer.n_kv_heads} of keys) of layer {layer.index} "
                f"do not divide into {size} ranks"
            )


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

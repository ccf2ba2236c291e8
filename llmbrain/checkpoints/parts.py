"""Save a model part by part: blocks are written as they come, and no more than one has to be in memory."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmbrain._files import refuse_other, still_free, transaction, write_json
from llmbrain._validation import InputError, check_option
from llmbrain.anatomy.experts import has_experts
from llmbrain.checkpoints.gguf_writing import check_folder_path
from llmbrain.checkpoints.loading import PROVENANCE, load_model
from llmbrain.checkpoints.proof import answer
from llmbrain.checkpoints.remote import write_remote_code
from llmbrain.checkpoints.saving import MODEL, OLD, provenance, write_model
from llmbrain.checkpoints.shapes import layer_shapes, record_shapes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMATS_BY_PART = ("per-layer", "remote-code", "uniform")


class Parts:
    """A checkpoint that is being written: one safetensors file a part.

    Parameters
    ----------
    model : transformers model
        Of the shapes that are saved when it is finished; most of it need not have values.
    folder : Path
    format : str
        One of `FORMATS_BY_PART`.
    n_parts : int
        How many there will be, the last one (what is in no block) included.
    """

    def __init__(self, model: Any, folder: Path, format: str, n_parts: int) -> None:
        self.model, self.folder, self.format, self.n_parts = model, folder, format, n_parts
        self.index: dict[str, str] = {}
        self.size = 0

    def add(self, state: Mapping[str, Tensor]) -> None:
        """Write these tensors, by their names in the model, as the next part."""
        inside = self.folder / "part"
        try:
            with self._no_bars():
                self.model.save_pretrained(
                    inside, state_dict=dict(state), max_shard_size="1000TB",
                    save_original_format=self.format != "remote-code",
                )  # fmt: skip
            self._take(inside / "model.safetensors")
        finally:
            shutil.rmtree(inside, ignore_errors=True)

    @contextmanager
    def _no_bars(self) -> Iterator[None]:
        """transformers shows a bar for every part."""
        from transformers.utils import logging

        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            yield
        finally:
            if shown:
                logging.enable_progress_bar()

    def _take(self, file: Path) -> None:
        from safetensors import safe_open

        name = f"model-{len(set(self.index.values())) + 1:05d}-of-{self.n_parts:05d}.safetensors"
        file.rename(self.folder / name)
        with safe_open(self.folder / name, framework="pt") as part:
            self.index |= dict.fromkeys(part.keys(), name)
        self.size += (self.folder / name).stat().st_size

    def finish(self, state: Mapping[str, Tensor]) -> None:
        """Write the last part, the config that tells the shapes, and the index."""
        mixture = has_experts(self.model)
        if not mixture:
            record_shapes(self.model)
        if self.format == "uniform" and not mixture and layer_shapes(self.model.config):
            raise InputError(
                "format='uniform' needs the same shapes in all layers, biases too: plan with allocation='uniform' and "
                "intercept=False, or use 'per-layer'"
            )
        inside = self.folder / "part"  # transformers clears other parts away where it writes one
        with self._no_bars():
            write_model(self.model, inside, self.format, "1000TB", dict(state))
        self._take(inside / "model.safetensors")
        for file in inside.iterdir():
            file.rename(self.folder / file.name)
        inside.rmdir()
        write_json(self.folder / "model.safetensors.index.json",
                   {"metadata": {"total_size": self.size}, "weight_map": self.index}, indent=2)  # fmt: skip
        if self.format == "remote-code":
            write_remote_code(self.model, self.folder)
        write_json(self.folder / PROVENANCE, provenance(self.model, self.format))


@contextmanager
def saving_by_part(
    model: Any, tokenizer: PreTrainedTokenizerBase | None, path: str | Path, *, format: str, n_parts: int,
    needed: int, overwrite: bool = False, verify: bool = True, beside: Callable[[Path], object] | None = None,
) -> Iterator[Parts]:  # fmt: skip
    """A folder for a checkpoint that is written part by part: at the end all of it is there, or nothing.

    Parameters
    ----------
    model, format, n_parts
        As of `Parts`, which must be finished within the block.
    tokenizer : tokenizer or None
        Saved beside it.
    path : str or Path
    needed : int
        Bytes it will take at most.
    overwrite : bool
        Replace a model that is there already.
    verify : bool
        Open what was written, its blocks one by one, and let it read a few tokens.
    beside : callable, optional
        As in `save_pruned`.

    Raises
    ------
    FileExistsError
        If there is a model already.
    InputError
        If the format is not written so, or what was written does not load or run.
    """
    check_option("format", format, FORMATS_BY_PART)
    path = Path(path)
    check_folder_path(path, format)
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file, not a folder")
    if (path / "config.json").exists() and not overwrite:
        raise FileExistsError(f"{path} holds a model already: give another folder, or overwrite=True")
    refuse_other(path, MODEL)
    free = partial(still_free, what=MODEL, mark="" if overwrite else "config.json")
    with transaction(path, replaces=OLD, needed=needed, free=free) as new:
        parts = Parts(model, new, format, n_parts)
        yield parts
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        if verify and tokenizer is not None and format != "remote-code":
            _check(model, new)
        if beside is not None:
            beside(new)


def _check(model: nn.Module, folder: Path) -> None:
    loaded, _ = load_model(folder, offload=True)
    ours = {name: tuple(p.shape) for name, p in model.named_parameters()}
    theirs = {name: tuple(p.shape) for name, p in loaded.named_parameters()}
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise InputError(
                f"saved and opened again, {name} has shape {theirs.get(name)} for {ours.get(name)}: this model cannot "
                "be saved so"
            )
    if not bool(torch.isfinite(answer(loaded)).all()):
        raise InputError("saved and opened again, the model says what is not finite: this model cannot be saved so")

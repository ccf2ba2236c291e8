"""Prune where a block fits and the model does not: from the checkpoint's files to the smaller one's, block by block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from llmbrain._files import refuse_other
from llmbrain._validation import InputError, check_option, check_range
from llmbrain.anatomy.experts import has_experts
from llmbrain.anatomy.families import LayerAnatomy, anatomy
from llmbrain.anatomy.offload import is_away, lend, lend_rest, present, shell
from llmbrain.anatomy.surgery import check_cuttable, check_no_adapter, restored
from llmbrain.checkpoints.parts import FORMATS_BY_PART, Parts, saving_by_part
from llmbrain.checkpoints.shapes import RECORD
from llmbrain.hooks.change import refuse_changed
from llmbrain.pruning.calibrate.windows import Calibration
from llmbrain.pruning.experts import ExpertPlan
from llmbrain.pruning.plan import PruningPlan
from llmbrain.pruning.prune import COMPENSATIONS, record_of, repair_text
from llmbrain.pruning.repair.fit import repair
from llmbrain.pruning.repair.propagation import propagation_of
from llmbrain.pruning.verify import check_cut_is_zeroing, take
from llmbrain.scanning.scans import Scan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_by_part(
    model: nn.Module, format: str, plan: PruningPlan | ExpertPlan | None = None, functions: bool = False
) -> None:
    """Refuse what is not cut block by block; before a plan is made, where there is none yet.

    Parameters
    ----------
    functions : bool
        Whether the plan will keep or forget functions.

    Raises
    ------
    InputError
        Saying what to do.
    """
    check_option("format", format, FORMATS_BY_PART)
    if has_experts(model) or isinstance(plan, ExpertPlan):
        raise InputError("experts are not cut block by block yet: load the model whole, and use prune")
    if functions or (plan is not None and plan.details.get("functions")):
        raise InputError("a plan that keeps or forgets functions is not cut block by block: load the model whole")


def prune_offloaded(
    model: nn.Module,
    plan: PruningPlan,
    path: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    calibration: Calibration | Sequence[str] | Sequence[Scan] | Tensor | None = None,
    compensate: str | None = None,
    ridge: float | None = None,
    intercept: bool = True,
    sequential: bool = True,
    propagation: float | None = None,
    format: str = "per-layer",
    overwrite: bool = False,
    verify: bool = True,
    beside: Callable[[Path], object] | None = None,
    **text: Any,
) -> Path:
    """Cut what a plan removes, and save the smaller model, with one block in memory at a time.

    For a model that was loaded with ``offload=True`` (or a device map); any other is taken, too. What is saved is what
    `prune` and `save_pruned` would save. In memory are one block, what is in no block (embeddings, head), and the
    hidden states of the calibration text.

    Parameters
    ----------
    model : transformers model
        Not changed.
    plan : PruningPlan
        Made for these weights.
    path : str or Path
        Folder of the smaller model.
    tokenizer, calibration, compensate, ridge, intercept, sequential, propagation, **text
        As in `prune`. The tokenizer is saved beside the model.
    format : {"per-layer", "remote-code", "uniform"}
        As in `save_pruned`.
    overwrite : bool
        Replace a model that is there already.
    verify : bool
        Try on a copy of one block that cutting equals silencing, first; open what was written, block by block.
    beside : callable, optional
        As in `save_pruned`.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    FileExistsError
        If the folder holds a model already.
    InputError
        As in `prune`; or if the plan is one of experts or forgets functions, or the blocks of the model can not run
        one by one.
    """
    check_option("compensate", compensate, COMPENSATIONS)
    check_by_part(model, format, plan)
    if ridge is not None:
        check_range("ridge", ridge, 0)
    if (Path(path) / "config.json").exists() and not overwrite:
        raise FileExistsError(f"{path} holds a model already: give another folder, or overwrite=True")
    refuse_other(path, "a model")
    refuse_changed(model, "prune_offloaded")
    check_no_adapter(model)
    body, kept = plan.check_model(model), plan.kept_units
    for units, of in kept.items():
        check_cuttable(body, units, [len(stays) for stays in of])
    if format == "uniform" and any(len({len(stays) for stays in of}) > 1 for of in kept.values()):
        raise InputError(
            "format='uniform' needs one width in all layers: plan with allocation='uniform' and nothing protected, or "
            "use 'per-layer'"
        )
    given, windows, token_weights = Calibration.of(calibration, tokenizer, **text), None, None
    if compensate is not None:
        windows, token_weights = repair_text(model, plan, given, compensate)
    if verify:
        check_cut_is_zeroing(model, body, kept, windows)
    carry = propagation_of(model, body, windows, propagation, compensate=compensate, sequential=sequential)
    small = shell(model)
    setattr(small, RECORD, [*getattr(small, RECORD, []), record_of(plan, compensate, None, windows, carry)])
    layers = anatomy(small).layers
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    in_blocks = {f"{layer.path}." for layer in layers}

    def write(parts: Parts, layer: LayerAnatomy) -> None:
        """Cut a block as it is now in memory, and write it."""
        mine = layers[layer.index]
        lend(layer.block, mine.block)
        for units, of in kept.items():
            take(mine, units, of[layer.index])
        parts.add({f"{mine.path}.{name}": value.cpu() for name, value in mine.block.state_dict().items()})
        mine.block.to("meta")

    with saving_by_part(
        small,
        tokenizer,
        path,
        format=format,
        n_parts=len(layers) + 1,
        needed=size,
        overwrite=overwrite,
        verify=verify,
        beside=beside,
    ) as parts:
        if windows is None:
            for layer in body.layers:
                with present(layer.block):
                    write(parts, layer)
        else:
            with restored(body.layers, list(kept)):
                repair(
                    model, body, windows, kept, kind=str(compensate), ridge=ridge, intercept=intercept,
                    sequential=sequential, weights=token_weights, carry=carry,
                    done=lambda layer: write(parts, layer),
                )  # fmt: skip
        if is_away(model):
            lend_rest(model, small, in_blocks)
        rest = {n: v for n, v in small.state_dict().items() if not any(n.startswith(p) for p in in_blocks)}
        parts.finish(rest)
    return Path(path)

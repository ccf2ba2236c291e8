"""Fewer experts: what ``llmbrain plan`` and ``llmbrain prune`` do with ``--expert-ratio``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from llmbrain._validation import InputError
from llmbrain.anatomy.experts import expert_anatomy, has_experts
from llmbrain.checkpoints import load_model, save_pruned
from llmbrain.checkpoints.gguf_writing import check_gguf_path
from llmbrain.checkpoints.shapes import RECORD
from llmbrain.pruning import plan_pruning, prune
from llmbrain.pruning.expert_neurons import methods
from llmbrain.pruning.experts import ExpertPlan
from llmbrain.study.again import MADE, check_plan_place, made_from, making
from llmbrain.study.fits import check_saving, gguf_of
from llmbrain.study.folder import Study
from llmbrain.study.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def plan_fewer(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str] | None, *,
    expert_ratio: float, study: Study | str | Path | None = None, out: str | Path | None = None, **options: Any,
) -> ExpertPlan:  # fmt: skip
    """Say which experts of a mixture of experts a cut would remove; nothing is cut.

    Parameters
    ----------
    texts : sequence of str, optional
        Calibration text; default: that of the study.
    expert_ratio : float
        Share of each layer's routed experts.
    study : path, optional
        Whose networks ``"networks"`` uses.
    out : path, optional
        Where to write the plan.
    **options
        As for `plan_pruning`.
    """
    networks = None
    if study is not None:
        found = study if isinstance(study, Study) else Study(study)
        networks = found.networks if options.get("method") == "networks" else None
        texts = texts if texts is not None else [run.text for run in found.scans if run.text]
    made = plan_pruning(
        model, networks, expert_ratio=expert_ratio, tokenizer=tokenizer, calibration=texts or None, **options
    )
    if out is not None:
        check_plan_place(out)
        made.save(out)
    return made


def cut_fewer(
    model: Any, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str] | None, *, out: str | Path,
    plan: ExpertPlan | None = None, compensate: str | None = "least-squares", format: str = "per-layer",
    gguf_type: str = "f16", like: str | Path | None = None, overwrite: bool = False, **options: Any,
) -> tuple[nn.Module, ExpertPlan]:  # fmt: skip
    """Cut experts out of a model, repair what stays where there is text, and save it.

    Parameters
    ----------
    plan : ExpertPlan, optional
        Made before; else as in `plan_fewer`.
    compensate : str, optional
        See `llmbrain.prune`; without text nothing is repaired.
    out, format, gguf_type, like, overwrite
        See `save_pruned`; `like` is the GGUF that the model was loaded from, if it was.
    """
    check_saving(model, tokenizer, format, gguf_type, like)
    if format == "gguf":
        check_gguf_path(out)
    study = options.get("study")
    folder = study.folder if isinstance(study, Study) else study and Path(study)
    made = made_from("prune experts", model, texts, folder or None, format=format, compensate=compensate,
                     gguf_type=gguf_type, like=like and str(like),
                     plan=plan and plan.to_dict(), **{k: v for k, v in options.items() if k != "study"})  # fmt: skip
    with making(out, overwrite, made) as is_there:
        if is_there:
            small, _ = load_model(out)
            return small, ExpertPlan(**getattr(small, RECORD)[-1]["plan"])
        plan = plan_fewer(model, tokenizer, texts, **options) if plan is None else plan
        texts = texts if texts is not None else calibration_of(options.get("study"))
        how = {"compensate": compensate, "tokenizer": tokenizer, "calibration": texts} if texts else {}
        small = prune(model, plan, **how)
        save_pruned(
            small, tokenizer, out, format=format, overwrite=overwrite, gguf_type=gguf_type,
            like=like or (gguf_of(model) if format == "gguf" else None), note={MADE: made} if made else None,
        )  # fmt: skip
    return small, plan


def calibration_of(study: Study | str | Path | None) -> list[str] | None:
    """Texts of a study's scans."""
    if study is None:
        return None
    return [run.text for run in (study if isinstance(study, Study) else Study(study)).scans if run.text] or None


def check_method(model: nn.Module, how: Settings) -> None:
    """Refuse a method that a mixture of experts (or a dense model) does not have, before any work.

    Raises
    ------
    InputError
        Saying which ones there are.
    """
    if how.expert_ratio is not None:
        expert_anatomy(model)  # says that there are none
    else:
        check_neuron_method(model, how.method)


def check_neuron_method(model: nn.Module, method: str) -> None:
    """Refuse a method that scores no neurons inside experts, before any work."""
    if has_experts(model) and method not in methods():
        raise InputError(
            f"method={method!r} does not score neurons inside experts: say method ({', '.join(methods())}), or "
            "expert_ratio, to remove whole experts"
        )

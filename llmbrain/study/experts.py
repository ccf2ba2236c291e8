"""Fewer experts: what ``llmbrain plan`` and ``llmbrain prune`` do with ``--expert-ratio``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from llmbrain.checkpoints import save_pruned
from llmbrain.pruning import plan_pruning, prune
from llmbrain.pruning.experts import ExpertPlan
from llmbrain.study.folder import Study

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def plan_fewer(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str] | None, *,
    expert_ratio: float, study: str | Path | None = None, out: str | Path | None = None, **options: Any,
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
        found = Study(study)
        networks = found.networks if options.get("method") == "networks" else None
        texts = texts if texts is not None else [run.text for run in found.scans if run.text]
    made = plan_pruning(
        model, networks, expert_ratio=expert_ratio, tokenizer=tokenizer, calibration=texts or None, **options
    )
    if out is not None:
        made.save(out)
    return made


def cut_fewer(
    model: Any, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str] | None, *, out: str | Path,
    format: str = "per-layer", overwrite: bool = False, **options: Any,
) -> ExpertPlan:  # fmt: skip
    """Cut experts out of a model and save it; parameters as in `plan_fewer`, and `save_pruned`."""
    made = plan_fewer(model, tokenizer, texts, **options)
    save_pruned(prune(model, made), tokenizer, out, format=format, overwrite=overwrite)
    return made

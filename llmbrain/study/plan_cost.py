"""What a plan, the repair after it and what is said of both will take, before any of it is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from llmbrain.hooks.text import window_length
from llmbrain.pruning import PruningPlan
from llmbrain.pruning.forget.relearning import Relearning
from llmbrain.study.cost import (
    Cost,
    Forgetting,
    Part,
    Subject,
    forecast_part,
    own_windows,
    plan_passes,
    repair_passes,
    step_cost,
    writing_passes,
)
from llmbrain.study.experts import check_neuron_method
from llmbrain.study.folder import Study
from llmbrain.study.smaller import TEXT_WINDOWS, may_write

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase


def plan_cost(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str] | None, *,
    study: Study | str | Path | None = None, method: str = "networks", allocation: str | None = None,
    passes: float = 24, head_ratio: float = 0.0, compensate: str | None = None, drop: Sequence[str] = (),
    self_text: int | None = None, keep: Sequence[str] = (), forget: Sequence[str] = (), last: bool = False,
    relearning: bool = False, forecast: bool = False, measured: bool = False,
    plan: PruningPlan | None = None, ratio: float | None = None, propagation: float | None = None,
    token_balance: float | None = None,
    saves: bool = False,
) -> Cost | None:  # fmt: skip
    """What a plan (and the repair after it) will take; None where there is no text to measure on.

    Parameters
    ----------
    model, tokenizer, texts, study
        As for `llmbrain.study.smaller.plan`; one batch of the text is read.
    method, allocation, passes, head_ratio, drop
        As for `plan_pruning`.
    compensate : str, optional
        The repair that follows; None: only a plan, or a cut without repair.
    self_text
        As in `llmbrain.study.smaller.evidence_of`.
    keep, forget, last
        Functions, and whether forgetting is to last.
    relearning : bool
        Whether what was forgotten is taught again after the repair.
    forecast, measured : bool
        Whether it is said what the cut will cost, where there is a study and a forecast can be made; and afterwards
        what it did cost.
    plan : PruningPlan, optional
        That is there already: its functions are those that are kept or forgotten.
    ratio : float, optional
        0: no neuron is to go, so none is looked for.
    propagation, token_balance : float, optional
        As for `prune` and `plan_pruning`.
    saves : bool
        Whether the smaller model is written: it takes no more disk than this one.
    """
    if plan is not None:
        functions, method = plan.details.get("functions") or {}, "magnitude"
        keep, forget, last = functions.get("keep") or (), functions.get("forget") or (), bool(functions.get("last"))
        head_ratio, drop = float(plan.kept_heads is not None), [k for k, of in plan.dropped.items() if any(of)]
    check_neuron_method(model, method)
    made = None if study is None else Study.of(study)
    held = [] if made is None or (texts is not None and not made.has("scans")) else made.scans
    if texts is None:
        texts = [run.text for run in held if run.text]
    if not texts:
        return None
    subject, length = Subject.of(model), window_length(model)
    layers = len(subject.widths)
    planning = (
        0.0 if plan is not None else plan_passes(method, allocation, passes, head_ratio, drop, layers, token_balance)
    )
    often = planning + repair_passes(compensate, 0 if subject.mixture or keep or forget else layers, propagation)
    most = TEXT_WINDOWS * length
    cost = step_cost(model, tokenizer, texts, n_tokens=most, passes=often, name=f"plan ({method})", method=method)
    if self_text is None and (keep or forget or not may_write(model, tokenizer)):
        self_text = 0
    own = own_windows(self_text, layers, max(1, cost.parts[0].tokens // length)) * length
    given = cost.parts[0]
    parts = [given]
    if own:
        more = given.tokens + own
        read = replace(given, tokens=more, extra=given.extra * more / max(1, given.tokens))
        parts = [Part("text of the model's own", writing_passes(own), own), read]
    memory = cost.memory
    if forget:
        beside = Forgetting.of(
            held or texts, forget, last=last, searches=plan is None and ratio != 0,
            repairs=compensate == "least-squares", attack=Relearning() if relearning else None,
        )  # fmt: skip
        parts += beside.parts(subject.parameters, given.tokens, length)
        memory += (beside.copies(subject.itemsize) - 2) * subject.size
    elif forecast and held and not (keep or head_ratio or drop or subject.mixture):
        parts.append(forecast_part(subject, sum(scan.n_tokens for scan in held), measured=measured))
    return replace(cost, parts=tuple(parts), memory=memory, disk=subject.size if saves else cost.disk)

"""What a cut of a study was going to cost, and did: the forecast that stands in reports."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from llmbrain.anatomy.offload import is_away
from llmbrain.evaluation.perplexity import predicts_next_token
from llmbrain.hooks.text import ScanWarning
from llmbrain.networks import FunctionalNetworks
from llmbrain.pruning import PruningPlan
from llmbrain.pruning.calibrate.windows import scans_with_tokens
from llmbrain.pruning.experts import ExpertPlan
from llmbrain.pruning.forecast import Forecast, OtherModelError
from llmbrain.scanning import Scan, Stimulus, scan
from llmbrain.study.sample import count_tokens
from llmbrain.study.texts import LEAST, limit_tokens

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn
    from transformers import PreTrainedTokenizerBase

TOKENS = 2048  # that the forecast is for, at least, where the scans have so many
FITTED = 8192  # that the repair is foreseen on, at most


def fitted_tokens(n_tokens: int) -> int:
    """Tokens that the repair is foreseen on, of so many: a quarter, so that a small job's forecast is small too."""
    return min(n_tokens, FITTED, max(TOKENS, n_tokens // 4))


def forecast_of(
    model: nn.Module, plan: PruningPlan | ExpertPlan, networks: FunctionalNetworks | None, scans: Sequence[Scan] | None,
    compensate: str | None, *, unseen: Sequence[Scan] = (),
) -> Forecast | None:  # fmt: skip
    """The forecast of a plan on the last scans of a study, such that they hold `TOKENS` tokens, or on unseen ones; None
    where there can be none (no scans with tokens, heads cut as well, no next token, a mixture of experts, a repair that
    keeps or forgets).

    Warns where the scans are of another model.

    Parameters
    ----------
    model : dense model
    unseen : sequence of Scan
        Of text that the cut is not calibrated on.
    networks : FunctionalNetworks, optional
        Of other neurons than the plan's (neurons and heads joined, say): left out.
    """
    if no_forecast(model, plan, scans, compensate) is not None or isinstance(plan, ExpertPlan):
        return None
    known = _of_plan(plan, scans)
    if networks is not None and (networks.space is None or tuple(networks.space.widths) != plan.widths_before):
        networks = None
    tokens = sum(scan.n_tokens for scan in known)
    chosen, fitted = unseen or _enough(known[::-1], TOKENS), _enough(known, fitted_tokens(tokens))
    try:
        found = plan.forecast(networks, chosen, model=model, compensate=compensate, calibration=fitted)
        return replace(found, fitted=not unseen)
    except OtherModelError as error:  # the cut itself may be calibrated on tokens of such scans
        warnings.warn(f"no forecast: {error}", ScanWarning, stacklevel=2)
        return None


def unseen_scans(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], scans: Sequence[Scan],
    run_length: int | None,
) -> list[Scan]:  # fmt: skip
    """The first `TOKENS` tokens of text that was held out, in memory; none where only the other text has conditions.

    Parameters
    ----------
    texts : sequence of str
        Held out.
    scans : sequence of Scan
        Of what was calibrated on.
    run_length : int, optional
        As for `llmbrain.scan`.
    """
    if not any(getattr(text, "events", None) is not None for text in texts) and any(len(s.events) for s in scans):
        return []
    first = [t for t in limit_tokens(texts, tokenizer, TOKENS) if count_tokens(tokenizer, [t]) >= LEAST]
    named = [Stimulus(t, getattr(t, "events", None), f"held-out-{i:04d}") for i, t in enumerate(first, 1)]
    return scan(model, tokenizer, named, run_length=run_length) if named else []


def no_forecast(
    model: nn.Module, plan: PruningPlan | ExpertPlan, scans: Sequence[Scan] | None, compensate: str | None
) -> str | None:
    """Why there can be no forecast of a plan, in a few words; None where there can be one."""
    if isinstance(plan, ExpertPlan) or plan.experts_before is not None:
        return "it is for cuts of neurons of dense models, not of experts"
    if plan.kept_heads is not None or any(plan.dropped.values()):
        return "it is for cuts of neurons only, this plan takes heads or whole blocks as well"
    functions = plan.details.get("functions") or {}
    if compensate is not None and (functions.get("keep") or functions.get("forget")):
        return "the plan keeps or forgets functions, and of its repair a forecast knows nothing"
    if not predicts_next_token(model):
        return "the model predicts no next token"
    if is_away(model):
        return "of a model on disk it would take as long as the cut"
    if not _of_plan(plan, scans):
        return "it needs a scan of the neurons with its tokens (--study)"
    return None


def _of_plan(plan: PruningPlan, scans: Sequence[Scan] | None) -> list[Scan]:
    return [s for s in scans_with_tokens(scans) if tuple(s.space.widths) == plan.widths_before]


def forecast_table(found: Forecast) -> pd.DataFrame:
    """What a cut costs each condition, or each text where there are none, and all tokens together.

    Returns
    -------
    DataFrame
        ``condition`` or ``text``, ``tokens``, ``predicted`` nats a token, ``measured`` once it was measured.
    """
    import pandas as pd

    rows = found.conditions if len(found.conditions) else found.texts
    numbers = [c for c in ("predicted", "measured") if c in rows]
    weights = found.texts["tokens"] / max(1, found.texts["tokens"].sum())
    every = {c: float((found.texts[c].fillna(0.0) * weights).sum()) for c in numbers}
    last = {rows.columns[0]: "all", "tokens": int(found.texts["tokens"].sum()), **every}
    return pd.concat([rows, pd.DataFrame([last])], ignore_index=True)[[rows.columns[0], "tokens", *numbers]]


def _enough(scans: Sequence[Scan], tokens: int) -> list[Scan]:
    chosen: list[Scan] = []
    for run in scans:
        if sum(s.n_tokens for s in chosen) >= tokens:
            break
        chosen.append(run)
    return chosen

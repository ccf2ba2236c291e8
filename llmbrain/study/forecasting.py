"""What a cut of a study was going to cost, and did: the forecast that stands in reports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmbrain.evaluation.perplexity import predicts_next_token
from llmbrain.networks import FunctionalNetworks
from llmbrain.pruning import PruningPlan
from llmbrain.pruning.calibrate.windows import scans_with_tokens
from llmbrain.pruning.experts import ExpertPlan
from llmbrain.pruning.forecast import Forecast
from llmbrain.scanning import Scan

if TYPE_CHECKING:
    from torch import nn

TOKENS = 2048  # that the forecast is for, at least, where the scans have so many
FITTED = 8192  # that the repair is foreseen on, at most


def fitted_tokens(n_tokens: int) -> int:
    """Tokens that the repair is foreseen on, of so many: a quarter, so that a small job's forecast is small too."""
    return min(n_tokens, FITTED, max(TOKENS, n_tokens // 4))


def forecast_of(
    model: nn.Module, plan: PruningPlan | ExpertPlan, networks: FunctionalNetworks | None, scans: Sequence[Scan] | None,
    compensate: str | None,
) -> Forecast | None:  # fmt: skip
    """The forecast of a plan on the last scans of a study, such that they hold `TOKENS` tokens; None where there can be
    none (no scans with tokens, heads cut as well, no next token, a mixture of experts, a repair that keeps or forgets).

    Parameters
    ----------
    model : dense model
    networks : FunctionalNetworks, optional
        Of other neurons than the plan's (neurons and heads joined, say): left out.
    """
    if isinstance(plan, ExpertPlan) or plan.experts_before is not None:
        return None
    known = [s for s in scans_with_tokens(scans) if tuple(s.space.widths) == plan.widths_before]
    if not known or plan.kept_heads is not None or any(plan.dropped.values()) or not predicts_next_token(model):
        return None
    functions = plan.details.get("functions") or {}
    if compensate is not None and (functions.get("keep") or functions.get("forget")):
        return None
    if networks is not None and (networks.space is None or tuple(networks.space.widths) != plan.widths_before):
        networks = None
    tokens = sum(scan.n_tokens for scan in known)
    chosen, fitted = _enough(known[::-1], TOKENS), _enough(known, fitted_tokens(tokens))
    return plan.forecast(networks, chosen, model=model, compensate=compensate, calibration=fitted)


def _enough(scans: Sequence[Scan], tokens: int) -> list[Scan]:
    chosen: list[Scan] = []
    for scan in scans:
        if sum(s.n_tokens for s in chosen) >= tokens:
            break
        chosen.append(scan)
    return chosen

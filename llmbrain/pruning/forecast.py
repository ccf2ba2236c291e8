"""What a cut will cost, before anything is cut: by token, text, condition and network.

Several predictors are here, so that they can be measured beside each other (``benchmarks/uses.py --only forecast``).
The one that measured best needs the model and no network: an expansion of the loss to the second order in what the
repaired layers will say differently. Networks then only sort its tokens into functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from llmbrain._validation import InputError, check_option
from llmbrain.anatomy.families import anatomy
from llmbrain.evaluation.perplexity import next_token_losses, predicts_next_token
from llmbrain.hooks.change import recomputing
from llmbrain.hooks.listen import hear_outputs
from llmbrain.hooks.text import evaluating
from llmbrain.networks import FunctionalNetworks
from llmbrain.networks.localizer import time_courses_of
from llmbrain.pruning.calibrate.gradients import gradient_pass, to_recompute
from llmbrain.pruning.calibrate.losses import gradients_of
from llmbrain.pruning.calibrate.moments import Moments
from llmbrain.pruning.calibrate.windows import calibration_windows, scans_with_tokens
from llmbrain.pruning.repair.fit import FALLBACK_RIDGE
from llmbrain.pruning.repair.least_squares import bias_only, least_squares
from llmbrain.scanning.scans import Scan

if TYPE_CHECKING:
    import pandas as pd

Series = list[NDArray[np.float64]]  # one array a run, one number a token
Kept = Sequence[NDArray[np.int64]]

PREDICTORS = ("taylor", "taylor2", "curvature", "fluctuation", "networks", "share")
BEST = "taylor2"
OF_MODEL = ("taylor", "taylor2", "curvature", "fluctuation")  # these look at weights
REPAIRS = (None, "bias", "least-squares")
OTHER = 0.2  # relative difference of signals above which they are another model's; 16 bits make some thousandths


class OtherModelError(InputError):
    """Scans hold what another model did."""


@dataclass(frozen=True)
class Forecast:
    """What `PruningPlan.forecast` returns: predicted loss added, by token and summed up.

    Attributes
    ----------
    predictor : str
        See `forecast`.
    unit : str
        ``"nats a token"``, or ``"relative"`` for predictors that have no scale: only their order means anything.
    tokens : list of float64 array ``(n_tokens,)``
        One a run: predicted loss added to each token; nan at the first one of a block, which nothing predicts.
    networks : DataFrame
        ``network``, ``share_cut`` (of the energy of its map), ``predicted`` (mean over tokens, weighted by the squared
        time course of the network), ``measured`` once it was measured.
    conditions, texts : DataFrame
        ``condition`` or ``text``, ``tokens``, ``predicted`` (mean), ``measured``.
    fitted : bool, optional
        Whether the cut was calibrated on these tokens too, where that is known: then less is lost on them than is
        predicted, which is for text that it was not.
    """

    predictor: str
    unit: str
    tokens: Series
    networks: pd.DataFrame
    conditions: pd.DataFrame
    texts: pd.DataFrame
    fitted: bool | None = None
    _scans: list[Scan] = field(repr=False, default_factory=list)
    _courses: list[NDArray[np.float64]] = field(repr=False, default_factory=list)

    def measure(self, model: nn.Module, small: nn.Module) -> Forecast:
        """The same tables with what the cut did cost on these tokens.

        Parameters
        ----------
        model, small : causal language models
            Before and after the cut.
        """
        dense, after = (token_losses_of(m, self._scans) for m in (model, small))
        measured = [b - a for a, b in zip(dense, after)]
        shares = self.networks["share_cut"].to_numpy()
        tables = _tables(self._scans, self._courses, shares, list(self.networks["network"]), self.tokens, measured)
        return Forecast(self.predictor, self.unit, self.tokens, *tables, self.fitted, self._scans, self._courses)

    def agreement(self) -> pd.DataFrame:
        """Rank correlation of predicted and measured loss over networks, conditions and texts, and their means.

        Raises
        ------
        InputError
            If nothing was measured yet.
        """
        import pandas as pd
        from scipy.stats import spearmanr

        rows = []
        for name in ("networks", "conditions", "texts"):
            table = getattr(self, name)
            if "measured" not in table:
                raise InputError("this forecast was not measured yet: forecast.measure(model, small)")
            known = table.dropna(subset=["predicted", "measured"])
            r = float(spearmanr(known["predicted"], known["measured"]).statistic) if len(known) > 2 else np.nan
            rows.append((name, len(known), r, known["predicted"].mean(), known["measured"].mean()))
        return pd.DataFrame(rows, columns=["over", "n", "rank_correlation", "predicted", "measured"])


def forecast(
    kept: Kept,
    widths: Sequence[int],
    networks: FunctionalNetworks | None,
    scans: Sequence[Scan],
    *,
    model: nn.Module | None = None,
    predictor: str = BEST,
    compensate: str | None = "least-squares",
    calibration: Sequence[Scan] | None = None,
) -> Forecast:
    """Predict what a cut costs on the tokens of some scans.

    Parameters
    ----------
    kept : sequence of int64 array
        Neurons of each layer that stay.
    widths : sequence of int
        Neurons of each layer before.
    networks : FunctionalNetworks, optional
        Of this model; their time courses say at which tokens each is active (their own where they are of these scans,
        else by dual regression). Without any there is no table of networks.
    scans : sequence of Scan
        Of the dense model, with tokens.
    model, predictor, compensate, calibration
        As for `PruningPlan.forecast`.

    Returns
    -------
    Forecast
    """
    check_option("predictor", predictor, PREDICTORS)
    check_option("compensate", compensate, REPAIRS)
    if networks is not None and not isinstance(networks, FunctionalNetworks):
        raise InputError(f"networks={type(networks).__name__} must be a FunctionalNetworks (see from_ica), or None")
    scans = _checked(scans, widths)
    if networks is None and predictor == "networks":
        raise InputError("predictor='networks' needs networks")
    if predictor in OF_MODEL and model is None:
        raise InputError(f"predictor={predictor!r} needs the model that the plan was made for: pass model=")
    courses: list[NDArray[np.float64]] = []
    shares, names = np.zeros(0), []
    if networks is not None:
        if networks.space is None or tuple(networks.space.widths) != tuple(widths):
            raise InputError(f"networks lie in {networks.space}, the plan is for layers of {list(widths)} neurons")
        courses = [np.asarray(c, dtype=np.float64) for c in time_courses_of(networks, scans)]
        shares, names = share_cut(networks, kept), list(networks.names)
    if predictor == "share":
        cut = float(np.mean([1 - len(k) / w for k, w in zip(kept, widths)]))
        tokens = [np.full(s.n_tokens, cut) for s in scans]
    elif predictor == "networks":
        tokens = [(c**2) @ shares for c in courses]
    else:
        assert model is not None
        fits = _checked(list(calibration) if calibration else scans, widths)
        changes = Changes(Observed(model, fits), kept, compensate)
        if predictor == "fluctuation":
            tokens = changes.fluctuation(scans)
        else:
            first, second = changes.expansion(scans)
            both = [a + b for a, b in zip(first, second)]
            tokens = {"taylor": first, "curvature": second, "taylor2": both}[predictor]
    tokens = [shifted(t, s) for t, s in zip(tokens, scans)]
    unit = "nats a token" if predictor in ("taylor", "taylor2", "curvature") else "relative"
    tables = _tables(scans, courses, shares, names, tokens, None)
    return Forecast(predictor, unit, tokens, *tables, None, scans, courses)


def share_cut(networks: FunctionalNetworks, kept: Kept) -> NDArray[np.float64]:
    """Share of the energy (squared z) of each network's map that lies on neurons that go; ``(n_networks,)``."""
    assert networks.space is not None
    gone = np.ones(networks.n_neurons, dtype=bool)
    for layer, stays in enumerate(kept):
        gone[networks.space.offsets[layer] + np.asarray(stays)] = False
    energy = networks.maps.astype(np.float64) ** 2
    return energy[:, gone].sum(1) / np.maximum(energy.sum(1), 1e-12)


class Observed:
    """What a model does on some text, for the forecasts of any number of plans: each thing is found once.

    Parameters
    ----------
    model : transformers model
        Dense.
    scans : sequence of Scan
        Of the text that repairs are fitted to.
    """

    def __init__(self, model: nn.Module, scans: Sequence[Scan]) -> None:
        self.model, self.body, self.scans = model, anatomy(model), list(scans)
        if tuple(self.body.widths) != tuple(scans[0].space.widths):
            raise InputError(f"scans lie in {scans[0].space}, the model has layers of {list(self.body.widths)} neurons")

    @cached_property
    def metric(self) -> list[Tensor]:
        """``E[g g^T]`` of each layer, g the gradient of the summed loss by its output."""
        windows = calibration_windows(self.model, None, None, self.scans, None, 128)
        assert windows is not None
        return [g.float() for g in gradient_pass(self.model, self.body, windows)["metric"]]

    def moments(self, layer: int) -> Moments:
        """Of a layer's neurons, with what they make of them as the target."""
        weight = self.body.layers[layer].down.weight().detach().float().cpu()
        found = Moments()
        for scan in self.scans:
            for _, part in scan.iter_data(2048, layer):
                x = torch.from_numpy(part)
                found.add(x, x @ weight)
        return found


class Changes:
    """What each layer of a model will say differently after a cut, as far as its own inputs tell.

    Parameters
    ----------
    observed : Observed
    kept : sequence of int64 array
    compensate : {None, "bias", "least-squares"}
    """

    def __init__(self, observed: Observed, kept: Kept, compensate: str | None) -> None:
        self.observed = observed
        self.weights: list[Tensor] = []  # (neurons, outputs): what is added to the old weights
        self.biases: list[Tensor] = []
        self.levels: list[Tensor] = []  # (neurons,) squared weights of those that go, by the variance of the layer
        self.means: list[Tensor] = []
        for layer, indices in zip(observed.body.layers, kept):
            stays = torch.from_numpy(np.asarray(indices))
            weight = layer.down.weight().detach().double().cpu()
            moments = observed.moments(layer.index)
            refit = None
            if compensate == "bias":
                refit = bias_only(moments, weight, stays)
            elif compensate == "least-squares" and len(stays) < layer.width:
                refit = least_squares(moments, weight, stays, ridge=FALLBACK_RIDGE)
            change = -weight
            change[stays] += weight[stays] if refit is None else refit.weight
            bias = None if refit is None else refit.bias
            self.weights.append(change.float())
            self.biases.append(torch.zeros(weight.shape[1]) if bias is None else bias.float())
            total = float(moments.target_variance.sum().clamp_min(1e-12))
            gone = torch.ones(layer.width, dtype=torch.bool).index_fill_(0, stays, False)
            self.levels.append(torch.where(gone, weight.square().sum(1), 0.0).float() / total)
            self.means.append(moments.mean.float())

    def of(self, layer: int, x: Tensor) -> Tensor:
        """Change of a layer's output at tokens whose neurons say x ``(tokens, neurons)``."""
        return x.float() @ self.weights[layer].to(x.device) + self.biases[layer].to(x.device)

    def fluctuation(self, scans: Sequence[Scan]) -> Series:
        """FLAP's error, token by token: squared deviation of what goes, times its squared weights, layers alike."""
        found = []
        for scan in scans:
            total = np.zeros(scan.n_tokens)
            for i, (mean, level) in enumerate(zip(self.means, self.levels)):
                total += ((torch.from_numpy(scan.data(i)) - mean).square() @ level).numpy()
            found.append(total)
        return found

    def expansion(self, scans: Sequence[Scan]) -> tuple[Series, Series]:
        """First-order change of the loss of all later tokens, at the token where layers say something else; and half
        the second order, with the second moment of gradients as the Hessian of each layer."""
        model, layers = self.observed.model, self.observed.body.layers
        if not predicts_next_token(model):
            raise InputError(f"model {type(model).__name__} predicts no next token: there is no loss to forecast")
        metric = self.observed.metric
        first: list[Tensor] = [torch.zeros(0)]
        second: dict[int, Tensor] = {}  # of each layer: a block that runs again says it again
        begun: list[Scan] = []  # until its first block was compared with what the model does now

        def watch(i: int) -> Callable[[Tensor, Tensor], None]:
            def hook(entering: Tensor, output: Tensor) -> None:
                signals = entering.detach().flatten(0, -2)
                if begun:
                    _check_recorded(begun[0], i, signals)
                change = self.of(i, signals)
                second[i] = (0.5 * ((change @ metric[i].to(change.device)) * change).sum(-1)).cpu()

                def take(g: Tensor) -> None:
                    first[0] += (change * g.detach().float().flatten(0, -2)).sum(-1).cpu()

                output.register_hook(take)

            return hook

        places = [(layer.down.module, watch(i)) for i, layer in enumerate(layers)]
        found: tuple[Series, Series] = ([], [])
        leaf: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
        with gradients_of(model, list(leaf.parameters())):
            for scan in scans:
                parts: tuple[list[Tensor], list[Tensor]] = ([], [])
                begun[:] = [scan]
                for ids in _blocks(scan):
                    first[0] = torch.zeros(len(ids))
                    second.clear()
                    with recomputing(to_recompute(self.observed.body, len(ids))), hear_outputs(model, places):
                        torch.autograd.grad(next_token_losses(model, ids[None]).sum(), list(leaf.parameters()))
                    begun.clear()
                    parts[0].append(first[0])
                    parts[1].append(torch.stack(list(second.values())).sum(0))
                for series, of in zip(found, parts):
                    series.append(torch.cat(of).numpy().astype(np.float64))
        return found


def token_losses_of(model: nn.Module, scans: Sequence[Scan]) -> Series:
    """Loss of each token of each scan, read in the blocks that the scan read; nan at the first token of a block."""
    found = []
    with evaluating(model):
        for scan in scans:
            parts = [F.pad(next_token_losses(model, ids[None])[0], (1, 0), value=torch.nan) for ids in _blocks(scan)]
            found.append(torch.cat(parts).double().cpu().numpy())
    return found


def _blocks(scan: Scan) -> list[Tensor]:
    ids = torch.from_numpy(scan.token_ids)
    starts = [*np.flatnonzero(scan.positions == 0).tolist(), len(ids)]
    return [ids[a:b] for a, b in pairwise(starts)]


def shifted(values: NDArray[np.float64], scan: Scan) -> NDArray[np.float64]:
    """A change at one token shows in the loss of the next; nothing predicts the first of a block."""
    moved = np.concatenate([[np.nan], values[:-1]])
    moved[scan.positions == 0] = np.nan
    return moved


def _checked(scans: Sequence[Scan], widths: Sequence[int]) -> list[Scan]:
    given = [scans] if isinstance(scans, (Scan, str)) else list(scans or ())
    if not all(hasattr(scan, "token_ids") for scan in given):
        raise InputError(f"scans of {type(given[0]).__name__} must be scans of the dense model: lb.scan(...)")
    known = scans_with_tokens(given)
    if not known:
        raise InputError("scans: none of them holds token ids: a forecast is for the tokens of a text")
    for scan in known:
        if tuple(scan.space.widths) != tuple(widths):
            raise InputError(
                f"scan {scan.name!r} lies in {scan.space}, the plan is for layers of {list(widths)} neurons"
            )
    return known


def _check_recorded(scan: Scan, layer: int, signals: Tensor) -> None:
    """Refuse scans of another model: signals of the scan's first tokens differ by more than precision does."""
    now = signals.float().cpu().numpy()
    then = np.asarray(scan.data(layer)[: len(now)], dtype=np.float32)
    apart = float(np.square(now - then).mean() ** 0.5) / max(float(np.square(now).mean() ** 0.5), 1e-12)
    if apart > OTHER:
        raise OtherModelError(
            f"scan {scan.name!r} is not of this model: what it holds of layer {layer} is {apart:.0%} "
            "off what the model does now (another model, or weights that were trained or cut since): scan it again"
        )


def _tables(
    scans: Sequence[Scan], courses: Sequence[NDArray[np.float64]], shares: NDArray[np.float64], names: Sequence[str],
    predicted: Series, measured: Series | None,
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:  # fmt: skip
    """Tables of networks, conditions and texts."""
    import pandas as pd

    values = {"predicted": np.concatenate(predicted)}
    if measured is not None:
        values["measured"] = np.concatenate(measured)
    known = np.isfinite(values["predicted"])
    run = np.repeat(np.arange(len(scans)), [s.n_tokens for s in scans])
    label = np.concatenate([_labels(s) for s in scans])

    def means(of: NDArray[np.bool_]) -> dict[str, float]:
        return {k: float(v[of & known].mean()) if (of & known).any() else np.nan for k, v in values.items()}

    texts = [{"text": s.name, "tokens": int(known[run == i].sum()), **means(run == i)} for i, s in enumerate(scans)]
    kinds = sorted({str(x) for x in label if x is not None})
    conditions = [{"condition": c, "tokens": int(known[label == c].sum()), **means(label == c)} for c in kinds]
    rows = []
    if len(courses):
        # a token's loss goes with what the networks did at the token before it
        power = np.concatenate([np.concatenate([c[:1], c[:-1]]) for c in courses]) ** 2
        for k, name in enumerate(names):
            w = power[known, k]
            mean = {key: float((v[known] * w).sum() / max(w.sum(), 1e-12)) for key, v in values.items()}
            rows.append({"network": name, "share_cut": float(shares[k]), **mean})
    columns = list(values)
    return (
        pd.DataFrame(rows, columns=["network", "share_cut", *columns]),
        pd.DataFrame(conditions, columns=["condition", "tokens", *columns]),
        pd.DataFrame(texts, columns=["text", "tokens", *columns]),
    )


def _labels(scan: Scan) -> NDArray[np.object_]:
    label = np.full(scan.n_tokens, None, dtype=object)
    for onset, duration, kind in scan.events[["onset", "duration", "trial_type"]].itertuples(index=False):
        label[int(onset) : int(onset + duration)] = str(kind)
    return label


__all__ = ["BEST", "PREDICTORS", "Changes", "Forecast", "Observed", "forecast", "share_cut", "token_losses_of"]

"""`PruningPlan`: what stays, why, and what it costs; made before any weight is touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import ref

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llmbrain._files import read_json, write_json
from llmbrain._validation import InputError, check_range
from llmbrain.anatomy.families import Anatomy, anatomy
from llmbrain.anatomy.offload import present
from llmbrain.anatomy.space import NeuronSpace
from llmbrain.anatomy.surgery import part_parameters
from llmbrain.anatomy.units import HEADS, NEURONS, Units
from llmbrain.checkpoints.gguf_layout import BLOCK, K_BLOCK
from llmbrain.distributed import ranks
from llmbrain.hooks.text import digest
from llmbrain.networks import FunctionalNetworks
from llmbrain.pruning.forecast import BEST, OF_MODEL, Forecast, forecast
from llmbrain.scanning.scans import Scan

if TYPE_CHECKING:
    import pandas as pd

Kept = tuple[NDArray[np.int64], ...]


@dataclass(frozen=True)
class PruningPlan:
    """Which neurons (and attention heads) of a model stay.

    Attributes
    ----------
    method, allocation : str
        How units were scored, and how the budget was spread over layers.
    ratio : float
        Share of MLP neurons that was asked to be removed; `removed` is what the plan removes.
    kept : tuple of int64 arrays
        Per layer, ascending indices of the neurons that stay; none of them: the MLP is dropped.
    widths_before : tuple of int
    digest : str
        Of the weights the plan was made for.
    kept_heads : tuple of int64 arrays, optional
        Per layer, the key/value groups of heads that stay (none of them: the attention is dropped); None where heads
        are not touched.
    groups_before : tuple of int
        Key/value groups per layer before.
    protect : tuple of int
        Layers that were not to be cut.
    parameters, parameters_removed : int
        All parameters of the model, and those that go (before any intercept that compensation adds).
    details : dict
        What else decided: thresholds, losses, convergence, calibration; plain JSON values.
    experts_before : tuple of tuple of int, optional
        Of a mixture of experts: neurons of each expert of each layer before, shared ones first, which lie side by side
        in `kept`; None for a dense model.
    """

    method: str
    allocation: str
    ratio: float
    kept: Kept
    widths_before: tuple[int, ...]
    digest: str
    kept_heads: Kept | None = None
    groups_before: tuple[int, ...] = ()
    protect: tuple[int, ...] = ()
    parameters: int = 0
    parameters_removed: int = 0
    details: dict[str, Any] = field(default_factory=dict)
    experts_before: tuple[tuple[int, ...], ...] | None = None
    _model: ref[nn.Module] | None = field(default=None, repr=False, compare=False)  # the one it was made for

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            "widths_before": whole_numbers("widths_before", self.widths_before, 0),
            "groups_before": whole_numbers("groups_before", self.groups_before, 0),
        }
        n = len(checked["widths_before"])
        checked["kept"] = _kept("kept", self.kept, checked["widths_before"])
        if self.kept_heads is not None:
            checked["kept_heads"] = _kept("kept_heads", self.kept_heads, checked["groups_before"])
        if checked["groups_before"] and len(checked["groups_before"]) != n:
            raise InputError(f"this plan has {len(checked['groups_before'])} groups_before for {n} layers")
        checked["protect"] = whole_numbers("protect", self.protect, 0)
        if any(layer >= n for layer in checked["protect"]):
            raise InputError(f"protect={list(checked['protect'])} of this plan names layers that are not there: {n}")
        if self.experts_before is not None:
            experts = tuple(whole_numbers("experts_before", of, 1) for of in self.experts_before)
            if tuple(map(sum, experts)) != checked["widths_before"]:
                raise InputError("experts_before of this plan does not add up to widths_before")
            checked["experts_before"] = experts
        check_range("ratio", self.ratio, 0, 1)
        for name in ("parameters", "parameters_removed"):
            checked[name] = whole_numbers(name, [getattr(self, name)], 0)[0]
        for name in ("method", "allocation", "digest"):
            if not isinstance(getattr(self, name), str):
                raise InputError(f"{name}={getattr(self, name)!r} of this plan is no text")
        if not isinstance(self.details, dict):
            raise InputError(f"details={self.details!r} of this plan is no dict")
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @property
    def kept_units(self) -> dict[Units, Kept]:
        """What stays, by kind of units; only kinds that are touched."""
        return {NEURONS: self.kept} if self.kept_heads is None else {NEURONS: self.kept, HEADS: self.kept_heads}

    @property
    def widths(self) -> tuple[int, ...]:
        """Neurons per layer that stay."""
        return tuple(len(k) for k in self.kept)

    @property
    def expert_widths(self) -> list[list[int]]:
        """Neurons that stay of each expert of each layer, shared ones first; empty for a dense model."""
        found = []
        for kept, before in zip(self.kept, self.experts_before or ()):
            found.append(np.histogram(kept, bins=np.cumsum([0, *before]) - 0.5)[0].tolist())
        return found

    @property
    def widths_read(self) -> list[int]:
        """Widths of the matrices of neurons that stay: of each layer, or of each kind of expert of each layer."""
        if self.experts_before is None:
            return list(self.widths)
        return [width for widths in self.expert_widths for width in dict.fromkeys(widths)]

    @property
    def dropped(self) -> dict[str, tuple[int, ...]]:
        """Layers whose ``"mlp"`` and whose ``"attention"`` are set to nothing."""
        heads = zip(self.groups_before, self.kept_heads or ())
        return {
            "mlp": tuple(i for i, (n, k) in enumerate(zip(self.widths_before, self.kept)) if n and not len(k)),
            "attention": tuple(i for i, (n, k) in enumerate(heads) if n and not len(k)),
        }

    @property
    def removed(self) -> float:
        """Share of the MLP neurons that goes."""
        return 1 - sum(self.widths) / sum(self.widths_before)

    @property
    def parameters_share(self) -> float:
        """Share of all parameters that goes."""
        return self.parameters_removed / max(self.parameters, 1)

    @property
    def mask(self) -> NDArray[np.bool_]:
        """Which neurons stay; shape ``(n_neurons,)`` of the model before."""
        space = NeuronSpace(self.widths_before)
        mask = np.zeros(space.n_neurons, dtype=bool)
        for layer, kept in enumerate(self.kept):
            mask[space.offsets[layer] + kept] = True
        return mask

    def to_frame(self) -> pd.DataFrame:
        """One row a layer: neurons before, kept, removed, share removed, protected, and heads where they are cut."""
        import pandas as pd

        before = np.array(self.widths_before)
        frame = pd.DataFrame({"layer": np.arange(len(before)), "before": before, "kept": self.widths})
        frame["removed"] = frame["before"] - frame["kept"]
        frame["share_removed"] = frame["removed"] / frame["before"].clip(lower=1)
        frame["protected"] = frame["layer"].isin(self.protect)
        if self.kept_heads is not None:
            frame["groups_before"] = self.groups_before
            frame["groups_kept"] = [len(k) for k in self.kept_heads]
        return frame

    def summary(self) -> str:
        """What the plan does, in a few lines."""
        lines = [
            f"{self.method}, allocation {self.allocation}: {sum(self.widths)} of {sum(self.widths_before)} MLP neurons "
            f"stay ({self.removed:.1%} removed, {self.ratio:.1%} asked)",
            f"{self.parameters_removed:,} of {self.parameters:,} parameters go ({self.parameters_share:.1%})",
            f"widths {list(self.widths)} (before {_runs(self.widths_before)})",
        ]
        if self.experts_before is not None:
            lines.append(f"neurons of each expert {self.expert_widths} (shared ones first)")
        if self.kept_heads is not None:
            lines.append(f"key/value groups {[len(k) for k in self.kept_heads]} (before {_runs(self.groups_before)})")
        for part, layers in self.dropped.items():
            if layers:
                lines.append(f"{'MLP' if part == 'mlp' else part} of layers {list(layers)} dropped whole")
        if odd := self._odd_widths():
            lines.append(odd)
        if self.protect:
            lines.append(f"layers {list(self.protect)} protected")
        lines += [f"note: {note}" for note in self.details.get("notes", [])]
        return "\n".join(lines)

    def _odd_widths(self) -> str | None:
        """A line on widths that engines read more slowly and quantize worse; None where the cut leaves none."""
        pairs = list(zip(self.widths, self.widths_before))
        if self.experts_before is not None:
            pairs = [
                pair
                for now, before in zip(self.expert_widths, self.experts_before)
                for pair in dict.fromkeys(zip(now, before))
            ]
        cut = [(width, before) for width, before in pairs if 0 < width < before]
        for block, what in ((BLOCK, "slower in llama.cpp, and not quantized there"),
                            (K_BLOCK, "of a larger type in llama.cpp's K-quants")):  # fmt: skip
            odd = [width for width, before in cut if width % block and not before % block]
            if odd:
                return (
                    f"no multiple of {block}: {len(odd)} of {len(pairs)} widths, such as {odd[0]} ({what}; "
                    f"multiple_of={block} avoids it)"
                )
        return None

    def token_weights(self, windows: Tensor) -> Tensor | None:
        """How much each token of these calibration windows counted in the plan, ``(n, window)``.

        None where all counted alike, and for other windows than the plan was made with.
        """
        weights = self.details.get("token_weights")
        if weights is None or self.details.get("calibration", {}).get("hash") != digest(windows):
            return None
        return torch.tensor(weights, dtype=torch.float32)

    def forecast(
        self,
        networks: FunctionalNetworks | None,
        scans: Sequence[Scan],
        *,
        model: nn.Module | None = None,
        predictor: str = BEST,
        compensate: str | None = "least-squares",
        calibration: Sequence[Scan] | None = None,
    ) -> Forecast:
        """What the cut will cost, token by token and function by function, before anything is cut.

        The default predictor needs no networks: an expansion of the loss to the second order in what the repaired
        layers will say differently measured best (page "What networks are for"). Networks say to which functions its
        tokens belong. ``forecast.measure(model, small)`` puts what the cut did cost beside it.

        Parameters
        ----------
        networks : FunctionalNetworks or None
            Of this model; None leaves the table of networks out.
        scans : sequence of Scan
            Of this model before the cut, of the text that the forecast is for.
        model : transformers model, optional
            Dense. Default: the one that the plan was made for, while it is there; a plan that was read from a file
            needs it.
        predictor : str
            ``"taylor2"``: ``sum_l g_l . d_l + d_l . G_l d_l / 2``, with d what layer l will say differently at a token,
            g the gradient of the loss of all later tokens by it, and G the mean of ``g g^T``; ``"taylor"`` and
            ``"curvature"`` are its two parts. ``"fluctuation"`` (FLAP's error), ``"networks"`` (share of each network's
            map that goes, times its squared time course) and ``"share"`` (of neurons) have no scale.
        compensate : {None, "bias", "least-squares"}
            The repair that there will be.
        calibration : sequence of Scan, optional
            Of the text that the repair will be fitted to; default `scans`.

        Returns
        -------
        Forecast

        Raises
        ------
        InputError
            If there is no model, scans, networks and model do not belong together, or the plan cuts more than neurons
            or is to be repaired to keep or forget functions.
        """
        known = self._model() if model is None and self._model is not None else model
        if known is not None:
            self.check_model(known)
        if any(self.dropped.values()):
            raise InputError("this plan drops whole blocks: a forecast is for cuts of neurons only")
        if self.kept_heads is not None and predictor != "share":
            raise InputError("this plan cuts heads as well: a forecast is for cuts of neurons only")
        functions = self.details.get("functions") or {}
        if compensate is not None and predictor in OF_MODEL and any(functions.get(k) for k in ("keep", "forget")):
            raise InputError(
                "this plan keeps or forgets functions: its repair weighs tokens by them, and a forecast knows no such "
                "repair. compensate=None forecasts the bare cut"
            )
        return forecast(
            self.kept, self.widths_before, networks, scans, model=known, predictor=predictor, compensate=compensate,
            calibration=calibration,
        )  # fmt: skip

    # -- records -----------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain JSON values."""
        record = {name: getattr(self, name) for name in self.__dataclass_fields__ if not name.startswith("_")}
        record["kept"] = [k.tolist() for k in self.kept]
        record["experts_before"] = None if self.experts_before is None else [list(of) for of in self.experts_before]
        record["kept_heads"] = None if self.kept_heads is None else [k.tolist() for k in self.kept_heads]
        return record

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> PruningPlan:
        """Rebuild a plan; what is missing, of the wrong kind or contradicts itself is an `InputError`."""
        try:
            return cls(**record)
        except TypeError as error:
            raise InputError(f"this is not a pruning plan: {error}") from error

    def save(self, path: str | Path) -> Path:
        """Write the plan as JSON, whole or not at all."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        return write_json(path, {"llmbrain": "pruning plan", **self.to_dict()}, seal=True, indent=None)

    @classmethod
    def load(cls, path: str | Path) -> PruningPlan:
        """Read a plan that `save` wrote."""
        record = read_json(path, anew="make the plan again (llmbrain plan)")
        if record.pop("llmbrain", None) != "pruning plan":
            raise InputError(f"{path} is not a pruning plan")
        try:
            return cls.from_dict(record)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error

    def check_model(self, model: nn.Module) -> Anatomy:
        """The anatomy of a model that this plan was made for; another model is an `InputError`."""
        body = anatomy(model)
        if body.widths != self.widths_before:
            raise InputError(
                f"plan was made for layers of {_runs(self.widths_before)} neurons, this model has {_runs(body.widths)}"
            )
        groups = HEADS.counts(body)
        if self.kept_heads is not None and groups != self.groups_before:
            raise InputError(
                f"plan was made for {_runs(self.groups_before)} groups of heads, this model has {_runs(groups)}"
            )
        own = weights_digest(body)
        if own != self.digest:
            raise InputError(f"plan was made for weights {self.digest}, this model has {own}: make a new plan")
        return body


def whole_numbers(name: str, values: Any, low: int) -> tuple[int, ...]:
    """Whole numbers of at least `low`, as they stand in a plan."""
    values = values.tolist() if hasattr(values, "tolist") and not isinstance(values, np.ndarray) else values
    if isinstance(values, (str, bytes)) or not isinstance(values, (Sequence, np.ndarray)):
        raise InputError(f"{name}={values!r} of this plan is no list of whole numbers")
    if isinstance(values, np.ndarray) and values.ndim == 1 and np.issubdtype(values.dtype, np.integer):
        if len(values) and int(values.min()) < low:
            raise InputError(f"{name} of this plan holds {int(values.min())}: at least {low} is allowed")
        return tuple(values.tolist())
    for value in values:
        if isinstance(value, bool) or not isinstance(value, Integral) or value < low:
            raise InputError(f"{name} of this plan holds {value!r}: whole numbers of at least {low} are allowed")
    return tuple(int(value) for value in values)


def _kept(name: str, kept: Any, before: Sequence[int]) -> Kept:
    """Indices of what stays in each layer: ascending, each once, within the layer."""
    if isinstance(kept, (str, bytes)) or not isinstance(kept, Sequence) or len(kept) != len(before):
        size = len(kept) if isinstance(kept, Sequence) else repr(kept)
        raise InputError(f"{name} of this plan has {size} layers, the model had {len(before)}")
    found = []
    for i, (units, width) in enumerate(zip(kept, before)):
        numbers = whole_numbers(f"{name}[{i}]", units, 0)
        if len(numbers) and max(numbers) >= width:
            raise InputError(f"{name}[{i}] of this plan names unit {max(numbers)} of {width}")
        indices = np.array(numbers, dtype=np.int64)
        if (np.diff(indices) <= 0).any():
            raise InputError(f"{name}[{i}] of this plan must be ascending, each unit once")
        found.append(indices)
    if before and any(before) and not any(len(k) for k in found):
        raise InputError(f"{name} of this plan is empty: the model keeps at least one unit")
    return tuple(found)


def given_alike(body: Anatomy, networks: FunctionalNetworks | None, **options: Any) -> dict[str, Any]:
    """What ranks that plan together must be given alike: options, weights, networks; nothing for a process alone."""
    if ranks().size == 1:
        return {}
    maps = None if networks is None else sha256(np.ascontiguousarray(networks.maps).tobytes()).hexdigest()[:16]
    return {**options, "weights": weights_digest(body), "networks": maps}


def weights_digest(body: Anatomy) -> str:
    """Hash of a sample of every MLP weight, independent of device: 16 hexadecimal digits."""
    digest = sha256()
    for layer in body.layers:
        for projection in layer.neuron_projections:
            with present(projection.module):
                weight = projection.weight().detach()
                flat = weight.reshape(-1)[:: max(1, weight.numel() // 4096)]
                digest.update(flat.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def parameters_removed(body: Anatomy, kept: Mapping[Units, Kept]) -> int:
    """Parameters that go with the units that are not kept, or with a part that keeps none."""
    return sum(
        (units.count(layer) - len(k)) * units.parameters(layer) if len(k) else part_parameters(layer, units)
        for units, of in kept.items()
        for layer, k in zip(body.layers, of)
    )


def check_protect(protect: Sequence[int] | None, n_layers: int) -> tuple[int, ...]:
    """Layer numbers, ascending; negative ones count from the end."""
    if protect is not None and (isinstance(protect, (str, bytes)) or not hasattr(protect, "__iter__")):
        raise InputError(f"protect={protect!r} must be a list of layers, such as [0, -1]")
    layers = set()
    given: Any = protect
    for layer in () if given is None else np.atleast_1d(given).tolist() if hasattr(given, "ndim") else given:
        whole = isinstance(layer, Integral) and not isinstance(layer, bool)
        number = int(layer) if whole else n_layers
        if not -n_layers <= number < n_layers:
            raise InputError(f"protect={layer!r} is not a layer: allowed are {-n_layers} to {n_layers - 1}")
        layers.add(number % n_layers)
    return tuple(sorted(layers))


def _runs(values: Sequence[int]) -> str:
    return f"{len(values)} x {values[0]}" if len(set(values)) == 1 else str(list(values))

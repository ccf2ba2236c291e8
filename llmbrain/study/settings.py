"""The settings of the main job: one object, checked when it is made, and a TOML file that holds it."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from numbers import Real
from pathlib import Path
from typing import Any

from llmbrain._files import verify_listed
from llmbrain._validation import InputError, check_names, check_option, check_range, seed_of
from llmbrain._validation import check_whole as whole
from llmbrain.checkpoints import FORMATS
from llmbrain.checkpoints.gguf_writing import GGUF_TYPES
from llmbrain.hooks.sites import check_sites
from llmbrain.pruning.allocate.blocks import check_drop, check_whole
from llmbrain.pruning.allocate.search import PASSES
from llmbrain.pruning.criteria import CRITERIA
from llmbrain.pruning.experts import METHODS as OF_EXPERTS
from llmbrain.pruning.prune import COMPENSATIONS
from llmbrain.pruning.repair.propagation import check_propagation
from llmbrain.stats import PUBLISHED_Z

SHORT = {"n_components": "components", "random_state": "seed"}  # fields that commands and files call by a shorter name
NONE = {"compensate": "none", "n_tokens": 0, "run_length": 0, "eval_tokens": 0, "max_windows": 0}  # None, in a file
OWN_WINDOWS = 65_536  # of own text at most: more than any model was calibrated on


@dataclass(frozen=True)
class Settings:
    """What `run` does.

    Attributes
    ----------
    n_components : int, float or str
        Networks: their number, a share of variance below 1, or ``"auto"``.
    site, dtype
        What is recorded, and in which precision it is kept; see `scan`.
    threshold : float
        |z| above which a neuron belongs to a network.
    n_tokens : int, optional
        Tokens of the text that are scanned, and calibrated on; None is all.
    run_length : int, optional
        Longer texts are cut into runs of at most so many tokens; None never cuts.
    eval_tokens : int, optional
        Tokens of the sample that both perplexities are measured on; None is all of the text.
    max_windows : int, optional
        The same, in windows.
    ratio, expert_ratio, method, compensate, allocation, multiple_of, protect, head_ratio
        See `plan_pruning` and `prune`.
    drop : tuple of str, optional
        Parts that may be set to nothing in some layers: ``"mlp"``, ``"attention"``, or both.
    passes, token_balance, keep, forget, last
        See `plan_pruning` and `prune`.
    indices : bool
        Whether the files name the neurons that went (``record_indices`` of `prune`); without, there is no plan either.
    self_text : int, optional
        Windows of calibration text that the model writes itself, beside the text; None is twice as many as the text
        fills in deep models, none in shallow ones: see `llmbrain.study.cost.own_windows`.
    propagation : float, optional
        See `prune`.
    format, gguf_type, like : str
        See `save_pruned`.
    random_state : int or None
        None draws a number, which is recorded.

    Raises
    ------
    InputError
        If a value cannot be.
    """

    n_components: int | float | str = 20
    site: str = "neuron"
    dtype: str | None = None
    threshold: float = PUBLISHED_Z
    n_tokens: int | None = 32768
    run_length: int | None = 2048
    eval_tokens: int | None = 32768
    max_windows: int | None = None
    ratio: float | None = None
    method: str = "networks"
    compensate: str | None = "least-squares"
    allocation: str | None = None
    multiple_of: int = 1
    protect: tuple[int, ...] | None = None
    head_ratio: float = 0.0
    drop: tuple[str, ...] | None = None
    passes: float = PASSES
    token_balance: float | None = None
    self_text: int | None = None
    keep: tuple[str, ...] | None = None
    forget: tuple[str, ...] | None = None
    last: bool = False
    indices: bool = True
    format: str = "per-layer"
    gguf_type: str = "f16"
    like: str | None = None
    random_state: int | None = 0
    expert_ratio: float | None = None
    propagation: float | None = None

    def __post_init__(self) -> None:
        for name in ("keep", "forget", "drop"):  # lists of a file or a caller
            object.__setattr__(self, name, check_names(name, getattr(self, name)) or None)
        check_drop(self.drop)
        object.__setattr__(self, "protect", _layers(self.protect))
        if self.random_state is None:  # drawn once and recorded: the study can be repeated
            object.__setattr__(self, "random_state", seed_of(None))
        for name in ("last", "indices"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name}={getattr(self, name)!r} must be true or false")
        if self.last and not self.forget:
            raise InputError("last=True is an option of forget: say what is to go")
        if self.last and self.compensate != "least-squares":
            raise InputError(
                f"compensate={self.compensate!r}: it is the repair by least squares that makes forgetting last"
            )
        if not self.indices and (self.format == "masked" or self.expert_ratio is not None):
            what = "format='masked'" if self.expert_ratio is None else f"expert_ratio={self.expert_ratio}"
            raise InputError(f"indices=False together with {what}, which names what went")
        if self.expert_ratio is not None:
            check_range("expert_ratio", self.expert_ratio, 0, 1, open_low=True, open_high=True)
            beside = {"ratio": self.ratio, "protect": self.protect, "head_ratio": self.head_ratio, "keep": self.keep,
                      "forget": self.forget, "self_text": self.self_text, "drop": self.drop,
                      "propagation": self.propagation}  # fmt: skip
            if given := [name for name, value in beside.items() if value]:
                raise InputError(f"expert_ratio={self.expert_ratio} together with {', '.join(given)}: experts go alone")
        elif self.ratio is None and not self.forget:
            object.__setattr__(self, "ratio", 0.3)
        check_option("method", self.method, CRITERIA if self.expert_ratio is None else OF_EXPERTS)
        if self.expert_ratio is None:
            functions = bool(self.keep or self.forget)
            check_whole(
                self.method, CRITERIA[self.method].blocks, self.drop or (), self.ratio, self.allocation,
                self.head_ratio, functions,
            )  # fmt: skip
        check_option("compensate", self.compensate, COMPENSATIONS)
        check_option("format", self.format, FORMATS)
        if self.like is not None and not isinstance(self.like, str):
            raise InputError(f"like={self.like!r} must be the name or the path of a tokenizer")
        check_option("gguf_type", self.gguf_type, GGUF_TYPES)
        check_option("dtype", self.dtype, (None, "float16", "bfloat16", "float32"))
        check_sites(self.site)
        check_components("n_components", self.n_components)
        for name, low in (("n_tokens", 1), ("run_length", 2), ("eval_tokens", 2), ("max_windows", 1)):
            if getattr(self, name) is not None:
                check_range(name, _whole(name, getattr(self, name)), low)
        if self.self_text is not None:
            check_range("self_text", _whole("self_text", self.self_text), 0, OWN_WINDOWS)
        for name, low in (("multiple_of", 1), ("random_state", 0)):
            check_range(name, _whole(name, getattr(self, name)), low)
        check_range("random_state", int(self.random_state or 0), 0, 2**32 - 1)
        check_propagation(self.propagation, self.compensate, functions=bool(self.keep or self.forget))
        check_range("threshold", self.threshold, 0)
        check_range("passes", self.passes, 0, open_low=True)
        check_range("head_ratio", self.head_ratio, 0, 1, open_high=True)
        if self.token_balance is not None:
            check_range("token_balance", self.token_balance, 0, 1)
        if self.ratio is not None:
            check_range("ratio", self.ratio, 0, 1, open_low=not self.last, open_high=True)

    @classmethod
    def of(cls, settings: Settings | None = None, /, **options: Any) -> Settings:
        """Settings with some of them changed; a name that is none is an `InputError`."""
        known = {f.name for f in fields(cls)}
        for name in options:
            check_option("option", name, sorted(known))
        return replace(settings, **options) if settings is not None else cls(**options)

    @property
    def own_text(self) -> int | None:
        """`self_text`; where it was left open and functions are kept or forgotten 0: such text has no conditions."""
        return 0 if self.self_text is None and (self.keep or self.forget) else self.self_text

    @property
    def is_sample_asked(self) -> bool:
        """Whether the size of the sample is another than the default: then a text must have as much."""
        return self.max_windows is not None or self.eval_tokens not in (None, Settings.eval_tokens)

    def to_dict(self) -> dict[str, Any]:
        """By the names that commands and files use."""
        return {SHORT.get(name, name): value for name, value in asdict(self).items()}

    def to_toml(self, **more: str | None) -> str:
        """What ``--config`` reads; `more` (model, text) goes first."""
        entries: dict[str, Any] = {k: v for k, v in more.items() if v is not None}
        for f in fields(self):
            value = getattr(self, f.name)
            value = NONE.get(f.name) if value is None else value
            if value is not None:
                entries[SHORT.get(f.name, f.name).replace("_", "-")] = value
        return "".join(f"{k} = {json.dumps(v, ensure_ascii=False)}\n" for k, v in entries.items())

    @classmethod
    def from_toml(cls, path: str | Path) -> Settings:
        """Read the settings of a file; model and text in it are left to the caller."""
        entries = {k: v for k, v in read_config(path).items() if k not in PLACES}
        long = {short: name for name, short in SHORT.items()}
        options = {long.get(k, k): v for k, v in entries.items()}
        return cls.of(**{k: None if k in NONE and v == NONE[k] else v for k, v in options.items()})


# What a file may say beside the settings.
PLACES = ("model", "text", "field", "device", "device_map", "model_dtype", "budget")


def read_config(path: str | Path) -> dict[str, Any]:
    """Entries of a TOML file of options, by names with underscores.

    Raises
    ------
    InputError
        If it is no TOML, or an entry is no option.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"config: no file at {path}")
    verify_listed(path, anew="change a copy of it in another folder, or run the job again")
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # decoding, TOML's own, numbers of too many digits, lists in lists
        raise InputError(f"config={str(path)!r} is not TOML: {error}") from None
    known = [*PLACES, *(SHORT.get(f.name, f.name) for f in fields(Settings))]
    for name, value in found.items():
        if name.replace("-", "_") not in known or isinstance(value, dict):
            allowed = ", ".join(k.replace("_", "-") for k in known)
            raise InputError(f"config={str(path)!r}: {name!r} is no option of a run: allowed are {allowed}")
    return {name.replace("-", "_"): value for name, value in found.items()}


def check_components(name: str, value: int | float | str) -> int | float | str:
    """A number of components, a share of variance below 1, or ``"auto"``."""
    if value == "auto":
        return value
    number = _number(value)
    if not 0 < number < math.inf or (number > 1 and number % 1):
        raise InputError(f"{name}={value!r} must be a whole number, a share below 1, or 'auto'")
    return value


def _number(value: object) -> float:
    """A number as a float, NaN for anything else."""
    try:
        return float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:
        return math.inf


def _layers(protect: Any) -> tuple[int, ...] | None:
    if protect is not None and (isinstance(protect, (str, bytes, Mapping)) or not isinstance(protect, Iterable)):
        raise InputError(f"protect={protect!r} must be a list of layers, such as [0, -1]")
    return None if protect is None else tuple(whole("protect", layer) for layer in protect)


def _whole(name: str, value: Any) -> int:
    if not math.isfinite(_number(value)) or value % 1:
        raise InputError(f"{name}={value!r} must be a whole number")
    return int(value)

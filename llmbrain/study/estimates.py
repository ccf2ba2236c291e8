"""What each step would take, from a config alone: disk, memory and seconds, on this CPU or on GPUs of the table.

Steps are counted as the code does them (walks through the layers, forward passes, sums, fits), and each piece takes
what `llmbrain.study.machines` says of the machine. Sizes are those of `llmbrain.study.cost`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llmbrain._files import bytes_text
from llmbrain._progress import span
from llmbrain._validation import InputError, check_names, check_range, check_whole
from llmbrain.anatomy.families import context_length
from llmbrain.checkpoints.configs import model_of_config, read_config
from llmbrain.pruning.allocate.losses import LEVELS
from llmbrain.pruning.allocate.search import LOSS_TOKENS, OF_CANDIDATE, OF_SENSITIVITY
from llmbrain.pruning.calibrate.stream import LEAST_BATCHES
from llmbrain.pruning.criteria import CRITERIA
from llmbrain.pruning.criteria.networks import DEEP
from llmbrain.study.cost import BASE_MEMORY, BATCH, Subject, scan_bytes
from llmbrain.study.machines import CpuSpeeds, GpuSpeeds, Speeds, gpu_of

if TYPE_CHECKING:
    import pandas as pd

OF_EXPERTS = ("reap", "man", "frequency")
OF_NEURONS = (
    "random",
    "magnitude",
    "wanda-sp",
    "flap",
    "taylor",
    "relp",
    "published",
    "obs",
    "obs-gradient",
    "networks",
)
OF_NEXT_TOKEN = ("taylor", "relp")  # criteria that ask for the next token
MLP_SHARE = 0.7  # of a block's time, what runs again where only its MLP was changed
BACKWARD = 1.3  # forward passes that gradients of signals take, without those of weights
CANDIDATES = 6  # allocations that a search tries, at most
READS = 2  # of a scan by group ICA, at about the speed at which it was written
TABLE_CELL = 12.5  # bytes of a number in a table
OF_HEAD = 2.0  # of a pass through the head, what it takes with its gradient, without that of its weights
MAP_VALUE, COURSE_VALUE = (
    1.9e-7,
    9.4e-7,
)  # seconds that a number of a map, and one in a table, take: fitted to 1M and 135M
OF_SAVING = 3.5  # of what writing takes: fitted to SmolLM2-135M
OF_READING = {"random": 0.15, "magnitude": 1 / 3}  # of what writing the weights takes: fitted to SmolLM2-135M
FIXED = {"scan": 0.02, "networks": 0.04, "save": 0.045}  # seconds that do not grow with the model


@dataclass(frozen=True)
class Plan:
    """What is to be done.

    Attributes
    ----------
    n_tokens : int
        Scanned, and calibrated on.
    window, run_length : int
    n_components : int
    ratio : float
        Of the neurons, removed.
    passes : float
        Of the search.
    """

    n_tokens: int = 32768
    window: int = 2048
    run_length: int = 2048
    n_components: int = 32
    ratio: float = 0.3
    passes: float = 24

    @property
    def batch(self) -> int:
        """Tokens in a batch of the calibration text."""
        windows = max(1, self.n_tokens // self.window)
        at_once = min(BATCH, -(-windows * self.window // LEAST_BATCHES))
        return min(self.n_tokens, max(1, at_once // self.window) * self.window)


@dataclass(frozen=True)
class Estimate:
    """Seconds, memory and disk of each step.

    Attributes
    ----------
    name : str
    machine : str
        What it was computed for.
    subject : Subject
    steps : list of dict
        ``step``, ``seconds``, ``memory`` (peak of a process, bytes; of one device where there are several), ``disk``
        (bytes).
    notes : list of str
    """

    name: str
    machine: str
    subject: Subject
    steps: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)

    @property
    def scan_bytes_per_1000_tokens(self) -> int:
        """Disk of a scan of neurons."""
        return scan_bytes(self.subject, 1000)

    @property
    def frame(self) -> pd.DataFrame:
        """One row a step."""
        import pandas as pd

        return pd.DataFrame(self.steps)

    def lines(self) -> list[str]:
        """What a user is told."""
        said = [
            f"{self.name}: {self.subject.parameters:,} parameters in {len(self.subject.widths)} blocks, "
            f"{self.subject.n_neurons:,} neurons, {bytes_text(self.subject.size)} of weights",
            f"scan: {bytes_text(self.scan_bytes_per_1000_tokens)} of disk per 1,000 tokens",
            f"computed for {self.machine}, not measured:",
        ]
        for row in self.steps:
            disk = f", {bytes_text(row['disk'])} of disk" if row["disk"] else ""
            said.append(f"    {row['step']}: {span(row['seconds'])}, {bytes_text(row['memory'])} of memory{disk}")
        return [*said, *(f"note: {note}" for note in self.notes)]


def estimate(
    source: str | Path,
    *,
    gpu: str | None = None,
    gpus: int = 1,
    dtype: str | None = None,
    methods: Sequence[str] | None = None,
    n_tokens: int = 32768,
    window: int | None = None,
    run_length: int = 2048,
    n_components: int = 32,
    ratio: float = 0.3,
    passes: float = 24,
    clock: Callable[[], float] = time.perf_counter,
    timings: dict[str, float] | None = None,
) -> Estimate:
    """Disk, memory and seconds of each step, from the config of a model; its weights are not needed.

    Parameters
    ----------
    source : str or Path
        A folder with a ``config.json``, such a file, a GGUF (its header is read), or a hub id.
    gpu : str, optional
        One of `llmbrain.study.machines.GPUS`, by its published peaks; default this CPU, which is measured briefly.
    gpus : int
        How many of them share texts, runs and calibration windows, or a model that is larger than one.
    dtype : str, optional
        Of the weights; default the config's own (of a GGUF float32, as it is loaded).
    methods : sequence of str, optional
        Pruning criteria; default all whose steps are counted here.
    n_tokens, window, run_length, n_components, ratio, passes
        Of the job: tokens that are scanned and calibrated on, in windows (default the context, at most 2,048), runs,
        networks, share of the neurons removed, passes of the search.
    clock : function
        Seconds, by which this CPU is measured.
    timings : dict, optional
        Seconds of the pieces that are measured, by name: what is there is not measured again, the rest is put in.

    Returns
    -------
    Estimate

    Raises
    ------
    InputError
        If the GPU is not in the table, or a setting is impossible.
    """
    check_whole("gpus", gpus, 1)
    for name, value in (("n_tokens", n_tokens), ("run_length", run_length), ("n_components", n_components)):
        check_whole(name, value, 2)
    check_range("ratio", ratio, 0, 1, open_low=True, open_high=True)
    check_range("passes", passes, 0, open_low=True)
    if gpu is None and gpus > 1:
        raise InputError(f"gpus={gpus} without gpu: say which (gpu='h100')")
    table = None if gpu is None else gpu_of(gpu)
    kind = getattr(torch, dtype, None) if isinstance(dtype, str) else None
    if dtype is not None and kind not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise InputError(f"dtype={dtype!r} is not known: float32, bfloat16 or float16")
    if window is not None:
        check_whole("window", window, 2)
    config = read_config(source)
    model = model_of_config(config, kind)
    subject = Subject.of(model)
    known: tuple[str, ...] = OF_EXPERTS if subject.mixture else OF_NEURONS
    if not _writes(model):
        known = tuple(name for name in known if name not in OF_NEXT_TOKEN)
    methods = check_names("methods", methods)
    unknown = sorted(set(methods) - set(known))
    if unknown:
        raise InputError(f"methods={unknown} are not known here: {', '.join(known)}")
    longest = min(context_length(model) or 2048, 2048)
    how = Plan(
        n_tokens, min(window or longest, longest, n_tokens), min(run_length, n_tokens), n_components, ratio, passes
    )
    speeds: Speeds
    if table is None:
        speeds = CpuSpeeds(
            subject, config, model, how.window, next(model.parameters()).dtype, clock, timings, how.batch
        )
        machine = f"this CPU ({torch.get_num_threads()} threads)"
    else:
        speeds, machine = GpuSpeeds(subject, table, how.window), f"{gpus} x {gpu.lower() if gpu else ''}"
    made = Steps(subject, speeds, how, gpus, None if table is None else table.memory)
    rows = [made.scan(), made.ica(), made.networks(), *(made.plan(name) for name in methods or known)]
    if not subject.mixture:
        rows.append(made.repair())
    rows.append(made.save())
    return Estimate(str(source), machine, subject, rows, made.notes())


def _writes(model: nn.Module) -> bool:
    """Whether a model is one of the next token, by its class: without weights it cannot be asked."""
    can_generate = getattr(model, "can_generate", None)
    return callable(can_generate) and bool(can_generate()) and not type(model).__name__.endswith("ForMaskedLM")


class Steps:
    """The steps of a job on some machine.

    Parameters
    ----------
    subject : Subject
    speeds : Speeds
        Of one device.
    how : Plan
    devices : int
    limit : float, optional
        Memory of one device; None is a CPU.
    """

    def __init__(self, subject: Subject, speeds: Speeds, how: Plan, devices: int = 1, limit: float | None = None):
        self.subject, self.speeds, self.how, self.devices, self.limit = subject, speeds, how, devices, limit
        self.hidden = how.n_tokens * subject.hidden * subject.itemsize
        self.base = BASE_MEMORY if limit is None else 0.5e9  # of libraries

    # -- one step each ------------------------------------------------------------------------------------------------

    def scan(self) -> dict[str, Any]:
        """Forward passes, signals to the disk."""
        size = scan_bytes(self.subject, self.how.n_tokens)
        seconds = (self.speeds.forward(self.how.n_tokens) + self.speeds.disk(size)) / self.devices
        batch = 8 * min(self.how.run_length, self.how.window)
        signals = min(batch, self.how.n_tokens) * size / self.how.n_tokens if self.limit is None else 0.0
        return self._row("scan", seconds, self._weights() + 2 * signals + self._activations(batch), size)

    def ica(self) -> dict[str, Any]:
        """Runs are reduced, the group is unmixed."""
        runs = max(1.0, self.how.n_tokens / self.how.run_length)
        shared = max(1.0, runs / self.devices)
        n, k = self.subject.n_neurons, self.how.n_components
        memory = 4 * n * (2.0 * self.how.run_length + 16 * k)
        reading = READS * self.speeds.disk(scan_bytes(self.subject, self.how.n_tokens)) / self.devices
        return self._row("group ICA", self.speeds.ica(shared, self.how.run_length, k) + reading, memory)

    def networks(self) -> dict[str, Any]:
        """Maps are z-scored, cut off and written as tensors and an image, time courses as tensors and a table."""
        size = 4 * self.subject.n_neurons * self.how.n_components
        numbers = self.how.n_tokens * self.how.n_components
        seconds = 4 * self.speeds.disk(size) + MAP_VALUE * size / 4 + COURSE_VALUE * numbers
        return self._row("networks", seconds, 6 * size, 2 * size + (4 + TABLE_CELL) * numbers)

    def plan(self, method: str) -> dict[str, Any]:
        """Scores, allocation, choice."""
        tokens, speeds, s = self.how.n_tokens, self.speeds, self.subject
        if s.mixture:
            return self._row(
                f"plan ({method})", speeds.forward(tokens) / self.devices, self._weights() + self._logits()
            )
        memory = self._weights()
        if method in ("random", "magnitude"):
            return self._row(f"plan ({method})", speeds.disk(s.size) * OF_READING[method], memory)
        whole = speeds.forward(tokens) + speeds.head(tokens)
        shared, owned = 0.0, 0.0  # what ranks share by tokens, and by layers
        if method in ("wanda-sp", "flap"):
            shared = self._walk(changed=False)
        elif method == "published":  # every rank holds all signals, and unmixes its share
            shared, owned = whole * self.devices, speeds.published(tokens, self.how.window)
        elif method in ("taylor", "relp"):
            shared = speeds.forward(tokens) * (1 + BACKWARD) + speeds.head(tokens) * OF_HEAD
        else:
            n = len(s.widths)  # the last layer is chosen from, and needs no refit
            fits = speeds.fit(self._stays, True) * (n - 1) / n
            shared, owned = self._walk(changed=True), speeds.surgeon(method != "obs") + fits
            if method in ("obs-gradient", "networks"):
                shared += self._gradients()
        if method == "networks":
            searches = CRITERIA[method]().spread(len(s.widths)) == "search"
            more = self._search() if searches else (0.0, 0.0)
            shared, owned = shared + 2 * whole + more[0], owned + more[1]
        memory += self._walking() if method not in ("taylor", "relp", "published") else 0.0
        if method == "published" and self.limit is None:
            memory += 12.0 * tokens * s.n_neurons + 16 * min(tokens, 40 * self.how.window) * 2 * max(s.widths)
        if method in ("taylor", "relp"):
            memory += s.size
        if method in ("taylor", "relp", "obs-gradient", "networks"):
            memory += max(0.0, self._backward() - self._logits())
        owners = min(self.devices, len(s.widths))
        return self._row(f"plan ({method})", shared / self.devices + owned / owners, memory)

    def repair(self) -> dict[str, Any]:
        """A walk with a fit in each layer, on a copy of the model."""
        owners = min(self.devices, len(self.subject.widths))
        deep = len(self.subject.widths) >= DEEP and not self.subject.mixture  # then the dense states go beside it
        beside = self.speeds.forward(self.how.n_tokens) if deep else 0.0
        seconds = (self._walk(changed=True) + beside) / self.devices + self.speeds.fit(self._stays, True) / owners
        memory = self._weights(2.0) + self._walking() + (2.0 * self.hidden / self.devices if deep else 0.0)
        return self._row("repair", seconds, memory)

    def save(self) -> dict[str, Any]:
        """Written, loaded again, run and compared."""
        size = int(self.subject.size * (1 - self._goes))
        return self._row("save", OF_SAVING * self.speeds.disk(size), self._weights(1 + 2 * (1 - self._goes)), size)

    # -- pieces -------------------------------------------------------------------------------------------------------

    @property
    def _stays(self) -> float:
        return 1 - self.how.ratio

    @property
    def _goes(self) -> float:
        """Share of all parameters that goes with the neurons."""
        s = self.subject
        return 0.0 if s.mixture else min(1.0, self.how.ratio * 3 * sum(s.widths) * s.hidden / max(s.parameters, 1))

    def _walk(self, *, changed: bool) -> float:
        """Every layer measured once, and run again where it was changed; a first pass records what blocks are told."""
        forward = self.speeds.forward(self.how.n_tokens)
        first = self.speeds.forward(3 * self.how.batch) + self.speeds.head(2 * self.how.batch)
        return forward * (1 + (MLP_SHARE if changed else 0.0)) + first + self.speeds.moments(self.how.n_tokens)

    def _gradients(self) -> float:
        tokens = self.how.n_tokens
        passes = self.speeds.forward(tokens) * (1 + BACKWARD) + self.speeds.head(tokens) * OF_HEAD
        return passes + self.speeds.metric(tokens)

    def _search(self) -> tuple[float, float]:
        """Sensitivities, then whole allocations: what goes by tokens, and what by layers."""
        tokens, n = self.how.n_tokens, len(self.subject.widths)
        trials = n * len(LEVELS)
        each = min(LOSS_TOKENS, int(OF_SENSITIVITY * self.how.passes * tokens / trials))
        measured = trials * max(self.how.window, each // self.how.window * self.how.window)
        held = min(LOSS_TOKENS, max(self.how.window, tokens // 8))
        tried = min(CANDIDATES, max(1, int(self.how.passes * (1 - OF_SENSITIVITY) / OF_CANDIDATE)))
        tried = 0 if tried == 1 else tried
        through = self._walk(changed=False) + tried * self._walk(changed=True)
        losses = measured + tried * held
        fits = sum(self.speeds.fit(1 - level, False) for level in LEVELS) + tried * self.speeds.fit(self._stays, True)
        return (
            through + self.speeds.forward(losses) + self.speeds.head(losses),
            (1 + tried) * self.speeds.surgeon(True) + fits,
        )

    # -- memory -------------------------------------------------------------------------------------------------------

    def _weights(self, copies: float = 1.0) -> float:
        """Of one device; a model that is larger than a device is spread over all of them."""
        return self._share(copies * self.subject.size)

    def _share(self, size: float) -> float:
        return size / self.devices if self.limit is not None and self.subject.size > 0.5 * self.limit else size

    def _activations(self, tokens: float) -> float:
        widest = sum(self.subject.passed) / len(self.subject.widths)
        return min(tokens, self.how.n_tokens) * self.subject.itemsize * (3 * widest + 6 * self.subject.hidden)

    def _logits(self) -> float:
        return 3.0 * self.how.batch * self.subject.vocabulary * 4

    def _backward(self) -> float:
        s = self.subject
        kept = self.how.batch * len(s.widths) * (14 * s.hidden + 4 * max(s.widths)) * s.itemsize
        return kept + 2 * self._logits()

    def _walking(self) -> float:
        """Hidden states, moments of one layer in float64, and what fits make of them."""
        s, widest = self.subject, max(self.subject.widths)
        copies = self._share(sum(s.widths) * s.hidden * s.itemsize)  # output projections that are put back
        moments = widest * (widest + s.hidden) * 8
        return 3.0 * self.hidden / self.devices + 7 * moments + max(copies, self._logits())

    def _row(self, step: str, seconds: float, memory: float, disk: float = 0.0) -> dict[str, Any]:
        seconds += FIXED.get(step, 0.005 + 2e-4 * len(self.subject.widths))
        return {"step": step, "seconds": float(seconds), "memory": int(self.base + memory), "disk": int(disk)}

    def notes(self) -> list[str]:
        """What a reader must know."""
        if self.limit is None:
            return []
        said = ["GPUs by their published peaks and a guessed efficiency (llmbrain.study.machines.EFFICIENCY)"]
        if self._weights() < self.subject.size:
            said.append(f"the weights are larger than half of a device: spread over {self.devices} (--device-map auto)")
        elif self.subject.size > 0.5 * self.limit:
            said.append("the weights are larger than half of the device: take more, or llmbrain prune --offload")
        host = scan_bytes(self.subject, self.how.n_tokens)
        said.append(
            f"memory is that of a device; method='published' holds {bytes_text(3 * host)} of signals in the host's"
        )
        return said

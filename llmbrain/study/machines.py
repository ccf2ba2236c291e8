"""How fast a machine does what llmbrain asks of it: published peaks of GPUs, and a CPU that is measured for a moment.

What a GPU reaches of its peaks is a guess (`EFFICIENCY`), the same for all; only the speed of its disk was measured, on
one machine. A CPU runs pieces of
the work itself, at the model's own sizes where these are small: one block over some tokens, one layer's moments, one
fit.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from llmbrain._files import file_sha256, write_tensors
from llmbrain._validation import InputError
from llmbrain.anatomy.surgery import Refit
from llmbrain.checkpoints.loading import model_class_of
from llmbrain.checkpoints.shapes import text_config
from llmbrain.decomposition import GroupICA
from llmbrain.hooks.text import evaluating
from llmbrain.pruning.calibrate.moments import Moments
from llmbrain.pruning.criteria.obs import RIDGE, removal_costs
from llmbrain.pruning.repair.least_squares import choose_ridge, least_squares
from llmbrain.study.cost import BATCH, Subject


@dataclass(frozen=True)
class Gpu:
    """Published peaks of one GPU: multiply-adds count as two operations, dense, without sparsity.

    Attributes
    ----------
    half, single, double : float
        Operations a second in bfloat16 (tensor cores), float32 and float64.
    bandwidth : float
        Bytes a second of its memory.
    memory : float
        Bytes.
    """

    half: float
    single: float
    double: float
    bandwidth: float
    memory: float


GPUS = {
    "h100": Gpu(989e12, 67e12, 34e12, 3.35e12, 80e9),
    "h200": Gpu(989e12, 67e12, 34e12, 4.8e12, 141e9),
    "a100": Gpu(312e12, 19.5e12, 9.7e12, 2.04e12, 80e9),
    "l40s": Gpu(362e12, 91.6e12, 1.43e12, 0.864e12, 48e9),
    "rtx4090": Gpu(165e12, 82.6e12, 1.29e12, 1.01e12, 24e9),
}
"""Data sheets of their maker: H100 and H200 SXM, A100 SXM 80 GB, L40S, GeForce RTX 4090."""
EFFICIENCY = {"half": 0.4, "single": 0.5, "double": 0.3, "bandwidth": 0.6}
HOST_COPY = 2e10  # bytes a second from a GPU to the CPU's memory
DISK = 4.5e8  # and to a disk with checksums: the scan of a 7B model on one H200 took 53 s for 23 GB
LAUNCH = 1e-5  # seconds that a kernel takes to start


class Speeds(Protocol):
    """Seconds of pieces of work, on one device."""

    def forward(self, tokens: float) -> float:
        """All blocks, forward, in windows."""

    def head(self, tokens: float) -> float:
        """Logits and the loss."""

    def moments(self, tokens: float) -> float:
        """What a walk sums of every layer's signals."""

    def metric(self, tokens: float) -> float:
        """Second moments of every layer's gradient."""

    def fit(self, share: float, ridges: bool) -> float:
        """Refits of all layers with a share of the units; with or without the choice of a ridge."""

    def surgeon(self, metric: bool) -> float:
        """Greedy removal costs of all layers."""

    def ica(self, n_runs: float, run_length: int, n_components: int) -> float:
        """Group ICA of all neurons."""

    def published(self, tokens: int, window: int) -> float:
        """The published rule, signals at hand."""

    def disk(self, size: float) -> float:
        """Writing with checksums."""


class GpuSpeeds:
    """A GPU by its published peaks.

    Parameters
    ----------
    subject : Subject
    gpu : Gpu
    window : int
        Tokens in a window.
    """

    def __init__(self, subject: Subject, gpu: Gpu, window: int) -> None:
        self.subject, self.gpu, self.window = subject, gpu, window
        self.half, self.single, self.double, self.bandwidth = (
            getattr(gpu, name) * EFFICIENCY[name] for name in ("half", "single", "double", "bandwidth")
        )
        self.model = self.half if subject.itemsize == 2 else self.single

    def forward(self, tokens: float) -> float:
        """Multiplications of the parameters that a token passes, and of attention; each batch reads all weights."""
        work = 2 * self.subject.body_work(self.window)
        reading = self.subject.size / self.bandwidth / BATCH  # of a mixture a batch calls nearly all experts
        return tokens * max(work / self.model, reading)

    def head(self, tokens: float) -> float:
        """The output matrix, and the logits read and written in float32 a few times."""
        rows = self.subject.vocabulary
        return tokens * rows * (2 * self.subject.hidden / self.model + 4 * 4 / self.bandwidth)

    def moments(self, tokens: float) -> float:
        """Float32 products, added to float64 sums once a batch."""
        hidden = self.subject.hidden
        products = sum(2 * w * (w + hidden) for w in self.subject.widths) / self.single
        sums = sum(w * (w + hidden) * 24 for w in self.subject.widths) / self.bandwidth
        return tokens * (products + sums / BATCH)

    def metric(self, tokens: float) -> float:
        """The same of the residual stream."""
        hidden, n = self.subject.hidden, len(self.subject.widths)
        return tokens * n * (2 * hidden**2 / self.single + hidden**2 * 24 / self.bandwidth / BATCH)

    def fit(self, share: float, ridges: bool) -> float:
        """Float64: a solution for each ridge, its error, and a last one."""
        total, hidden, times = 0.0, self.subject.hidden, (6, 5) if ridges else (1, 0)
        for width in self.subject.widths:
            k = share * width
            solve, error = 2 * k**3 / 3 + 2 * k**2 * hidden, 2 * k**2 * hidden + 2 * k * hidden**2
            reading = 60 * width**2 / self.bandwidth  # covariances made from sums, and copied
            total += (times[0] * solve + times[1] * error) / self.double + sum(times) * reading
        return total

    def surgeon(self, metric: bool) -> float:
        """Float64: an inverse, then updates, at most 256 steps."""
        total, hidden = 0.0, self.subject.hidden
        for width in self.subject.widths:
            work = 2 * width**3 + 2 * width**2 * hidden + (2 * width * hidden**2 + hidden**3 / 3 if metric else 0)
            total += work / self.double + 8 * width**3 / 64 / self.bandwidth + 256 * 40 * LAUNCH
        return total

    def ica(self, n_runs: float, run_length: int, n_components: int) -> float:
        """Products of runs with themselves, reading and cleaning them twice, 100 steps over components."""
        n, k = self.subject.n_neurons, n_components
        size = run_length * n * 4
        run = (
            2 * size / HOST_COPY + 12 * size / self.bandwidth + 2 * n * run_length * (run_length + 4 * k) / self.single
        )
        group = 2 * n * (6 * k) ** 2 / self.single
        return n_runs * (run + group + 300 * LAUNCH) + 100 * (4 * n * k**2 / self.single + 20 * LAUNCH)

    def published(self, tokens: int, window: int) -> float:
        """An eigendecomposition and 300 steps of ICA for every layer and every 40 windows, in float64."""
        groups = max(1, tokens // (40 * window))
        rows, k = min(tokens, 40 * window), 128
        total = 0.0
        for width in self.subject.widths:
            columns = 2 * width
            small = min(rows, columns)
            work = 2 * small * rows * columns + 10 * small**3 + 2 * rows * columns * k
            total += groups * (work + 300 * 4 * columns * k**2) / self.double
        return total

    def disk(self, size: float) -> float:
        """From the GPU, and with its checksum."""
        return size / HOST_COPY + size / DISK


LARGE = 3e8  # parameters of a block from which it is not built to be timed
BIG = 2048  # width from which moments and fits are timed smaller, and scaled


class CpuSpeeds:
    """This machine's CPU: pieces of the work are run, most of them at the model's sizes.

    Parameters
    ----------
    subject : Subject
    config : config of transformers
    model : module
        Of the config, without values.
    window : int
    dtype : torch.dtype
    clock : function
        Seconds: of the wall, or of the processor.
    timings : dict, optional
        Seconds of pieces that are known already; others are put in.
    batch : int
        Tokens that pass at once.
    """

    def __init__(
        self, subject: Subject, config: Any, model: nn.Module, window: int, dtype: torch.dtype,
        clock: Callable[[], float] = time.perf_counter, timings: dict[str, float] | None = None,
        batch: int = BATCH,
    ) -> None:  # fmt: skip
        self.subject, self.window, self.dtype, self.clock = subject, window, dtype, clock
        self._config, self._model = config, model
        self.batch = batch
        self._known = {} if timings is None else timings

    def _timed(self, key: Any, make: Callable[[], Callable[[], Any]]) -> float:
        """Seconds of what `make` gives, the best of three calls; once for each key."""
        key = str(key)
        if key not in self._known:
            run, found = make(), []
            for _ in range(3):
                start = self.clock()
                run()
                found.append(self.clock() - start)
                if found[0] > 3:
                    break
            self._known[key] = min(found)
        return float(self._known[key])

    def _product(self, dtype: torch.dtype) -> float:
        """Multiplications a second of a product of matrices."""

        def make() -> Callable[[], Any]:
            a = torch.randn(512, 1024, generator=_drawn()).to(dtype)
            return lambda: a @ a.T

        return 512 * 512 * 1024 / self._timed(("product", dtype), make)

    def forward(self, tokens: float) -> float:
        """One block of random weights over one batch; large ones by their multiplications."""
        n = len(self.subject.widths)
        if self.subject.body_parameters / n > LARGE or self.subject.mixture:
            return tokens * self.subject.body_work(self.window) / self._product(self.dtype)
        rows = max(1, min(self.batch, int(2e9 / (self.subject.body_parameters / n))) // self.window)

        def make() -> Callable[[], Any]:
            body, ids = self._one_block(), torch.randint(8, (rows, self.window), generator=_drawn())

            def run() -> None:
                with evaluating(body):
                    body(input_ids=ids)

            return run

        return tokens * n * self._timed("block", make) / (rows * self.window)

    def _one_block(self) -> nn.Module:
        """The model with one block and a small vocabulary, random weights, no head."""
        config = copy.deepcopy(self._config)
        text, n = text_config(config), len(self.subject.widths)
        for part in {id(c): c for c in (config, text)}.values():
            for name, value in list(vars(part).items()):
                if name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers"):
                    setattr(part, name, 1)
                elif isinstance(value, list) and len(value) == n:
                    setattr(part, name, value[:1])
            if isinstance(getattr(part, "vocab_size", None), int):
                part.vocab_size = min(part.vocab_size, 256)
            for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
                if getattr(part, name, None) is not None:
                    setattr(part, name, 0)
        model_class = model_class_of(config, False)
        make: Any = model_class.from_config if hasattr(model_class, "from_config") else model_class
        with torch.random.fork_rng(devices=[]):
            built = make(config).to(self.dtype)
        body: nn.Module = getattr(built, "base_model", built)
        return body

    def head(self, tokens: float) -> float:
        """The output matrix and the loss, over some tokens."""
        rows, hidden = self.subject.vocabulary, self.subject.hidden
        some = max(128, min(512, int(2e9 / max(rows * hidden, 1))))  # fewer are not as fast

        def make() -> Callable[[], Any]:
            weight = torch.randn(rows, hidden, generator=_drawn()).to(self.dtype)
            x, target = (
                torch.randn(some, hidden, generator=_drawn()).to(self.dtype),
                torch.zeros(some, dtype=torch.long),
            )
            return lambda: nn.functional.cross_entropy((x @ weight.T).float(), target, reduction="none")

        return tokens * self._timed("head", make) / some if rows else 0.0

    def _moments(self, width: int) -> Moments:
        x, t = _signals(BATCH, width), _signals(BATCH, self._hidden(width))
        found = Moments()
        found.add(x, t)
        return found

    def _hidden(self, width: int) -> int:
        """The residual stream, as much smaller as the width is."""
        return max(16, round(self.subject.hidden * width / max(self.subject.widths)))

    def _scaled(self, key: str, make: Callable[[int], Callable[[], Any]], power: float, most: int = BIG) -> float:
        """Seconds of all layers, of which those up to `most` wide are timed and others scaled."""
        total = 0.0
        for width in self.subject.widths:
            if not width:  # a layer whose MLP was dropped
                continue
            small = min(width, most)
            seconds = self._timed((key, small), lambda small=small: make(small))  # type: ignore[misc]
            total += seconds * (width / small) ** power
        return total

    def moments(self, tokens: float) -> float:
        """A batch added to the moments of a layer."""

        def make(width: int) -> Callable[[], Any]:
            moments, n = self._moments(width), self.batch
            x, t = _signals(n, width), _signals(n, self._hidden(width))
            return lambda: moments.add(x, t)

        return tokens / self.batch * self._scaled("moments", make, 2, 2048)

    def metric(self, tokens: float) -> float:
        """The same of the gradients."""

        def make() -> Callable[[], Any]:
            g = _signals(self.batch, self.subject.hidden)
            return lambda: (g.T @ g).double()

        return tokens / self.batch * len(self.subject.widths) * self._timed("metric", make)

    def fit(self, share: float, ridges: bool) -> float:
        """One layer's fit."""

        def make(width: int) -> Callable[[], Any]:
            train, held, kept = self._moments(width), self._moments(width), torch.arange(max(1, round(share * width)))
            weight = torch.randn(width, self._hidden(width), generator=_drawn()).double()

            def run() -> Refit:
                ridge = choose_ridge(train, held, weight, kept) if ridges else 1e-3
                return least_squares(train, weight, kept, ridge=ridge)

            return run

        return self._scaled(f"fit {share:.3f} {ridges}", make, 3)

    def surgeon(self, metric: bool) -> float:
        """One layer's removal costs."""

        def make(width: int) -> Callable[[], Any]:
            covariance, hidden = self._moments(width).covariance, self._hidden(width)
            weight = torch.randn(width, hidden, generator=_drawn()).double()
            inner = torch.eye(hidden, dtype=torch.float64) if metric else None
            return lambda: removal_costs(covariance, weight, ridge=RIDGE, metric=inner)

        return self._scaled(f"surgeon {metric}", make, 3)

    def ica(self, n_runs: float, run_length: int, n_components: int) -> float:
        """Group ICA of one and of two drawn runs, of 2,048 and of 4,096 neurons; linear from there."""
        sizes, k = (2048, 4096), n_components

        def make(n: int, runs: int) -> Callable[[], Any]:
            rng = np.random.default_rng(0)
            sources = rng.laplace(size=(k, n)) ** 3
            data = [
                (rng.normal(size=(run_length, k)) @ sources + rng.normal(size=(run_length, n))).astype(np.float32)
                for _ in range(runs)
            ]
            return lambda: GroupICA(k, random_state=0, device="cpu", progress=False).fit(data)

        t = {
            (n, r): self._timed(("ica", n, r, run_length, k), lambda n=n, r=r: make(n, r))  # type: ignore[misc]
            for n in sizes
            for r in (1, 2)
        }
        slope = {r: max(0.0, t[sizes[1], r] - t[sizes[0], r]) / (sizes[1] - sizes[0]) for r in (1, 2)}
        whole = {r: t[sizes[1], r] + slope[r] * (self.subject.n_neurons - sizes[1]) for r in (1, 2)}
        return max(whole[1] + (n_runs - 1) * max(0.0, whole[2] - whole[1]), t[sizes[0], 1] / 2)

    def published(self, tokens: int, window: int) -> float:
        """An eigendecomposition and 300 steps of ICA for every layer and every 40 windows, by their multiplications."""
        groups, rows = max(1, tokens // (40 * window)), min(tokens, 40 * window)
        columns = 2 * max(self.subject.widths)
        small = min(rows, columns)
        work = small * rows * columns + 5 * small**3 + rows * columns * 128 + 300 * 2 * columns * 128**2
        return groups * len(self.subject.widths) * work / self._product(torch.float64)

    def disk(self, size: float) -> float:
        """Written, and read once for its checksum."""

        def make() -> Callable[[], Any]:
            array = np.random.default_rng(0).integers(0, 255, size=2**24, dtype=np.uint8)

            def run() -> None:
                with tempfile.TemporaryDirectory() as folder:
                    file_sha256(write_tensors(Path(folder) / "x.safetensors", {"x": array}))

            return run

        return size / 2**24 * self._timed("disk", make)


def _drawn() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _signals(tokens: int, width: int) -> Tensor:
    return torch.randn(tokens, width, generator=_drawn())


def gpu_of(name: str) -> Gpu:
    """A GPU by its name; an `InputError` lists those that are known."""
    if not isinstance(name, str) or name.lower() not in GPUS:
        raise InputError(f"gpu={name!r} is not in the table: {', '.join(GPUS)}")
    return GPUS[name.lower()]

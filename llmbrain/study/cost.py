"""What a job will cost before it runs: passes over the text, tokens, disk, memory, and, from one measured batch, time.

A *pass* is one forward pass of the whole model over the calibration text; a backward pass counts as two more. How many
a criterion and an allocation take was counted (the test counts them again). Time is not passes alone: a walk through
the layers also sums covariances, and group ICA multiplies runs with themselves. Both are counted in the multiplications
they take, beside those of a token's forward pass.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from llmbrain._files import bytes_text
from llmbrain._progress import span
from llmbrain.anatomy.experts import expert_anatomy, has_experts
from llmbrain.anatomy.families import Anatomy, anatomy
from llmbrain.anatomy.spread import is_spread
from llmbrain.distributed import ranks
from llmbrain.hooks.text import evaluating, input_device
from llmbrain.pruning.calibrate.gradients import LARGE
from llmbrain.pruning.calibrate.windows import WRITTEN_AT_ONCE
from llmbrain.pruning.criteria import CRITERIA
from llmbrain.pruning.criteria.networks import DEEP, balance_of
from llmbrain.pruning.forget import neurons, unlearning
from llmbrain.pruning.forget.relearning import LONGEST, Relearning
from llmbrain.study.forecasting import TOKENS, fitted_tokens
from llmbrain.study.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Passes of a plan at one share everywhere, and of each way to spread it: counted on a small model.
OF_METHOD = {"random": 0.0, "magnitude": 0.0, "wanda-sp": 1.1, "flap": 1.1, "taylor": 3.0, "published": 1.0, "obs": 2.0,
             "obs-gradient": 5.0, "networks": 5.0, "shortgpt": 1.0, "2ssp": 3.0}  # fmt: skip
OF_BALANCE = 2.0  # to weigh tokens by networks
OF_EXPERTS = 3.0  # times as many passes as that takes the repair of experts, which is done three times a layer
SEQUENTIAL = {"obs", "obs-gradient", "networks"}
OF_REPAIR = 2.0  # of the sequential repair: what a block gave before, and what it gives now
OF_PROPAGATION = 1.0  # more of it, where what the dense model made of the text goes beside it: in deep models
FIXED, BYTES_A_SECOND = 4.0, 1e8  # seconds of figures and the report; how fast a model is copied, saved and checked
BASE_MEMORY = 0.6e9  # Python, torch and transformers themselves
SPEED_TOKENS = 4 * 512  # read to measure the speed of a model
SLOW = 5.0  # seconds of one text: then no larger batch is measured
BATCH = 2048  # tokens in a forward pass of an evaluation or a scan
PIECE = 512  # tokens of a text that a model writes
ROUNDS = 11  # of the search for neurons to forget: they took 6 to 24 on the demo brain, a hundredth of the neurons each
OF_ROUND = 5.0  # passes of a round: one forward, two backward
OF_UPDATE = 150.0  # multiplications a parameter that a step of Adam on all of them takes as long as (demo brain)
LINE = 32  # tokens of a line of labelled text, where it is not known
OWN = 2  # times the text that is given, what a deep model writes beside it
OF_STEP, OF_TOKEN = 100, 2.5  # what writing a token of all pieces costs, in tokens that are read: at least, and each


def plan_passes(
    method: str, allocation: str | None, passes: float, head_ratio: float = 0.0, drop: Sequence[str] = (),
    n_layers: int = 0, balance: float | None = None,
) -> float:  # fmt: skip
    """Forward passes over the calibration text that a plan takes; `n_layers` is what unsaid options follow from."""
    if allocation is None and method in CRITERIA:
        allocation = CRITERIA[method]().spread(n_layers)
    found = OF_METHOD.get(method, 5.0) + OF_BALANCE * (method == "networks" and balance_of(balance, n_layers) > 0)
    if allocation in ("global", "clamped") and method in SEQUENTIAL:
        found += 1.0
    elif allocation == "sensitivity":
        found += min(passes, 24) / 3 + (0.8 if method in SEQUENTIAL else 0.0)
    elif allocation == "search" and not drop:
        found += 0.92 * min(passes, 24)
    elif allocation == "search":
        found += min(passes, 24) / 3
    if drop:
        found += min(passes, 24) * 2 / 3
    return found + (1.0 if head_ratio else 0.0)


def own_windows(asked: int | None, n_layers: int, n_text: int) -> int:
    """Windows of text that a model writes itself beside `n_text` of the user's, where the user does not say how many.

    None for shallow models; twice as many for deep ones, which were trained on far more kinds of text than the one they
    are calibrated on (see ``benchmarks/real.py``).
    """
    if asked is not None:
        return asked
    return OWN * n_text if n_layers >= DEEP else 0


def repair_passes(compensate: str | None, n_layers: int, propagation: float | None = None) -> float:
    """Forward passes over the calibration text that a repair takes."""
    if compensate is None:
        return 0.0
    carries = n_layers >= DEEP if propagation is None else propagation > 0
    return OF_REPAIR + (OF_PROPAGATION if compensate == "least-squares" and carries else 0.0)


def writing_passes(n_tokens: int) -> float:
    """Forward passes over text of so many tokens that writing it takes as long as.

    It is written one token of every piece at a time, and each such step reads all weights, however few pieces there
    are: of SmolLM2 a step of 4 pieces took as long as 116 tokens that are read.
    """
    steps = PIECE * -(-n_tokens // (PIECE * WRITTEN_AT_ONCE))
    return OF_TOKEN + OF_STEP * steps / max(n_tokens, 1)


@dataclass(frozen=True)
class Subject:
    """Sizes of a model that costs follow from.

    Attributes
    ----------
    parameters : int
        Of the whole model.
    size : int
        Bytes of its weights.
    widths : tuple of int
        MLP neurons of each layer.
    hidden, vocabulary : int
    itemsize : int
        Bytes of what it computes in.
    passed : tuple of int
        Widths of the MLPs that a token passes: of each layer, or, of a mixture of experts, of the experts it visits.
    active : int
        Parameters that a token meets.
    body_parameters : int
        Of all blocks.
    visits : int
        Routed experts that a token visits in all layers; 0 where it is no mixture of experts.
    """

    parameters: int
    size: int
    widths: tuple[int, ...]
    hidden: int
    vocabulary: int
    itemsize: int
    passed: tuple[int, ...]
    active: int
    body_parameters: int = 0
    visits: int = 0

    @classmethod
    def of(cls, model: nn.Module, body: Anatomy | None = None) -> Subject:
        """Sizes of this model, which need not have values."""
        mixture = expert_anatomy(model) if body is None and has_experts(model) else None
        found = body or (mixture if mixture is not None else anatomy(model, spread=True))
        widths = found.widths
        passed, silent, visits = widths, 0, 0
        if mixture is not None:
            passed = tuple(mlp.width for layer in mixture.layers for mlp in layer.shared)
            for _, r in mixture.routed:
                passed += (r.width,) * r.top_k
                visits += r.top_k
                silent += sum(t.value.numel() for t in r.weights) // r.count * (r.count - r.top_k)
        parameters = list(model.parameters())
        embedding = model.get_input_embeddings()  # type: ignore[operator]
        rows = int(getattr(embedding, "num_embeddings", 0) or 0)
        return cls(
            sum(p.numel() for p in parameters), sum(p.numel() * p.element_size() for p in parameters), widths,
            int(getattr(embedding, "embedding_dim", 0) or max(widths)), rows, parameters[0].element_size(), passed,
            sum(p.numel() for p in parameters) - silent,
            sum(p.numel() for layer in found.layers for p in layer.block.parameters()), visits,
        )  # fmt: skip

    @property
    def mixture(self) -> bool:
        """Whether it is a mixture of experts."""
        return self.visits > 0

    @property
    def by_visit(self) -> int:
        """Bytes that a scan of neurons keeps of a token of a mixture: neurons, numbers of experts, gates."""
        return self.itemsize * sum(self.passed) + self.visits * (4 + self.itemsize)

    def body_work(self, length: int) -> float:
        """Multiplications of one token's way through the blocks, in a text of `length` tokens."""
        active = self.active - (self.parameters - self.body_parameters)
        return active + 2 * len(self.widths) * self.hidden * length

    @property
    def n_neurons(self) -> int:
        """MLP neurons of all layers."""
        return sum(self.widths)

    def token_work(self, length: int) -> float:
        """Multiplications of one token's forward pass in a text of `length` tokens."""
        return self.active + len(self.widths) * self.hidden * length

    def covariance_work(self) -> float:
        """Multiplications that a token adds to a walk: covariances of all layers, in float64 (twice the time)."""
        return 2.0 * sum(w * (w + self.hidden) for w in self.passed)

    def ica_work(self, n_tokens: int, run_length: int, n_components: int) -> float:
        """Multiplications of group ICA: each run with itself, twice, then components over neurons."""
        return self.n_neurons * (2.0 * n_tokens * run_length + 4.0 * n_tokens * n_components + 400.0 * n_components**2)


@dataclass(frozen=True)
class Part:
    """One step of a job: how many tokens go through the model, and the work that comes on top."""

    name: str
    passes: float
    tokens: int
    extra: float = 0.0  # multiplications beside the forward passes


@dataclass(frozen=True)
class Forgetting:
    """What is done beside a plan and a repair where conditions are to be forgotten.

    Attributes
    ----------
    own, others : int
        Tokens of a line of what is to go, and of what stays: such that one in ten is longer.
    last, searches, repairs : bool
        Whether it is to last; whether neurons are looked for, and the cut is repaired.
    attack : Relearning or None
        How it is taught again.
    """

    own: int = LINE
    others: int = LINE
    last: bool = False
    searches: bool = True
    repairs: bool = True
    attack: Relearning | None = field(default_factory=Relearning)

    @classmethod
    def of(cls, read: Sequence[Any], forget: Sequence[str], **how: Any) -> Forgetting:
        """With the lines of texts or scans, where these have events."""
        kinds: dict[bool, list[float]] = {True: [], False: []}
        for events in (getattr(one, "events", None) for one in read):
            for kind, duration in () if events is None else events[["trial_type", "duration"]].itertuples(index=False):
                kinds[str(kind) in forget].append(min(float(duration), LONGEST) + 1)
        own, others = (int(np.percentile(kinds[k], 90)) if kinds[k] else LINE for k in (True, False))
        return cls(own, others, **how)

    def parts(self, parameters: int, n_tokens: int, window: int) -> list[Part]:
        """Steps that come on top of a plan and a repair, on `n_tokens` of calibration in windows of `window`."""
        search = Part("neurons to forget", 1 + OF_ROUND * ROUNDS, min(n_tokens, neurons.TOKENS))
        found = [search] if self.searches else []
        if self.repairs:
            found.append(self._repair(parameters, n_tokens, max(1, min(window, n_tokens))))
        if (attack := self.attack) is not None:
            times = len(attack.lines) + attack.unrelated
            looks = 1 + -(-attack.steps // attack.every)
            read = 3 * attack.steps * attack.batch * self.own + looks * attack.test * self.own
            found.append(Part("teaching it again", 1.0, times * read, times * attack.steps * OF_UPDATE * parameters))
        return found

    def _repair(self, parameters: int, n_tokens: int, window: int) -> Part:
        trained = n_tokens - n_tokens // (unlearning.HELD_LASTING if self.last else unlearning.HELD_OUT)
        batch = max(1, trained // -(-trained // (max(1, unlearning.TOKENS // window) * window)))  # the last is short
        steps, passes, updates = unlearning.STEPS, 8.0, 0.3  # the windows twice: dense, and forth and back
        if self.last:  # at most: where nothing else suffers, it ends sooner
            steps += unlearning.MENDS * unlearning.MENDING
            held = min(unlearning.HELD_LINES, max(1, unlearning.TOKENS // max(self.others, 1)))
            passes += ((3.0 + 4.0) * unlearning.LINES * self.own + 4.0 * held * self.others) / batch
            updates = 2.0  # its own, and the adversary's
        name = "repair that makes forgetting last" if self.last else "repair that forgets"
        return Part(name, passes, steps * batch, steps * updates * OF_UPDATE * parameters)

    def copies(self, itemsize: int) -> int:
        """Models that are held at once, of the size of the dense one."""
        of_float = max(1, 4 // itemsize)
        return 2 + of_float * max(4 * (self.attack is not None), 9 * (self.last and self.repairs))


@dataclass(frozen=True)
class Cost:
    """What a job takes.

    Attributes
    ----------
    parts : tuple of Part
    disk, memory : int
        Bytes; memory is the peak of the process.
    work : float
        Multiplications of one token's forward pass.
    fixed : float
        Seconds of what does not depend on the text.
    per_token : float or None
        Seconds that a token's forward pass takes here, once measured.
    """

    parts: tuple[Part, ...]
    disk: int
    memory: int
    work: float
    fixed: float = 0.0
    per_token: float | None = None

    @property
    def tokens(self) -> float:
        """Tokens through the model, passes counted."""
        return sum(part.passes * part.tokens for part in self.parts)

    @property
    def seconds(self) -> float | None:
        """Expected time, once a batch was measured."""
        if self.per_token is None:
            return None
        work = sum(part.passes * part.tokens * self.work + part.extra for part in self.parts)
        return self.fixed + work / self.work * self.per_token

    def lines(self) -> list[str]:
        """What a user is told."""
        said = [
            f"cost: {self.tokens:,.0f} tokens through the model; {bytes_text(self.disk)} of disk, "
            f"about {bytes_text(self.memory)} of memory"
        ]
        for part in self.parts:
            if part.passes:
                said.append(f"    {part.name}: {part.passes:.3g} passes over {part.tokens:,} tokens")
        if self.seconds is not None and self.per_token:
            said.append(f"measured: {1 / self.per_token:,.0f} tokens a second: about {span(self.seconds)} in all")
        return said


def forecast_part(subject: Subject, n_tokens: int, *, measured: bool, unseen: bool = False) -> Part:
    """The forecast of a plan on a study of `n_tokens`; `measured`: and afterwards what was lost; `unseen`: on text that
    is scanned for it."""
    fitted, judged = fitted_tokens(n_tokens), min(TOKENS, n_tokens)
    name = "forecast of the loss, beside what was lost" if measured else "forecast of the loss"
    passes = 4.0 + (4.0 + 2.0 * measured + 1.0 * unseen) * judged / max(
        1, fitted
    )  # two backward passes, and both models read
    return Part(name, passes, fitted, fitted * subject.covariance_work() / 2)


def seconds_per_token(model: nn.Module, ids: Tensor) -> float:
    """Time of a token in one batch that is read, after a smaller one that warms up."""
    device = input_device(model)

    def timed(batch: Tensor) -> float:
        start = time.perf_counter()
        model(input_ids=batch.to(device))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    with evaluating(model):
        timed(ids[:1, : max(2, ids.shape[1] // 8)])
        first = timed(ids[:1])
        if is_spread(model):  # all ranks read a batch together, or none does
            first = max(float(seconds) for seconds in ranks().gather("speed", first))
        if first > SLOW or len(ids) == 1:
            return first / ids.shape[1]
        return min(timed(ids) / ids.numel(), first / ids.shape[1])


def measured_batch(model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int) -> float:
    """`seconds_per_token` of the beginning of the texts."""
    from llmbrain.hooks.text import TOKENIZING

    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text[: 40 * length], **TOKENIZING)["input_ids"]
        if len(ids) >= 4 * length:
            break
    length = min(length, max(2, len(ids)))
    rows = max(1, min(4, len(ids) // length))
    return seconds_per_token(model, torch.tensor((ids + [ids[0]] * length)[: rows * length]).reshape(rows, length))


def scan_bytes(subject: Subject, n_tokens: int, site: str = "neuron", dtype: str | None = None, sites: int = 1) -> int:
    """Disk that a recording takes."""
    if subject.mixture and site == "neuron":
        return n_tokens * subject.by_visit
    units = len(subject.widths) * subject.hidden if site in ("mlp_out", "block_out") else subject.n_neurons
    return n_tokens * units * sites * ({"float32": 4, "float16": 2, "bfloat16": 2}.get(dtype or "", subject.itemsize))


def memory_of(
    subject: Subject, batch: int, run_length: int, n_tokens: int, *, method: str = "", copies: int = 2
) -> int:
    """Peak memory of a job: the model and its smaller copy, and the largest of its steps."""
    widest = max(subject.passed)
    scan = 2 * batch * subject.n_neurons * subject.itemsize
    ica = 3 * run_length * subject.n_neurons * 4
    reading = 3 * BATCH * max(subject.vocabulary, 1) * 4
    streams = 3 * n_tokens * subject.hidden * 4 + 8 * widest * widest * 8
    gradient = 0
    if method in ("taylor", "obs-gradient", "networks"):
        kept = BATCH * len(subject.widths) * (12 * subject.hidden + 4 * widest) * 4
        gradient = min(kept, LARGE) + reading
    return int(BASE_MEMORY + copies * subject.size + max(scan, ica, reading, streams + gradient))


def run_cost(
    subject: Subject, how: Settings, *, n_tokens: int, eval_tokens: int, window: int, per_token: float | None = None,
    todo: Sequence[str] = ("evaluate", "scan", "networks", "prune"), writes: bool = True,
    read: Sequence[Any] = (),
) -> Cost:  # fmt: skip
    """Cost of `run`, or of those of its steps that are still to do.

    `writes`: whether the model writes text of its own where the user does not say; see `smaller.may_write`.
    `read`: texts, whose events say how long a line is that is forgotten.
    """
    work = subject.token_work(window)
    length = min(how.run_length or n_tokens, n_tokens)
    k = how.n_components if isinstance(how.n_components, int) else 32
    layers = len(subject.widths)
    cut, drop = (how.method, how.allocation, how.passes, how.head_ratio), how.drop or ()
    planning = plan_passes(*cut, drop, layers, how.token_balance)
    deep = 0 if subject.mixture or how.keep or how.forget else layers
    repair = repair_passes(how.compensate, deep, how.propagation)
    if how.expert_ratio is not None:  # scores are one pass, of networks and chance none
        planning = 0.0 if how.method in ("networks", "random") else 1.0
        repair *= OF_EXPERTS
    unasked = how.own_text is None and (subject.mixture or not writes)
    asked = 0 if how.expert_ratio is not None or unasked else how.own_text
    own = own_windows(asked, layers, -(-n_tokens // window)) * window
    calibration = n_tokens + own
    parts: dict[str, list[Part]] = {
        "evaluate": [Part("perplexity of the dense model, and its speed", 1.0, eval_tokens + SPEED_TOKENS)],
        "scan": [Part("scan", 1.0, n_tokens)],
        "networks": [Part("group ICA", 0.0, n_tokens, subject.ica_work(n_tokens, length, k))],
        "prune": [
            Part(f"plan ({how.method})", planning, calibration, planning * calibration * subject.covariance_work() / 2),
            Part("cut and repair", repair, calibration, repair / 2 * calibration * subject.covariance_work()),
            Part("perplexity of the smaller model, and its speed", 1.0, eval_tokens + SPEED_TOKENS),
        ],
    }
    if own:
        parts["prune"].insert(0, Part("text of the model's own", writing_passes(own), own))
    if not (subject.visits or how.expert_ratio or how.head_ratio or how.drop or how.keep or how.forget):
        parts["prune"].append(forecast_part(subject, n_tokens, measured=True, unseen=True))
    forgetting = None
    if how.forget:
        forgetting = Forgetting.of(read, how.forget, last=how.last, searches=how.ratio != 0,
                                   repairs=how.compensate == "least-squares")  # fmt: skip
        parts["prune"] += forgetting.parts(subject.parameters, calibration, window)
    sites = 3 if how.method == "published" else 1
    disk = scan_bytes(subject, n_tokens, how.site, how.dtype, sites) + subject.size
    batch = max(BATCH, length)
    copies = 2 if forgetting is None else forgetting.copies(subject.itemsize)
    return Cost(
        tuple(part for step in todo for part in parts[step]), disk,
        memory_of(subject, batch, length, calibration, method=how.method, copies=copies), work,
        FIXED + subject.size / BYTES_A_SECOND, per_token,
    )  # fmt: skip


def told(cost: Cost, tell: Any) -> Cost:
    """Say what it costs, and give it back."""
    for line in cost.lines():
        tell(line)
    return cost


def step_cost(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, n_tokens: int | None = None,
    passes: float = 1.0, name: str = "scan", site: str = "neuron", dtype: str | None = None, disk: bool = False,
    method: str = "", per_token: float | None = None,
) -> Cost:  # fmt: skip
    """Cost of one step of the job by itself; a batch of the texts is read.

    Parameters
    ----------
    n_tokens : int, optional
        Tokens that are read; default all of the texts.
    passes : float
        How often.
    name : str
        What it is called.
    site, dtype, disk
        What is recorded; whether to disk.
    method : str
        Criterion, whose memory counts.
    per_token : float, optional
        Seconds that a token takes here, where it was measured before.
    """
    from llmbrain.hooks.text import window_length
    from llmbrain.study.sample import count_tokens

    subject, total = Subject.of(model), count_tokens(tokenizer, texts)
    tokens = min(n_tokens or total, total)
    window = min(512, window_length(model), total)
    extra = passes * tokens * subject.covariance_work() / 2 if method in SEQUENTIAL | {"flap", "wanda-sp"} else 0.0
    return Cost(
        (Part(name, passes, tokens, extra),), scan_bytes(subject, tokens, site, dtype) if disk else 0,
        memory_of(subject, BATCH, min(BATCH, total), tokens, method=method, copies=2 if method else 1),
        subject.token_work(window), FIXED, per_token or measured_batch(model, tokenizer, texts, window),
    )  # fmt: skip


def together(costs: Sequence[Cost]) -> Cost:
    """Several jobs of one model, one after the other."""
    return replace(
        costs[0], parts=tuple(part for cost in costs for part in cost.parts), disk=sum(cost.disk for cost in costs),
        memory=max(cost.memory for cost in costs), fixed=sum(cost.fixed for cost in costs),
    )  # fmt: skip

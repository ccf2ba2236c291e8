"""Whole blocks: which MLPs and attentions are set to nothing, within the parameters that a ratio may take.

Neurons and blocks draw on one budget: as many parameters go as the ratio takes from the MLPs, so that plans with and
without blocks are of one size. Three ways to choose: ours (`search_blocks`), block influence (ShortGPT) and two stages
(2SSP).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from llmbrain._validation import InputError, check_names, check_range
from llmbrain.anatomy.layers import Anatomy, LayerAnatomy
from llmbrain.anatomy.offload import is_away
from llmbrain.anatomy.surgery import Change, check_droppable, part_parameters, restored, write
from llmbrain.anatomy.units import HEADS, NEURONS, Units
from llmbrain.hooks.listen import hear_outputs
from llmbrain.hooks.text import batches, evaluating, input_device
from llmbrain.pruning.allocate.budget import Budget, check_multiple
from llmbrain.pruning.allocate.search import OF_CANDIDATE, OF_SENSITIVITY, SURE, Allocator
from llmbrain.pruning.allocate.shares import uniform
from llmbrain.pruning.criteria.base import Material

PARTS: dict[str, Units] = {"mlp": NEURONS, "attention": HEADS}
OF_BLOCKS = 1 / 6  # share of a search's passes that measures blocks alone
SHARES = (1 / 8, 1 / 4, 1 / 2, 1.0)  # of the blocks that fit: what is tried as a whole
ALPHA = 1.5  # of 2SSP: how attentions and neurons share the budget (arXiv 2501.17771, eq. 5)
STAGE_TOKENS = 2048  # of 2SSP: text on which attentions are tried, one after another


@dataclass(frozen=True)
class Blocks:
    """Layers whose MLP, and whose attention, go whole."""

    mlp: tuple[int, ...] = ()
    attention: tuple[int, ...] = ()

    def record(self) -> dict[str, list[int]]:
        """As plain JSON values."""
        return {"mlp": list(self.mlp), "attention": list(self.attention)}


@dataclass(frozen=True)
class BlockBudget:
    """How many parameters a plan takes, from neurons and whole blocks together.

    Attributes
    ----------
    body : Anatomy
    ratio : float
        Of the parameters of all neurons.
    protect : tuple of int
    multiple_of : int
    """

    body: Anatomy
    ratio: float
    protect: tuple[int, ...] = ()
    multiple_of: int = 1

    def __post_init__(self) -> None:
        check_range("ratio", self.ratio, 0, 1, open_low=True, open_high=True)
        check_multiple(self.multiple_of)

    @property
    def parameters(self) -> float:
        """Parameters to remove."""
        return self.ratio * sum(self.cost(layer, NEURONS) for layer in self.body.layers)

    def cost(self, layer: LayerAnatomy, units: Units) -> int:
        """Parameters that go with a block."""
        return layer.width * NEURONS.parameters(layer) if units is NEURONS else part_parameters(layer, units)

    def neurons(self, blocks: Blocks) -> Budget | None:
        """What the neurons have to give once these blocks are gone; None where the blocks are too many."""
        layers = self.body.layers
        widths = tuple(0 if i in blocks.mlp else w for i, w in enumerate(self.body.widths))
        each = sum(self.cost(layer, NEURONS) for layer in layers) / sum(self.body.widths)
        left = self.parameters - sum(self.cost(layers[i], HEADS) for i in blocks.attention)
        spare = round(left / each) - (sum(self.body.widths) - sum(widths))
        if spare < 0 or not sum(widths):
            return None
        budget = Budget(widths, sum(widths) - spare, self.protect, self.multiple_of)
        if budget.keep < budget.low.sum():
            return None
        return budget

    def heads(self, blocks: Blocks) -> tuple[int, ...]:
        """Key/value groups that each layer keeps."""
        return tuple(0 if i in blocks.attention else n for i, n in enumerate(HEADS.counts(self.body)))

    def candidates(self, parts: Sequence[str]) -> list[tuple[str, int]]:
        """Parts of layers that are not protected and can be dropped.

        Raises
        ------
        InputError
            If there is none of a part that was asked for; says why of the first layer.
        """
        found: list[tuple[str, int]] = []
        for part in parts:
            units, why = PARTS[part], None
            before = len(found)
            for layer in self.body.layers:
                if layer.index in self.protect or units.is_gone(layer):
                    continue
                try:
                    check_droppable(layer, units)
                except InputError as error:
                    why = why or error
                    continue
                found.append((part, layer.index))
            if len(found) == before:
                raise InputError(f"drop={part!r}: no layer can lose its {part}: {why or 'all are protected or gone'}")
        return found


def check_drop(drop: Sequence[str] | str | None) -> tuple[str, ...]:
    """Names of parts, each once.

    Raises
    ------
    InputError
        If one is not known.
    """
    names = check_names("drop", drop)
    for name in names:
        if name not in PARTS:
            raise InputError(f"drop={name!r} is no part of a block: allowed are 'mlp' and 'attention', or both")
    return names


def check_whole(
    method: str, own: str, drop: Sequence[str], ratio: float | None, allocation: str | Sequence[int] | None,
    head_ratio: float, functions: bool = False,
) -> None:  # fmt: skip
    """Refuse what does not go together with blocks that are dropped whole; `own` is the method's own way to choose.

    Raises
    ------
    InputError
        Naming what to leave away.
    """
    if own and drop:
        raise InputError(f"drop={list(drop)}: method={method!r} says itself what it drops: leave drop away")
    if own and allocation is not None:
        raise InputError(f"allocation={allocation!r}: method={method!r} says itself how much of each layer stays")
    if not own and not drop:
        return
    what = f"drop={list(drop)}" if drop else f"method={method!r}"
    if head_ratio:
        raise InputError(f"{what} together with head_ratio={head_ratio}: attentions go whole, or single heads do")
    if functions or (allocation is not None and not isinstance(allocation, str)):
        given = "keep and forget" if functions else "an allocation of widths"
        raise InputError(f"{what} is chosen by its own measure: leave {given} away")
    if ratio is None:
        raise InputError(f"{what} needs ratio=, in (0, 1)")


def check_measurable(material: Material, drop: Sequence[str]) -> None:
    """Refuse to choose blocks without text, or of a model whose weights are not there.

    Raises
    ------
    InputError
        Saying what to give.
    """
    if material.windows is None:
        raise InputError(f"drop={list(drop)} needs calibration texts (or scans with tokens): it is measured")
    if is_away(material.model):
        raise InputError(f"drop={list(drop)}: weights of the model are offloaded: load it whole to drop parts")


def sorted_blocks(chosen: Sequence[tuple[str, int]]) -> Blocks:
    """Blocks from ``(part, layer)``."""
    return Blocks(*(tuple(sorted(i for p, i in chosen if p == part)) for part in PARTS))


# -- ours --------------------------------------------------------------------------------------------------------------


def search_blocks(
    allocator: Allocator, given: BlockBudget, parts: Sequence[str], allocation: str, *, sequential: bool
) -> tuple[Blocks, tuple[int, ...], dict[str, Any]]:
    """Blocks that are surely worth dropping rather than as many parameters of neurons, as measured.

    Each block alone is silenced, and the loss that this adds, by its parameters, gives an order. The first blocks of
    that order, more and more of them, each time with the rest of the budget spread over neurons, are tried as whole
    cuts (chosen and refitted on the training windows, measured on the held-out ones) beside a cut of neurons alone.

    Returns
    -------
    blocks, widths, facts
        Facts are what the plan should record.
    """
    material = allocator.scorer.material
    alone = given.neurons(Blocks())
    if alone is None:
        Budget.of(given.body.widths, given.ratio, given.protect, given.multiple_of)  # says why
        raise InputError(f"ratio={given.ratio} cannot be met with neurons alone")
    losses = _alone(allocator, given.candidates(parts))
    order = sorted(losses, key=lambda block: losses[block] / given.cost(given.body.layers[block[1]], PARTS[block[0]]))
    fits = [
        k for k in range(1, len(order) + 1)
        if given.neurons(sorted_blocks(order[:k])) is not None and any(given.heads(sorted_blocks(order[:k])))
    ]  # fmt: skip
    most = max(fits, default=0)
    counts = dict.fromkeys(max(k for k in (0, *fits) if k <= max(1, round(most * share))) for share in SHARES)
    affordable = max(2, int(allocator.passes * (1 - OF_SENSITIVITY - OF_BLOCKS) / OF_CANDIDATE))
    tried = [Blocks(), *(sorted_blocks(order[:k]) for k in counts if k)][:affordable]
    spread = []
    for blocks in tried:
        budget = given.neurons(blocks)
        assert budget is not None
        spread.append(allocator.spread(allocation, budget))
    found = []
    for blocks, widths in zip(tried, spread):
        sizes: dict[Units, Sequence[int]] = {NEURONS: widths}
        if blocks.attention:
            sizes[HEADS] = given.heads(blocks)
        found.append(allocator.measure(sizes, sequential=sequential))
    measured = np.array(found)
    gain = measured[0] - measured
    sure = gain.mean(1) > SURE * gain.std(1) / np.sqrt(gain.shape[1])
    mean = np.where(sure, measured.mean(1), np.inf)
    mean[0] = measured[0].mean()
    best = int(np.argmin(mean))
    facts = {
        "loss_added": {
            part: {str(i): round(float(x), 6) for (p, i), x in losses.items() if p == part} for part in parts
        },
        "tried": [
            {**blocks.record(), "widths": list(widths), "loss": round(float(x), 6), "chosen": i == best}
            for i, (blocks, widths, x) in enumerate(zip(tried, spread, measured.mean(1)))
        ],
    }
    if not best:
        material.notes.append(
            "no block was dropped: on held-out text none of the choices tried was surely better than as many "
            "parameters of neurons"
        )
    return tried[best], spread[best], facts


def _alone(allocator: Allocator, candidates: Sequence[tuple[str, int]]) -> dict[tuple[str, int], float]:
    """Loss added when one block alone is silenced, on training windows."""
    material = allocator.scorer.material
    assert material.windows is not None
    tokens = int(OF_BLOCKS * allocator.passes * material.windows.numel() / len(candidates))
    objective = allocator.objective(held_out=False, tokens=tokens)
    base = objective.mean()
    losses = {}
    for part, i in candidates:
        layer = material.body.layers[i]
        with restored([layer], [PARTS[part]]):
            _silence(layer, PARTS[part])
            losses[part, i] = objective.mean() - base
    return losses


def _silence(layer: LayerAnatomy, units: Units) -> None:
    output = units.output(layer)
    assert output is not None
    write(output, Change(torch.zeros(0, dtype=torch.long)))


# -- ShortGPT, 2SSP ----------------------------------------------------------------------------------------------------


def block_influence(material: Material) -> NDArray[np.float64]:
    """``1 - E_t cos(x_t, y_t)`` of what enters each block and what leaves it (ShortGPT, arXiv 2403.03853, eq. 1)."""
    layers = material.body.layers
    sums = np.zeros(len(layers))
    windows = material.windows
    assert windows is not None

    def watch(i: int) -> Any:
        def hear(entering: Tensor, output: Any) -> None:
            left = output if isinstance(output, Tensor) else output[0]
            sums[i] += float(F.cosine_similarity(entering.double(), left.double(), dim=-1).sum())

        return hear

    with evaluating(material.model), hear_outputs(None, [(layer.block, watch(layer.index)) for layer in layers]):
        for ids in batches(windows):
            material.model(input_ids=ids.to(input_device(material.model)))
    return 1 - sums / windows.numel()


def by_influence(allocator: Allocator, given: BlockBudget) -> tuple[Blocks, tuple[int, ...], dict[str, Any]]:
    """Whole layers of least influence, as many as come nearest to the budget; the others stay as they are."""
    material, layers = allocator.scorer.material, given.body.layers
    influence = block_influence(material)
    free = [layer.index for layer in layers if layer.index not in given.protect and not NEURONS.is_gone(layer)]
    costs = {i: given.cost(layers[i], NEURONS) + given.cost(layers[i], HEADS) for i in free}
    order = sorted(free, key=lambda i: influence[i])
    totals = np.cumsum([costs[i] for i in order[: max(0, len(layers) - 1)]])
    if not len(totals):
        raise InputError("method='shortgpt' removes whole layers, and none may go (protect)")
    count = int(np.argmin(np.abs(totals - given.parameters))) + 1
    gone = tuple(sorted(order[:count]))
    for i in gone:
        check_droppable(layers[i], NEURONS)
        if HEADS.output(layers[i]) is not None:
            check_droppable(layers[i], HEADS)
    blocks = Blocks(gone, tuple(i for i in gone if HEADS.count(layers[i])))
    material.notes.append(f"whole layers go: {totals[count - 1] / given.parameters:.0%} of the parameters asked for")
    widths = tuple(0 if i in gone else w for i, w in enumerate(given.body.widths))
    return blocks, widths, {"influence": np.round(influence, 6).tolist()}


def two_stages(allocator: Allocator, given: BlockBudget) -> tuple[Blocks, tuple[int, ...], dict[str, Any]]:
    """Neurons by the norm of their activity, the same share everywhere; then attentions, one by one, by the loss.

    As many attentions as 2SSP takes (arXiv 2501.17771): ``n s^(m / (1.5 a))``, n layers, s the share of the blocks'
    parameters that goes, m and a the parameters of an MLP and an attention. Each is the one without which the model,
    its neurons cut, predicts best.
    """
    layers = given.body.layers
    candidates = [i for _, i in given.candidates(["attention"])]
    mlp, attention = (np.mean([given.cost(layer, units) for layer in layers]) for units in (NEURONS, HEADS))
    share = given.parameters / sum(p.numel() for layer in layers for p in layer.block.parameters())
    wanted = min(round(len(layers) * share ** (mlp / attention / ALPHA)), len(candidates), len(layers) - 1)
    budget = None
    while budget is None and wanted >= 0:  # as many as leave the neurons something to give
        budget = given.neurons(Blocks((), tuple(candidates[:wanted])))
        wanted -= budget is None
    if budget is None:
        Budget.of(given.body.widths, given.ratio, given.protect, given.multiple_of)  # says why
        raise InputError(f"ratio={given.ratio} cannot be met")
    widths = uniform(budget)
    kept = allocator.scorer.best(widths, NEURONS)
    objective = allocator.objective(held_out=False, tokens=STAGE_TOKENS)
    gone: list[int] = []
    with restored(layers, [NEURONS, HEADS]):
        for layer, stays in zip(layers, kept):
            if len(stays) < layer.width:
                write(layer.down, Change(torch.from_numpy(stays)))
        for _ in range(wanted):
            losses = {}
            for i in candidates:
                if i not in gone:
                    with restored([layers[i]], [HEADS]):
                        _silence(layers[i], HEADS)
                        losses[i] = objective.mean()
            gone.append(min(losses, key=lambda i: losses[i]))
            _silence(layers[gone[-1]], HEADS)
    return Blocks((), tuple(sorted(gone))), widths, {"attentions_in_order": gone}


WHOLE_LAYERS = "influence"
CHOOSERS = {WHOLE_LAYERS: by_influence, "two-stages": two_stages}
"""By what a criterion says of itself (`Criterion.blocks`)."""


def choose_blocks(
    allocator: Allocator, given: BlockBudget, drop: Sequence[str], allocation: str, *, sequential: bool
) -> tuple[dict[Units, tuple[int, ...]], dict[str, Any]]:
    """How many units each layer keeps where some lose their MLP or attention whole, and what a plan records of it."""
    own = allocator.scorer.criterion.blocks
    if own:
        blocks, widths, facts = CHOOSERS[own](allocator, given)
    else:
        blocks, widths, facts = search_blocks(allocator, given, drop, allocation, sequential=sequential)
    counts: dict[Units, tuple[int, ...]] = {HEADS: given.heads(blocks)} if blocks.attention else {}
    counts[NEURONS] = widths
    return counts, {**allocator.facts(allocation, NEURONS), "blocks": {**blocks.record(), **facts}}

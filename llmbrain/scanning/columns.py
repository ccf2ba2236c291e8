"""A model that is spread over ranks (``tp_plan``) is scanned by all of them at once, each hearing its own columns.

All ranks read every batch together; of each shard the parts go to rank 0, which writes it (or, of a scan that is kept
in memory, to all). The columns of a rank are a run of neurons, as many as it has of the down projection's weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmbrain._validation import InputError
from llmbrain.anatomy.families import Anatomy, LayerAnatomy
from llmbrain.anatomy.layers import sizes
from llmbrain.anatomy.spread import is_part, parts_of, spread_over
from llmbrain.distributed import RankError, Ranks
from llmbrain.hooks.listen import Kinds
from llmbrain.hooks.sites import Tap

Key = tuple[str, int]


@dataclass(frozen=True)
class Columns:
    """Which units of every signal each rank hears.

    Attributes
    ----------
    team : Ranks
        All that the model is spread over.
    parts : dict
        By site and layer, units of each rank, one rank's after the other's; signals that every rank hears whole are
        not in it.
    """

    team: Ranks
    parts: Mapping[Key, Sequence[int]]

    @classmethod
    def of(cls, team: Ranks, body: Anatomy, kinds: Kinds) -> tuple[Columns, Kinds]:
        """What each rank hears, told by all of them; and what all signals look like once joined.

        Parameters
        ----------
        team : Ranks
        body : Anatomy
            Of the whole model.
        kinds : dict
            What this rank hears.

        Raises
        ------
        InputError
            If the parts do not make the whole of a layer, in order.
        """
        told = team.gather("scan: columns", {f"{site} {layer}": units for (site, layer), (_, units) in kinds.items()})
        parts: dict[Key, Sequence[int]] = {}
        joined = dict(kinds)
        for (site, index), (dtype, _) in kinds.items():
            heard = [int(one[f"{site} {index}"]) for one in told]
            total, in_order = _whole(body.layers[index], site)
            if all(units == (heard[0] if total is None else total) for units in heard):
                continue
            if heard != in_order:
                raise InputError(
                    f"site={site!r}, layer {index}: the ranks hear {heard} units of {total}, which is not a run of "
                    "them each: this plan of tp_plan cannot be scanned, use device_map='auto' (--device-map auto)"
                )
            parts[site, index] = heard
            joined[site, index] = (dtype, sum(heard))
        return cls(team, parts), joined

    def own(self, key: Key, whole: Tensor) -> Tensor:
        """This rank's columns of a signal ``(tokens, units)`` of all ranks."""
        if key not in self.parts:
            return whole
        before = sum(self.parts[key][: self.team.rank])
        return whole[:, before : before + self.parts[key][self.team.rank]]

    def joined(self, signals: Mapping[Key, Tensor], to: int | None) -> dict[Key, Tensor]:
        """Signals of all columns, on rank `to` (others keep their own part) or on all."""
        found = dict(signals)
        for key, part in signals.items():
            if key not in self.parts:
                continue
            all_of_it = self.team.collect(part, [(len(part), n) for n in self.parts[key]], "scan: columns", to)
            if all_of_it:
                found[key] = torch.cat(all_of_it, dim=1)
        return found

    def agreed(self, call: Callable[[], object]) -> None:
        """Do something that may fail on one rank; if it does, all raise.

        The ranks wait for each other in the model's forward pass, where an error of one is not told.
        """
        failure: Exception | None = None
        try:
            call()
        except Exception as error:
            failure = error
        told = self.team.gather("scan: shard", None if failure is None else " ".join(str(failure).split()))
        if failure is not None:
            raise failure
        for rank, said in enumerate(told):
            if said is not None:
                raise RankError(f"{said} (rank {rank} of {self.team.size})")

    def all(self, fact: bool) -> bool:
        """Whether something holds on every rank."""
        return all(self.team.gather("scan: padding", bool(fact)))


def _whole(layer: LayerAnatomy, site: str) -> tuple[int | None, list[int] | None]:
    """Units of all ranks at a site (None: not known, all hear the same), and of each where they are runs."""
    if site in ("neuron", "gate", "up"):
        return layer.width, parts_of(layer.down.module.weight, layer.down.axis)
    if site == "head" and layer.out is not None:
        entries, size = parts_of(layer.out.module.weight, layer.out.axis), sizes(layer.out.module)[0] // layer.n_heads
        cut = entries is None or any(n % size for n in entries)
        return layer.n_heads, None if cut or entries is None else [n // size for n in entries]
    return (sizes(layer.down.module)[1] if site == "mlp_out" else None), None


def check_spread(model: nn.Module, team: Ranks, mixture: bool) -> None:
    """Refuse a spread model that a scan can not join.

    Raises
    ------
    InputError
        If it is a mixture of experts, or is spread over other ranks than those of the process group.
    """
    size = spread_over(model)
    if size != team.size:
        raise InputError(
            f"the model is spread over {size} ranks, but the process group has {team.size}: load it with tp_plan in a "
            "group of all ranks"
        )
    if mixture:
        raise InputError("a mixture of experts is not scanned over ranks (tp_plan): use device_map='auto'")


def check_taps(taps: Sequence[Tap]) -> None:
    """Refuse a site of a spread model that lies in a projection which is fused with another.

    Raises
    ------
    InputError
        Naming it.
    """
    for tap in taps:
        fused = tap.width is not None and tap.width != sizes(tap.module)[1]
        if fused and is_part(tap.module.weight):
            raise InputError(
                f"site={tap.site!r}, layer {tap.layer}: its projection holds gate and up, and is spread over ranks "
                "(tp_plan): scan this site with device_map='auto' (--device-map auto)"
            )

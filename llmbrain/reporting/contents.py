"""What a report is made of: whatever there is, in one shape, with the reason where something is not there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from llmbrain._validation import InputError
from llmbrain.imaging.atlas import Atlas
from llmbrain.imaging.brain_mask import BrainMask
from llmbrain.page.text import shown_tokens
from llmbrain.reporting.brain import Brain
from llmbrain.reporting.effects import condition_effects, standardized, token_types

ALPHA = 0.05
SAME = 0.5  # |r| of two maps that counts as the same component


@dataclass
class Contents:
    """Everything `build_report` was given; each part may be missing."""

    title: str
    scans: Sequence[Any] | None = None
    ica: Any = None
    networks: Any = None
    plan: Any = None
    dense: Mapping[str, Any] | None = None
    pruned: Mapping[str, Any] | None = None
    abilities: pd.DataFrame | None = None
    lesions: Any = None
    stability: Any = None
    connectivity: Any = None
    comparison: Mapping[str, Any] | None = None
    warnings: Sequence[Any] = ()
    provenance: Any = None
    mask_img: Any = None
    atlas: Atlas | tuple[Any, Sequence[str]] | None = None
    forecast: Any = None
    forgetting: Mapping[str, Any] | None = None
    summary: Mapping[str, Any] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def held_out(self) -> Mapping[str, Any]:
        """Perplexities of text that nothing was fitted to; empty where none were measured."""
        found = (self.summary or {}).get("held_out") or {}
        return found if "dense_perplexity" in found else {}

    @cached_property
    def before_after(self) -> tuple[Mapping[str, Any] | None, Mapping[str, Any] | None]:
        """Numbers of the dense and of the pruned model, those of held-out text first."""
        sides: list[Mapping[str, Any] | None] = []
        for name, side in (("dense", self.dense), ("pruned", self.pruned)):
            beside = {k: self.held_out.get(f"{name}_{k}") for k in ("perplexity", "perplexity_se")}
            first_ones = {f"held_out_{k}": v for k, v in beside.items()} if self.held_out else {}
            sides.append(None if side is None else {**first_ones, **side})
        return sides[0], sides[1]

    # -- networks ------------------------------------------------------------------------------------------------------

    @property
    def n_networks(self) -> int:
        """Number of networks, 0 where there are none."""
        return 0 if self.networks is None else len(self.networks.maps)

    @cached_property
    def names(self) -> list[str]:
        """Name of each network."""
        names = getattr(self.networks, "names", None)
        return [str(name) for name in names] if names is not None else [f"IC{k:02d}" for k in range(self.n_networks)]

    @property
    def space(self) -> Any:
        """Where the neurons lie, or None."""
        return None if self.networks is None else getattr(self.networks, "space", None)

    @cached_property
    def brain(self) -> Brain | None:
        """Where the voxels lie, of maps of a brain: from `mask_img`, the networks or the ICA; None for neurons."""
        known = getattr(self.networks, "brain", None) or getattr(self.ica, "brain_mask_", None)
        mask = known if self.mask_img is None else BrainMask(self.mask_img)
        if not isinstance(mask, BrainMask):
            mask = None  # grayordinates have no grid to look through
        if self.networks is None or self.space is not None or mask is None:
            if self.mask_img is not None or self.atlas is not None:
                raise InputError(
                    "mask_img= and atlas= are for maps of a brain: these networks have a NeuronSpace, or none"
                )
            return None
        n_voxels = np.shape(self.networks.maps)[1]
        if mask.n_voxels != n_voxels:
            raise InputError(f"mask_img has {mask.n_voxels} voxels, the maps have {n_voxels}")
        return Brain.of(mask, self.atlas)

    @property
    def layout(self) -> Any:
        """What the viewer draws: the space of the networks, else that of the scans."""
        if self.networks is not None or not self.scans:
            return self.space
        return self.scans[0].space

    @cached_property
    def profiles(self) -> NDArray[np.int64] | None:
        """Key neurons per layer, ``(n_networks, n_layers)``; None without a space."""
        if self.space is None:
            return None
        layers = [self.space.layer_of[np.flatnonzero(mask)] for mask in self.networks.masks]
        return np.stack([np.bincount(found, minlength=self.space.n_layers) for found in layers])

    # -- time ----------------------------------------------------------------------------------------------------------

    @cached_property
    def courses(self) -> list[NDArray[np.float32]] | None:
        """Time course of each network in each run, in standard deviations over all runs; None where there is none."""
        own = getattr(self.networks, "time_courses", None)
        courses = list(own) if own is not None and len(own) else list(getattr(self.ica, "mixing_", None) or [])
        if not courses or self.n_networks == 0 or any(np.shape(c)[1] != self.n_networks for c in courses):
            return None
        return standardized(courses, self.scans)

    @cached_property
    def runs(self) -> list[Any]:
        """The scans that the time courses belong to; empty where they do not fit each other."""
        scans = list(self.scans or [])
        courses = self.courses
        if courses is None or not scans:
            return []
        if [len(c) for c in courses] != [int(s.n_tokens) for s in scans]:
            self.notes.append(
                f"time courses of {[len(c) for c in courses][:8]} tokens do not fit scans of "
                f"{[int(s.n_tokens) for s in scans][:8]} tokens: shown without their text"
            )
            return []
        return scans

    @cached_property
    def bound(self) -> Any:
        """The networks with the time courses that are shown."""
        from llmbrain.networks import FunctionalNetworks

        return FunctionalNetworks(
            self.networks.maps, self.space, time_courses=self.courses, names=self.names, standardize=False
        )

    @cached_property
    def texts(self) -> list[list[str]]:
        """Shown text of the tokens of each run."""
        return [shown_tokens(scan) for scan in self.runs]

    @cached_property
    def types(self) -> list[list[tuple[str, float, int]]]:
        """Token types that each network answers to most."""
        return token_types(self.courses or [], self.texts, scans=self.runs)

    @cached_property
    def effects(self) -> pd.DataFrame:
        """Condition effects; empty where there are no conditions."""
        if self.courses is None or not self.runs:
            return pd.DataFrame()
        return condition_effects(self.courses, self.runs)

    # -- tables of other rooms -----------------------------------------------------------------------------------------

    @cached_property
    def iq(self) -> NDArray[np.float64] | None:
        """Stability of each network (cluster quality Iq; nan where it has no stable counterpart), or None."""
        values = self.stability
        if not isinstance(values, (list, tuple, np.ndarray)):
            values = first(self.stability, "iq")
        centrotypes = None if isinstance(self.stability, (Mapping, pd.DataFrame)) else first(self.stability, "maps")
        if values is None or self.n_networks == 0:
            return None
        values = np.asarray(values, dtype=float)
        if centrotypes is not None and np.shape(centrotypes)[1:] == np.shape(self.networks.maps)[1:]:
            return _matched(values, np.asarray(centrotypes), np.asarray(self.networks.maps))
        return values if values.shape == (self.n_networks,) else None

    @cached_property
    def lesion_rows(self) -> pd.DataFrame | None:
        """Lesion table in long form; see `llmbrain.plotting.long_lesions`."""
        if self.lesions is None:
            return None
        from llmbrain.plotting import long_lesions

        return long_lesions(self.lesions, self.names)


def _matched(iq: NDArray[np.float64], centrotypes: NDArray[Any], maps: NDArray[Any]) -> NDArray[np.float64]:
    """Iq in the order of the networks: `ica_stability` sorts its clusters, so each is matched by its map."""
    from llmbrain.stats.matching import match_maps

    index, r = match_maps(centrotypes, maps)
    return np.where((index >= 0) & (np.abs(r) > SAME), iq[index], np.nan)


def first(source: Any, *names: str) -> Any:
    """The first of these entries, columns or attributes that `source` has, else None."""
    for name in names:
        if isinstance(source, (Mapping, pd.DataFrame)):
            if name in source:
                return source[name]
        elif getattr(source, name, None) is not None:
            return getattr(source, name)
    return None

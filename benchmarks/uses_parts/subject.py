"""The models that uses are tried on, with their texts, scans and networks, each made once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

import llmbrain as lb
from llmbrain.datasets import CONTRASTS, contrast_texts, load_demo
from llmbrain.hooks.text import as_windows
from llmbrain.stats.nulls import phase_randomize

SMOLLM2 = "models/smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf"


class Subject:
    """A model with labelled text to calibrate on and labelled held-out text.

    Parameters
    ----------
    name : {"demo", "stories260K", "smollm2"}
    data : Path
        The folder with the models and corpora that do not come with the package.
    draw : int
        Another draw takes other text.
    device : str
        Where the model lies.
    """

    def __init__(self, name: str, data: Path, draw: int = 0, device: str = "cpu") -> None:
        self.name, self.data, self.draw, self.device = name, data, draw, device
        self.demo = load_demo() if name == "demo" else None
        if self.demo is not None:
            self.model, self.tokenizer = self.demo.model, self.demo.tokenizer
            self.n_components, self.threshold = 32, 3.0
        else:
            self.model, self.tokenizer = lb.load_model(data / (SMOLLM2 if name == "smollm2" else f"models/{name}"))
            self.n_components, self.threshold = 32, 3.6
        self.model = self.model.to(device)
        if self.demo is not None:
            self.demo.model = self.model

    def _mixed(self, n: int, n_tokens: int, seed: int, *, held_out: bool) -> list[lb.Stimulus]:
        """Texts of every kind, each one condition."""
        if self.demo is not None:
            return self.demo.texts("heldout" if held_out else "calibration", n=n, n_tokens=256, seed=seed)
        names = ("wiki", "stories", "plays")
        kinds = {name: self._pieces(name, n_tokens, n, held_out=held_out, seed=seed) for name in names}
        texts = [lb.Stimulus.from_segments([(t, kind)], self.tokenizer, f"{kind}-{i}")
                 for kind, of in kinds.items() for i, t in enumerate(of)]  # fmt: skip
        if self.name == "smollm2":
            for contrast in CONTRASTS:
                texts += contrast_texts(contrast, self.tokenizer, n=max(1, n // 2), blocks=1, items=6,
                                        seed=2 * seed + held_out)  # fmt: skip
        return texts

    def _pieces(self, kind: str, n_tokens: int, n: int, *, held_out: bool, seed: int) -> list[str]:
        text = self.corpus(kind, held_out=held_out)
        size = 4 * n_tokens if self.name == "smollm2" else 2 * n_tokens
        starts = np.random.default_rng([seed, held_out]).integers(0, len(text) - 2 * size, n)
        return [text[int(s) : int(s) + size].split(" ", 1)[1] for s in starts]

    def corpus(self, kind: str, *, held_out: bool) -> str:
        """One of the corpora; held-out text comes from another part or file."""
        folder = self.data / "corpora"
        if kind == "wiki":
            from real_parts.bench import wikitext

            return wikitext(folder / f"wikitext2-{'test' if held_out else 'valid'}.tokens")
        if kind == "stories":
            stories = json.loads((folder / "tinystories-1000.json").read_text(encoding="utf-8"))
            return "\n".join(stories[700:] if held_out else stories[:500])
        plays = (folder / "tinyshakespeare.txt").read_text(encoding="utf-8")
        return plays[len(plays) // 2 :] if held_out else plays[: len(plays) // 2]

    @cached_property
    def scans(self) -> list[lb.Scan]:
        """Of the calibration text."""
        n, length = (32, 256) if self.demo is not None else (12, 256) if self.name == "stories260K" else (6, 256)
        return lb.scan(self.model, self.tokenizer, self._mixed(n, length, self.draw, held_out=False))

    @cached_property
    def tests(self) -> list[lb.Scan]:
        """Of the held-out text."""
        n, length = (16, 256) if self.demo is not None else (6, 200) if self.name == "stories260K" else (2, 160)
        return lb.scan(self.model, self.tokenizer, self._mixed(n, length, 1000 + self.draw, held_out=True))

    @cached_property
    def networks(self) -> lb.FunctionalNetworks:
        """Group ICA of the calibration scans."""
        return self.networks_of("fastica")

    @cached_property
    def null(self) -> lb.FunctionalNetworks:
        """The same of their phase-randomized signals."""
        rng = np.random.default_rng(self.draw)
        return self._found("fastica", [phase_randomize(s.data(), rng, shared=False) for s in self.scans])

    def networks_of(self, method: str) -> lb.FunctionalNetworks:
        """Networks by another decomposition."""
        return self._found(method, self.scans)

    def _found(self, method: str, runs: Sequence[Any]) -> lb.FunctionalNetworks:
        ica = lb.GroupICA(self.n_components, method=method, random_state=0, max_iter=500).fit(runs)
        return lb.FunctionalNetworks(ica.components_, self.scans[0].space, threshold=self.threshold)

    def windows(self, text: str, n: int, window: int = 256) -> torch.Tensor:
        """Windows of a text."""
        return as_windows(self.model, self.tokenizer, [text], window, n)

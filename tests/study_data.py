"""A small study with tokens and names that want to break a page."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd

from llmbrain.anatomy.space import NeuronSpace
from llmbrain.networks import FunctionalNetworks
from llmbrain.reporting.effects import labels_of
from llmbrain.scanning import Scan

NASTY = '</script><img src=x onerror="alert(1)">&<!--\u2028\x00\x1b\u202e\ud800'
SPACE = NeuronSpace([30, 20, 30])
KINDS = ("sort", "reverse")


def make_study(n_tokens: int = 120, n_networks: int = 3) -> dict[str, Any]:
    """Two runs of two conditions; network 0 is driven by "sort"; tokens and names that want to break the page."""
    rng = np.random.default_rng(0)
    maps = rng.standard_normal((n_networks, SPACE.n_neurons)).astype(np.float32)
    for k in range(n_networks):
        maps[k, SPACE.index(k % 3, np.arange(4))] += 9
    scans, courses = [], []
    for run in range(2):
        onsets = np.arange(0, n_tokens, 20)
        events = pd.DataFrame(
            {"onset": onsets, "duration": 20, "trial_type": [KINDS[i % 2] for i in range(len(onsets))]}
        )
        tokens = [f" word{i % 7}" for i in range(n_tokens)]
        tokens[5] = NASTY
        data = rng.standard_normal((n_tokens, SPACE.n_neurons)).astype(np.float32)
        scans.append(Scan.from_array(data, SPACE, tokens=tokens, events=events, name=f"<b>run {run}</b>",
                                     model_id="some/<model>"))  # fmt: skip
        course = rng.standard_normal((n_tokens, n_networks))
        course[:, 0] += 2.0 * (labels_of(scans[-1]) == "sort")
        course[n_tokens // 2, 1] = 12.0
        courses.append(course)
    names = ["IC00", "<i>IC01</i>", *[f"IC{k:02d}" for k in range(2, n_networks)]]
    return {"scans": scans, "networks": FunctionalNetworks(maps, SPACE, time_courses=courses, names=names)}


def make_everything() -> dict[str, Any]:
    study = make_study()
    lesions = pd.DataFrame(
        {"network": ["IC00", "IC02"], "evaluation": KINDS, "effect": [0.7321, 0.01], "random_effect": [0.012, 0.011],
         "p_random": [0.01, 0.8], "q_random": [0.02, 0.8], "effect_low": [0.5, 0.0], "effect_high": [0.9, 0.02]}
    )  # fmt: skip
    kept = [range(10), range(20), range(15)]
    plan = SimpleNamespace(kept=kept, widths_before=[30, 20, 30], method="flap", ratio=0.4375,
                           compensate="bias")  # fmt: skip
    numbers = {"perplexity": 4.6457, "parameters": 260032, "mlp_neurons": 80, "tokens_per_second": 1000.0}
    return study | {
        "plan": plan, "dense": numbers, "pruned": numbers | {"perplexity": 6.5, "mlp_neurons": 45},
        "abilities": pd.DataFrame({"dense": [0.98, 0.97], "pruned": [0.9, 0.111]}, index=list(KINDS)),
        "lesions": lesions, "stability": [0.91, 0.52, 0.77], "connectivity": np.corrcoef(study["networks"].maps),
        "comparison": {"fingerprint": pd.DataFrame({"score": [0.5]}), "note": "3 < 4"},
        "warnings": [f"careful: {NASTY}"], "provenance": {"command": "llmbrain run", "versions": {"torch": "2"}},
        "ica": SimpleNamespace(n_iter_=12, converged_=True, get_params=lambda: {"fun": "logcosh", "random_state": 3}),
    }  # fmt: skip

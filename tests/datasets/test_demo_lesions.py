"""The demo brain as a known answer: its networks dissociate doubly. Margins are far below what was measured."""

from __future__ import annotations

import numpy as np
import pytest

import llmbrain as lb
from llmbrain.datasets import load_demo
from llmbrain.intervention import TokenEvaluation, lesion_table


def evaluations(demo, seed, n):
    made = {}
    for ability in demo.abilities:
        lines = demo.examples("heldout", ability, n=n, seed=seed)
        answers = [f"{line.answer}\n" for line in lines]
        made[ability] = TokenEvaluation.from_answers(demo.tokenizer, [x.prompt for x in lines], answers, score="loss")
    return made


@pytest.mark.slow
def test_networks_of_two_percent_dissociate_abilities_doubly():
    demo = load_demo()
    scans = lb.scan(demo.model, demo.tokenizer, demo.texts("calibration", n=48, seed=11))
    ica = lb.GroupICA(32, random_state=11, max_iter=1000).fit(scans)
    networks = lb.FunctionalNetworks.from_ica(ica, threshold=3.0)
    assert 0.01 < networks.sizes.mean() / networks.n_neurons < 0.03
    chosen_on = lesion_table(demo.model, networks, evaluations(demo, 1, 24), n_random=0, n_matched=0, progress=False)
    effect = chosen_on.matrix("effect")
    selective = {a: (effect[a] - effect.drop(columns=a).max(axis=1)).idxmax() for a in demo.abilities}
    best = sorted(selective, key=lambda a: effect.loc[selective[a], a], reverse=True)[:3]
    assert len({selective[a] for a in best}) == 3
    table = lesion_table(
        demo.model,
        {a: networks[selective[a]] for a in best},
        evaluations(demo, 2, 40),  # lines that the choice has not seen
        n_random=20,
        n_matched=0,
        progress=False,
    )
    fresh = table.matrix("effect")
    largest_random = table.draws.groupby(["network", "evaluation"])["effect"].max()
    for a in best:
        assert fresh.loc[a, a] > 0.25
        assert fresh.loc[a, a] > largest_random[a, a] + 0.1
        for b in best:
            if a != b:
                assert fresh.loc[b, a] < fresh.loc[a, a] / 4
    assert len(table.double_dissociations(corrected=False)) >= 3
    assert np.isfinite(fresh.to_numpy()).all()

"""
Keep or forget an ability
=========================

Can one cut an ability out of a model, or cut everything else? Networks and a localizer say which neurons to try;
controls say whether they were needed for it. Two questions on the demo brain: forgetting to balance brackets, and
keeping two abilities in a model with far fewer neurons.
"""

# %%
# Candidates
# ----------
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd

import llmbrain as lb
from llmbrain.datasets import load_demo
from llmbrain.intervention.controls import random_masks
from llmbrain.networks import localizer

brain = load_demo()
texts = brain.texts("calibration", n=32, n_tokens=256)
scans = lb.scan(brain.model, brain.tokenizer, texts)
networks = lb.FunctionalNetworks.from_ica(lb.GroupICA(n_components=16, random_state=0).fit(scans), threshold=3.0)

# %%
# Which network responds to brackets? The choice uses responses to the calibration text, and no lesion.
responses = localizer(scans, ["brackets"], networks=networks, n_permutations=0)
target = networks[int(np.abs(responses.t[0]).argmax())]
print(f"{target.name}: t = {responses.t[0, target.index]:.0f}, {target.size} neurons of {networks.n_neurons}")

# %%
# Forget
# ------
# Accuracy per ability without these neurons, beside two controls of the same size: random neurons of the same layers,
# and the neurons with the largest contrast of activation (no ICA at all), which is the control that networks have to
# beat.
contrast = np.abs(localizer(scans, ["brackets"], n_permutations=0).t[0])
loudest = np.zeros(networks.n_neurons, dtype=bool)
loudest[np.argsort(-contrast)[: target.size]] = True
draws = random_masks(target.mask, networks.space, 3, np.random.default_rng(0))


def accuracy(mask: np.ndarray) -> dict[str, float]:
    """Share of exact answers per ability without the neurons of `mask`."""
    with lb.lesion(brain.model, mask):
        return brain.ability_accuracy(n=50)


table = pd.DataFrame({
    "intact": brain.ability_accuracy(n=50),
    "network": accuracy(target.mask),
    "activation contrast": accuracy(loudest),
    "random (mean of 3)": pd.DataFrame([accuracy(mask) for mask in draws]).mean(),
})  # fmt: skip
table.round(2)

# %%
# For good: ``forget=`` silences neurons in rounds, those first that matter to brackets and to nothing else, until
# brackets are not predicted any more; there is no ratio to choose. The repair makes the model answer as before on text
# of the others, and no more on text of brackets. Then it is saved and loaded as any pruned model.
plan = lb.plan_pruning(brain.model, networks, scans, method="obs", forget=["brackets"])
print(plan.summary())
forgetful = lb.prune(brain.model, plan, calibration=scans, compensate="least-squares")
with TemporaryDirectory() as folder:
    lb.save_pruned(forgetful, brain.tokenizer, Path(folder) / "forgetful")
    again, _ = lb.load_pruned(Path(folder) / "forgetful")
pd.Series(brain.ability_accuracy(again, n=50), name="accuracy after forgetting brackets").round(2)

# %%
# Keep
# ----
# The other way round: remove most neurons and keep two abilities. With ``keep=`` the tokens of other conditions hardly
# count. Controls: the same criterion calibrated on text of the kept abilities alone, on all text, and random neurons
# with the same repair.
keep = ["reversal", "sorting"]
kept_texts = brain.texts("calibration", keep, n=32, n_tokens=256)
columns = {"intact": table["intact"]}
cut = lb.plan_pruning(brain.model, networks, scans, ratio=0.6, method="obs", keep=keep)
small = lb.prune(brain.model, cut, calibration=scans, compensate="least-squares")
columns["keep="] = pd.Series(brain.ability_accuracy(small, n=50))
for name, method, calibration in (
    ("kept text", "obs", kept_texts),
    ("all text", "obs", texts),
    ("random, kept text", "random", kept_texts),
):
    cut = lb.plan_pruning(brain.model, ratio=0.6, method=method, tokenizer=brain.tokenizer, calibration=calibration)
    small = lb.prune(brain.model, cut, tokenizer=brain.tokenizer, calibration=calibration, compensate="least-squares")
    columns[name] = pd.Series(brain.ability_accuracy(small, n=50))
kept = pd.DataFrame(columns)
kept.insert(0, "kept", kept.index.isin(keep))
kept.round(2)

# %%
# What to conclude
# ----------------
# From the first table: which lesion takes the ability, and what each costs the other seven. From the second: what a
# model of 40 % of the neurons still does, and how much of that is due to the choice of neurons rather than to the
# repair.
#
# What not to conclude
# --------------------
# * That an ability is gone because answers are wrong: a little training, or another way of asking, may bring it back.
#   Forgetting by cutting is no guarantee of safety or privacy.
# * That it works like this in a large model, whose abilities share more.
# * One network of one decomposition is one candidate: repeat it at other model orders and thresholds.

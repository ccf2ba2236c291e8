"""
fMRI analysis for LLM engineers
===============================

You know transformers and tensors, and have never seen a brain scan. Neuroimaging has spent thirty years on a problem
that you have too: thousands of correlated signals, few independent samples, and patterns everywhere. This page shows
its three habits (decompose over units, go back to single runs, distrust smooth time courses) on data with known truth.
"""

# %%
# The words
# ---------
# ==================  =====================================================================
# voxel               one unit: for us, a hidden neuron of an MLP (input of ``down_proj``)
# volume, TR          all units at one time: for us, at one token
# run                 one recording from start to end: one text
# component map       a weight for every unit: *where* a network lies
# time course         a value for every token: *when* it is active
# ==================  =====================================================================
#
# A *phantom* is an object with known content that one puts into the scanner to test it. Ours is a set of runs made from
# six sources, each a sparse map over 1,200 neurons in six layers times a time course, plus noise.
import numpy as np
import pandas as pd
from scipy import stats

import llmbrain as lb
from llmbrain.comparison import couple
from llmbrain.datasets import make_phantom
from llmbrain.plotting import plot_glass_model

phantom = make_phantom(6, n_neurons=1200, n_layers=6, n_runs=6, n_tokens=300, cnr=1.0, random_state=0)
print(len(phantom.scans), "runs of", phantom.scans[0].n_tokens, "tokens x", phantom.scans[0].n_neurons, "neurons")

# %%
# Habit 1: decompose
# ------------------
# A run is a matrix ``X`` of tokens by neurons. Group ICA writes ``X = A S + noise`` with few rows in ``S`` (the maps),
# chosen to be as independent over neurons as can be. It is PCA with a rotation that makes maps sparse; unlike a sparse
# autoencoder it needs no training run, and unlike PCA its axes are not an accident of variance.
ica = lb.GroupICA(n_components=6, random_state=0).fit(phantom.scans)
print("converged:", ica.converged_)
score = phantom.score(ica.components_, ica.mixing_)
print("|r| of each true map with its estimate:", np.round(score["map_r"], 3))

# %%
# A network is where the map stands out: ``|z| > 3.6`` over neurons. The picture shows each network from the side, input
# on the left, a dot for each key neuron.
networks = lb.FunctionalNetworks.from_ica(ica)
glass = plot_glass_model(networks)

# %%
networks.key_neurons(0).head()

# %%
# Habit 2: go back to single runs
# -------------------------------
# Runs differ. Dual regression finds each run's own version of a group network by two regressions: data on maps gives
# time courses, data on time courses gives the run's maps. The phantom's sources move and change strength between runs,
# so we can check that the answer is the run's own map rather than a copy of the group's.
dual = lb.dual_regression(networks, phantom.scans)
own = phantom.score(ica.components_, run_maps=dual.maps)
print(f"run maps against the run's own truth: r = {own['run_map_r_own']:.3f}; against the group's: "
      f"{own['run_map_r_group']:.3f}")  # fmt: skip

# %%
# Habit 3: distrust smooth time courses
# -------------------------------------
# Two slow series correlate by chance, and the textbook p-value does not know it, because it counts every sample as new
# evidence. Here are pairs of unrelated series with the smoothness of an activation that changes slowly over a text. The
# textbook test against a test that moves one series round the circle (which keeps the smoothness of both):
rng = np.random.default_rng(0)


def smooth_noise(n: int, ar: float = 0.9) -> np.ndarray:
    """A series in which each value is `ar` times the one before, plus noise."""
    series = rng.normal(size=n)
    for t in range(1, n):
        series[t] = ar * series[t - 1] + np.sqrt(1 - ar**2) * series[t]
    return series


false = {"textbook": 0, "circular shift": 0}
n_pairs = 200
for _ in range(n_pairs):
    a, b = smooth_noise(200), smooth_noise(200)
    false["textbook"] += stats.pearsonr(a, b).pvalue < 0.05
    false["circular shift"] += couple(a[:, None], b[:, None], lags=[0]).p[0, 0] < 0.05
pd.Series(false, name="share of false alarms at p < .05") / n_pairs

# %%
# Activations of a language model are such series: a topic, a language or an open bracket lasts for many tokens.
#
# What to conclude
# ----------------
# Networks are a middle level between single neurons and whole layers, found without labels; the same tools tell you in
# which run and when each was active, and every claim can be tested against a null that keeps what is uninteresting.
#
# What not to conclude
# --------------------
# * That ICA finds "the" networks: the number of components is a choice (see the tutorial on stability and model order).
# * That a phantom's clean recovery carries over to a model: there, nobody knows the truth. Stability and lesions are
#   what is left.
# * That a token-by-token p-value from a regression means what it says.

"""
Compare a model with fMRI
=========================

People hear a story in the scanner; a model reads the same words. Do its networks follow the time courses of brain
regions, beyond what the mere rate of words explains? The steps are always the same: tokens to words, words to volumes
through the haemodynamic response, the same filter on both sides, then a test that knows that both series are smooth.

This page runs on a phantom where the answer is known. With real data (below) the same functions are called.
"""

# %%
# A phantom with a known answer
# -----------------------------
# Eight model networks and six brain regions of ten listeners; the first three regions follow networks 0 to 2 through
# the haemodynamic response, with alternating sign, and the other three follow nothing.
import os
import warnings
from pathlib import Path

import numpy as np
from scipy import stats

from llmbrain.brains import align, load_fmri, load_words, prepare, word_regressor
from llmbrain.comparison import compare, couple, noise_ceilings
from llmbrain.comparison.coupling import group_mean
from llmbrain.datasets.fmri_phantom import make_paired_phantom
from llmbrain.plotting import plot_coupling, plot_lag_profile

phantom = make_paired_phantom(n_networks=8, n_regions=6, n_pairs=3, snr=0.7, n_subjects=10, n_volumes=300,
                              random_state=1)  # fmt: skip
print("planted (network, region, sign):", phantom.pairs)
print("words:", len(phantom.words), "  fMRI (subjects, volumes, regions):", phantom.fmri.data.shape)

# %%
# Time
# ----
# ``align`` finds each word of the transcript in the model's text, takes the mean of its tokens, puts that at the word's
# offset, convolves with SPM's response and samples at the volumes. Whatever filter the brain gets, the model gets too.
tr, high_pass = phantom.tr, 128.0
aligned = align(phantom.scan, phantom.words, tr, phantom.fmri.n_volumes, series=phantom.time_courses, hrf="spm",
                high_pass=high_pass)  # fmt: skip
brain = prepare(phantom.fmri.data, tr, high_pass=high_pass)
print(aligned.report)

# %%
# Coupling
# --------
# All pairs at once. The null moves all networks round the circle together, and each draw counts with its largest
# ``|r|`` of all pairs: family-wise error control for smooth series. The word rate goes out first, as nuisance.
rate = word_regressor(phantom.words, tr, phantom.fmri.n_volumes, high_pass=high_pass)
result = couple(aligned.data, brain, nuisance=rate)
print(f"|r| needed: {result.threshold:.2f} ({result.n_permutations} draws)")
result.to_frame().head(6).round(3)

# %%
matrix = plot_coupling(result.r, significant=result.significant, rows=result.networks, columns=result.regions)

# %%
# The lag at which a pair couples best should be zero if the times are right:
network, region, _ = phantom.pairs[0]
lags = plot_lag_profile(result.lags, result.lag_r[:, network, region], threshold=result.threshold, tr=tr)

# %%
# The control: what the textbook would have said of the pairs in which nothing was planted.
planted = {(n, r) for n, r, _ in phantom.pairs}
mean = group_mean(brain)
others = [(n, r) for n in range(8) for r in range(6) if (n, r) not in planted]
textbook = np.mean([stats.pearsonr(aligned.data[:, n], mean[:, r]).pvalue < 0.05 for n, r in others])
ours = np.mean([result.p[n, r] < 0.05 for n, r in others])
print(f"false alarms at p < .05 per pair: textbook {textbook:.0%}, circular shift {ours:.0%}")

# %%
# The ceiling
# -----------
# How well could any model do? A correlation of listeners with each other bounds it.
noise_ceilings(phantom.fmri.data).round(2)

# %%
# All of it at once
# -----------------
# ``compare`` goes these steps from files to tables: controls (word rate, position in the context, log frequency where
# the word table has it, and whatever series you give), the story mirrored in time, coupling, ceilings, similarity and,
# with himalaya installed, encoding models. The same as a command, with figures and a report:
#
# .. code-block:: bash
#
#    llmbrain compare MODEL --fmri FOLDER --words words.tsv --tr 2 --offset 20 --out out
#
# FOLDER holds one file a listener (NIfTI, or tables of regions in either orientation), ``words.tsv`` may be CSV, BIDS
# events or a TextGrid, and ``--untrained`` adds a copy of the model with random weights as a control.
whole = compare(phantom.scan, phantom.fmri, phantom.words, tr=tr, series=phantom.time_courses, encoding=False)
print(*whole.findings(), sep="\n")
print("to know before believing it:", *whole.report["cautions"], sep="\n  ")

# %%
# Real listeners
# --------------
# Chapter 1 of Alice in Wonderland (Brennan et al. 2016, Brain & Language 157-158): six language regions, timed words.
# Where the files are there, the known answer: the word rate itself couples with all six regions, and word times in
# reverse with none. A model's networks come in as above, through ``align``.
data = Path(os.environ.get("LLMBRAIN_TEST_DATA", "no-data"))
alice = data / "fmri" / "alice"
if alice.is_dir():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # one listener without signal, a few words without times
        fmri = load_fmri(alice / "alice_data_shared/10mm", regions=["LATL", "RATL", "LPTL", "LIPL", "LPreM", "LIFG"])
        words = load_words(alice / "ds002322_annotations.tsv").dropna(subset=["onset"]).reset_index(drop=True)
    people = prepare(fmri.data, 2.0)
    end = words["offset"].max() + words["onset"].min()
    backwards = words.assign(onset=end - words["offset"], offset=end - words["offset"]).sort_values("onset")
    for name, table in {"words": words, "words in reverse": backwards}.items():
        series = prepare(word_regressor(table, 2.0, fmri.n_volumes, offset=20.0), 2.0)
        found = couple(series, people, regions=fmri.regions)
        print(f"{name}: {int(found.significant.sum())} of 6 regions beyond |r| = {found.threshold:.2f}")
else:
    print("no fMRI data here: set LLMBRAIN_TEST_DATA to a folder with fmri/alice")

# %%
# What to conclude
# ----------------
# A pair that passes: this network and this region share more than two smooth series do, after word rate is taken out.
#
# What not to conclude
# --------------------
# * That the model does what the region does. Anything that both follow will do: loudness, sentence ends, frequency. Put
#   it into ``nuisance=``, and compare with an untrained copy of the model.
# * Subject p-values (``p_subjects``) say that other listeners would show it *for this story*; only ``p`` is about
#   chance.
# * A wrong time of the first volume destroys everything quietly. Look at the lag profile of the word rate first.

"""
A language model for neuroscientists
====================================

You know voxels, runs and TRs, and have never seen the inside of a transformer. This page puts one into your scanner.
The subject is the demo brain: a Llama of four layers that ships with llmbrain and was trained on eight small abilities,
so that we know what it can do.
"""

# %%
# The subject
# -----------
# A language model reads *tokens* (pieces of text; here single characters) and gives, at each, a probability for every
# possible next token. It has no time of its own: reading one token is one step, and we call that step a volume, or TR.
import numpy as np

import llmbrain as lb
from llmbrain.datasets import load_demo
from llmbrain.plotting import plot_carpet, plot_time_courses

brain = load_demo()
print(brain.abilities)
print(brain.texts("heldout", n=1, n_tokens=128)[0])

# %%
# Every line is a task and, at its end, the only right answer. Behaviour first, as always: how often does the model give
# exactly that answer to lines that it never saw?
brain.scores(n=50)

# %%
# The anatomy
# -----------
# A model is a stack of *layers*. Each has two parts. *Attention* fetches information from earlier tokens: it is the
# only route from one time to another. The *MLP* works at one token: it computes some hundred *neurons* from what it is
# given, each a number, and adds their weighted sum to the stream that goes on to the next layer. Those neurons are our
# voxels.
from llmbrain.anatomy.families import anatomy

parts = anatomy(brain.model)
print(parts.family, parts.widths)
space = lb.NeuronSpace(parts.widths)
print(space, "laid out as a volume of", space.shape)

# %%
# The grid is only a way to store neurons in an image: column and row of a neuron carry no meaning, because a model's
# neurons can change places within a layer without any change in what it does. Layers are real: they come one after the
# other. So slices lie along z, one a layer, and nothing may ever be smoothed or clustered within a slice.
#
# The scan
# --------
# A run is one text, read from start to end. What we record is every MLP neuron at every token: a 4D image without noise
# of the scanner. Read it twice and it is the same to the last bit.
texts = brain.texts("calibration", n=4, n_tokens=256, seed=1)
scans = lb.scan(brain.model, brain.tokenizer, texts)
run = scans[0]
print(f"{len(scans)} runs; the first has {run.n_tokens} volumes of {run.n_neurons} voxels")
run.events.head()

# %%
# Events are as in a BIDS ``events.tsv``, but onset and duration count tokens: there are no seconds here.
# A carpet plot, as for motion and other artefacts, shows all neurons over 80 tokens, under the text that was read:
carpet = plot_carpet(run, tokens=slice(0, 80))

# %%
# The first column is this field's motion artefact: models use the first token of a text (``<s>``) as a resting place
# for attention (an *attention sink*), and it can be far louder than all others; in large models by a factor of
# thousands (*massive activations*, arXiv 2402.17762). It says nothing about the text, so ``GroupICA``,
# ``dual_regression`` and ``localizer`` leave it out unless told otherwise. In this small model:
data = run.data()
size = np.sqrt((data**2).mean(axis=1))
print(f"root mean square over neurons: first token {size[0]:.2f}, median of the others {np.median(size[1:]):.2f}")

# %%
# One voxel
# ---------
# Take the neuron that differs most between reversing a word and everything else, and look at its course over the text.
# It was chosen by looking, so this is an illustration and no test; :ref:`the localizer tutorial
# <sphx_glr_auto_examples_plot_05_localizer.py>` does it properly.
reversal = np.zeros(run.n_tokens, dtype=bool)
for event in run.events.itertuples():
    if event.trial_type == "reversal":
        reversal[int(event.onset) : int(event.onset + event.duration)] = True
contrast = (data[reversal].mean(axis=0) - data[~reversal].mean(axis=0)) / data[1:].std(axis=0).clip(1e-6)
voxel = int(np.abs(contrast).argmax())
layer, neuron = space.locate(voxel)
start = int(run.events.query("trial_type == 'reversal'")["onset"].iloc[0])
course = plot_time_courses(
    data[:, [voxel]], tokens=run.tokens, names=[f"layer {layer}, neuron {neuron}"],
    span=slice(max(start - 20, 1), start + 40),
)  # fmt: skip

# %%
# What to conclude
# ----------------
# A model can be treated as a subject with perfect access: every unit, no noise, any number of repetitions, and lesions
# that can be undone. What is between runs is the text alone.
#
# What not to conclude
# --------------------
# * A neuron here is not a biological neuron, and the volume is not a brain. Distances inside a slice mean nothing.
# * Tokens are not seconds. There is no haemodynamic response; successive tokens are correlated all the same, so that
#   tests which assume independent volumes are wrong here too.
# * That a neuron is active *during* a task does not say that the model *needs* it. That takes a lesion.

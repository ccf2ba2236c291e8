"""
A functional localizer for a language model
===========================================

Where in the model are the neurons that respond to one task? In a brain one contrasts conditions in a block design,
takes the significant voxels, and tests the region on *other* runs. The same here, with the demo brain and its eight
tasks.
"""

# %%
# The experiment
# --------------
# A block design: eight lines of one task, then eight of another. Events count tokens.
import pandas as pd

import llmbrain as lb
from llmbrain.datasets import load_demo
from llmbrain.networks import localizer
from llmbrain.plotting import plot_glass_model, plot_layer_profile

brain = load_demo()
blocks = brain.texts("calibration", n=6, n_tokens=1024, design="block", block_lines=3, seed=2)
scans = lb.scan(brain.model, brain.tokenizer, blocks, block_size=256)
scans[0].events.head()

# %%
# (The texts are longer than the model's context of 256 tokens, so they are read in blocks, and a warning says so.)
#
# The contrasts
# -------------
# A name means that condition against the mean of all others. The design has a polynomial drift per run and a column for
# the first token of every context block. p-values come from moving the conditions round the circle against the runs:
# the largest ``|t|`` over all neurons in each draw gives family-wise error control.
#
# Shifts are honest about smooth activity, and costly in power when runs are few; with as few draws as here (to be
# quick) the smallest possible p is 1/40.
result = localizer(scans, n_permutations=39, random_state=0)
regions = result.to_networks(alpha=0.05)
summary = pd.DataFrame({"neurons": regions.sizes, "t needed": result.threshold(0.05)}, index=result.contrasts)
summary.round(2)

# %%
# Where they lie: in which layers, and neuron by neuron.
profile = plot_layer_profile(regions)

# %%
glass = plot_glass_model(regions, max_neurons=150)

# %%
# Test on other runs
# ------------------
# The region was chosen for its response in these runs, so its response there is inflated. In new runs of held-out
# lines: the mean response (SD of each neuron) of each region to each task.
new = lb.scan(brain.model, brain.tokenizer, brain.texts("heldout", n=4, n_tokens=256, seed=3))
response = pd.DataFrame(0.0, index=regions.names, columns=list(brain.abilities))
tokens = pd.Series(0, index=response.columns)
for run in new:
    data = run.data()
    data = (data - data[1:].mean(axis=0)) / data[1:].std(axis=0).clip(1e-6)
    for event in run.events.itertuples():
        span = slice(int(event.onset), int(event.onset + event.duration))
        response[event.trial_type] += [data[span][:, mask].mean(axis=1).sum() if mask.any() else 0 for mask in
                                       regions.masks]  # fmt: skip
        tokens[event.trial_type] += span.stop - span.start
response = response / tokens
response.round(2)

# %%
# Rows are regions, columns tasks. A region that is selective has its own task as the largest of its row:
selective = [row == response.loc[row].idxmax() for row in response.index]
print(f"{sum(selective)} of {len(selective)} regions respond most to their own task in new runs")

# %%
# What to conclude
# ----------------
# Which neurons respond to which task more than to the others, at a stated error rate, and whether they do so again.
#
# What not to conclude
# --------------------
# * Respond does not mean "needed for": see the tutorial on lesions.
# * A contrast against other tasks says nothing about what these have in common, and everything that differs between the
#   texts (letters, line length, punctuation) counts as task. A localizer is as good as its control condition.
# * The size of a region follows from the number of draws and tokens: it is no property of the model.

"""
Group ICA, dual regression, stability and model order
=====================================================

Any ICA gives as many components as you ask for. Which of them are there, and how many should one ask for? This page
decomposes the demo brain, and then tries to make the result fall apart.
"""

# %%
# Scan and decompose
# ------------------
import llmbrain as lb
from llmbrain.datasets import load_demo
from llmbrain.decomposition import model_order_sweep, split_half_reproducibility
from llmbrain.networks import describe
from llmbrain.plotting import plot_layer_profile, plot_model_order, plot_stability

brain = load_demo()
scans = lb.scan(brain.model, brain.tokenizer, brain.texts("calibration", n=12, n_tokens=256))
ica = lb.GroupICA(n_components=16, random_state=0).fit(scans)
print(f"{ica.n_components_} components in {ica.n_iter_} steps, converged: {ica.converged_}; together they explain "
      f"{ica.joint_explained_variance_ratio_:.1%} of the variance")  # fmt: skip

# %%
# ``mixing_`` holds a time course of every component in every run. ``describe`` says in words where and when each
# network is active; what it *does* is for the lesion tutorial.
networks = lb.FunctionalNetworks.from_ica(ica)
describe(networks, scans, n_tokens=3).head(8)

# %%
profile = plot_layer_profile(networks)

# %%
# Dual regression
# ---------------
# Each run's own time courses and maps. The z-maps are a scale for comparing neurons, not a test: tokens are correlated.
dual = lb.dual_regression(networks, scans, standardize=True)
print(len(dual.time_courses), "runs;", dual.maps.shape, "= runs x networks x neurons")

# %%
# Stability: does it depend on the start or the sample?
# -----------------------------------------------------
# ICASSO repeats the ICA from random starts on bootstrapped tokens and clusters all estimates. Iq near 1: the component
# comes back every time. A warning names those below 0.8; hollow dots in the figure.
stability = lb.ica_stability(scans, 16, n_starts=6, random_state=0)
iq = plot_stability(stability)

# %%
stability.to_frame().round(2).T

# %%
# Reproducibility: is it there in other runs?
# -------------------------------------------
# A component can come back from every start and still be noise of this sample. So: decompose two halves of the runs,
# and compare with surrogates whose neurons keep their spectra but nothing in common. (Few surrogates, to be quick: the
# smallest possible p is one over their number plus one.)
halves = split_half_reproducibility(scans, 16, n_splits=2, n_permutations=3, random_state=0)
print("|r| between halves, per component:", halves.reproducibility.round(2))
print("largest |r| of any component in the surrogates:", halves.null.max().round(2))
print("p:", halves.p.round(2))

# %%
# Model order
# -----------
# The sweep gives a table to choose from, and makes no choice. Few components merge networks, many split them and make
# single ones less stable.
sweep = model_order_sweep(scans, orders=(4, 8, 16, 32), n_starts=4, random_state=0)
sweep.round(3)

# %%
order = plot_model_order(sweep, y=["iq_median", "share_stable"])

# %%
# ``n_components="auto"`` (minimum description length) and ``"parallel"`` (parallel analysis) estimate an order from the
# data, run by run; ``order_estimates_`` says what each found. They ask how many dimensions exceed chance, which is not
# how many networks can be told apart: without noise of a scanner, nearly all of a model's dimensions do.
#
# What to conclude
# ----------------
# Report a component only with its stability and its reproducibility, and a result only if it holds at neighbouring
# model orders.
#
# What not to conclude
# --------------------
# * High Iq is not truth. All repeats share one data set; with few tokens a stable component can match nothing.
# * There is no right number of components. A split network is not a discovery of two.
# * A component's explained variance is not its importance to the model: a lesion is the test of that.

"""
Prune a model, save it, load it, serve it
=========================================

Plans before knives: first decide which neurons go and look at what that costs, then cut, so that tensors really get
smaller, then save a folder that loads again. All of it beside the control: as many random neurons.
"""

# %%
# The dense model
# ---------------
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd

import llmbrain as lb
from llmbrain.datasets import load_demo
from llmbrain.evaluation import latency
from llmbrain.plotting import plot_tradeoff, plot_widths

brain = load_demo()
calibration = brain.texts("calibration", n=32, n_tokens=256)
held_out = brain.texts("heldout", n=16, n_tokens=256, seed=5)


def measure(model) -> dict[str, float]:
    """Size, perplexity on held-out text and mean accuracy over the eight abilities."""
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "perplexity": lb.perplexity(model, brain.tokenizer, held_out),
        "accuracy": pd.Series(brain.ability_accuracy(model, n=25)).mean(),
    }


dense = measure(brain.model)
print(dense)

# %%
# A plan
# ------
# Nothing is cut yet. ``obs`` removes, one by one, the neuron whose loss the others can make up for best; the plan can
# be read, plotted and saved as JSON.
plan = lb.plan_pruning(brain.model, ratio=0.5, method="obs", tokenizer=brain.tokenizer, calibration=calibration,
                       allocation="sensitivity")  # fmt: skip
print(plan.summary())
plan.to_frame()

# %%
widths = plot_widths(plan)

# %%
# The cut, and its controls
# -------------------------
# Without compensation the cut equals setting the neurons to zero. Compensation refits each output projection to what
# the dense layer said. Random neurons with the same compensation are the control that any criterion has to beat.
rows = [{"method": "dense", "compensate": "-", "ratio": 0.0, **dense}]
for ratio in (0.3, 0.6):
    for method, compensate in (("obs", "least-squares"), ("obs", None), ("random", "least-squares"), ("random", None)):
        p = lb.plan_pruning(brain.model, ratio=ratio, method=method, tokenizer=brain.tokenizer, calibration=calibration)
        small = lb.prune(brain.model, p, tokenizer=brain.tokenizer, calibration=calibration, compensate=compensate)
        rows.append({"method": method, "compensate": str(compensate), "ratio": ratio, **measure(small)})
table = pd.DataFrame(rows)
table.round(3)

# %%
lines = table[1:].assign(method=table["method"] + " + " + table["compensate"])
tradeoff = plot_tradeoff(lines, dense=dense)

# %%
# Save, load, serve
# -----------------
# Widths that differ by layer go into ``config.json`` as ``per_layer_config``, and ``load_model`` opens the folder. A
# plan with one width everywhere can be saved as ``"uniform"``: an ordinary checkpoint that any server loads with no
# code of ours. Its width can be a multiple of what the hardware likes.
small = lb.prune(brain.model, plan, tokenizer=brain.tokenizer, calibration=calibration, compensate="least-squares")
with TemporaryDirectory() as folder:
    path = Path(folder)
    lb.save_pruned(small, brain.tokenizer, path / "per-layer")
    again, tokenizer = lb.load_model(path / "per-layer")
    print("widths:", [layer.mlp.down_proj.in_features for layer in again.model.layers])
    print("perplexity before and after the disk:", lb.perplexity(small, brain.tokenizer, held_out),
          lb.perplexity(again, tokenizer, held_out))  # fmt: skip

    even = lb.plan_pruning(brain.model, ratio=0.5, method="obs", tokenizer=brain.tokenizer, calibration=calibration,
                           allocation="uniform", multiple_of=64)  # fmt: skip
    # Llama's switch for MLP biases covers all three projections, so without an intercept the folder stays plainest.
    plain = lb.prune(brain.model, even, tokenizer=brain.tokenizer, calibration=calibration,
                     compensate="least-squares", intercept=False)  # fmt: skip
    lb.save_pruned(plain, brain.tokenizer, path / "uniform", format="uniform")

    from transformers import AutoModelForCausalLM  # as any server would

    served = AutoModelForCausalLM.from_pretrained(path / "uniform")
    print("plain transformers, width", served.config.intermediate_size)
    ids = brain.tokenizer("sort kbt=", return_tensors="pt")
    out = served.generate(**ids, max_new_tokens=4, do_sample=False, pad_token_id=brain.tokenizer.pad_token_id)
    print(repr(brain.tokenizer.decode(out[0], skip_special_tokens=True)))

# %%
# Is it faster? On a model this small, overhead counts for more than the neurons do: measure on yours.
speed = {name: latency(m, batch_sizes=[1], prompt=64, new_tokens=8, repeats=3) for name, m in
         {"dense": brain.model, "pruned": small}.items()}  # fmt: skip
pd.concat(speed, names=["model"])[["phase", "batch", "tokens_per_second", "seconds_low", "seconds_high"]]

# %%
# What to conclude
# ----------------
# How much smaller this model gets at which cost on this text, and how much of that the criterion, the compensation and
# the spread over layers each contribute.
#
# What not to conclude
# --------------------
# * Perplexity on text like the calibration text flatters: measure what you need the model for, too.
# * One calibration draw is one sample. Differences of a few percent between methods need several draws.
# * Fewer neurons are not less time until it is measured, at your batch size, on your machine.

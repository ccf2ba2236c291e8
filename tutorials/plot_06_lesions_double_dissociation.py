"""
Lesions and double dissociation
===============================

Activity during a task does not show that a network is needed for it. Neuropsychology's answer is the lesion, and its
strongest form the double dissociation: damage to A spares task 2 and breaks task 1, damage to B does the opposite. Here
lesions can be undone, repeated, and compared with lesions of the same size elsewhere.
"""

# %%
# Networks, found without labels
# ------------------------------
import llmbrain as lb
from llmbrain.datasets import load_demo
from llmbrain.intervention import TokenEvaluation
from llmbrain.networks import localizer
from llmbrain.plotting import plot_lesion_table

brain = load_demo()
scans = lb.scan(brain.model, brain.tokenizer, brain.texts("calibration", n=32, n_tokens=256))
networks = lb.FunctionalNetworks.from_ica(lb.GroupICA(n_components=24, random_state=0).fit(scans))

# %%
# To be quick, take the networks that respond most to four of the tasks. The choice looks at responses in the
# calibration text only, never at the effect of a lesion.
tasks = ["addition", "brackets", "shift", "agreement"]
responses = localizer(scans, tasks, networks=networks, n_permutations=0)
chosen = sorted({int(k) for t in responses.t for k in (-abs(t)).argsort()[:2]})
group = networks.subset(chosen)
group.summary()[["size", "share", "peak_layer"]]

# %%
# One lesion
# ----------
# ``lesion`` is a context manager: neurons are zero inside, and come back whatever happens. The prompt is a sum; the
# model writes its digits with the ones first (``580`` is 85).
line = brain.tokenizer("37+48=", return_tensors="pt")


def answer() -> str:
    """What the model writes after the prompt."""
    ids = brain.model.generate(**line, max_new_tokens=4, do_sample=False, pad_token_id=brain.tokenizer.pad_token_id)
    return repr(brain.tokenizer.decode(ids[0, line["input_ids"].shape[1] :]))


print("intact:", answer())
for network in group:
    with lb.lesion(brain.model, network):
        print(f"without {network.name} ({network.size} neurons):", answer())
print("after:", answer())

# %%
# The table
# ---------
# Every network by every task, on held-out lines, with two controls of the same size: random neurons in the same layers,
# and neurons that are as active as those of the network. Effects are loss added to the answers (nats a token).
evaluations = {}
for task in tasks:
    lines = brain.examples("heldout", task, n=15)
    evaluations[task] = TokenEvaluation.from_answers(
        brain.tokenizer, [x.prompt for x in lines], [x.answer + "\n" for x in lines], score="loss"
    )
table = lb.lesion_table(brain.model, group, evaluations, n_random=19, progress=False, random_state=0)
columns = ["network", "evaluation", "size", "effect", "effect_low", "effect_high", "random_effect", "p_random",
           "matched_effect", "p_matched"]  # fmt: skip
table.frame[columns].sort_values("effect", ascending=False).head(8).round(3)

# %%
heat = plot_lesion_table(table)

# %%
# Double dissociations
# --------------------
# Pairs in which each network harms its own task more than the other network does, intervals apart, and more than both
# controls. With 19 draws the smallest p is 1/20, which a correction over the whole table cannot pass: so cell by cell
# here, and said. For a paper, draw some thousand.
pairs = table.double_dissociations(alpha=0.05, corrected=False)
print(f"{len(pairs)} double dissociations")
pairs.head(10).round(3)

# %%
# What to conclude
# ----------------
# Where a pair is listed: the model needs network a for task i more than for j, and b the other way round, beyond what
# equally large and equally active sets of neurons do. The two tasks do not rest on the same neurons alone.
#
# What not to conclude
# --------------------
# * That a network *is* the seat of a task: it may be one step of many, and others may do the same work.
# * That a network without effect does nothing: its work may be done twice, or matter for what was not measured.
# * Zero is a strong lesion: it can push a layer where it never was. ``value="mean"`` or ``"resample"`` is the milder
#   control; a claim should survive it.
# * The interval is over lines; other models trained the same way may divide the work otherwise.

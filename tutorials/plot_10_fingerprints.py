"""
Fingerprints: which model is this one made from?
================================================

A model is pruned or trained on, its weights change, its name is lost. Do its functional networks still show where it
comes from (arXiv 2601.22692)? The published fingerprint correlates network time courses of two models that read the
same text, and calls them related above a fixed score. But two unrelated models that read the same text also act alike,
because the text is the same. So the score needs a null: models that are certainly not related.
"""

# %%
# Some families
# -------------
# Six tiny Llamas, trained alike from different seeds on lines of the demo brain's abilities: strangers to each other.
import copy
import random

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import llmbrain as lb
from llmbrain.comparison import fingerprint, networks_of
from llmbrain.datasets import load_demo
from llmbrain.datasets.abilities import stream_examples

brain = load_demo()


def train(model, steps: int, seed: int, rate: float = 3e-3):
    """A few steps of next-token training; enough to have networks, not to be good."""
    lines, text = stream_examples("train", random.Random(seed)), ""
    while len(text) < steps * 8 * 64:
        text += next(lines).text
    ids = torch.tensor(brain.tokenizer(text, add_special_tokens=False)["input_ids"][: steps * 8 * 64])
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    for batch in ids.reshape(steps, 8, 64):
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def born(seed: int):
    """A trained model of its own seed."""
    config = LlamaConfig(
        vocab_size=len(brain.tokenizer), hidden_size=32, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=2, max_position_embeddings=128, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    return train(model.train(), 150, seed)


models = [born(seed) for seed in range(7)]
parent, stranger, references = models[0], models[1], models[2:]

# %%
# And two children of the first: a quarter of its neurons cut out, and trained on with other text.
plan = lb.plan_pruning(parent, ratio=0.25, method="magnitude")
pruned = lb.prune(parent, plan)
tuned = train(copy.deepcopy(parent).train(), 25, seed=99, rate=1e-3)

# %%
# Fingerprints
# ------------
# The networks of each model on the same texts, once; then every pair is cheap. Every pair of references, and each
# reference with both models, is a draw of the null: five references give twenty draws, so no p falls below 1/21.
stream, texts = stream_examples("heldout", random.Random(100)), []
for _ in range(8):
    text = ""
    while len(text) < 120:
        text += next(stream).text
    texts.append(text[:120])


def look(model):
    """The networks of a model, which the comparisons share."""
    return networks_of((model, brain.tokenizer), texts, n_components=8, threshold=1.96)


subject, others = look(parent), [look(model) for model in references]
for name, model in {"pruned copy": pruned, "trained on": tuned, "stranger": stranger}.items():
    found = fingerprint(subject, look(model), reference=others, n_permutations=19)
    print(f"{name}: score {found.score:.2f}; unrelated models {found.reference.min():.2f} to "
          f"{found.reference.max():.2f}; p = {found.p:.3f}: {found.verdict}")  # fmt: skip
    print(f"    follows the text at all: p = {found.p_shared:.2f}; published: best pair {found.published_score:.2f}, "
          f"{found.published_pairs} pairs above .5")  # fmt: skip

# %%
# What to conclude
# ----------------
# Whether two models are more alike than models that have nothing to do with each other are, on this text.
#
# What not to conclude
# --------------------
# * A score above .5 by itself says that both follow the text. Compare it with the range of the unrelated models.
# * "Not told apart" is not "unrelated": a child that was trained on for long may lose its fingerprint.
# * References that are worse, smaller or trained on other text make the null too easy. Take siblings in kind.
# * A fingerprint is evidence about origin, and no proof of theft.

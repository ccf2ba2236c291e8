"""
A 7B model on one GPU
=====================

The same script, from a stand-in of a few hundred thousand parameters to a model of seven billion. Here it runs on the
stand-in; with ``MODEL`` set it takes yours::

    MODEL=path-or-hub-id TEXT=texts.txt OUT=study python tutorials/plot_12_seven_billion_on_one_gpu.py

Nothing in it holds all activations at once: the scan streams to disk, runs are reduced one by one, ICA sees components
times neurons, and pruning keeps one matrix of width squared a layer.
"""

# %%
# The model
# ---------
# ``bfloat16`` and CUDA where there is one. The stand-in has random weights, the shape of a Llama and the demo
# tokenizer, so that this page needs no download.
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

import llmbrain as lb
from llmbrain.anatomy.families import anatomy
from llmbrain.datasets import load_demo
from llmbrain.evaluation import throughput
from llmbrain.plotting import plot_layer_profile, plot_widths

MODEL, TEXT = os.environ.get("MODEL"), os.environ.get("TEXT")
cuda = torch.cuda.is_available()


def stand_in():
    """A Llama of four layers with random weights, and texts of the demo brain for it to read."""
    from transformers import LlamaConfig, LlamaForCausalLM

    brain = load_demo()
    config = LlamaConfig(
        vocab_size=len(brain.tokenizer), hidden_size=64, intermediate_size=256, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    return model.to("cuda" if cuda else "cpu").eval(), brain.tokenizer, brain.texts(n=16, n_tokens=256)


if MODEL:
    if not TEXT:
        raise SystemExit("set TEXT to a file with one text a line")
    model, tokenizer = lb.load_model(MODEL, dtype=torch.bfloat16, device="auto")
    texts = [line for line in Path(TEXT).read_text(encoding="utf-8").splitlines() if line.strip()]
else:
    model, tokenizer, texts = stand_in()
folder = TemporaryDirectory()
out = Path(os.environ.get("OUT", folder.name))
widths = anatomy(model).widths
print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {sum(widths):,} neurons, on {model.device}")

# %%
# Scan
# ----
# The need of disk is printed before the first token: tokens x neurons x 2 bytes in bfloat16. For 32 layers of 11,008
# neurons that is 0.7 MB a token. ``n_tokens`` limits each text; interrupt it, and the same call goes on.
scans = lb.scan(model, tokenizer, texts, out=out / "scan", block_size=256, batch_size=8, n_tokens=2048,
                dtype="bfloat16")  # fmt: skip
print(len(scans), "runs,", sum(run.n_tokens for run in scans), "tokens")

# %%
# Networks
# --------
# One pass reduces each run through the small side of its Gram matrix; ``device="auto"`` uses the GPU.
ica = lb.GroupICA(n_components=8 if not MODEL else 32, random_state=0, progress=True).fit(scans)
networks = lb.FunctionalNetworks.from_ica(ica)
networks.save(out / "networks")
profile = plot_layer_profile(networks)
networks.summary().head()

# %%
# Prune
# -----
# Widths in multiples of 128 are what GPUs like (8 for the stand-in). ``inplace=True`` needs no second copy of the
# model.
multiple = 128 if MODEL else 8
before = throughput(model, n_tokens=1024, repeats=3)
dense = lb.perplexity(model, tokenizer, texts, window=256, max_windows=16)
plan = lb.plan_pruning(model, ratio=0.3, method="flap", tokenizer=tokenizer, calibration=texts, window=256,
                       multiple_of=multiple)  # fmt: skip
print(plan.summary())
cut = plot_widths(plan)
small = lb.prune(model, plan, tokenizer=tokenizer, calibration=texts, window=256, compensate="least-squares",
                 inplace=True)  # fmt: skip
print(f"perplexity {dense:.2f} -> {lb.perplexity(small, tokenizer, texts, window=256, max_windows=16):.2f}")
print(f"tokens a second {before:,.0f} -> {throughput(small, n_tokens=1024, repeats=3):,.0f}")
if cuda:
    print(f"peak GPU memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")

# %%
# Save
# ----
lb.save_pruned(small, tokenizer, out / "pruned")
again, _ = lb.load_model(out / "pruned")
print("loads again:", anatomy(again).widths)
folder.cleanup()

# %%
# What to conclude
# ----------------
# That the pipeline fits: what it needs grows with neurons and components, not with tokens, except for the scan on disk.
#
# What not to conclude
# --------------------
# * Anything from the numbers of the stand-in: its weights are random, and so are its networks.
# * That the text above is enough calibration for your model: an error says when it is too little, and several draws say
#   how much the result depends on it.

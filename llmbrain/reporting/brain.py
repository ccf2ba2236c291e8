"""Maps of a brain in a report: where a voxel lies, what an atlas calls it, and the map through nilearn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmbrain.imaging.atlas import Atlas
from llmbrain.imaging.brain_mask import BrainMask

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from nibabel.nifti1 import Nifti1Image

    from llmbrain.imaging.atlas import Labels

APART = 8.0  # mm between two peaks of a table
PEAKS = 12


@dataclass(frozen=True)
class Brain:
    """Where the voxels of maps lie.

    Attributes
    ----------
    mask : BrainMask
        Its voxels, in C order, are the columns of the maps.
    regions : list of str, or None
        What the atlas calls each voxel; empty outside of it.
    """

    mask: BrainMask
    regions: list[str] | None = None

    @classmethod
    def of(cls, mask: BrainMask, atlas: Atlas | tuple[Any, Labels] | None = None) -> Brain:
        """A brain with the labels of an atlas: an `Atlas`, or ``(image, labels)``.

        Value v of the image (a NIfTI image or path) is ``labels[v]``, as nilearn's fetchers have it, 0 being the
        background; or ``labels[v - 1]`` where the labels name no background (as many as the largest value). It may lie
        on another grid: each voxel takes the value at its coordinates.
        """
        brain = cls(mask)
        if atlas is None:
            return brain
        known = atlas if isinstance(atlas, Atlas) else Atlas.of(*atlas)
        return cls(mask, known.at(brain.coordinates(np.arange(mask.n_voxels))))

    def coordinates(self, voxels: NDArray[np.int64]) -> NDArray[np.float64]:
        """Millimeters ``(n, 3)`` of the centers of voxels, in the space of the mask's affine."""
        places = np.argwhere(self.mask.volume)[voxels]
        affine = np.asarray(self.mask.image.affine)
        return places @ affine[:3, :3].T + affine[:3, 3]

    def peaks(self, values: NDArray[np.float32], inside: NDArray[np.bool_]) -> list[dict[str, Any]]:
        """Strongest voxels of a network, any two at least `APART` mm from each other: x, y, z (mm), region, value."""
        found: list[dict[str, Any]] = []
        voxels = np.flatnonzero(inside)
        places = self.coordinates(voxels)
        taken = np.empty((0, 3))
        for i in np.argsort(-np.abs(values[voxels]), kind="stable"):
            if (np.linalg.norm(taken - places[i], axis=1) < APART).any():
                continue
            taken = np.vstack([taken, places[i]])
            x, y, z = (float(v) for v in places[i].round(1))
            region = "" if self.regions is None else self.regions[int(voxels[i])]
            found.append({"x": x, "y": y, "z": z, "region": region, "value": float(values[voxels[i]])})
            if len(found) == PEAKS:
                break
        return found

    def inverse_transform(self, values: NDArray[np.float32]) -> Nifti1Image:
        """An image of one value a voxel: what `plot_brain_map` asks of a masker."""
        return self.mask.image_of(np.atleast_2d(values))

    def figure(self, values: NDArray[np.float32], inside: NDArray[np.bool_]) -> Figure:
        """The network, seen through the brain (nilearn's glass brain)."""
        from llmbrain.plotting import plot_brain_map

        return plot_brain_map(np.where(inside, values, 0), self, title="z")

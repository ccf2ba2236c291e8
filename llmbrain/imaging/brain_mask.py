"""`BrainMask`: which voxels of a brain are read, and maps back on its grid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmbrain._validation import InputError


class BrainMask:
    """A brain mask: reads the voxels inside it from images of the same grid."""

    def __init__(self, mask_img: Any) -> None:
        import nibabel

        self.image = nibabel.load(mask_img) if isinstance(mask_img, (str, Path)) else mask_img
        self.volume = np.asarray(self.image.dataobj) != 0
        if self.volume.ndim != 3:
            raise InputError(f"mask_img has shape {self.volume.shape}: a mask has three axes")
        self.n_voxels = int(self.volume.sum())
        if not self.n_voxels:
            raise InputError("mask_img removes everything: it has no voxel other than 0")

    @classmethod
    def from_arrays(cls, volume: np.ndarray, affine: np.ndarray) -> BrainMask:
        """A mask from a bool (x, y, z) volume and its affine."""
        from nibabel import Nifti1Image

        return cls(Nifti1Image(volume.astype(np.uint8), affine))

    def image_of(self, maps: np.ndarray) -> Any:
        """Maps (K, n_voxels) as a 4D NIfTI image in the grid of the mask."""
        from nibabel import Nifti1Image

        volume = np.zeros((*self.volume.shape, len(maps)), dtype=np.float32)
        volume[self.volume] = maps.T
        return Nifti1Image(volume, self.image.affine)

    def read(self, image: Any, name: str) -> np.ndarray:
        """The voxels inside the mask of a 4D image: float32 (n_volumes, n_voxels)."""
        import nibabel

        image = nibabel.load(image) if isinstance(image, (str, Path)) else image
        if len(image.shape) != 4 or image.shape[:3] != self.volume.shape:
            raise InputError(f"{name} has shape {image.shape}: mask_img needs {self.volume.shape} and a time axis")
        if not np.allclose(image.affine, self.image.affine, atol=1e-4):
            raise InputError(f"{name} and mask_img have different affines: resample one to the other first")
        return np.ascontiguousarray(np.asarray(image.dataobj, dtype=np.float32)[self.volume].T)


def split_mask(mask: Any) -> tuple[NDArray[Any] | None, Any]:
    """The two things that `mask` can be: an array of neurons, or an image (or its path); None for what it is not.

    Raises
    ------
    InputError
        For an array that is not one-dimensional: voxels need an affine.
    """
    if isinstance(mask, (str, Path)) and not Path(mask).exists():
        raise InputError(
            f"mask={str(mask)!r} is no file: pass the path (or the image) of a brain mask, or a bool array of neurons"
        )
    if mask is None or hasattr(mask, "dataobj") or isinstance(mask, (str, Path)):
        return None, mask
    neurons = np.asarray(mask)
    if neurons.ndim != 1:
        raise InputError(
            f"mask has shape {neurons.shape}: pass bools (n_neurons,), or the NIfTI image (or path) of a brain mask"
        )
    return neurons, None

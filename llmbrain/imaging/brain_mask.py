"""`BrainMask`: which voxels of a brain are read, and maps back on its grid, with its header."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmbrain._files import verify_listed
from llmbrain._validation import InputError
from llmbrain.imaging.grid import load_image, places_in, read_voxels, readable, seconds_between_volumes, spatial_shape

if TYPE_CHECKING:
    import pandas as pd

    from llmbrain.imaging.atlas import Atlas

_SAME_TR = 1e-3  # relative
_ALIGNED = 2  # the sform code that nibabel writes where nobody says one


class BrainMask:
    """A brain mask: reads the voxels inside it from images of the same grid, reoriented or not.

    Parameters
    ----------
    mask_img : NIfTI image or path
        ``(x, y, z)`` or ``(x, y, z, 1)``. Inside is what is above 0: NaN, 0 and negative values are outside.
    t_r : float, optional
        Seconds between volumes that every run must have; by default those of the first run that is read.

    Attributes
    ----------
    image : Nifti1Image
        The mask as 0 and 1 (uint8), with the affines, their codes and the units of `mask_img`; once runs were read,
        with their TR, and with their codes and units where the mask has none of its own (nibabel's default header).
    volume : bool array (x, y, z)
    n_voxels : int
    t_r : float or None
    """

    def __init__(self, mask_img: Any, *, t_r: float | None = None) -> None:
        loaded, path = load_image(mask_img, whole=True)
        if path is not None and isinstance(mask_img, (str, Path)):
            verify_listed(path)
        name = "mask_img" if path is None else f"mask_img {path.name}"
        shape, _ = spatial_shape(loaded, "mask_img", volumes=False)
        with readable(name):
            values = np.asarray(loaded.dataobj).reshape(shape)
        self.volume: NDArray[np.bool_] = np.asarray(values > 0)  # False for NaN
        self.n_voxels = int(self.volume.sum())
        if not self.n_voxels:
            raise InputError("mask_img removes everything: it has no voxel above 0")
        self.image = image_like(loaded, self.volume.astype(np.uint8))
        self.t_r: float | None = None
        self.set_t_r(t_r)

    def set_t_r(self, t_r: float | None) -> None:
        """The TR that every run must have."""
        self.t_r = t_r
        if t_r:
            self.image.header["pixdim"][4] = t_r  # where the images made from this one find it
            self.image.header.set_xyzt_units(self.image.header.get_xyzt_units()[0], "sec")

    @classmethod
    def from_arrays(cls, volume: np.ndarray, affine: np.ndarray, header: dict[str, Any] | None = None) -> BrainMask:
        """A mask from a bool (x, y, z) volume, its affine, and what `header_facts` gave."""
        from nibabel import Nifti1Image

        image = Nifti1Image(volume.astype(np.uint8), affine)
        t_r = None
        if header:
            image.header.set_xyzt_units(*header["units"])
            image.set_qform(affine if header["qform"] is None else np.array(header["qform"]), header["qform_code"])
            image.set_sform(affine, header["sform_code"])
            t_r = header["t_r"]
        return cls(image, t_r=t_r)

    def header_facts(self) -> dict[str, Any]:
        """What of the header an affine does not say, in JSON values."""
        header = self.image.header
        qform, code = header.get_qform(coded=True)
        return {
            "units": list(header.get_xyzt_units()),
            "qform": None if qform is None else qform.tolist(),
            "qform_code": int(code),
            "sform_code": int(header["sform_code"]),
            "t_r": self.t_r,
        }

    def image_of(self, maps: ArrayLike) -> Any:
        """Maps ``(n_voxels,)`` or ``(K, n_voxels)`` as a 3D or 4D float32 image in the grid of the mask."""
        return brain_image(maps, self.image)

    def millimeters(self) -> NDArray[np.float64]:
        """Where each voxel inside lies, by the affine: (n_voxels, 3)."""
        affine = self.image.affine
        return np.argwhere(self.volume) @ affine[:3, :3].T + affine[:3, 3]

    def coordinates(self, networks: Any, atlas: Atlas | None = None) -> pd.DataFrame:
        """Where networks lie: place in millimeters (by the affine), z, voxel; by falling ``|z|`` in each.

        Parameters
        ----------
        networks : FunctionalNetworks
        atlas : Atlas, optional
            Adds a column ``region``: what it calls the place; empty outside of it.
        """
        import pandas as pd

        voxels, where = np.argwhere(self.volume), self.millimeters()
        frames = []
        for name, row, inside in zip(networks.names, networks.maps, networks.masks):
            order = np.flatnonzero(inside)[np.argsort(-np.abs(row[inside]), kind="stable")]
            frame = pd.DataFrame(where[order].round(2), columns=["x_mm", "y_mm", "z_mm"])
            frame.insert(0, "network", name)
            frame["z"] = row[order]
            frame[["i", "j", "k"]] = voxels[order]
            if atlas is not None:
                frame["region"] = atlas.at(where[order])
            frames.append(frame)
        return pd.concat(frames, ignore_index=True)

    def read(self, image: Any, name: str, *, run: bool = True) -> NDArray[np.float32]:
        """The voxels inside the mask of a 4D image, or a 5D one ``(x, y, z, 1, t)``: float32 (n_volumes, n_voxels).

        `run` says that the fourth axis is time: then every image must have one TR.
        """
        loaded, path = load_image(image)
        if path is not None and isinstance(image, (str, Path)):
            verify_listed(path)
        spatial_shape(loaded, name, volumes=True)
        places = places_in(loaded, self.volume.shape, self.image.affine, np.nonzero(self.volume), name, "mask_img")
        if run:
            self._take_codes(loaded)
            self._check_t_r(loaded, name)
        return read_voxels(loaded, places, name)

    def _take_codes(self, image: Any) -> None:
        """Of the first run on its very grid, a mask takes what its own header leaves open."""
        own = self.image.header
        if (
            int(own["qform_code"])
            or int(own["sform_code"]) not in (0, _ALIGNED)
            or not hasattr(image.header, "get_qform")
        ):
            return
        if image.shape[:3] == self.volume.shape and np.allclose(image.affine, self.image.affine, atol=1e-4):
            self.image = image_like(image, self.volume.astype(np.uint8))
            self.set_t_r(self.t_r)

    def _check_t_r(self, image: Any, name: str) -> None:
        t_r = seconds_between_volumes(image)
        if t_r is None:
            return
        if self.t_r is None:
            self.set_t_r(t_r)
        elif abs(t_r - self.t_r) > _SAME_TR * self.t_r:
            raise InputError(
                f"{name} has a TR of {t_r:g} s, the runs before it {self.t_r:g} s: runs of different TR cannot be "
                "mixed (resample them, or correct the header)"
            )


def brain_image(maps: ArrayLike, mask: Any) -> Any:
    """Maps ``(n_voxels,)`` or ``(K, n_voxels)`` on the grid of a mask image, with its affines, codes, units and TR."""
    values = np.asarray(maps, dtype=np.float32)
    inside = np.asarray(mask.dataobj).reshape(mask.shape[:3]) > 0
    volume = np.zeros((*inside.shape, *values.shape[:-1]), dtype=np.float32)
    volume[inside] = np.moveaxis(values, -1, 0)
    return image_like(mask, volume)


def image_like(template: Any, data: NDArray[Any]) -> Any:
    """An image of `data` with the affines, their codes, the units and the TR of `template`."""
    from nibabel.nifti1 import Nifti1Image
    from nibabel.nifti2 import Nifti2Image

    image_class = Nifti2Image if isinstance(template, Nifti2Image) or max(data.shape) > 32767 else Nifti1Image
    image = image_class(data, template.affine)
    header = template.header
    if not hasattr(header, "get_qform"):
        return image  # of another format: the affine is all it says
    for form in ("qform", "sform"):
        affine, code = getattr(header, f"get_{form}")(coded=True)
        if code:
            getattr(image, f"set_{form}")(affine, int(code))
    if int(header["qform_code"]) and not int(header["sform_code"]):
        image.header["sform_code"] = 0  # the affine came from the qform, and is in it
    image.header.set_xyzt_units(*header.get_xyzt_units())
    if len(template.shape) != 4 or len(data.shape) == 4:
        image.header["pixdim"][4] = header["pixdim"][4]
    return image


def split_mask(mask: Any) -> tuple[NDArray[Any] | None, Any]:
    """The two things that `mask` can be: an array of neurons, or an image (or its path); None for what it is not.

    Raises
    ------
    InputError
        For an array that is not one-dimensional (voxels need an affine), and a path where there is no file.
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

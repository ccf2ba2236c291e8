"""Voxels of an image in the order of another grid, read by slabs.

Tools flip and permute the axes of an image and say so in its affine (LPS for RAS, fslswapdim, as_reoriented). By the
affines that is undone here; an image whose voxels lie elsewhere is refused. Only a few volumes are in memory at a time,
besides the result.
"""

from __future__ import annotations

import gzip
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmbrain._files import clear_damage
from llmbrain._validation import InputError

_SLAB_BYTES = 4 * 1024**2
_NIFTI2 = (b"\x1c\x02\0\0", b"\0\0\x02\x1c")  # 540, the size of its header
_DEFLATED = 1100  # bytes that one byte of a .gz can hold at most (1032), and some
_NEAR = 0.02  # of a voxel: rounding of affines in headers, and no more


def readable(name: str) -> AbstractContextManager[None]:
    """What nibabel raises on a file that is no image, or was cut short, as one clear error."""
    return clear_damage(name, "a NIfTI image")


def load_image(image: Any, *, nifti: bool = False, whole: bool = False) -> tuple[Any, Path | None]:
    """A nibabel image from one or from a path, and the path of its file if it has one.

    Parameters
    ----------
    nifti : bool
        Only that format.
    whole : bool
        Read a compressed file to its end now, where its checksum is (nibabel stops where the data end). `read_voxels`
        does so by itself.

    Raises
    ------
    DamagedError
        If the file is no image, or shorter than its header says.
    """
    from nibabel.nifti1 import Nifti1Image, Nifti1Pair
    from nibabel.nifti2 import Nifti2Image
    from nibabel.spatialimages import SpatialImage

    path: Path | None
    if isinstance(image, (str, Path)):
        path = Path(image)
        with readable(str(path)):
            if whole and path.name.endswith(".nii.gz"):
                with gzip.open(path) as file:
                    content = file.read()
                loaded = (Nifti2Image if content[:4] in _NIFTI2 else Nifti1Image).from_bytes(content)
                _check_header(loaded, len(content))
            else:
                loaded = open_image(path)
    else:
        loaded = image
        with readable("image"):
            _check_units(loaded)
        file_name = image.get_filename() if hasattr(image, "get_filename") else None
        path = Path(file_name) if file_name else None
    if not isinstance(loaded, Nifti1Pair if nifti else SpatialImage):  # NIfTI-2 is a subclass
        raise InputError(f"image={image!r} is not a NIfTI image or the path of one")
    return loaded, path


def open_image(path: Path) -> Any:
    """An image of any of nibabel's formats, its numbers compared with the size of its file; to be called in `readable`.

    Raises
    ------
    ValueError
        If the file is shorter than its header says (nibabel would allocate first), or its units are none.
    """
    import nibabel

    if path.suffix == ".nii":
        _check_cifti(path)
    image = nibabel.load(path)
    _check_header(image, _size_of(image))
    return image


def _check_cifti(path: Path) -> None:
    """Whether the header of a CIFTI file fits its size: nibabel allocates by it while it opens the file."""
    from nibabel.nifti2 import Nifti2Header

    with path.open("rb") as file:
        if file.read(4) not in _NIFTI2:
            return
        file.seek(0)
        header = Nifti2Header.from_fileobj(file, check=False)
    found = [content for e in header.extensions if hasattr(content := e.get_content(), "matrix")]
    shape = tuple(int(n) for n in header.get_data_shape())
    _check_fits(shape, int(header["vox_offset"]), header.get_data_dtype().itemsize, path.stat().st_size)
    for content in found:
        check_models(content, shape)


def check_models(header: Any, shape: tuple[int, ...]) -> None:
    """Whether the parts of the brain in a CIFTI header have as many places as its data: nibabel allocates by them.

    Raises
    ------
    ValueError
        If they have more.
    """
    most = max(shape, default=0)
    for mapping in header.matrix:
        models = list(getattr(mapping, "brain_models", ()))
        for model in models:
            if not (model.index_offset >= 0 and 0 <= model.index_count <= most - model.index_offset):
                raise ValueError(
                    f"{model.brain_structure} has {model.index_count} places from {model.index_offset}, the data {most}"
                )
        if sum(model.index_count for model in models) > most:
            raise ValueError(f"its parts of the brain have more places than the data ({most})")


def _size_of(image: Any) -> int | None:
    """Bytes that the data of an image can have at most, with what is before them; None where that is not known."""
    file = getattr(getattr(image, "dataobj", None), "file_like", None)
    if not isinstance(file, (str, Path)) or str(file).endswith((".bz2", ".zst")):
        return None
    return Path(file).stat().st_size * (_DEFLATED if str(file).endswith((".gz", ".mgz")) else 1)


def _check_header(image: Any, size: int | None) -> None:
    """Whether a file is as long as its header says, before anything is allocated for it; and whether it has units."""
    data: Any = getattr(image, "dataobj", None)
    if size is not None and hasattr(data, "offset"):
        _check_fits(tuple(data.shape), int(data.offset), data.dtype.itemsize, size)
    _check_units(image)


def _check_fits(shape: tuple[int, ...], offset: int, itemsize: int, size: int) -> None:
    needed = offset + math.prod(int(n) for n in shape) * itemsize
    if not 0 < needed <= size:
        raise ValueError(f"its header says {shape}, {needed} bytes, but it has {size}")


def _check_units(image: Any) -> None:
    header: Any = getattr(image, "nifti_header", getattr(image, "header", None))
    if hasattr(header, "get_xyzt_units"):
        try:
            header.get_xyzt_units()
        except KeyError as error:
            raise ValueError(f"its header says units of code {error.args[0]}, which are none") from None


def spatial_shape(image: Any, name: str, *, volumes: bool | None = None) -> tuple[tuple[int, ...], int | None]:
    """Shape of one volume, and how many there are; None for a single one. ``(x, y, z, 1, t)`` counts as 4D.

    Parameters
    ----------
    volumes : bool, optional
        True where there must be a time axis, False where there must be none (``(x, y, z, 1)`` has none then).
    """
    shape = tuple(int(n) for n in image.shape)
    rest = shape[3:]
    if len(rest) == 2 and 1 in rest:
        rest = (max(rest),)
    if volumes is False and rest in ((), (1,)):
        return shape[:3], None
    if len(shape) < 3 or len(rest) > 1 or volumes is False or (volumes and not rest):
        wanted = {None: "three or four axes", True: "three axes and a time axis", False: "three axes"}[volumes]
        raise InputError(f"{name} has shape {shape}: {wanted} are needed")
    return shape[:3], rest[0] if rest else None


def seconds_between_volumes(image: Any) -> float | None:
    """TR in seconds, by the header; None where it says nothing."""
    zooms = image.header.get_zooms()
    if len(zooms) < 4:
        return None
    value = float(zooms[4] if len(zooms) == 5 and image.shape[3] == 1 and zooms[3] in (0, 1) else zooms[3])
    unit = image.header.get_xyzt_units()[1] if hasattr(image.header, "get_xyzt_units") else "sec"
    return value * {"msec": 1e-3, "usec": 1e-6}.get(unit, 1.0) if 0 < value < math.inf else None


def places_in(
    image: Any, shape: tuple[int, ...], affine: ArrayLike | None, voxels: tuple[NDArray[Any], ...], name: str, grid: str
) -> NDArray[np.int64]:
    """Where the voxels of a grid are in an image of the same grid, reoriented perhaps: flat, first axis fastest.

    Parameters
    ----------
    image : nibabel image
    shape, affine
        Of the grid; None for an affine that is not known.
    voxels : three int arrays
        Of the grid.
    name, grid : str
        What errors call image and grid.

    Raises
    ------
    InputError
        If the image lies elsewhere, or has other voxels.
    """
    own = tuple(int(n) for n in image.shape[:3])
    if sorted(own) != sorted(shape):
        raise InputError(f"{name} has shape {tuple(image.shape)}: {grid} needs {tuple(shape)} and a time axis")
    if affine is None or image.affine is None:
        axes: tuple[int, ...] = (0, 1, 2)
        flips: tuple[bool, ...] = (False, False, False)
        if own != tuple(shape):
            raise InputError(f"{name} has shape {tuple(image.shape)}: {grid} needs {tuple(shape)} and a time axis")
    else:
        found = _turn(own, np.asarray(image.affine, float), tuple(shape), np.asarray(affine, float))
        if found is None:
            raise InputError(
                f"{name} and {grid} have different affines, and no turn or flip of axes makes them one: resample one "
                f"to the other first (origins {np.round(image.affine[:3, 3], 2).tolist()} and "
                f"{np.round(np.asarray(affine)[:3, 3], 2).tolist()})"
            )
        axes, flips = found
    moved: list[NDArray[Any]] = [np.empty(0)] * 3
    for place, axis, flip in zip(voxels, axes, flips):
        moved[axis] = own[axis] - 1 - place if flip else place
    return np.ravel_multi_index(tuple(moved), own, order="F").astype(np.int64)


def _turn(
    own: tuple[int, ...], own_affine: NDArray[Any], shape: tuple[int, ...], affine: NDArray[Any]
) -> tuple[tuple[int, ...], tuple[bool, ...]] | None:
    """For each axis of a grid the axis of the image that it is, and whether it runs backwards; None if they differ."""
    try:
        step = np.linalg.inv(own_affine) @ affine
    except np.linalg.LinAlgError:
        return None
    axes = tuple(int(axis) for axis in np.abs(step[:3, :3]).argmax(axis=0))
    if sorted(axes) != [0, 1, 2] or tuple(own[axis] for axis in axes) != tuple(shape):
        return None
    flips = tuple(bool(step[axis, i] < 0) for i, axis in enumerate(axes))
    wanted = np.zeros((4, 4))
    wanted[3, 3] = 1
    for i, (axis, flip) in enumerate(zip(axes, flips)):
        wanted[axis, i] = -1 if flip else 1
        wanted[axis, 3] = own[axis] - 1 if flip else 0
    corners = np.array([[*np.multiply(corner, np.subtract(shape, 1)), 1] for corner in np.ndindex(2, 2, 2)]).T
    return (axes, flips) if np.abs((step - wanted) @ corners).max() <= _NEAR else None


def read_voxels(image: Any, places: NDArray[np.int64], name: str) -> NDArray[np.float32]:
    """Values at flat `places` (first axis fastest) of every volume: float32 ``(n_volumes, n_places)``."""
    n_volumes = int(np.prod(image.shape[3:], dtype=np.int64))
    start = 0
    with readable(name):
        out = np.empty((n_volumes, len(places)), dtype=np.float32)
        for slab in _slabs(image, n_volumes):
            for volume in slab:
                out[start] = volume[places]
                start += 1
    if start != n_volumes:
        raise InputError(f"{name} holds {start} volumes where its header says {n_volumes}: it was truncated")
    return out


def _slabs(image: Any, n_volumes: int) -> Iterator[NDArray[Any]]:
    """A few volumes at a time, each flat with the first axis fastest: ``(n, n_voxels)``."""
    from nibabel.arrayproxy import ArrayProxy
    from nibabel.openers import ImageOpener
    from nibabel.volumeutils import apply_read_scaling

    data = image.dataobj
    n_voxels = int(np.prod(image.shape[:3], dtype=np.int64))
    at_once = max(1, _SLAB_BYTES // (8 * n_voxels))
    name = getattr(data, "file_like", None)
    compressed = isinstance(name, (str, Path)) and str(name).endswith((".gz", ".bz2", ".zst"))
    if type(data) is ArrayProxy and compressed and data.order == "F":
        # a compressed file can only be read from its start: once, not once a slab
        with ImageOpener(str(name)) as file:
            file.seek(data.offset)
            for start in range(0, n_volumes, at_once):
                count = min(at_once, n_volumes - start) * n_voxels
                raw = file.read(count * data.dtype.itemsize)
                if len(raw) != count * data.dtype.itemsize:
                    raise EOFError("the file ends within a volume")
                values = np.frombuffer(raw, dtype=data.dtype)
                yield apply_read_scaling(values, data.slope, data.inter).reshape(-1, n_voxels)
            while file.read(_SLAB_BYTES):  # to the end, where gzip's checksum is compared
                pass
        return
    if len(image.shape) == 3:
        yield np.asarray(data).reshape(1, n_voxels, order="F")
        return
    axis = 4 if len(image.shape) == 5 and image.shape[3] == 1 else 3
    for start in range(0, n_volumes, at_once):
        part = (slice(None),) * axis + (slice(start, start + at_once),)
        block = np.asarray(data[part])
        yield block.reshape((n_voxels, -1), order="F").T

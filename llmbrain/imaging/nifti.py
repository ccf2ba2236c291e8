"""NIfTI: values of neurons as images, and back.

Axes are (column, row, layer, token or map); numbers are float32; the affine is the identity, since a voxel is a neuron
and there are no millimetres. NIfTI-1 holds at most 32767 along an axis: beyond, NIfTI-2 is written. The geometry
travels as JSON in a header extension and, for files that llmbrain writes, in a ``.json`` beside the image, so that a
tool that drops extensions does not lose it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmbrain._files import (
    DamagedError,
    discard_file,
    file_sha256,
    read_json,
    read_sums,
    refuse_newer,
    verifying,
    write_json,
    writing,
)
from llmbrain._validation import InputError
from llmbrain.anatomy.space import NeuronSpace
from llmbrain.imaging.grid import load_image, places_in, read_voxels, spatial_shape

FORMAT = "llmbrain-space"
IMAGE_SUM = "image_sha256"
LONGEST_NIFTI1 = 32767
SUFFIXES = (".nii", ".nii.gz")
_BLOCK = 64  # volumes laid out at once


def maps_to_nifti(maps: ArrayLike, space: NeuronSpace, facts: Mapping[str, Any] | None = None) -> Any:
    """Values of neurons as an image in memory.

    Parameters
    ----------
    maps : array ``(n_neurons,)`` or ``(n_maps, n_neurons)``
        Gives a 3D or a 4D image.
    space : NeuronSpace
    facts : mapping, optional
        More to keep in the header extension; must be JSON.

    Returns
    -------
    nibabel Nifti1Image, or Nifti2Image where an axis exceeds 32767
        float32, padding cells 0.

    Raises
    ------
    InputError
        If the values do not fit the space.
    """
    values = np.asarray(maps, dtype=np.float32)
    if values.ndim not in (1, 2):
        raise InputError(f"maps of shape {values.shape} must be (n_neurons,) or (n_maps, n_neurons)")
    image_class, header = _header((*space.shape, *values.shape[:-1]), space, facts)
    return image_class(space.to_volume(values), space.affine, header)


def write_nifti(
    path: str | Path,
    values: ArrayLike | Iterable[NDArray[Any]],
    space: NeuronSpace,
    n_volumes: int | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Write values of neurons as a NIfTI file with its ``.json`` sidecar.

    Parameters
    ----------
    path : path
        Ends in ``.nii`` or ``.nii.gz``; the sidecar has the same stem.
    values : array ``(n_neurons,)`` or ``(n_volumes, n_neurons)``, or iterable of such arrays with `n_volumes`
        An iterable is written piece by piece, so that memory is bounded by its largest piece.
    space : NeuronSpace
    n_volumes : int, optional
        Number of volumes that the iterable will give in all.
    facts : mapping, optional
        More to keep in the header extension and the sidecar.

    Returns
    -------
    Path
        Of the image. It exists only if all was written.
    """
    path = Path(path)
    suffix = next((s for s in sorted(SUFFIXES, key=len, reverse=True) if path.name.endswith(s)), None)
    if suffix is None:
        raise InputError(f"path={str(path)!r} must end in .nii or .nii.gz")
    pieces: Iterable[NDArray[Any]]
    if n_volumes is None:
        array = np.asarray(values)
        if array.ndim not in (1, 2):
            raise InputError(f"values of shape {array.shape} must be (n_neurons,) or (n_volumes, n_neurons)")
        pieces, shape = [np.atleast_2d(array)], (*space.shape, *array.shape[:-1])
    else:
        pieces, shape = values, (*space.shape, n_volumes)  # type: ignore[assignment]
    _, header = _header(shape, space, facts)
    record = {"axes": ["column", "row", "layer", "token"][: len(shape)], **_record(space, facts)}
    volumes = int(np.prod(shape[3:]))
    needed = 4 * volumes * int(np.prod(space.shape)) if suffix == ".nii" else None
    with writing(path, needed=needed) as temporary:
        _stream(temporary, header, pieces, space, volumes)
        record[IMAGE_SUM] = _sums_beside(path, space) | {path.name: file_sha256(temporary)}
        discard_file(sidecar_of(path))  # an image without one is whole; beside another's it would count as altered
    write_json(sidecar_of(path), record, seal=True)
    return path


def read_nifti(image: Any, space: NeuronSpace | None = None) -> tuple[NDArray[np.float32], NeuronSpace]:
    """Values of neurons in an image that llmbrain made, or that a tool made from one.

    Parameters
    ----------
    image : path or nibabel image
    space : NeuronSpace, optional
        For an image that has lost its header extension and its sidecar (nilearn's results in memory).

    Returns
    -------
    values : float32 array ``(n_neurons,)`` or ``(n_volumes, n_neurons)``
    space : NeuronSpace

    Raises
    ------
    InputError
        If the file is no NIfTI, has no header of ours, or does not have the shape its header says; if its affine says
        that voxels lie elsewhere. Axes that a tool flipped or swapped, and said so in the affine, are put back.
    """
    loaded, path = load_image(image, nifti=True)
    # An image without our extension was written anew by another program: its bytes are not ours.
    ours = isinstance(image, (str, Path)) and path is not None and _has_our_extension(loaded)
    sums = _sums_of(path) if ours and path is not None else {}
    beside = "" if path is None else f"write the image again, or remove {sidecar_of(path).name} if a program changed it"
    with verifying(sums, anew=beside):
        return _values_of(loaded, path, str(path) if path else "this image", space)


def _values_of(
    loaded: Any, path: Path | None, name: str, space: NeuronSpace | None
) -> tuple[NDArray[np.float32], NeuronSpace]:
    if space is None:
        space = _space_of(loaded, path, name)
    shape, n_volumes = spatial_shape(loaded, name)
    if sorted(shape) != sorted(space.shape):
        raise InputError(
            f"{name} has shape {loaded.shape}, but its space needs {space.shape} and at most one more axis"
        )
    places = places_in(loaded, space.shape, space.affine, space.voxels, name, "the space of neurons")
    values = read_voxels(loaded, places, name)
    return (values[0] if n_volumes is None else values), space


def sidecar_of(path: Path) -> Path:
    """The ``.json`` beside a ``.nii`` or ``.nii.gz``."""
    return path.with_name(path.name.removesuffix(".gz").removesuffix(".nii") + ".json")


# -- writing -----------------------------------------------------------------------------------------------------------


def _record(space: NeuronSpace, facts: Mapping[str, Any] | None) -> dict[str, Any]:
    return {"format": FORMAT, "format_version": 1, "space": space.to_dict(), **(facts or {})}


def _header(shape: tuple[int, ...], space: NeuronSpace, facts: Mapping[str, Any] | None) -> tuple[Any, Any]:
    """Image class and header for float32 data of this shape, with the space in an extension."""
    from nibabel.nifti1 import Nifti1Extension, Nifti1Image
    from nibabel.nifti2 import Nifti2Image

    image_class = Nifti1Image if max(shape) <= LONGEST_NIFTI1 else Nifti2Image
    header = image_class.header_class()
    header.set_data_shape(shape)
    header.set_data_dtype(np.float32)
    header.set_sform(space.affine, code="aligned")
    header.set_xyzt_units("mm", "sec")  # there are no millimetres; validators ask for a unit, and a token is a second
    header["descrip"] = b"llmbrain: a voxel is a neuron"
    content = json.dumps(_record(space, facts)).encode("utf-8")
    header.extensions.append(Nifti1Extension("comment", content))
    return image_class, header


def _stream(path: Path, header: Any, pieces: Iterable[NDArray[Any]], space: NeuronSpace, n_volumes: int) -> None:
    """Header, then the volumes as they come; a volume is contiguous in NIfTI's order."""
    from nibabel.openers import ImageOpener

    written = 0
    with ImageOpener(str(path), "wb") as file:
        header.write_to(file)
        at = int(header["vox_offset"]) or header.single_vox_offset + header.extensions.get_sizeondisk()
        file.write(b"\0" * (at - file.tell()))
        for block in _small(pieces):
            volumes = space.to_volume(block.astype("<f4", copy=False))
            file.write(volumes.tobytes(order="F"))
            written += len(block)
    if written != n_volumes:
        raise InputError(f"{written} volumes were given where n_volumes={n_volumes}")


def _small(pieces: Iterable[NDArray[Any]]) -> Iterator[NDArray[Any]]:
    for piece in pieces:
        for start in range(0, len(piece), _BLOCK):
            yield piece[start : start + _BLOCK]


# -- reading -----------------------------------------------------------------------------------------------------------


def _has_our_extension(image: Any) -> bool:
    return any(FORMAT.encode() in _content(e) for e in getattr(image.header, "extensions", ()))


def _content(extension: Any) -> bytes:
    content = extension.get_content()
    return content if isinstance(content, bytes) else str(content).encode()


def _sums_of(path: Path) -> dict[Path, str]:
    """Checksum of an image that llmbrain wrote: in its sidecar, or in the ``SHA256SUMS`` of its folder."""
    sidecar = sidecar_of(path)
    if sidecar.is_file():
        try:
            record = read_json(sidecar, anew="write the image again")
        except DamagedError:
            if _is_ours(sidecar):
                raise
            record = {}
        own = record.get(IMAGE_SUM)
        if isinstance(own, dict) and isinstance(own.get(path.name), str):
            return {path: own[path.name]}
    sums = read_sums(path.parent, strict=False)
    return {path: sums[path.name]} if path.name in sums else {}


def _sums_beside(path: Path, space: NeuronSpace) -> dict[str, str]:
    """Checksums of an image of the other ending, which shares the sidecar."""
    sidecar = sidecar_of(path)
    try:
        record = read_json(sidecar)
        sums = {name: str(digest) for name, digest in record[IMAGE_SUM].items()}
    except (InputError, FileNotFoundError, KeyError, AttributeError):
        return {}
    same = record.get("space") == space.to_dict()
    return {n: d for n, d in sums.items() if same and n != path.name and (path.parent / n).is_file()}


def _is_ours(sidecar: Path) -> bool:
    """Whether a damaged sidecar was ours: other programs keep what they like beside an image."""
    content = sidecar.read_bytes()
    return FORMAT.encode() in content or IMAGE_SUM.encode() in content


def _space_of(image: Any, path: Path | None, name: str) -> NeuronSpace:
    """From the header extension, else from the sidecar."""
    texts = [_content(extension) for extension in image.header.extensions]
    if path is not None and sidecar_of(path).is_file():
        texts.append(sidecar_of(path).read_bytes())
    for text in texts:
        try:
            record = json.loads(text.rstrip(b"\0"))
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and record.get("format") == FORMAT:
            refuse_newer(record, name)
            try:
                return NeuronSpace.from_dict(record["space"])
            except (KeyError, TypeError, AttributeError):
                raise DamagedError(f"{name} has an llmbrain header without a space: it was edited") from None
            except InputError as error:
                raise DamagedError(f"{name} has an llmbrain header that cannot be right: {error}") from None
    raise InputError(
        f"{name} has no llmbrain header (nor a .json beside it): which neuron a voxel is can not be known. Pass "
        "space=, or mask= where these are images of a brain"
    )

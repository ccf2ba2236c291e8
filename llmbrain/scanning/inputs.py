"""One way to read a run: a `Scan`, an array, a tensor, a NIfTI image or its path, one at a time and checked."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeGuard, cast

import numpy as np
import torch
from scipy.sparse import issparse

from llmbrain._files import clear_damage
from llmbrain._validation import InputError
from llmbrain.imaging.brain_mask import BrainMask
from llmbrain.imaging.confounds import as_confounds, without_confounds
from llmbrain.imaging.nifti import read_nifti
from llmbrain.imaging.surface import Grayordinates, is_surface, read_surface

if TYPE_CHECKING:
    import pandas as pd
    from nibabel.spatialimages import SpatialImage
    from numpy.typing import NDArray

    from llmbrain.anatomy.space import NeuronSpace


class HasData(Protocol):
    """What reads its own numbers when asked, as a `Scan` does."""

    def data(self) -> NDArray[Any]:
        """``(n_tokens, n_neurons)``."""


RunLike: TypeAlias = "HasData | NDArray[Any] | torch.Tensor | SpatialImage | str | Path"

_NIFTI = (".nii", ".nii.gz")


def _is_image(run: object) -> TypeGuard[SpatialImage]:
    return hasattr(run, "dataobj") and hasattr(run, "affine")


def _is_single(runs: object) -> TypeGuard[RunLike]:
    """Whether `runs` is one run, not a collection of runs."""
    if (
        isinstance(runs, (str, Path))
        or _is_image(runs)
        or (is_surface(runs) and not isinstance(runs, tuple))
        or callable(getattr(runs, "data", None))
    ):
        return True
    return getattr(runs, "ndim", None) == 2


def find_non_finite(data: np.ndarray | torch.Tensor, name: str, space: NeuronSpace | None = None) -> None:
    """Raise `InputError` naming run, token and neuron of the first NaN or infinity in (tokens, neurons) data."""
    values = torch.as_tensor(data)
    if not values.numel() or all(bool(torch.isfinite(end)) for end in torch.aminmax(values)):
        return  # both ends are NaN if anything is
    for token, row in enumerate(values):
        bad = torch.nonzero(~torch.isfinite(row))
        if len(bad):
            unit = int(bad[0])
            where = f"neuron {unit}"
            if space is not None and space.n_neurons == values.shape[1]:
                layer, neuron = space.locate(unit)
                where = f"neuron (layer {int(layer)}, neuron {int(neuron)})"
            raise InputError(
                f"{name} holds {float(row[unit])} at token {token}, {where}: all activations must be finite, not NaN "
                f"or inf ({len(bad)} such neurons at this token)"
            )


class Runs(Sequence[np.ndarray]):
    """Runs as a sequence of (n_tokens, n_neurons) float arrays that are read when asked for, and never kept.

    Parameters
    ----------
    runs : Scan, array, tensor, NIfTI, CIFTI or GIFTI image or path, or a sequence of them
        Anything with a ``.data()`` method is read through it. A path ends in ``.nii``, ``.nii.gz``, ``.gii`` or
        ``.npy``. A tuple of GIFTI files is one run: its hemispheres side by side.
    mask_img : NIfTI image or path, optional
        Voxels to read from NIfTI images of a brain; images written by llmbrain carry their own space and need none.
    space : NeuronSpace, optional
        Where the neurons lie, for arrays; taken from the runs where they know it.
    confounds : sequence, optional
        One a run: a table, an array ``(n_volumes, n_confounds)``, a path, or None. They are regressed out of the run
        when it is read; its means stay.

    Attributes
    ----------
    n_neurons : int or None
        Width of every run, known after the first was read.
    space : NeuronSpace or None
    surface : Grayordinates or None
        Where the columns of CIFTI and GIFTI lie, known after the first was read.

    Raises
    ------
    InputError
        When a run is not two-dimensional, differs in width from the first, holds a value that is not finite (named by
        run, token and neuron), or is a NIfTI image that cannot be placed.
    """

    def __init__(
        self,
        runs: RunLike | Iterable[RunLike],
        *,
        mask_img: SpatialImage | str | Path | None = None,
        space: NeuronSpace | None = None,
        confounds: Sequence[Any] | None = None,
    ) -> None:
        if runs is None or not (hasattr(runs, "__iter__") or hasattr(runs, "__array__") or _is_single(runs)):
            raise InputError(f"runs={runs!r}: pass a scan, an array, a NIfTI image, or a sequence of them")
        if hasattr(runs, "__array__") and not hasattr(runs, "ndim") and not _is_image(runs):
            runs = np.asarray(runs)
        if getattr(runs, "ndim", None) == 1 and np.asarray(runs).dtype.kind in "fiubc":
            raise InputError(
                f"runs has shape {np.asarray(runs).shape}: a run is (n_tokens, n_neurons). Reshape your data: "
                "array.reshape(-1, 1) is one neuron, array.reshape(1, -1) is one token"
            )
        items: list[RunLike] = [runs] if _is_single(runs) else list(cast(Iterable[RunLike], runs))
        if not items:
            raise InputError("runs is empty: pass at least one scan, array or NIfTI image")
        self._items = items
        self._confounds = None if confounds is None else list(confounds)
        if self._confounds is not None and len(self._confounds) != len(items):
            raise InputError(f"confounds has {len(self._confounds)} tables for {len(items)} runs: one each is needed")
        self.space = space
        self.n_neurons: int | None = space.n_neurons if space is not None else None
        self.mask = None if mask_img is None else BrainMask(mask_img)
        self.surface: Grayordinates | None = None
        if self.mask is not None:
            self.n_neurons = self.mask.n_voxels

    def __len__(self) -> int:
        return len(self._items)

    def name(self, index: int) -> str:
        """How errors call this run: its number, and its own name or path where it has one."""
        item = self._items[index]
        own = item if isinstance(item, (str, Path)) else getattr(item, "name", None)
        return f"run {index}" if not isinstance(own, (str, Path)) or not str(own) else f"run {index} ({own})"

    def positions(self, index: int) -> np.ndarray | None:
        """Position of each token in its context block, for scans; None for what does not know."""
        positions = getattr(self._items[index], "positions", None)
        return None if positions is None or callable(positions) else np.asarray(positions)

    def events(self, index: int) -> pd.DataFrame | None:
        """Events of a run, for scans; None for what has none."""
        events = getattr(self._items[index], "events", None)
        return events if hasattr(events, "columns") else None

    def origin(self) -> dict[str, str]:
        """The `Scan.origin` that all runs share; empty where they have none, or several."""
        found = [dict(getattr(item, "origin", None) or {}) for item in self._items]
        return found[0] if all(own == found[0] for own in found) else {}

    def digest(self, index: int) -> str:
        """Hash of a run: of where it comes from, for a scan in a store; else of its numbers, which are read."""
        item = self._items[index]
        scan = (getattr(item, "origin", None) or {}).get("scan")
        if isinstance(scan, str) and self._confounds is None:
            facts = [scan, getattr(item, "name", ""), getattr(item, "site", ""), str(getattr(item, "text", ""))]
            return hashlib.sha256("\0".join(facts).encode("utf-8", "surrogatepass")).hexdigest()
        data = self.read(index, check=False)
        digest = hashlib.sha256(f"{data.dtype.str} {data.shape} ".encode())
        digest.update(np.ascontiguousarray(data).data)
        return digest.hexdigest()

    def facts(self) -> str:
        """A short hash of what the runs are, nothing of them being read: names, lengths, tokens, ends of arrays.

        Of scans in a store also of which, and what site; of files their size; and the tables of confounds.
        """
        found = hashlib.sha256()
        for index, item in enumerate(self._items):
            found.update(self.name(index).encode())
            tokens = getattr(item, "token_ids", None)
            own = None if self._confounds is None else self._confounds[index]
            if own is not None:
                table = own if isinstance(own, (str, Path)) else np.asarray(own, dtype=np.float64)
                found.update(str(table).encode() if isinstance(table, (str, Path)) else table.tobytes())
            if isinstance(item, (str, Path)) and Path(item).is_file():
                found.update(f"{Path(item).stat().st_size}".encode())
            if tokens is not None:
                found.update(
                    f"{(getattr(item, 'origin', None) or {}).get('scan')} {getattr(item, 'site', '')}".encode()
                )
            if isinstance(item, torch.Tensor):
                item = item.detach().cpu().float().numpy()
            if isinstance(item, np.ndarray) and item.ndim == 2 and item.dtype.kind in "fiub":
                found.update(f"{item.shape}".encode())
                found.update(np.ascontiguousarray(item[[0, -1]]).tobytes())
            elif tokens is not None:
                found.update(np.asarray(tokens).tobytes())
        return found.hexdigest()[:16]

    def lattice(self) -> np.ndarray | None:
        """Where voxels of a brain mask lie, int (n_voxels, 3); None for neurons, whose numbers are one axis."""
        return None if self.mask is None else np.argwhere(self.mask.volume)

    def read(self, index: int, *, check: bool = True, narrow: bool = False) -> np.ndarray:
        """Read one run; `check` looks for values that are not finite, and with `narrow` float16 stays as it is."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        data, space = self._read(self._items[index], self.name(index))
        data = _as_float(data, self.name(index), narrow=narrow and self._confounds is None)
        self._check_space(index, data.shape[1], space)
        own = None if self._confounds is None else self._confounds[index]
        if own is not None:
            data = without_confounds(data, as_confounds(own, len(data), self.name(index)), self.name(index))
        if check:
            find_non_finite(data, self.name(index), self.space)
        return data

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            raise TypeError("read one run at a time")
        return self.read(index)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[index] for index in range(len(self)))

    def _check_space(self, index: int, width: int, space: NeuronSpace | None) -> None:
        if space is not None and space.n_neurons != width:
            space = None  # the scan was asked for a site that its space does not describe
        if self.n_neurons is None:
            self.n_neurons = width
        if width != self.n_neurons:
            wanted = "runs before it" if index else "space or mask given"
            raise InputError(
                f"{self.name(index)} has {width} neurons, the {wanted} {self.n_neurons}: all must have the same neurons"
            )
        if self.space is None and index == 0:
            self.space = space
        elif space is not None and self.space is not None and space != self.space:
            raise InputError(f"{self.name(index)} has another neuron space than the first: widths {space.widths}")

    def _read(self, item: RunLike, name: str) -> tuple[object, NeuronSpace | None]:
        if is_surface(item):
            return self._read_surface(item, name), None
        if isinstance(item, (str, Path)):
            path = Path(item)
            if not path.exists():
                raise FileNotFoundError(f"{name}: no such file")
            if path.name.endswith(".npy"):
                with clear_damage(path, "an array of numbers"):
                    return np.load(path, mmap_mode="c", allow_pickle=False), None
            if not path.name.endswith(_NIFTI):
                raise InputError(f"{name} is no run: a path must end in .nii, .nii.gz or .npy (or .gii)")
            if self.mask is not None:
                return self.mask.read(path, name), None
            return read_nifti(path)
        if _is_image(item):
            return (self.mask.read(item, name), None) if self.mask is not None else read_nifti(item)
        if not isinstance(item, (np.ndarray, torch.Tensor)) and callable(getattr(item, "data", None)):
            space = getattr(item, "space", None)
            return item.data(), space
        return item, None

    def _read_surface(self, item: object, name: str) -> np.ndarray:
        """CIFTI or GIFTI: every run must have the columns of the first."""
        if isinstance(item, (str, Path)) and not Path(item).exists():
            raise FileNotFoundError(f"{name}: no such file")
        if self.mask is not None:
            raise InputError(f"{name} is CIFTI or GIFTI, which has no voxels: leave the mask out")
        values, surface = read_surface(item, name)
        if self.surface is None:
            self.surface = surface
        self.surface.check_same(surface, name)
        return values


def _as_float(data: object, name: str, *, narrow: bool = False) -> np.ndarray:
    """A (n_tokens, n_neurons) array of float32, or float64 if it was that (`narrow`: or float16); no needless copy."""
    if isinstance(data, torch.Tensor):
        data = data.detach().cpu()
        data = (data if data.dtype == torch.float64 else data.float()).numpy()
    if np.ma.is_masked(data):
        raise InputError(f"{name} is a masked array with masked values: leave these neurons or tokens out")
    if issparse(data):
        raise InputError(f"{name} is sparse: sparse input is not supported, pass its .toarray()")
    data = np.asarray(data)
    if data.dtype == object and data.ndim == 2:
        data = data.astype(np.float64)  # a TypeError of numpy where an item is no number
    if data.ndim != 2 or 0 in data.shape or data.dtype.kind not in "fiub":
        what = f"{name} has shape {data.shape} and dtype {data.dtype}: pass numbers, (n_tokens, n_neurons)"
        if data.dtype.kind == "c":
            what += ". Complex data not supported"
        elif data.ndim == 2 and not data.shape[1]:
            what += f". 0 feature(s) (shape={data.shape}) while a minimum of 1 is required."
        raise InputError(what)
    if data.dtype not in (np.float32, np.float64) and not (narrow and data.dtype == np.float16):
        data = data.astype(np.float32)
    if min(data.strides) < 0:
        data = data.copy()  # torch takes no view that runs backwards
    return data if data.flags.writeable else np.require(data, requirements="W")  # torch refuses read-only memory

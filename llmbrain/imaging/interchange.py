"""Component maps from and for other tools: MELODIC, FSL's dual regression, GIFT and nilearn.

What is read has the attributes that `FunctionalNetworks.from_ica` wants, whether the image shows neurons or a brain.
Files that are written have the names that FSL users know; they were not read by an FSL program here.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmbrain._files import clear_damage, transaction, verify_listed, write_image, writing
from llmbrain._validation import InputError
from llmbrain.anatomy.space import NeuronSpace
from llmbrain.imaging.brain_mask import BrainMask, brain_image, image_like
from llmbrain.imaging.grid import load_image, seconds_between_volumes
from llmbrain.imaging.nifti import maps_to_nifti, read_nifti

MELODIC = ("melodic_*", "mask.nii.gz")
Geometry = Any
"""A `NeuronSpace`, or the NIfTI image of a brain mask."""


@dataclass(frozen=True)
class ComponentMaps:
    """Components that another tool found: pass to ``FunctionalNetworks.from_ica``, or ``.components_`` anywhere.

    Attributes
    ----------
    components_ : float32 array ``(n_components, n_neurons)``
        In the order of the space, or of the mask's voxels (C order, as ``GroupICA(mask=...)`` and nilearn have it).
    mixing_ : list of array ``(n_tokens, n_components)``, or None
        Time courses, where the tool keeps them.
    space_ : NeuronSpace or None
        None for a brain.
    mask_img_ : NIfTI image or None
        The brain mask; None for neurons.
    """

    components_: NDArray[np.float32]
    mixing_: list[NDArray[np.float64]] | None = None
    space_: NeuronSpace | None = None
    mask_img_: Any = None

    def components_img(self) -> Any:
        """The maps as a 4D image."""
        return to_image(self.components_, self.space_ if self.space_ is not None else self.mask_img_)


# -- reading -----------------------------------------------------------------------------------------------------------


def read_melodic(folder: str | Path, *, space: NeuronSpace | None = None, mask_img: Any = None) -> ComponentMaps:
    """Read a MELODIC folder: ``melodic_IC``, ``melodic_mix``, ``mask``.

    Parameters
    ----------
    folder : path
    space : NeuronSpace, optional
        For images of neurons that lost their llmbrain header on the way through other tools.
    mask_img : NIfTI image or path, optional
        For images of a brain; default: the folder's own mask.

    Returns
    -------
    ComponentMaps
        A MELODIC over several runs writes their time courses in one piece: then ``mixing_`` has one entry.
    """
    folder = Path(folder)
    image = _find(folder, "melodic_IC")
    mask = mask_img if mask_img is not None else _find(folder, "mask", needed=False)
    maps, found_space, found_mask = _read_components(image, space, mask)
    mixing = None
    if (folder / "melodic_mix").is_file():
        courses = _read_table(folder / "melodic_mix", len(maps))
        lengths = _lengths(folder)
        mixing = np.split(courses, np.cumsum(lengths)[:-1]) if sum(lengths) == len(courses) else [courses]
    return ComponentMaps(maps, mixing, found_space, found_mask)


def read_gift(image: str | Path, *, space: NeuronSpace | None = None, mask_img: Any = None) -> ComponentMaps:
    """Read GIFT's component image (``*_component_ica_*.nii``), and the time courses beside it.

    Parameters
    ----------
    image : path
        4D; its time courses are in the file of the same name with ``timecourses`` instead of ``component``, one column
        a component.
    space, mask_img
        As for `read_melodic`; the default mask is every voxel that is not 0 in some component.
    """
    path = Path(image)
    maps, found_space, found_mask = _read_components(path, space, mask_img)
    # the word may be in the name of the study too: GIFT's own is the last
    starts = [match.start() for match in re.finditer("component", path.name)][::-1]
    beside = [path.with_name(f"{path.name[:i]}timecourses{path.name[i + len('component') :]}") for i in starts]
    courses = next((file for file in beside if file.is_file()), None)
    mixing = None
    if courses is not None:
        with clear_damage(courses, "an image of time courses"):
            table = np.squeeze(np.asarray(load_image(courses, whole=True)[0].dataobj, dtype=np.float64))
        if table.ndim != 2 or table.shape[1] != len(maps):
            raise InputError(f"{courses} has shape {table.shape}: expected a column for each of {len(maps)} components")
        mixing = [table]
    return ComponentMaps(maps, mixing, found_space, found_mask)


def read_nilearn(estimator: Any, *, space: NeuronSpace | None = None) -> ComponentMaps:
    """Components of a fitted nilearn ``CanICA``, ``DictLearning`` or anything with ``components_img_``.

    Parameters
    ----------
    estimator : fitted estimator
    space : NeuronSpace, optional
        For images of neurons: nilearn's results do not keep our header. Without it the maps are taken as a brain's, in
        the voxels of the estimator's mask.
    """
    if not hasattr(estimator, "components_img_"):
        raise InputError(f"estimator={type(estimator).__name__} has no components_img_: fit it first")
    mask = None
    if space is None:
        mask = getattr(estimator, "mask_img_", None)
        if mask is None:
            mask = getattr(getattr(estimator, "masker_", None), "mask_img_", None)
    maps, found_space, found_mask = _read_components(estimator.components_img_, space, mask)
    return ComponentMaps(maps, None, found_space, found_mask)


def read_dual_regression(
    folder: str | Path, *, space: NeuronSpace | None = None, mask_img: Any = None
) -> tuple[list[NDArray[np.float64]], NDArray[np.float32]]:
    """Time courses and maps ``(n_runs, n_components, n_neurons)`` in a folder of FSL's (or our) dual regression."""
    folder = Path(folder)
    tables = sorted(folder.glob("dr_stage1_subject*.txt"))
    if not tables:
        raise FileNotFoundError(f"{folder} holds no dr_stage1_subject*.txt: it is no folder of a dual regression")
    mask = mask_img if mask_img is not None else _find(folder, "mask", needed=False)
    courses, maps = [], []
    for table in tables:
        own = _find(folder, table.name.replace("stage1", "stage2").removesuffix(".txt"))
        maps.append(_read_components(own, space, mask)[0])
        courses.append(_read_table(table, len(maps[-1])))
    return courses, np.array(maps)


# -- writing -----------------------------------------------------------------------------------------------------------


def to_image(values: ArrayLike, geometry: Geometry) -> Any:
    """Values ``(n_neurons,)`` or ``(n_maps, n_neurons)`` as an image, of neurons or of a brain."""
    if geometry is None:
        raise InputError("where the neurons lie is not known: pass scans, images or a space")
    if isinstance(geometry, NeuronSpace):
        return maps_to_nifti(values, geometry)
    return brain_image(values, geometry)


def write_melodic(ica: Any, folder: str | Path) -> Path:
    """Write a fitted `GroupICA` (or what the readers here return) as MELODIC's output folder.

    ``melodic_IC.nii.gz`` (maps), ``melodic_mix`` (time courses of all runs, one below the other), ``melodic_FTmix``
    (their power spectra, without the mean), ``melodic_ICstats`` (percent of the explained, and of the total variance),
    ``mask.nii.gz``, and ``melodic_runs`` (ours: tokens of each run). FSLeyes knows such a folder by the end ``.ica``.

    Maps are z over neurons, where MELODIC's are z against the noise of each voxel.
    """
    geometry = geometry_of(ica)
    components = to_image(ica.components_, geometry)
    mixing = getattr(ica, "mixing_", None)
    alone = getattr(ica, "explained_variance_ratio_", None)
    with transaction(folder, replaces=MELODIC) as new:
        write_image(new / "melodic_IC.nii.gz", components)
        _write_mask(new, geometry)
        if mixing:
            courses = np.concatenate([np.asarray(part, dtype=np.float64) for part in mixing])
            write_numbers(new / "melodic_mix", courses)
            write_numbers(new / "melodic_FTmix", np.abs(np.fft.rfft(courses, axis=0))[1:] ** 2)
            write_numbers(new / "melodic_runs", np.array([[len(part)] for part in mixing]))
        if alone is not None:
            write_numbers(new / "melodic_ICstats", 100 * np.column_stack([alone / np.sum(alone), alone]))
    return Path(folder)


def geometry_of(fitted: Any) -> Geometry:
    """Where the neurons of a fit lie: its space, or its brain mask; None if it does not know."""
    mask = getattr(fitted, "brain_mask_", None)
    if mask is not None:
        return mask.image
    if getattr(fitted, "mask_img_", None) is not None:
        return fitted.mask_img_
    return getattr(fitted, "space_", None)


def write_stages_of_run(
    folder: Path, index: int, time_courses: ArrayLike, maps: ArrayLike, z_maps: ArrayLike, geometry: Geometry
) -> None:
    """``dr_stage1_subject00000.txt``, and where the geometry is known ``dr_stage2_subject00000`` and ``..._Z``."""
    if geometry is not None:
        write_image(folder / f"dr_stage2_subject{index:05d}.nii.gz", to_image(maps, geometry))
        write_image(folder / f"dr_stage2_subject{index:05d}_Z.nii.gz", to_image(z_maps, geometry))
    write_numbers(folder / f"dr_stage1_subject{index:05d}.txt", time_courses)


def write_components_over_runs(folder: Path, maps: ArrayLike, geometry: Geometry) -> None:
    """``mask.nii.gz`` and, for each component, ``dr_stage2_ic0000.nii.gz``: its map in every run, 4D over runs."""
    if geometry is None:
        return
    _write_mask(folder, geometry)
    for k in range(np.shape(maps)[1]):
        write_image(folder / f"dr_stage2_ic{k:04d}.nii.gz", to_image(np.asarray(maps)[:, k], geometry))


def write_stage_three(folder: str | Path, test: Any, geometry: Geometry) -> None:
    """``dr_stage3_ic0000_tstat1`` and ``..._vox_corrp_tstat1`` of a `PermutationTest`.

    As in FSL's randomise (``-x``), ``corrp`` images hold 1 - p. A two-sided test has no such name in FSL, whose tests
    are one-sided: its corrp is two-sided here.
    """
    with transaction(folder, replaces=["dr_stage3_*"]) as new:
        for k, (t, p) in enumerate(zip(test.t, test.p_fwe)):
            write_image(new / f"dr_stage3_ic{k:04d}_tstat1.nii.gz", to_image(t, geometry))
            write_image(new / f"dr_stage3_ic{k:04d}_vox_corrp_tstat1.nii.gz", to_image(1 - p, geometry))


# -- parts -------------------------------------------------------------------------------------------------------------


def _find(folder: Path, stem: str, *, needed: bool = True) -> Path | None:
    for suffix in (".nii.gz", ".nii"):
        if (folder / f"{stem}{suffix}").is_file():
            return folder / f"{stem}{suffix}"
    if needed:
        raise FileNotFoundError(f"{folder} holds no {stem}.nii.gz: it is no folder of that tool, or not complete")
    return None


def _read_components(
    image: Any, space: NeuronSpace | None, mask_img: Any
) -> tuple[NDArray[np.float32], NeuronSpace | None, Any]:
    """Maps, and the space they lie in; or, for an image without a header of ours, the brain mask they are read with."""
    loaded, _ = load_image(image)
    if isinstance(image, (str, Path)):
        verify_listed(image)
    if len(loaded.shape) != 4 and (len(loaded.shape) != 5 or loaded.shape[3] != 1):
        raise InputError(f"component image of shape {loaded.shape} must be 4D, one volume a component")
    if space is not None or _is_ours(loaded):
        values, space = read_nifti(image, space)
        return values, space, None
    if mask_img is None:
        with clear_damage("the component image", "a NIfTI image"):
            data = np.asarray(loaded.dataobj, dtype=np.float32).reshape(*loaded.shape[:3], -1)
        inside = (np.nan_to_num(data) != 0).any(axis=3)
        if not inside.any():
            raise InputError("the mask holds no voxel: every component is 0")
        mask_img = image_like(loaded, inside.astype(np.uint8))
    fits = tuple(load_image(mask_img)[0].shape[:3])
    if sorted(fits) != sorted(loaded.shape[:3]):
        raise InputError(f"mask of shape {fits} does not fit components of shape {loaded.shape}")
    mask = BrainMask(mask_img, t_r=seconds_between_volumes(loaded))
    values = np.nan_to_num(mask.read(loaded, "the component image", run=False))
    if not values.any():
        raise InputError("every component is 0 inside the mask: is it the mask of these components?")
    return values, None, mask.image


def _is_ours(image: Any) -> bool:
    return any(b'"llmbrain-space"' in bytes(e.get_content()) for e in image.header.extensions)


def _lengths(folder: Path) -> list[int]:
    file = folder / "melodic_runs"
    return [int(n) for n in _read_table(file, 1)[:, 0]] if file.is_file() else []


def _read_table(path: Path, n_columns: int) -> NDArray[np.float64]:
    verify_listed(path)
    with clear_damage(path, "a table of numbers"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "input contained no data": said below
        table = np.loadtxt(path, ndmin=2)
    if table.shape[1] != n_columns:
        raise InputError(f"{path} has {table.shape[1]} columns for {n_columns} components")
    return table


def write_numbers(path: Path, table: ArrayLike) -> None:
    """Two spaces between columns, as FSL has it, and every digit; whole or absent."""
    with writing(path) as temporary:
        np.savetxt(temporary, np.asarray(table), fmt="%.17g", delimiter="  ")


def _write_mask(folder: Path, geometry: Geometry) -> None:
    image = geometry.mask_img() if isinstance(geometry, NeuronSpace) else geometry
    write_image(folder / "mask.nii.gz", image)

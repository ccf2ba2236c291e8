"""Brains as a study: group ICA and dual regression of images and tables, as `llmbrain decompose --images` does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmbrain._progress import Say, speaker
from llmbrain._validation import InputError, check_option
from llmbrain.decomposition import DualRegression, GroupICA, dual_regression, read_ica
from llmbrain.imaging import Atlas, write_melodic
from llmbrain.imaging.confounds import DEFAULT_COLUMNS, read_confounds
from llmbrain.imaging.surface import is_surface
from llmbrain.networks import FunctionalNetworks
from llmbrain.reporting import write_report
from llmbrain.stats import PUBLISHED_Z
from llmbrain.study.folder import claim
from llmbrain.study.networks import starts_of

if TYPE_CHECKING:
    from llmbrain.imaging.atlas import Labels

IMAGES = (".nii", ".nii.gz", ".gii", ".npy")


def runs_of(
    images: Sequence[str | Path], confounds: Sequence[str | Path], columns: Sequence[str], scrub: float | None
) -> tuple[list[Any], list[Any] | None]:
    """Images as they are, parcel tables as arrays; and the chosen columns of their confounds."""
    if not images:
        raise InputError("images is empty: pass at least one run")
    if confounds and len(confounds) != len(images):
        raise InputError(f"{len(confounds)} tables of confounds for {len(images)} images: one each is needed")
    if not confounds and (columns or scrub):
        raise InputError("confounds=None (--confounds): columns and scrub are of tables of confounds")
    runs: list[Any] = []
    for path in map(Path, images):
        if path.name.lower().endswith(IMAGES):
            runs.append(path)
            continue
        from llmbrain.brains import load_fmri

        runs += list(load_fmri(path).data)
    chosen = [read_confounds(path, columns or DEFAULT_COLUMNS, scrub=scrub) for path in confounds]
    return runs, chosen or None


def _needs_mask(run: Any) -> bool:
    return isinstance(run, Path) and run.name.endswith((".nii", ".nii.gz")) and not is_surface(run)


def decompose_images(
    images: Sequence[str | Path],
    out: str | Path,
    *,
    mask: str | Path | None = None,
    n_components: int | float | str = 20,
    confounds: Sequence[str | Path] = (),
    columns: Sequence[str] = (),
    scrub: float | None = None,
    method: str = "fastica",
    threshold: float = PUBLISHED_Z,
    convention: str = "bids",
    device: str = "auto",
    random_state: int = 0,
    overwrite: bool = False,
    atlas: str | Path | None = None,
    atlas_labels: Labels | None = None,
    progress: bool | Say = True,
) -> dict[str, Any]:
    """Group ICA of brain images (or parcel tables): maps as images, time courses, networks.

    Parameters
    ----------
    images : sequence of paths
        NIfTI (with `mask`), CIFTI, GIFTI, arrays or parcel tables; one a run.
    out : path
    mask : path, optional
        Brain mask.
    n_components, method, device, random_state
        As for `GroupICA`.
    confounds : sequence of paths, optional
        One table an image; `columns` and `scrub` as for `llmbrain.imaging.read_confounds`.
    threshold : float
        |z| above which a voxel belongs to a network.
    convention : {"bids", "fsl"}
        ``"fsl"`` writes MELODIC's names beside ours.
    atlas, atlas_labels : optional
        Labels image and what its labels are called: regions in the coordinates and in the report. See
        `llmbrain.imaging.Atlas`.

    Returns
    -------
    dict
        ``ica``, ``networks`` and ``folder``, which holds a report too.
    """
    tell = speaker(progress)
    check_option("convention", convention, ("bids", "fsl"))
    runs, nuisance = runs_of(images, confounds, columns, scrub)
    if mask is None and any(_needs_mask(run) for run in runs):
        raise InputError("mask=None (--mask): NIfTI images of a brain need a mask that says which voxels are read")
    known = None if atlas is None else Atlas.of(atlas, atlas_labels)
    target = Path(out)
    settings = {
        "components": n_components, "method": method, "seed": random_state, "images": [str(path) for path in images],
        "mask": None if mask is None else str(mask), "confounds": [str(path) for path in confounds],
        "columns": list(columns), "scrub": scrub,
    }  # fmt: skip
    with claim(target, settings, overwrite=overwrite):
        if (target / "ica" / "ica.json").is_file() and not overwrite:
            tell("group ICA: done before")
            ica = read_ica(target / "ica")
        else:
            ica = GroupICA(n_components, method=method, mask=mask, random_state=random_state, device=device)
            ica.fit(runs, confounds=nuisance)
            ica.save(target / "ica", overwrite=True)
        tell(starts_of(ica))
        networks = FunctionalNetworks.from_ica(ica, threshold=threshold)
        networks.save(target, overwrite=True, atlas=known)
        if ica.brain_mask_ is not None and convention == "fsl":
            write_melodic(ica, target)
        names = {f"run {i}": str(path) for i, path in enumerate(images)}
        write_report(
            target / "report.html", title=f"Networks of {len(runs)} runs", ica=ica, networks=networks, atlas=known,
            provenance={**settings, **names},
        )  # fmt: skip
        return {"ica": ica, "networks": networks, "folder": target}


def dualreg_images(
    images: Sequence[str | Path],
    networks: str | Path,
    out: str | Path,
    *,
    mask: str | Path | None = None,
    confounds: Sequence[str | Path] = (),
    columns: Sequence[str] = (),
    scrub: float | None = None,
    normalize: bool = True,
) -> DualRegression:
    """Dual regression of brain images on networks that `decompose_images` found; parameters as there."""
    runs, nuisance = runs_of(images, confounds, columns, scrub)
    folder = Path(networks)
    known = folder / "mask.nii.gz"
    return dual_regression(
        FunctionalNetworks.load(folder), runs, normalize=normalize, out=out, confounds=nuisance,
        mask_img=mask if mask is not None or not known.is_file() else known,
    )  # fmt: skip

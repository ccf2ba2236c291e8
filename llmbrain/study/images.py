"""Brains as a study: group ICA and dual regression of images and tables, as `llmbrain decompose --images` does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmbrain._files import write_image, write_table
from llmbrain._progress import Say, speaker
from llmbrain._validation import InputError, check_option
from llmbrain.decomposition import DualRegression, GroupICA, dual_regression, read_ica
from llmbrain.imaging import write_melodic
from llmbrain.imaging.confounds import DEFAULT_COLUMNS, read_confounds
from llmbrain.networks import FunctionalNetworks
from llmbrain.stats import PUBLISHED_Z
from llmbrain.study.folder import claim

IMAGES = (".nii", ".nii.gz", ".gii", ".npy")


def runs_of(
    images: Sequence[str | Path], confounds: Sequence[str | Path], columns: Sequence[str], scrub: float | None
) -> tuple[list[Any], list[Any] | None]:
    """Images as they are, parcel tables as arrays; and the chosen columns of their confounds."""
    if not images:
        raise InputError("images is empty: pass at least one run")
    if confounds and len(confounds) != len(images):
        raise InputError(f"{len(confounds)} tables of confounds for {len(images)} images: one each is needed")
    runs: list[Any] = []
    for path in map(Path, images):
        if path.name.lower().endswith(IMAGES):
            runs.append(path)
            continue
        from llmbrain.brains import load_fmri

        runs += list(load_fmri(path).data)
    chosen = [read_confounds(path, columns or DEFAULT_COLUMNS, scrub=scrub) for path in confounds]
    return runs, chosen or None


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

    Returns
    -------
    dict
        ``ica``, ``networks`` and ``folder``.
    """
    tell = speaker(progress)
    check_option("convention", convention, ("bids", "fsl"))
    runs, nuisance = runs_of(images, confounds, columns, scrub)
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
        failed = sum(not start["converged"] for start in ica.convergence_)
        tell(f"ICA: {ica.n_iter_} steps, {failed} of {len(ica.convergence_)} starts did not converge")
        networks = FunctionalNetworks.from_ica(ica, threshold=threshold)
        networks.save(target, overwrite=True)
        if ica.brain_mask_ is not None:
            write_image(target / "desc-ICA_stat-z_components.nii.gz", ica.components_img())
            write_image(target / "mask.nii.gz", ica.brain_mask_.image)
            write_table(target / "coordinates.tsv", ica.brain_mask_.coordinates(networks))
            if convention == "fsl":
                write_melodic(ica, target)
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

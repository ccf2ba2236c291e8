"""Dual regression: from group maps to each run's own time courses and maps.

Runs are read one at a time and never kept; all sums are float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from llmbrain._files import owner
from llmbrain._progress import bar
from llmbrain._validation import InputError, resolve_device
from llmbrain.decomposition.prepare.preprocess import Preprocessing, kept_tokens, standardize_option
from llmbrain.decomposition.workers import Workers, workers
from llmbrain.distributed import ALONE, Parcel, Ranks, ranks
from llmbrain.imaging.brain_mask import split_mask
from llmbrain.imaging.confounds import Confounds, read_confounds
from llmbrain.imaging.dual_regression_folder import FolderStore, MemoryStore, array_digest
from llmbrain.imaging.interchange import write_components_over_runs, write_stage_three, write_stages_of_run
from llmbrain.scanning.inputs import Runs
from llmbrain.scanning.manifest import warn_of_other_model
from llmbrain.stats.tails import t_to_z

if TYPE_CHECKING:
    from llmbrain.anatomy.space import NeuronSpace
    from llmbrain.decomposition.permutation import PermutationTest

VARYING = "varying"
# Below this share of a neuron's variance a residual is rounding: the neuron counts as fitted to this precision.
_EXACT = 1e-14


@dataclass(frozen=True)
class DualRegression:
    """What `dual_regression` returns.

    Attributes
    ----------
    time_courses : list of array ``(n_tokens, n_networks)``, float64
        Stage 1, for every token, in the units of the data over those of the maps.
    maps : array ``(n_runs, n_networks, n_neurons)``, float64 for float64 runs, else float32
        Stage 2: change of a neuron, in its own units, for one SD of the network's time course (with ``normalize``).
    z_maps : array, same shape
        The same, divided by its standard error and turned into z.
    names : list of str
        One a run.
    space : NeuronSpace or None
    mask_img : NIfTI image or None
        The brain mask, for fMRI.
    """

    time_courses: list[NDArray[np.float64]]
    maps: NDArray[Any]
    z_maps: NDArray[Any]
    names: list[str] = field(default_factory=list)
    space: NeuronSpace | None = None
    mask_img: Any = None

    def save(self, folder: str | Path, test: PermutationTest | None = None) -> Path:
        """Write FSL's files: stages 1 and 2 and, with a `permutation_test`, stage 3.

        ``dr_stage1_subject00000.txt``, ``dr_stage2_subject00000.nii.gz``, ``dr_stage2_subject00000_Z.nii.gz``,
        ``dr_stage2_ic0000.nii.gz`` (4D over runs), ``mask.nii.gz``, ``dr_stage3_ic0000_tstat1.nii.gz`` and
        ``dr_stage3_ic0000_vox_corrp_tstat1.nii.gz`` (1 - p). Images need runs that know their space, or a brain mask.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        geometry = self.space if self.space is not None else self.mask_img
        for i, course in enumerate(self.time_courses):
            write_stages_of_run(folder, i, course, self.maps[i], self.z_maps[i], geometry)
        write_components_over_runs(folder, self.maps, geometry)
        if test is not None:
            write_stage_three(folder, test, geometry)
        return folder

    def __len__(self) -> int:
        return len(self.time_courses)

    def __repr__(self) -> str:
        runs, networks, neurons = self.maps.shape
        return f"DualRegression({runs} runs, {networks} networks, {neurons} neurons)"


def dual_regression(
    maps: Any,
    scans: Any,
    *,
    normalize: bool = True,
    standardize: str | bool = False,
    mask: Any = None,
    drop_first: int = 0,
    drop_positions: int = 1,
    mask_img: Any = None,
    confounds: Sequence[Confounds] | None = None,
    out: str | Path | None = None,
    progress: bool = False,
    device: str | torch.device = "auto",
) -> DualRegression:
    """Find each run's own version of group networks.

    In a process group every rank is given all runs and takes its share of them; rank 0 writes, all get the result.

    Parameters
    ----------
    maps : FunctionalNetworks, GroupICA or array ``(n_networks, n_neurons)``
        The group's maps.
    scans : sequence of runs, or one
        Scans, arrays ``(n_tokens, n_neurons)``, or NIfTI images or paths; read one at a time.
    normalize : bool
        Scale stage 1 time courses to unit SD (ddof 1) before stage 2, so that a run's amplitude goes into its maps
        (FSL's ``des_norm``).
    standardize : {"zscore", "center", "none"} or bool
        "zscore" (True): each neuron over the tokens of a run first, as `GroupICA` does by default; maps are then in SD
        of the neuron. "none" (False; "center" is the same, since both stages center), as in FSL: stage 1 listens most
        to the neurons with the largest variance, and in language models a few have a thousand times that of the others.
    mask : bool array ``(n_neurons,)``, ``"varying"``, NIfTI image or path, or None
        Neurons that take part; the maps are zero elsewhere. ``"varying"`` leaves out every neuron that is constant in
        at least one run, as FSL does; it reads the runs twice. Default: all. An image or its path is a brain mask, for
        runs that are fMRI images, as for `GroupICA`.
    drop_first, drop_positions : int
        Tokens that stage 2 leaves out: the first of a run, and those at the first positions of a context block (scans
        know them). The first token of a block is the attention sink: one token with activations a thousand times the
        others' would decide every map. As in `GroupICA`.
    mask_img : NIfTI image or path, optional
        Brain mask, where `mask` already says which of its voxels take part.
    confounds : sequence, optional
        One a run, regressed out of it first: as for `GroupICA.fit`.
    out : path, optional
        Folder to write run by run, with the files that `DualRegression.save` names, and the maps memory-mapped
        (``dr_maps.npy``, ``dr_z_maps.npy``) for more runs than memory holds. The same call on the same folder goes on
        where it was stopped.
    progress : bool
        Show a progress bar over runs.
    device : str or torch.device

    Returns
    -------
    DualRegression

    Raises
    ------
    InputError
        If widths differ, values are not finite, a run has too few tokens (``n_tokens <= n_networks + 1``), or the maps
        or a run's time courses are linearly dependent; the message names the run.
    FileExistsError
        If `out` holds a dual regression of other maps, runs or settings.

    Notes
    -----
    Stage 1 regresses each token on the maps, both centred over neurons; stage 2 regresses each neuron on the time
    courses, both centred over tokens (Nickerson et al. 2017, Front Neurosci 11:115, eqs. 1 and 2). Residual degrees of
    freedom are ``n_tokens - n_networks - 1``. Tokens are correlated, so that z is a scale to compare neurons on, not a
    test; for a test, see `permutation_test`.
    """
    if not (isinstance(mask, str) and mask == VARYING):
        mask, image = split_mask(mask)
        if image is not None and mask_img is not None:
            raise InputError("mask and mask_img are both images: pass one of them")
        mask_img = mask_img if image is None else image
    zscored = standardize_option(standardize) == "zscore"
    runs = Runs(scans, mask_img=mask_img, confounds=confounds)
    group = _as_maps(maps)
    settings = Preprocessing(drop_first=drop_first, drop_positions=drop_positions)
    sharing = ranks()
    with sharing.job("dual regression: mask"):
        keep_neurons = _as_mask(mask, runs, group.shape[1], sharing)
    weights = _spatial_weights(group, keep_neurons)
    shape = (len(runs), *group.shape)
    names = [runs.name(i) for i in range(len(runs))]
    chosen: dict[str, Any] = {"normalize": normalize, "standardize": zscored}
    chosen |= {"drop_first": drop_first, "drop_positions": drop_positions, "runs": names}
    if confounds is not None:
        read = [read_confounds(own) if isinstance(own, (str, Path)) else own for own in confounds]
        tables = [None if own is None else np.asarray(own, dtype=np.float64) for own in read]
        chosen["confounds"] = [array_digest(table) for table in tables]
    chosen |= {"maps": array_digest(group), "mask": array_digest(keep_neurons)}
    warn_of_other_model(maps, runs.origin())
    facts = {**chosen, "runs": [len(runs), runs.facts()]} if sharing.size > 1 else {}
    alone = nullcontext() if out is None or not sharing.leads else owner(out)
    with sharing.job("dual regression", **facts), alone:
        writes = out is not None and sharing.leads
        store = FolderStore(Path(out), shape, chosen, runs.digest) if writes and out is not None else MemoryStore(shape)
        done = int(sharing.told("dual regression", lambda: store.done))
        space = getattr(maps, "space", None) or getattr(maps, "space_", None)
        if space is None and (done or sharing.size > 1):
            runs.read(0)  # to know where neurons lie, if nothing else is left to read

        def of_run(number: int) -> Parcel:
            i = done + number
            read = runs.read(i, narrow=team.device.type != "cpu")
            _check_width(read, group.shape[1], names[i])
            data = torch.from_numpy(read)
            if team.device.type != "cuda" or data.nbytes < torch.cuda.mem_get_info(team.device)[0] // 2:
                data = data.to(team.device)  # else block by block
            keep = kept_tokens(len(data), settings, runs.positions(i), names[i])
            if keep.sum() <= len(group) + 1:
                raise InputError(
                    f"{names[i]} keeps {keep.sum()} tokens: more than {len(group) + 1} are needed for {len(group)} "
                    "networks"
                )
            if zscored:
                mean, scale = _mean_and_scale(data, keep, team)
                course = stage_one(weights * scale[:, None], data, team) - (mean * scale) @ weights
            else:
                course = stage_one(weights, data, team)
            stage2, z_maps = stage_two(course, data, team, keep=keep, normalize=normalize, name=names[i])
            if zscored:
                stage2 *= scale
            if keep_neurons is not None:
                stage2[:, ~keep_neurons] = 0
                z_maps[:, ~keep_neurons] = 0
            found = {"course": course, "maps": stage2, "z": z_maps}
            kept_dtype = np.result_type(read.dtype, np.float32).str
            return Parcel({name: torch.from_numpy(array) for name, array in found.items()}, kept_dtype)

        with workers(resolve_device(device)) as team:
            n = len(runs) - done
            found = sharing.each(n, "dual regression", of_run)
            for run in bar(found, total=n, desc="dual regression", unit="run", show=progress):
                course, stage2, z_maps = (run.tensors[name].numpy() for name in ("course", "maps", "z"))
                if out is None or sharing.leads:
                    store.add(course, stage2, z_maps, np.dtype(run.record), space or runs.space or _image_of(runs))
        space = space or runs.space
        if out is None or sharing.leads:
            store.finish(space or _image_of(runs))
        sharing.meet("dual regression: files")
        if out is not None and not sharing.leads:  # what rank 0 wrote
            store = FolderStore(Path(out), shape, chosen, runs.digest)
            if store.done < len(runs):
                raise InputError(
                    f"out={str(out)!r}: rank {sharing.rank} does not see what rank 0 wrote there: give a folder that "
                    "all machines share"
                )
        return DualRegression(store.time_courses, store.maps, store.z_maps, names, space, _image_of(runs))


def stage_one(weights: NDArray[np.float64], data: torch.Tensor, team: Workers) -> NDArray[np.float64]:
    """Time courses ``(n_tokens, n_networks)`` of one run; see `_spatial_weights`."""
    columns = torch.from_numpy(weights).to(team.device)

    def block(part: slice) -> torch.Tensor:
        return data[:, part].to(team.device).double() @ columns[part]

    total = torch.zeros((len(data), weights.shape[1]), dtype=torch.float64, device=team.device)
    for partial in team.map(block, len(weights), rows=2 * len(data)):
        total += partial
    return total.cpu().numpy()


def stage_two(
    course: NDArray[np.float64],
    data: torch.Tensor,
    team: Workers,
    *,
    keep: NDArray[np.bool_] | None = None,
    normalize: bool = True,
    name: str = "run",
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Maps and z-maps ``(n_networks, n_neurons)`` of one run from its time courses and its data, over tokens `keep`."""
    rows = None if keep is None or keep.all() else torch.from_numpy(np.flatnonzero(keep)).to(data.device)
    course = course if keep is None else course[keep]
    n_tokens, n_networks = course.shape
    design = course - course.mean(axis=0)
    if normalize:
        spread = design.std(axis=0, ddof=1)
        if not spread.all():
            raise InputError(f"{name}: the time course of network {int(np.argmin(spread))} is constant")
        design = design / spread
    basis, triangle = np.linalg.qr(design)
    _check_rank(triangle, f"the time courses of {name} are")
    inverse = np.linalg.inv(triangle)
    error = np.sqrt((inverse**2).sum(axis=1))[:, None]  # of a coefficient, for unit residual SD
    df = n_tokens - n_networks - 1
    project = torch.from_numpy(basis.T.copy()).to(team.device)
    maps, z_maps = (np.empty((n_networks, data.shape[1])) for _ in range(2))

    def block(part: slice) -> None:
        x = (data[:, part] if rows is None else data[rows, part]).to(team.device).double()
        x = x - x[0]  # exact zeros for constant neurons, whatever their value
        x -= x.mean(dim=0)
        scores = project @ x
        total = x.square().sum(dim=0)
        residual = torch.maximum(total - scores.square().sum(dim=0), _EXACT * total).cpu().numpy()
        maps[:, part] = inverse @ scores.cpu().numpy()
        scale = error * np.sqrt(residual / df)
        t = np.divide(maps[:, part], scale, out=np.zeros_like(maps[:, part]), where=scale > 0)
        z_maps[:, part] = t_to_z(t, df)

    for _ in team.map(block, data.shape[1], rows=2 * n_tokens):
        pass
    return maps, z_maps


def _mean_and_scale(
    data: torch.Tensor, keep: NDArray[np.bool_], team: Workers
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and 1 / SD (ddof 0) of each neuron over tokens `keep`; the scale of a constant neuron is 0."""
    rows = None if keep.all() else torch.from_numpy(np.flatnonzero(keep)).to(data.device)

    def block(part: slice) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        x = (data[:, part] if rows is None else data[rows, part]).to(team.device).double()
        mean = x.mean(dim=0)
        spread = (x - x[0]).std(dim=0, correction=0)
        return mean.cpu().numpy(), torch.where(spread > 0, 1 / spread, 0).cpu().numpy()

    means, scales = zip(*team.map(block, data.shape[1], rows=2 * len(data)))
    return np.concatenate(means), np.concatenate(scales)


def _as_maps(maps: Any) -> NDArray[np.float64]:
    for attribute in ("components_", "maps"):
        maps = getattr(maps, attribute, maps)
    group = np.atleast_2d(np.asarray(maps, dtype=np.float64))
    if group.ndim != 2 or 0 in group.shape:
        raise InputError(f"maps has shape {group.shape}: expected (n_networks, n_neurons)")
    if not np.isfinite(group).all():
        network, neuron = np.argwhere(~np.isfinite(group))[0]
        raise InputError(f"maps holds {group[network, neuron]} in network {network} at neuron {neuron}")
    return group


def _as_mask(mask: ArrayLike | str | None, runs: Runs, n_neurons: int, team: Ranks = ALONE) -> NDArray[np.bool_] | None:
    if mask is None:
        return None
    if isinstance(mask, str):
        constant = torch.zeros(n_neurons, dtype=torch.int64)
        for i in team.mine(len(runs)):
            data = runs[i]
            _check_width(data, n_neurons, runs.name(i))
            constant += torch.from_numpy((data == data[0]).all(axis=0))
        keep = (team.sum([constant], "mask")[0] == 0).numpy()
    else:
        keep = np.asarray(mask)
        if keep.shape != (n_neurons,) or keep.dtype != bool:
            raise InputError(f"mask has shape {keep.shape} and dtype {keep.dtype}: expected bool ({n_neurons},)")
    if not keep.any():
        raise InputError(f"mask={mask if isinstance(mask, str) else 'array'!r} removes every neuron")
    return keep


def _check_width(data: NDArray[Any], n_neurons: int, name: str) -> None:
    if data.shape[1] != n_neurons:
        raise InputError(f"{name} has {data.shape[1]} neurons, the maps have {n_neurons}: they must be the same")


def _check_rank(triangle: NDArray[np.float64], subject: str) -> None:
    singular = np.linalg.svd(triangle, compute_uv=False)
    rank = int((singular > len(triangle) * 1e-13 * singular[0]).sum()) if singular[0] > 0 else 0
    if rank < len(triangle):
        raise InputError(
            f"{subject} linearly dependent: rank {rank} of {len(triangle)}; leave out the surplus networks"
        )


def _spatial_weights(group: NDArray[np.float64], keep: NDArray[np.bool_] | None) -> NDArray[np.float64]:
    """``(n_neurons, n_networks)``: a token times this is its least-squares fit by the maps, centred over neurons.

    The weights of each network sum to zero, so the token itself need not be centred.
    """
    part = group if keep is None else group[:, keep]
    basis, triangle = np.linalg.qr((part - part.mean(axis=1, keepdims=True)).T)
    _check_rank(triangle, "maps are")
    weights = np.zeros(group.shape[::-1])
    weights[slice(None) if keep is None else keep] = basis @ np.linalg.inv(triangle).T
    return weights


def _image_of(runs: Runs) -> Any:
    return None if runs.mask is None else runs.mask.image

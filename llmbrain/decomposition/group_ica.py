"""Group ICA of scans, arrays and NIfTI images: the estimator. The modules beside do the work."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.validation import check_is_fitted

from llmbrain._validation import InputError, check_option, check_range, check_whole, legacy_generator, resolve_device
from llmbrain.anatomy.space import NeuronSpace
from llmbrain.decomposition.prepare.order import estimate_order, warn_of_color
from llmbrain.decomposition.prepare.pca import project, whiten
from llmbrain.decomposition.prepare.preprocess import Preprocessing
from llmbrain.decomposition.prepare.reduce import (
    Reduced,
    Window,
    components_for_share,
    cut_windows,
    group_subspace,
    reduce_runs,
)
from llmbrain.decomposition.prepare.source import Source
from llmbrain.decomposition.solvers import SOLVERS, Settings, Unmixed, unmix
from llmbrain.decomposition.solvers.fastica import FUNCTIONS
from llmbrain.decomposition.solvers.result import warn_not_converged
from llmbrain.decomposition.store import Saved
from llmbrain.decomposition.time_courses import Regressor, regress, standardize_maps
from llmbrain.decomposition.workers import workers
from llmbrain.distributed import Parcel, Ranks, ranks
from llmbrain.imaging.brain_mask import split_mask
from llmbrain.imaging.confounds import Confounds
from llmbrain.imaging.nifti import maps_to_nifti
from llmbrain.scanning.inputs import Runs

SAVED_VALUES = ("n_components_", "n_iter_", "converged_", "convergence_", "joint_explained_variance_ratio_",
                 "start_scores_", "order_estimates_", "preprocessing_report_", "origin_")  # fmt: skip
UNMIXED_VALUES = ("n_iter_", "converged_", "start_scores_", "convergence_")
SAVED_ARRAYS = ("components_", "explained_variance_ratio_", "constant_neurons_", "component_layers_")
_ORDER_RUNS = 3  # the order is a property of the data, not of how many runs there are: the first few tell


class GroupICA(Saved, ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Group ICA: functional networks that runs have in common.

    Each run is preprocessed, reduced by PCA and stacked; a PCA over the stack gives the group's subspace, and ICA turns
    it into components that are as independent as can be, over neurons (spatial ICA, the default) or over tokens.

    Parameters
    ----------
    n_components : int, float or {"auto", "parallel"}, default=20
        Components to find (in each layer or window, if `scope` says so); or the share of variance, between 0 and 1,
        that the group's subspace must hold; or "auto": by minimum description length (Li et al. 2007); or "parallel":
        by parallel analysis against circularly shifted time courses. Both first take out one AR(1) model over tokens
        of all neurons ("auto" where tokens correlate by more than .3), since noise with a memory looks like components;
        where more memory is left, they find too many, and a warning says so. ``order_estimates_`` has both.
    method : {"fastica", "picard", "dictlearning", "kmeans", "nmf"}, default="fastica"
        "picard" needs ``llmbrain[picard]``; "dictlearning" is nilearn's (its maps are sparse, not independent);
        "kmeans" and "nmf" (semi-nonnegative) are rivals: see `llmbrain.decomposition.solvers.clustering`.
    fun : {"logcosh", "exp", "cube"}, default="logcosh"
        Contrast. nilearn's CanICA uses "cube".
    axis : {"space", "time"}, default="space"
        What is independent: maps, or time courses (the earlier paper's way, arXiv 2502.20408).
    scope : {"model", "layer"} or int, default="model"
        One ICA over all layers, one a layer, or one for every so many consecutive layers (the last may have fewer).
        The latter two need runs that know their space. Maps are 0 outside their layers.
    run_components : int, optional
        Components kept of each run; by default three times `n_components` (`n_components` with `cca`).
    cca : bool, default=False
        Canonical correlation between runs (Varoquaux et al. 2010): components of a run count alike, whatever variance
        they have, so what matters is that runs share them. CanICA itself does not center volumes over voxels: for its
        subspace add ``center_tokens=False``.
    center_tokens : bool, default=True
        Center every token (volume) over neurons before the runs are reduced. On fMRI, whose global signal is large, the
        subspaces with and without differ; maps have zero mean either way.
    detrend, standardize, drop_first, drop_positions, outliers, outlier_threshold
        Preprocessing over tokens: see `llmbrain.decomposition.Preprocessing`. By default neurons are z-scored, and the
        first token of every context block (BOS, the attention sink) is not fitted where the runs know which it is.
        Then every token is centred over neurons (`center_tokens`).
    mask : bool array (n_neurons,), NIfTI image or path, optional
        Neurons to use; for NIfTI images of a brain, the voxels to read.
    n_init : int, default=1
        Random starts; the one with the largest negentropy is kept, ``start_scores_`` tells all. `ica_stability` says
        whether starts agree.
    max_iter : int, default=200
    tol : float, default=1e-5
        See `llmbrain.decomposition.fastica`. At 1e-4 (scikit-learn's) some starts stop where two components are mixed
        half and half: 14 of 400 on a phantom, against 2 of 400 at 1e-5, which takes 0.6 steps more.
    dtype : {"float32", "float64"}, default="float32"
        Precision of the large products. Small matrices are always float64.
    device : str, default="auto"
        CUDA when it is there, else the CPU.
    random_state : int, Generator, RandomState or None, default=0
    progress : bool, default=False
        Show a progress bar over runs.

    Attributes
    ----------
    components_ : float32 array (n_components_, n_neurons)
        Maps with zero mean and unit variance over the neurons used, 0 on neurons that are constant or masked out. The
        largest absolute value of a map is positive. Order: explained variance, falling (within each window).
    mixing_ : list of float32 arrays (n_tokens, n_components_)
        Time courses: least squares of each run's preprocessed tokens on the maps, ``run ~ mixing @ components``.
        Tokens left out of the fit have theirs too.
    n_components_ : int
    n_features_in_ : int
        Neurons (or voxels) of a run; ``get_feature_names_out`` names the components.
    explained_variance_ratio_ : float64 array (n_components_,)
        Share of the preprocessed runs' variance that each component explains by itself.
    joint_explained_variance_ratio_ : float
        Share that all explain together. The shares of single components add up to it only where maps are uncorrelated
        over neurons, as spatial FastICA and picard make them; after temporal ICA or dictionary learning they do not.
    n_iter_ : int
        Steps of the start that was kept (largest over windows).
    converged_ : bool
    convergence_ : list of dict
        Every start of every window: ``window``, ``start``, ``n_iter``, ``converged``.
    space_ : NeuronSpace or None
    brain_mask_ : BrainMask or None
        The brain mask that NIfTI runs were read with.
    surface_ : Grayordinates or None
        Where the columns of CIFTI or GIFTI runs lie; not saved.
    origin_ : dict
        The `Scan.origin` of the runs, where they are of one scan in a store.
    component_layers_ : int array (n_components_, 2) or None
        First and last layer of each component's window; None for ``scope="model"``.
    constant_neurons_ : int array
        Neurons constant in every run, or masked out.
    order_estimates_ : dict
        For ``n_components="auto"`` or "parallel": what each criterion says, run by run.
    preprocessing_report_ : list of dict
        A run's tokens dropped and masked, values clipped, neurons hit most.
    start_scores_ : list of float
        Negentropy reached from each random start (of the first window).

    Examples
    --------
    >>> ica = GroupICA(n_components=20).fit([run_1, run_2])  # doctest: +SKIP
    >>> ica.components_.shape  # doctest: +SKIP
    (20, 131072)

    References
    ----------
    Calhoun et al. 2001, Human Brain Mapping 14; Smith et al. 2014, NeuroImage 101 (incremental group PCA); Varoquaux et
    al. 2010, NeuroImage 51 (CanICA); Hyvärinen 1999, IEEE Trans. Neural Networks 10 (FastICA).
    """

    def __init__(
        self,
        n_components: int | float | str = 20,
        *,
        method: str = "fastica",
        fun: str = "logcosh",
        axis: str = "space",
        scope: str | int = "model",
        run_components: int | None = None,
        cca: bool = False,
        center_tokens: bool = True,
        detrend: str | int = "none",
        standardize: str | bool = "zscore",
        drop_first: int = 0,
        drop_positions: int = 1,
        outliers: str = "keep",
        outlier_threshold: float | None = None,
        mask: Any = None,
        n_init: int = 1,
        max_iter: int = 200,
        tol: float = 1e-5,
        dtype: str = "float32",
        device: str = "auto",
        random_state: int | np.random.Generator | np.random.RandomState | None = 0,
        progress: bool = False,
    ) -> None:
        self.n_components = n_components
        self.method = method
        self.fun = fun
        self.axis = axis
        self.scope = scope
        self.run_components = run_components
        self.cca = cca
        self.center_tokens = center_tokens
        self.detrend = detrend
        self.standardize = standardize
        self.drop_first = drop_first
        self.drop_positions = drop_positions
        self.outliers = outliers
        self.outlier_threshold = outlier_threshold
        self.mask = mask
        self.n_init = n_init
        self.max_iter = max_iter
        self.tol = tol
        self.dtype = dtype
        self.device = device
        self.random_state = random_state
        self.progress = progress

    # ------------------------------------------------------------------ public

    def fit(
        self, runs: Any, y: Any = None, *, space: NeuronSpace | None = None,
        confounds: Sequence[Confounds] | None = None,
    ) -> GroupICA:  # fmt: skip
        """Find the components that `runs` have in common.

        Parameters
        ----------
        runs : list of Scan, array (n_tokens, n_neurons), NIfTI image or path
            One per run; read one at a time, twice, and never kept. In a process group every rank is given all runs, and
            reads its share of them; all end with the same fit.
        y : None
            Ignored.
        space : NeuronSpace, optional
            Where the neurons of plain arrays lie.
        confounds : sequence, optional
            One a run: array ``(n_volumes, n_confounds)``, table or path (`llmbrain.imaging.read_confounds`), or None;
            regressed out before anything else.

        Raises
        ------
        InputError
            For runs of different width, values that are not finite (named by run and neuron), fewer tokens than
            components, rank-deficient data (the rank is named), a mask that removes everything.
        """
        self._check_parameters()
        source, team = self._source(runs, space, confounds), ranks()
        with workers(source.device), team.job("group ICA", **source.facts(self.get_params(), team)):
            windows = self._windows(source, team)
            reduced = reduce_runs(source, windows, self.run_components, self.cca, center=self.center_tokens, team=team)
            self.n_features_in_ = reduced.live.numel()
            self.preprocessing_report_ = reduced.reports
            self._note_constant(reduced.live, source.mask)
            maps = self._found(source, windows, reduced, team)
            self._describe(source, windows, reduced, maps)
        self.space_, self.brain_mask_, self.surface_ = source.runs.space, source.runs.mask, source.runs.surface
        self.origin_ = source.runs.origin()
        return self

    def fit_transform(self, runs: Any, y: Any = None, **fit_params: Any) -> list[np.ndarray]:
        """Fit, and return ``mixing_``."""
        return self.fit(runs, y, **fit_params).mixing_

    def transform(self, runs: Any, confounds: Sequence[Confounds] | None = None) -> list[np.ndarray]:
        """Time courses of the fitted maps in other runs: a list of (n_tokens, n_components_) float32 arrays.

        Runs are preprocessed as in `fit`, each with its own statistics, then regressed on the maps.
        """
        check_is_fitted(self, "components_")
        self._check_parameters()
        source = self._source(runs, None, confounds)
        source.n_features = self.components_.shape[1]
        if self.brain_mask_ is not None and source.runs.mask is not None:
            source.runs.mask.set_t_r(self.brain_mask_.t_r)
        maps = torch.from_numpy(self.components_).to(source.device, source.dtype)
        offsets = np.cumsum([0, *self._counts])
        parts = [maps[a:b, columns] for columns, (a, b) in zip(self._columns, pairwise(offsets))]
        with workers(source.device):
            found = regress(source, parts, self._columns, "transform")
            return [courses.astype(self.components_.dtype) for courses, _, _ in found]

    def components_img(self) -> Any:
        """The maps as a 4D NIfTI image: on the grid of the brain mask, or of the neuron space; CIFTI or GIFTI of such.

        Raises
        ------
        InputError
            When the fit knows neither, because the runs were plain arrays.
        """
        check_is_fitted(self, "components_")
        if self.brain_mask_ is not None:
            return self.brain_mask_.image_of(self.components_)
        if self.surface_ is not None:
            return self.surface_.image_of(self.components_)
        if self.space_ is None:
            raise InputError("the fit does not know where its neurons lie: fit scans or images, or pass space= to fit")
        return maps_to_nifti(self.components_, self.space_)

    def solver_settings(self) -> Settings:
        """The solver and its settings."""
        return Settings(self.method, self.fun, self.n_init, self.max_iter, self.tol)

    @property
    def _n_features_out(self) -> int:
        """For ``get_feature_names_out``."""
        return self.n_components_

    # ------------------------------------------------------------------ steps

    def _check_parameters(self) -> None:
        check_option("method", self.method, SOLVERS)
        check_option("fun", self.fun, FUNCTIONS)
        check_option("axis", self.axis, ("space", "time"))
        check_option("dtype", self.dtype, ("float32", "float64"))
        if isinstance(self.n_components, str):
            check_option("n_components", self.n_components, ("auto", "parallel"))
        elif isinstance(self.n_components, (int, np.integer)) and not isinstance(self.n_components, bool):
            check_range("n_components", self.n_components, 1)
        else:
            check_range("n_components", self.n_components, 0, 1, open_low=True, open_high=True)
        if isinstance(self.scope, str):
            check_option("scope", self.scope, ("model", "layer"))
        else:
            check_range("scope", self.scope, 1)
        if self.run_components is not None:
            check_whole("run_components", self.run_components, 1)
        check_whole("n_init", self.n_init, 1, 1_000_000)
        if SOLVERS[self.method].from_start is None and self.axis == "time":
            raise InputError(f"method={self.method!r} finds maps: use axis='space'")
        if self.cca and isinstance(self.n_components, float):
            raise InputError(f"n_components={self.n_components!r} is a share of variance, which cca=True leaves out")
        self._preprocessing()

    def _source(self, runs: Any, space: NeuronSpace | None, confounds: Sequence[Confounds] | None = None) -> Source:
        neurons, image = split_mask(self.mask)
        return Source(
            runs=Runs(runs, mask_img=image, space=space, confounds=confounds),
            settings=self._preprocessing(),
            device=resolve_device(self.device),
            dtype=getattr(torch, self.dtype),
            mask=neurons,
            progress=self.progress,
        )

    def _preprocessing(self) -> Preprocessing:
        return Preprocessing(
            self.detrend, self.standardize, self.drop_first, self.drop_positions, self.outliers, self.outlier_threshold
        )  # fmt: skip

    def _windows(self, source: Source, team: Ranks) -> list[Window]:
        """The windows of the scope, each with its number of components."""
        self.order_estimates_: dict[str, Any] = {}
        windows = []
        for columns, layers in cut_windows(source, self.scope):
            k = self.n_components
            if isinstance(k, str):
                estimates = team.told("model order", partial(
                    estimate_order, source.prepared("model order", limit=_ORDER_RUNS), columns,
                    random_state=self.random_state, lattice=source.runs.lattice(),
                ))  # fmt: skip
                warn_of_color(estimates, k)
                self.order_estimates_["model" if layers is None else f"layers {layers[0]}-{layers[1]}"] = estimates
                k = int(estimates["mdl" if k == "auto" else "parallel"])
            windows.append(Window(columns, layers, k))
        return windows

    def _note_constant(self, live: torch.Tensor, mask: np.ndarray | None) -> None:
        dead = ~live.cpu().numpy()
        self.constant_neurons_ = np.flatnonzero(dead)
        n_constant = int(dead.sum() if mask is None else (dead & mask).sum())
        if n_constant:
            warnings.warn(
                f"{n_constant} of {dead.size} neurons are constant in every run: their components are 0",
                UserWarning,
                stacklevel=3,
            )

    def _found(self, source: Source, windows: list[Window], reduced: Reduced, team: Ranks) -> list[torch.Tensor]:
        """The maps of every window, and how the ICAs went; of a team, rank 0 unmixes."""

        def find() -> Parcel:
            maps = self._decompose(source, windows, reduced)
            return Parcel({f"{i}": part for i, part in enumerate(maps)}, {n: getattr(self, n) for n in UNMIXED_VALUES})

        found = team.found_by(0, "ICA", find)
        self.__dict__.update(found.record)
        return [found.tensors[f"{i}"].to(source.device) for i in range(len(windows))]

    def _decompose(self, source: Source, windows: list[Window], reduced: Reduced) -> list[torch.Tensor]:
        """ICA of every window: standardised maps, (k, n_columns) each."""
        random_state = legacy_generator(self.random_state)
        maps, fits = [], []
        for window, stack, variance in zip(windows, reduced.stacks, reduced.variance):
            live = reduced.live[window.columns]
            k = window.n_components
            if isinstance(k, float):
                k = components_for_share(stack, variance, k)
            found, fit = self._unmix(stack, k, live, source, window, random_state)
            maps.append(standardize_maps(found, live))
            fits.append(fit)
        self.n_iter_ = max(fit.n_iter for fit in fits)
        self.converged_ = all(fit.converged for fit in fits)
        self.start_scores_ = fits[0].scores
        self.convergence_ = [
            {"window": i, "start": j, "n_iter": steps, "converged": done}
            for i, fit in enumerate(fits)
            for j, (steps, done) in enumerate(zip(fit.start_iterations, fit.start_converged))
        ]
        n_failed = sum(not start["converged"] for start in self.convergence_)
        if self.converged_ and n_failed:
            warnings.warn(
                f"{n_failed} of {len(self.convergence_)} starts did not converge in max_iter={self.max_iter} steps; "
                "the one that is kept did: see convergence_",
                ConvergenceWarning,
                stacklevel=3,
            )
        if not self.converged_:
            failed = [(window, fit) for window, fit in zip(windows, fits) if not fit.converged]
            layers = [f"{window.layers[0]}-{window.layers[1]}" for window, _ in failed if window.layers is not None]
            where = f" in layers {', '.join(layers)}" if layers else ""
            tried = f" ({n_failed} of {len(self.convergence_)} starts)" if len(self.convergence_) > len(fits) else ""
            warn_not_converged(
                self.method + where + tried, self.max_iter, max(fit.change for _, fit in failed), self.tol
            )
        return maps

    def _unmix(
        self, stack: torch.Tensor, k: int, live: torch.Tensor, source: Source, window: Window,
        random_state: np.random.RandomState,
    ) -> tuple[torch.Tensor, Unmixed]:  # fmt: skip
        """ICA of one window: maps (k, n_columns) in no particular units or order, and how it went."""
        n_live = int(live.sum())
        group = group_subspace(stack, k, live, center=self.center_tokens)
        whole_group = SOLVERS[self.method].whole_group
        if whole_group is not None:
            return whole_group(group, live, random_state)
        if self.axis == "space":
            fit = unmix(group.data, self.solver_settings(), random_state, n_live)
            return project(torch.from_numpy(fit.unmixing).to(stack.device), group.data), fit
        # temporal: what is unmixed are the tokens' coordinates in the group's subspace
        basis = Regressor(group.data, window.columns)
        courses = [
            basis.time_courses(run)[torch.from_numpy(run.keep).to(stack.device)] for run in source.prepared("project")
        ]
        tokens = torch.cat(courses).T.contiguous()
        white = whiten(tokens - tokens.mean(dim=1, keepdim=True))
        fit = unmix(white.data, self.solver_settings(), random_state)
        mixing = white.dewhitening @ torch.from_numpy(fit.unmixing.T.copy()).to(stack.device)
        return project(mixing.T.contiguous(), group.data), fit

    def _describe(self, source: Source, windows: list[Window], reduced: Reduced, maps: list[torch.Tensor]) -> None:
        """Time courses and explained variance; then order the components and put the windows together."""
        self._columns = [window.columns for window in windows]
        self._counts = [len(part) for part in maps]
        offsets = np.cumsum([0, *self._counts])
        alone, joint, mixing = np.zeros(offsets[-1]), 0.0, []
        for courses, own, together in regress(source, maps, self._columns, "time courses", ranks()):
            mixing.append(courses)
            alone += own
            joint += together
        order = np.concatenate([a + np.argsort(-alone[a:b], kind="stable") for a, b in pairwise(offsets)])
        dtype = np.dtype(self.dtype)
        components = np.zeros((offsets[-1], reduced.live.numel()), dtype=dtype)
        for start, part, columns in zip(offsets, maps, self._columns):
            components[start : start + len(part), columns] = part.cpu().numpy()
        self.components_ = components[order]
        self.mixing_ = [courses[:, order].astype(dtype) for courses in mixing]
        self.explained_variance_ratio_ = alone[order] / sum(reduced.variance)
        self.joint_explained_variance_ratio_ = joint / sum(reduced.variance)
        self.n_components_ = len(order)
        self.component_layers_ = None
        if windows[0].layers is not None:
            self.component_layers_ = np.repeat([window.layers for window in windows], self._counts, axis=0)

    # ------------------------------------------------------------------ files

    def _as_plain(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        arrays = {name: getattr(self, name) for name in SAVED_ARRAYS if getattr(self, name) is not None}
        parameters = self.get_params()
        mask = parameters.pop("mask")
        if self.brain_mask_ is not None:
            arrays["mask_volume"] = self.brain_mask_.volume
            arrays["mask_affine"] = np.asarray(self.brain_mask_.image.affine, dtype=np.float64)
        elif mask is not None:
            arrays["mask"] = np.asarray(mask)
        record = {
            "parameters": parameters,
            "mask_header": None if self.brain_mask_ is None else self.brain_mask_.header_facts(),
            "space": None if self.space_ is None else self.space_.to_dict(),
            "windows": [[columns.start, columns.stop, count] for columns, count in zip(self._columns, self._counts)],
            **{name: getattr(self, name) for name in SAVED_VALUES},
        }
        return arrays, record

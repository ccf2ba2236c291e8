"""Group ICA of scans, arrays and NIfTI images: the estimator. The work is done by the functions of the modules beside."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from llmbrain._validation import InputError, check_option, check_range, resolve_device
from llmbrain.decomposition._chunks import workers
from llmbrain.decomposition._fastica import FUNCTIONS, warn_not_converged
from llmbrain.decomposition._maps import ExplainedVariance, Regressor, standardize_maps
from llmbrain.decomposition._methods import METHODS, Unmixed, dictionary_maps, unmix
from llmbrain.decomposition._order import estimate_order
from llmbrain.decomposition._pca import GroupPCA, project, run_pca, whiten
from llmbrain.decomposition._preprocess import PreparedRun, Preprocessing, center_over_neurons, prepare
from llmbrain.decomposition._runs import Runs

if TYPE_CHECKING:
    from llmbrain.space import NeuronSpace

_SHARE_ROWS = 500  # rows kept between runs when the number of components is not known before the last run


@dataclass
class _Window:
    """The neurons of one ICA, and what is collected about them."""

    columns: slice
    layers: tuple[int, int] | None
    n_components: int | float
    run_components: int | float
    pca: GroupPCA
    total: float = 0.0


class GroupICA(TransformerMixin, BaseEstimator):
    """Group ICA: functional networks that runs have in common.

    Each run is preprocessed, reduced by PCA and stacked; a PCA over the stack gives the group's subspace, and ICA turns it
    into components that are as independent as can be, over neurons (spatial ICA, the default) or over tokens.

    Parameters
    ----------
    n_components : int, float or {"auto", "parallel"}, default=20
        Components to find (in each layer or window, if `scope` says so); or the share of variance, between 0 and 1, that
        the group's subspace must hold; or "auto": by minimum description length (Li et al. 2007); or "parallel": by
        parallel analysis against circularly shifted time courses. See ``order_estimates_``.
    method : {"fastica", "picard", "dictlearning"}, default="fastica"
        "picard" needs ``llmbrain[picard]``; "dictlearning" is nilearn's sparse dictionary (its maps are not independent).
    fun : {"logcosh", "exp", "cube"}, default="logcosh"
        Contrast. nilearn's CanICA uses "cube".
    axis : {"space", "time"}, default="space"
        What is independent: maps, or time courses (the earlier paper's way, arXiv 2502.20408).
    scope : {"model", "layer"} or int, default="model"
        One ICA over all layers, one a layer, or one for every so many consecutive layers (the last may have fewer). Needs
        runs that know their space. Maps are 0 outside their layers.
    run_components : int, optional
        Components kept of each run; by default one and a half times `n_components` (`n_components` with `cca`).
    cca : bool, default=False
        CanICA's canonical correlation step (Varoquaux et al. 2010): components of a run count alike, whatever variance
        they have, so what matters is that runs share them.
    detrend, standardize, drop_first, drop_positions, outliers, outlier_threshold
        Preprocessing over tokens: see `llmbrain.decomposition.Preprocessing`. By default neurons are z-scored, and the first
        token of every context block (BOS, the attention sink) is left out of the fit where the runs know which it is.
    mask : bool array (n_neurons,), NIfTI image or path, optional
        Neurons to use; for NIfTI images of a brain, the voxels to read.
    n_init : int, default=1
        Random starts; the one with the largest negentropy is kept, ``start_scores_`` tells all. Use `ica_stability` to see
        whether starts agree.
    max_iter : int, default=200
    tol : float, default=1e-4
        See `llmbrain.decomposition.fastica`.
    dtype : {"float32", "float64"}, default="float32"
        Precision of the large products. Small matrices are always float64.
    device : str, default="auto"
        CUDA when it is there, else the CPU.
    random_state : int, RandomState or None, default=0
    progress : bool, default=False
        Show a progress bar over runs.

    Attributes
    ----------
    components_ : float32 array (n_components_, n_neurons)
        Maps with zero mean and unit variance over the neurons used, 0 on neurons that are constant or masked out. The
        largest absolute value of a map is positive. Order: explained variance, falling (within each window of layers).
    mixing_ : list of float32 arrays (n_tokens, n_components_)
        Time courses: least squares of each run's preprocessed tokens on the maps, so ``run ~ mixing @ components``. Tokens
        left out of the fit have theirs too.
    n_components_ : int
    explained_variance_ratio_ : float64 array (n_components_,)
        Share of the preprocessed runs' variance that each component explains by itself.
    joint_explained_variance_ratio_ : float
        Share that all explain together. The shares of single components add up to it only where maps are uncorrelated over
        neurons, as spatial FastICA makes them; after temporal ICA, picard or dictionary learning they do not.
    n_iter_ : int
        Steps of the start that was kept (largest over windows).
    converged_ : bool
    space_ : NeuronSpace or None
    brain_mask_ : object or None
        The brain mask that NIfTI runs were read with.
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
        detrend: str | int = "none",
        standardize: str = "zscore",
        drop_first: int = 0,
        drop_positions: int = 1,
        outliers: str = "keep",
        outlier_threshold: float | None = None,
        mask: Any = None,
        n_init: int = 1,
        max_iter: int = 200,
        tol: float = 1e-4,
        dtype: str = "float32",
        device: str = "auto",
        random_state: int | np.random.RandomState | None = 0,
        progress: bool = False,
    ) -> None:
        self.n_components = n_components
        self.method = method
        self.fun = fun
        self.axis = axis
        self.scope = scope
        self.run_components = run_components
        self.cca = cca
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

    def fit(self, runs: Any, y: Any = None, *, space: NeuronSpace | None = None) -> GroupICA:
        """Find the components that `runs` have in common.

        Parameters
        ----------
        runs : list of Scan, array (n_tokens, n_neurons), NIfTI image or path
            One per run; read one at a time, twice, and never kept.
        y : None
            Ignored.
        space : NeuronSpace, optional
            Where the neurons of plain arrays lie.

        Raises
        ------
        InputError
            For runs of different width, values that are not finite (named by run and neuron), fewer tokens than
            components, rank-deficient data (the rank is named), a mask that removes everything.
        """
        self._check_parameters()
        reader = self._reader(runs, space)
        with workers(self._device):
            windows = self._reduce(reader)
            self._solve(windows, reader)
            self._describe(windows, reader)
        self.space_ = reader.space
        self.brain_mask_ = reader.mask
        return self

    def fit_transform(self, runs: Any, y: Any = None, **fit_params: Any) -> list[np.ndarray]:
        """Fit, and return ``mixing_``."""
        return self.fit(runs, y, **fit_params).mixing_

    def transform(self, runs: Any) -> list[np.ndarray]:
        """Time courses of the fitted maps in other runs: a list of (n_tokens, n_components_) float32 arrays.

        Runs are preprocessed as in `fit`, each with its own statistics, then regressed on the maps.
        """
        check_is_fitted(self, "components_")
        self._check_parameters()
        reader = self._reader(runs, self.space_)
        if reader.n_neurons is None:
            reader.n_neurons = self.components_.shape[1]
        with workers(self._device):
            return [courses for courses, _ in self._regress(reader, "transform")]

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the fit as safetensors with a JSON beside it; read it back with `read_ica`.

        Parameters
        ----------
        path : folder, or file ending in ``.safetensors``
        overwrite : bool
            Whether a fit that is already there may be replaced.

        Returns
        -------
        Path of the safetensors file.
        """
        from llmbrain.decomposition._store import save_ica

        check_is_fitted(self, "components_")
        return save_ica(self, Path(path), overwrite=overwrite)

    def components_img(self) -> Any:
        """The maps as a 4D NIfTI image: on the grid of the brain mask, or of the neuron space.

        Raises
        ------
        InputError
            When the fit knows neither, because the runs were plain arrays.
        """
        check_is_fitted(self, "components_")
        if self.brain_mask_ is not None:
            return self.brain_mask_.image_of(self.components_)
        if self.space_ is None:
            raise InputError("the fit does not know where its neurons lie: fit scans or images, or pass space= to fit")
        from llmbrain.imaging import maps_to_nifti

        return maps_to_nifti(self.components_, self.space_)

    # ------------------------------------------------------------------ steps

    def _check_parameters(self) -> None:
        check_option("method", self.method, METHODS)
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
            check_range("run_components", self.run_components, 1)
        check_range("n_init", self.n_init, 1)
        if self.method == "dictlearning" and self.axis == "time":
            raise InputError("method='dictlearning' finds maps: use axis='space'")
        if self.cca and isinstance(self.n_components, float):
            raise InputError(f"n_components={self.n_components!r} is a share of variance, which cca=True leaves out")
        self._preprocessing = Preprocessing(
            self.detrend, self.standardize, self.drop_first, self.drop_positions, self.outliers, self.outlier_threshold
        )
        self._device = resolve_device(self.device)
        self._dtype = getattr(torch, self.dtype)

    def _reader(self, runs: Any, space: NeuronSpace | None) -> Runs:
        is_array = self.mask is None or isinstance(self.mask, (np.ndarray, list, tuple, torch.Tensor))
        return Runs(runs, mask_img=None if is_array else self.mask, space=space)

    def _neurons(self, n_neurons: int) -> torch.Tensor | None:
        """The mask over neurons, on the device; None when there is none."""
        if self.mask is None or not isinstance(self.mask, (np.ndarray, list, tuple, torch.Tensor)):
            return None
        mask = np.asarray(self.mask)
        if mask.dtype != bool or mask.shape != (n_neurons,):
            raise InputError(f"mask has shape {mask.shape} and dtype {mask.dtype}: {n_neurons} bools are needed")
        if not mask.any():
            raise InputError("mask removes everything: no neuron is True")
        return torch.from_numpy(mask).to(self._device)

    def _prepared(self, reader: Runs, what: str) -> Iterator[PreparedRun]:
        indices: Any = range(len(reader))
        if self.progress:
            from tqdm.auto import tqdm

            indices = tqdm(indices, desc=what, unit="run")
        for index in indices:
            data = reader[index]
            yield prepare(
                data,
                self._preprocessing,
                device=self._device,
                dtype=self._dtype,
                positions=reader.positions(index),
                neurons=self._neurons(data.shape[1]),
                name=reader.name(index),
            )

    def _reduce(self, reader: Runs) -> list[_Window]:
        """First pass: every run to its leading components, stacked over runs; one stack a window of layers."""
        windows: list[_Window] = []
        live: torch.Tensor | None = None
        self.preprocessing_report_ = []
        n_tokens = 0
        for index, run in enumerate(self._prepared(reader, "reduce")):
            if not bool(run.live.any()):
                raise InputError(f"{reader.name(index)} has no variance: all neurons are constant over tokens")
            if not windows:
                windows = self._windows(reader)
            live = run.live if live is None else live | run.live
            n_tokens += int(run.keep.sum())
            self.preprocessing_report_.append(run.report)
            for window in windows:
                part = center_over_neurons(_view(run, window.columns))
                pca = run_pca(part.kept, window.run_components)
                rows = pca.rows
                if self.cca:
                    rows = rows / pca.eigenvalues[: len(rows)].sqrt()[:, None].to(rows.dtype)
                window.pca.add(rows)
                window.total += pca.total
        assert live is not None
        for window in windows:
            k = window.n_components
            width = window.columns.stop - window.columns.start
            if not isinstance(k, float) and k > min(n_tokens, width):
                raise InputError(
                    f"n_components={k} is more than the data allow: {n_tokens} tokens are fitted over {width} neurons"
                )
        self._live = live
        self.constant_neurons_ = np.flatnonzero(~live.cpu().numpy())
        neurons = self._neurons(live.numel())
        n_constant = self.constant_neurons_.size - (0 if neurons is None else int((~neurons).sum()))
        if n_constant:
            warnings.warn(
                f"{n_constant} of {live.numel()} neurons are constant in every run: their components are 0",
                UserWarning,
                stacklevel=3,
            )
        return windows

    def _windows(self, reader: Runs) -> list[_Window]:
        n_neurons = reader.n_neurons or 0
        if self.scope == "model":
            parts: list[tuple[slice, tuple[int, int] | None]] = [(slice(0, n_neurons), None)]
        else:
            space = reader.space
            if space is None:
                raise InputError(f"scope={self.scope!r} needs to know the layers: pass scans, or fit(..., space=...)")
            size = 1 if isinstance(self.scope, str) else int(self.scope)
            parts = []
            for first in range(0, space.n_layers, size):
                last = min(first + size, space.n_layers) - 1
                columns = slice(space.layer_slice(first).start, space.layer_slice(last).stop)
                parts.append((columns, (first, last)))
        self.order_estimates_: dict[str, Any] = {}
        windows = []
        for columns, layers in parts:
            k: int | float
            if isinstance(self.n_components, str):
                k = self._estimated_order(reader, columns, layers)
            else:
                k = self.n_components
            if isinstance(k, float):
                run_k: int | float = self.run_components or (1 + k) / 2
                pca = GroupPCA(_SHARE_ROWS)
            else:
                run_k = self.run_components or (k if self.cca else int(np.ceil(1.5 * k)))
                pca = GroupPCA(max(4 * int(run_k), 4 * k))
            windows.append(_Window(columns, layers, k, run_k, pca))
        return windows

    def _estimated_order(self, reader: Runs, columns: slice, layers: tuple[int, int] | None) -> int:
        estimates = estimate_order(
            (_view(run, columns) for run in self._prepared(reader, "model order")),
            random_state=self.random_state,
            lattice=reader.lattice(),
        )
        self.order_estimates_["model" if layers is None else f"layers {layers[0]}-{layers[1]}"] = estimates
        return int(estimates["mdl" if self.n_components == "auto" else "parallel"])

    def _solve(self, windows: list[_Window], reader: Runs) -> None:
        """ICA of every window's stack; leaves maps in ``_maps``, one (k, n_neurons) tensor a window."""
        random_state = check_random_state(self.random_state)
        self._maps: list[torch.Tensor] = []
        fits: list[Unmixed] = []
        for window in windows:
            live = self._live[window.columns]
            rows = window.pca.stack()
            k = self._group_components(window, rows)
            maps, fit = self._decompose(rows, k, live, random_state, window, reader)
            self._maps.append(standardize_maps(maps, live))
            fits.append(fit)
        self.n_iter_ = max(fit.n_iter for fit in fits)
        self.converged_ = all(fit.converged for fit in fits)
        self.start_scores_ = fits[0].scores
        worst = max(fits, key=lambda fit: fit.change)
        if not self.converged_:
            warn_not_converged(self.method, self.max_iter, worst.change, self.tol)

    def _group_components(self, window: _Window, rows: torch.Tensor) -> int:
        if not isinstance(window.n_components, float):
            return window.n_components
        values = whiten(rows, 1).eigenvalues
        share = torch.cumsum(values, 0).cpu().numpy() / window.total
        if share[-1] < window.n_components:
            raise InputError(
                f"n_components={window.n_components}: the reduced runs hold only {share[-1]:.3f} of the variance"
            )
        return int(np.searchsorted(share, window.n_components)) + 1

    def _decompose(
        self,
        rows: torch.Tensor,
        k: int,
        live: torch.Tensor,
        random_state: np.random.RandomState,
        window: _Window,
        reader: Runs,
    ) -> tuple[torch.Tensor, Unmixed]:
        n_live = int(live.sum())
        group = whiten(rows, k, n_samples=n_live)
        if self.method == "dictlearning":
            return dictionary_maps(group, live, random_state)
        options = {
            "method": self.method, "fun": self.fun, "n_init": self.n_init, "random_state": random_state,
            "max_iter": self.max_iter, "tol": self.tol,
        }  # fmt: skip
        if self.axis == "space":
            fit = unmix(group.data, n_samples=n_live, **options)
            return project(torch.from_numpy(fit.unmixing).to(rows.device), group.data), fit
        # temporal: the tokens' coordinates in the group's subspace are what is mixed
        basis = Regressor(group.data)
        courses = []
        for run in self._prepared(reader, "project"):
            part = center_over_neurons(_view(run, window.columns))
            courses.append(basis.time_courses(part.kept))
        tokens = torch.cat(courses).T.contiguous()
        tokens -= tokens.mean(dim=1, keepdim=True)
        white = whiten(tokens)
        fit = unmix(white.data, **options)
        mixing = white.dewhitening @ torch.from_numpy(fit.unmixing.T).to(rows.device)
        return project(mixing.T.contiguous(), group.data), fit

    def _describe(self, windows: list[_Window], reader: Runs) -> None:
        """Second pass: time courses and explained variance; then order the components and put windows together."""
        n_neurons = self._live.numel()
        offsets = np.cumsum([0, *(len(maps) for maps in self._maps)])
        components = np.zeros((offsets[-1], n_neurons), dtype=np.float32 if self.dtype == "float32" else np.float64)
        for window, maps, start in zip(windows, self._maps, offsets):
            components[start : start + len(maps), window.columns] = maps.cpu().numpy()
        self.components_ = components
        self._columns = [window.columns for window in windows]
        self._counts = [len(maps) for maps in self._maps]
        variance = ExplainedVariance(np.zeros(int(offsets[-1])))
        mixing = []
        for courses, shares in self._regress(reader, "time courses", variance=True):
            mixing.append(courses)
            variance.alone += shares.alone
            variance.joint += shares.joint
            variance.total += shares.total
        order = np.concatenate(
            [
                start + np.argsort(-variance.alone[start:stop], kind="stable")
                for start, stop in zip(offsets, offsets[1:])
            ]
        )
        self.components_ = components[order]
        self.mixing_ = [courses[:, order] for courses in mixing]
        self.explained_variance_ratio_ = variance.alone[order] / variance.total
        self.joint_explained_variance_ratio_ = variance.joint / variance.total
        self.n_components_ = len(order)
        self.component_layers_ = None
        if windows[0].layers is not None:
            self.component_layers_ = np.repeat(
                np.array([window.layers for window in windows]), [len(maps) for maps in self._maps], axis=0
            )
        del self._maps, self._live

    def _regress(
        self, reader: Runs, what: str, *, variance: bool = False
    ) -> Iterator[tuple[np.ndarray, ExplainedVariance]]:
        """Time courses of ``components_`` in every run, window by window, and the variance they explain."""
        offsets = np.cumsum([0, *self._counts])
        maps = torch.from_numpy(self.components_).to(self._device, self._dtype)
        regressors = [
            Regressor(maps[start:stop, columns]) for columns, start, stop in zip(self._columns, offsets, offsets[1:])
        ]
        for run in self._prepared(reader, what):
            courses = np.empty((len(run.keep), int(offsets[-1])), dtype=self.components_.dtype)
            shares = ExplainedVariance(np.zeros(int(offsets[-1])))
            for columns, regressor, start, stop in zip(self._columns, regressors, offsets, offsets[1:]):
                part = center_over_neurons(_view(run, columns))
                products = regressor.products(part.data)
                found = products @ regressor.inverse
                courses[:, start:stop] = found.cpu().numpy()
                if variance:
                    kept = torch.from_numpy(part.keep).to(found.device)
                    own = ExplainedVariance(np.zeros(stop - start))
                    own.add(part.kept, products[kept], found[kept], regressor.gram)
                    shares.alone[start:stop] = own.alone
                    shares.joint += own.joint
                    shares.total += own.total
            yield courses, shares


def _view(run: PreparedRun, columns: slice) -> PreparedRun:
    """The same run seen through a window of neurons."""
    return PreparedRun(run.data[:, columns], run.keep, run.live[columns], run.report)

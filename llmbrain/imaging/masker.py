"""`NeuronMasker`: between images and arrays, with nilearn's masker methods."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted

from llmbrain._validation import InputError
from llmbrain.anatomy.space import NeuronSpace
from llmbrain.imaging.nifti import maps_to_nifti, read_nifti


class NeuronMasker(TransformerMixin, BaseEstimator):
    """Take the neurons out of an image, and put values back into one.

    As nilearn's `NiftiMasker`, but columns are in neuron order (layer by layer), and nothing is resampled, smoothed,
    detrended or scaled.

    Parameters
    ----------
    space : NeuronSpace, optional
        Default: that of the image given to `fit`.

    Attributes
    ----------
    space_ : NeuronSpace
    mask_img_ : image
        Which voxels are neurons.
    n_features_in_ : int
        Neurons; ``get_feature_names_out`` names them by layer and index.
    """

    def __init__(self, space: NeuronSpace | None = None) -> None:
        self.space = space

    def fit(self, imgs: Any = None, y: None = None) -> NeuronMasker:
        """Learn the space, from `space` or from an image (or the first of a list)."""
        if self.space is None and imgs is None:
            raise InputError("imgs=None: fit needs an image where NeuronMasker got no space")
        first = imgs[0] if isinstance(imgs, (list, tuple)) else imgs
        self.space_ = self.space if self.space is not None else read_nifti(first)[1]
        self.mask_img_ = self.space_.mask_img()
        self.n_features_in_ = self.space_.n_neurons
        return self

    def transform(self, imgs: Any) -> NDArray[np.float32]:
        """Values of an image, ``(n_volumes, n_neurons)`` or ``(n_neurons,)``; a list of them for a list of images."""
        if isinstance(imgs, (list, tuple)):
            return [self.transform(img) for img in imgs]  # type: ignore[return-value]
        self._check_fitted()
        return read_nifti(imgs, self.space_)[0]

    def inverse_transform(self, X: ArrayLike) -> Any:
        """An image of values ``(n_neurons,)`` or ``(n_volumes, n_neurons)``."""
        self._check_fitted()
        return maps_to_nifti(X, self.space_)

    def get_feature_names_out(self, input_features: None = None) -> NDArray[np.object_]:
        """Names of the columns of `transform`: ``layer3_neuron17``."""
        self._check_fitted()
        layer, neuron = self.space_.locate(np.arange(self.space_.n_neurons))
        return np.array([f"layer{a}_neuron{b}" for a, b in zip(layer, neuron)], dtype=object)

    def _check_fitted(self) -> None:
        """A masker that was given its space has nothing to learn from an image."""
        if not hasattr(self, "space_") and self.space is not None:
            self.fit()
        check_is_fitted(self, "space_")

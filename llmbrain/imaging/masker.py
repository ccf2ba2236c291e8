"""`NeuronMasker`: between images and arrays, with nilearn's masker methods."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, TransformerMixin

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

    def _check_fitted(self) -> None:
        if not hasattr(self, "space_"):
            self.fit()

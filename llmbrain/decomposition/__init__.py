"""Group ICA and dual regression: torch inside, arrays at the door, scikit-learn's contract."""

from llmbrain.decomposition._fastica import fastica
from llmbrain.decomposition._preprocess import Preprocessing
from llmbrain.decomposition._store import read_ica
from llmbrain.decomposition.back_reconstruction import back_reconstruct
from llmbrain.decomposition.group_ica import GroupICA
from llmbrain.decomposition.permutation import permutation_test
from llmbrain.decomposition.regression import DualRegression, dual_regression

__all__ = [
    "DualRegression",
    "GroupICA",
    "Preprocessing",
    "back_reconstruct",
    "dual_regression",
    "fastica",
    "permutation_test",
    "read_ica",
]

"""Group ICA and dual regression: torch inside, arrays at the door, scikit-learn's contract."""

from llmbrain.decomposition.back_reconstruction import back_reconstruct
from llmbrain.decomposition.designs import ExchangeabilityWarning, read_fsl_matrix
from llmbrain.decomposition.dual_regression import DualRegression, dual_regression
from llmbrain.decomposition.group_ica import GroupICA
from llmbrain.decomposition.permutation import permutation_test
from llmbrain.decomposition.prepare.preprocess import Preprocessing
from llmbrain.decomposition.reproducibility import SmoothMapsWarning, SplitHalf, split_half_reproducibility
from llmbrain.decomposition.saved_fit import read_ica
from llmbrain.decomposition.solvers.fastica import fastica
from llmbrain.decomposition.stability import Stability, UnstableComponentsWarning, ica_stability, model_order_sweep
from llmbrain.decomposition.ulcmod import ULCMOD

__all__ = [
    "ULCMOD",
    "DualRegression",
    "ExchangeabilityWarning",
    "GroupICA",
    "Preprocessing",
    "SmoothMapsWarning",
    "SplitHalf",
    "Stability",
    "UnstableComponentsWarning",
    "back_reconstruct",
    "dual_regression",
    "fastica",
    "ica_stability",
    "model_order_sweep",
    "permutation_test",
    "read_fsl_matrix",
    "read_ica",
    "split_half_reproducibility",
]

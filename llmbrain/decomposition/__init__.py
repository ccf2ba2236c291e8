"""Group ICA and dual regression: torch inside, arrays at the door, scikit-learn's contract."""

from llmbrain.decomposition._fastica import fastica
from llmbrain.decomposition._preprocess import Preprocessing
from llmbrain.decomposition._store import read_ica
from llmbrain.decomposition.group_ica import GroupICA

__all__ = ["GroupICA", "Preprocessing", "fastica", "read_ica"]

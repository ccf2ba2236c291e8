"""What tests of the decomposition share."""

from __future__ import annotations

import numpy as np
import pytest
from ica_data import planted


@pytest.fixture(scope="module")
def data() -> tuple[np.ndarray, list[np.ndarray]]:
    """Planted maps and runs of them: see `ica_data.planted`."""
    return planted()

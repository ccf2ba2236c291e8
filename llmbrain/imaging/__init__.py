"""Images and folders that neuroimaging tools read: NIfTI, BIDS-derivatives style, FSL names.

Works on arrays and a `NeuronSpace`. Public: `maps_to_nifti`, `write_nifti`, `read_nifti`, `NeuronMasker`,
`export_bids`; for other tools' components `read_melodic`, `read_gift`, `read_nilearn`, `read_dual_regression`,
`ComponentMaps`, `write_melodic`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PUBLIC = {
    "ComponentMaps": "interchange",
    "NeuronMasker": "masker",
    "export_bids": "bids",
    "maps_to_nifti": "nifti",
    "read_dual_regression": "interchange",
    "read_gift": "interchange",
    "read_melodic": "interchange",
    "read_nifti": "nifti",
    "read_nilearn": "interchange",
    "write_melodic": "interchange",
    "write_nifti": "nifti",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(import_module(f"llmbrain.imaging.{_PUBLIC[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'llmbrain.imaging' has no attribute {name!r}")

"""Images and folders that neuroimaging tools read: NIfTI, BIDS-derivatives style, FSL names.

Works on arrays and a `NeuronSpace`. Public: `maps_to_nifti`, `write_nifti`, `read_nifti`, `NeuronMasker`,
`export_bids`; for other tools' components `read_melodic`, `read_gift`, `read_nilearn`, `read_dual_regression`,
`ComponentMaps`, `write_melodic`; for brains `Atlas`, `read_labels`, `read_confounds`.
"""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "atlas": ["Atlas", "read_labels"],
        "bids": ["export_bids"],
        "confounds": ["read_confounds"],
        "interchange": [
            "ComponentMaps",
            "read_dual_regression",
            "read_gift",
            "read_melodic",
            "read_nilearn",
            "write_melodic",
        ],
        "masker": ["NeuronMasker"],
        "nifti": ["maps_to_nifti", "read_nifti", "write_nifti"],
    },
)

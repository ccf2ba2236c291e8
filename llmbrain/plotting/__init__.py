"""Pictures (matplotlib): each function takes `ax` or `figure`, returns the figure, and works without a display.

Neurons are shown on the model's own anatomy, layer by layer, and never on a brain.
"""

from llmbrain.plotting.comparison import plot_brain_map, plot_ceilings, plot_coupling, plot_lag_profile
from llmbrain.plotting.maps import plot_glass_model, plot_layer_profile, plot_network
from llmbrain.plotting.pruning import kept_widths, plot_latency, plot_tradeoff, plot_widths
from llmbrain.plotting.tables import (
    long_lesions,
    plot_connectivity,
    plot_lesion_table,
    plot_model_order,
    plot_stability,
)
from llmbrain.plotting.time import plot_carpet, plot_time_courses

__all__ = [
    "kept_widths",
    "long_lesions",
    "plot_brain_map",
    "plot_carpet",
    "plot_ceilings",
    "plot_connectivity",
    "plot_coupling",
    "plot_glass_model",
    "plot_lag_profile",
    "plot_latency",
    "plot_layer_profile",
    "plot_lesion_table",
    "plot_model_order",
    "plot_network",
    "plot_stability",
    "plot_time_courses",
    "plot_tradeoff",
    "plot_widths",
]

"""Statistics that all rooms share, one of each: matching, nulls, tails, sparsity, bootstrap. Arrays in, arrays out."""

PUBLISHED_Z = 3.6  # |z| above which a neuron belongs to a network (arXiv 2502.20408)

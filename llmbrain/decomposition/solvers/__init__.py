"""ICA solvers."""

"""Statistics that every room shares, one of each: matching, null models, sparsity. Arrays in, arrays out."""

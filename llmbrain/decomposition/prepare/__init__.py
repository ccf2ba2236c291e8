"""What is done to runs before an ICA: preprocessing, PCA, model order."""

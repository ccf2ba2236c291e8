"""What calibration text says about a model: windows, the stream of hidden states, moments, gradients, losses."""

"""Picks codes, scales and biases in MLX's packed forms that lose less than rounding to the nearest code does."""

"""Measurements for developers; what users measure is in mlx_qwen/bench."""

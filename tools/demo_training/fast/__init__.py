"""Layers of Qwen3.5-MoE for training on a CPU: the maths of transformers, in far fewer passes over memory."""

"""The best token of logits."""

from metal_kernels.greedy.op import best_tokens
from metal_kernels.greedy.reference import Best

__all__ = ["Best", "best_tokens"]

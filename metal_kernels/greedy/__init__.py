"""The best token of logits, and the best few."""

from metal_kernels.greedy.op import best_tokens, top_tokens
from metal_kernels.greedy.reference import Best, Top

__all__ = ["Best", "Top", "best_tokens", "top_tokens"]

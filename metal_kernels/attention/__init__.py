"""Softmax attention of a few tokens and what surrounds it: norms and rotary positions before, the gate behind it."""

from metal_kernels.attention.decode.op import attention, packed_attention
from metal_kernels.attention.op import attention_epilogue, attention_prologue
from metal_kernels.attention.rotary import Rotary

__all__ = ["Rotary", "attention", "attention_epilogue", "attention_prologue", "packed_attention"]

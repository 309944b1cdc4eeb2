"""Softmax attention of a few tokens and what surrounds it: norms and rotary positions before, the gate behind it."""

from metal_kernels.attention.decode.op import attention, attention_of_rows, packed_attention
from metal_kernels.attention.decode.reference import MOST_TOKENS
from metal_kernels.attention.op import attention_epilogue, attention_prologue
from metal_kernels.attention.rotary import Rotary

__all__ = [
    "MOST_TOKENS",
    "Rotary",
    "attention",
    "attention_epilogue",
    "attention_of_rows",
    "attention_prologue",
    "packed_attention",
]

"""What surrounds softmax attention: norms and rotary positions before it, the output's gate behind it."""

from metal_kernels.attention.op import attention_epilogue, attention_prologue
from metal_kernels.attention.rotary import Rotary

__all__ = ["Rotary", "attention_epilogue", "attention_prologue"]

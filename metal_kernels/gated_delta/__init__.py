"""The gated delta rule and the Gated DeltaNet layer around it."""

from metal_kernels.gated_delta.decode import gated_delta_decode
from metal_kernels.gated_delta.decode_reference import DecodeResult
from metal_kernels.gated_delta.layer import Heads, Mixer
from metal_kernels.gated_delta.op import gated_delta_mixer, gated_delta_rule
from metal_kernels.gated_delta.reference import causal_conv, gated_rms_norm, log_decay_and_beta
from metal_kernels.gated_delta.rollback import roll_back
from metal_kernels.gated_delta.rollback_reference import Tape

__all__ = [
    "DecodeResult",
    "Heads",
    "Mixer",
    "Tape",
    "causal_conv",
    "gated_delta_decode",
    "gated_delta_mixer",
    "gated_delta_rule",
    "gated_rms_norm",
    "log_decay_and_beta",
    "roll_back",
]

"""The gated delta rule and the Gated DeltaNet layer around it."""

from metal_kernels.gated_delta.layer import Heads, Mixer
from metal_kernels.gated_delta.mixer.convolution import causal_conv
from metal_kernels.gated_delta.mixer.op import gated_delta_mixer
from metal_kernels.gated_delta.mixer.reference import MixerResult, gated_rms_norm, log_decay_and_beta
from metal_kernels.gated_delta.rollback.op import roll_back
from metal_kernels.gated_delta.rollback.reference import Tape
from metal_kernels.gated_delta.rule.op import gated_delta_rule

__all__ = [
    "Heads",
    "Mixer",
    "MixerResult",
    "Tape",
    "causal_conv",
    "gated_delta_mixer",
    "gated_delta_rule",
    "gated_rms_norm",
    "log_decay_and_beta",
    "roll_back",
]

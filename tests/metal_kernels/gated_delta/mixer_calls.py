"""Calls of `gated_delta_mixer` and `roll_back`: arguments, and ways to run them."""

import mlx.core as mx
import numpy as np
import pytest

from metal_kernels.gated_delta import Heads, Mixer, MixerResult, gated_delta_mixer
from tests.metal_emulator import emulated


def layer_inputs(T, *, B=1, Hk=2, Hv=4, Dk=32, Dv=32, W=4, hidden=24, dtype=mx.float32):
    """Arguments of `call` with values of a trained layer's size."""
    rng = np.random.default_rng(T)

    def normal(*shape, scale=1.0):
        return mx.array(scale * rng.standard_normal(shape, dtype=np.float32))

    channels = 2 * Hk * Dk + Hv * Dv
    return {
        "qkvz": normal(B, T, channels + Hv * Dv).astype(dtype),
        "x": normal(B, T, hidden).astype(dtype),
        "ba_weight": normal(2 * Hv, hidden, scale=hidden**-0.5).astype(dtype),
        "conv_weight": normal(channels, W, 1, scale=0.5).astype(dtype),
        "A_log": normal(Hv),
        "dt_bias": normal(Hv).astype(dtype),
        "norm_weight": normal(Dv),
        "eps": 1e-6,
        "num_key_heads": Hk,
        "key_head_dim": Dk,
        "num_value_heads": Hv,
        "value_head_dim": Dv,
        "conv_state": normal(B, W - 1, channels).astype(dtype),
        "state": normal(B, Hv, Dv, Dk),
    }


def call(**inputs) -> MixerResult:
    """`gated_delta_mixer` on what `layer_inputs` returns."""
    weights = [inputs.pop(name) for name in ("conv_weight", "A_log", "dt_bias", "norm_weight", "eps")]
    sizes = ("num_key_heads", "key_head_dim", "num_value_heads", "value_head_dim")
    layer = Mixer(*weights, Heads(*(inputs.pop(name) for name in sizes)))
    return gated_delta_mixer(layer=layer, **inputs)


def tokens(inputs, stop):
    """The same call with its first tokens only."""
    return inputs | {name: inputs[name][:, :stop] for name in ("qkvz", "x")}


def reference(**inputs) -> MixerResult:
    return in_reference(call, **inputs)


def in_reference(op, *args, **kwargs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_QWEN_KERNELS", "reference")
        return op(*args, **kwargs)


def in_kernel(*, checked=False, order="forward", **inputs) -> MixerResult:
    return in_one_launch(call, checked=checked, order=order, **inputs)


def in_one_launch(op, *args, checked=False, order="forward", **kwargs):
    with pytest.MonkeyPatch.context() as patch, emulated(checked=checked, order=order) as report:
        patch.setenv("MLX_QWEN_KERNELS", "metal")
        result = op(*args, **kwargs)
    assert report.count() == 1
    return result

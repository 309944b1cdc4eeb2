"""What a model calls for a Gated DeltaNet layer's tokens: to prefill, to decode, and to verify and take back."""

import mlx.core as mx

from metal_kernels._backend import takes_kernel
from metal_kernels.gated_delta.layer import Heads, Mixer
from metal_kernels.gated_delta.mixer import kernel, reference
from metal_kernels.gated_delta.mixer.reference import MixerResult
from metal_kernels.gated_delta.rollback.reference import Tape
from metal_kernels.gated_delta.rule.op import kernel_or_chunks
from metal_kernels.gated_delta.rule.reference import masked_rows


def gated_delta_mixer(
    qkvz: mx.array,
    x: mx.array,
    ba_weight: mx.array,
    layer: Mixer,
    *,
    conv_state: mx.array | None = None,
    state: mx.array | None = None,
    mask: mx.array | None = None,
    tape: bool = False,
) -> MixerResult:
    """Compute all of a Gated DeltaNet layer between its wide input projection and its output projection.

    Causal depthwise convolution and SiLU over q, k and v; the gates; the gated delta rule; RMSNorm gated by SiLU(z).
    b and a are x @ ba_weight.T, rounded to x's dtype; all else between the inputs and y is fp32.

    One kernel takes 1 to 8 tokens with a state, heads of 32 to 256 in steps of 32 and 2 to 8 taps, at any strides. It
    sums in another order than the reference: fp32 results differ by less than 2e-6 of the reference's largest value.
    In bf16 and fp16 a b, a or y near a tie may be rounded the other way. All other calls run as plain MLX around the
    rule, which is a kernel where `gated_delta_rule` has one.

    Args:
        qkvz: [B, T, 2 Hk Dk + 2 Hv Dv], rows of q, k, v, z; may be strided.
        x: [B, T, hidden], the input of the layer's projections, in qkvz's dtype; may be strided.
        ba_weight: [2 Hv, hidden], the rows of b, then those of a; in qkvz's dtype.
        layer: its weights and heads.
        conv_state: the W - 1 rows of q, k, v before this call, [B, W - 1, 2 Hk Dk + Hv Dv]; None is zeros.
        state: fp32 [B, Hv, Dv, Dk]; None is zeros.
        mask: bool [B, T]; tokens where it is False enter neither the convolution nor the state, and their y is finite
            but otherwise unspecified. The last W - 1 tokens must not be masked (pad on the left).
        tape: whether to record what `roll_back` needs. The reference's work then grows with T squared.

    Returns:
        y [B, T, Hv Dv] in qkvz's dtype, the new conv_state, the new state, and the tape or None.

    Raises:
        ValueError: shapes do not fit together.
    """
    conv_weight, A_log, dt_bias, norm_weight, eps, heads = layer
    (B, T), W, channels = qkvz.shape[:2], conv_weight.shape[1], heads.channels
    expected = [
        ("qkvz", qkvz, (B, T, channels + heads.num_value * heads.value_dim)),
        ("x", x, (B, T, x.shape[-1])),
        ("ba_weight", ba_weight, (2 * heads.num_value, x.shape[-1])),
        ("conv_weight", conv_weight, (channels, W, 1)),
        ("A_log", A_log, (heads.num_value,)),
        ("dt_bias", dt_bias, (heads.num_value,)),
        ("norm_weight", norm_weight, (heads.value_dim,)),
        ("conv_state", conv_state, (B, W - 1, channels)),
        ("state", state, (B, heads.num_value, heads.value_dim, heads.key_dim)),
        ("mask", mask, (B, T)),
    ]
    _check_shapes(expected, heads)
    if takes_kernel("gated_delta_mixer", kernel.unsupported(qkvz, x, ba_weight, heads, conv_state, state)):
        assert conv_state is not None and state is not None, "the kernel takes only calls with a state"
        inputs = [qkvz, x, ba_weight, conv_weight, A_log, dt_bias, norm_weight, mx.array(eps), conv_state, state]
        y, conv_state, state, recorded = kernel.launch(inputs, mask, heads, taped=tape)
        if not tape:
            return MixerResult(y, conv_state, state, None)
        k, delta, log_decay = recorded
        return MixerResult(y, conv_state, state, Tape(k, delta, log_decay, masked_rows(qkvz[..., :channels], mask)))
    return reference.gated_delta_mixer(
        qkvz,
        x,
        ba_weight,
        layer,
        conv_state=conv_state,
        state=state,
        mask=mask,
        tape=tape,
        rule=kernel_or_chunks,
    )


def _check_shapes(expected: list[tuple[str, mx.array | None, tuple[int, ...]]], heads: Heads) -> None:
    given = f"{heads.num_key} key heads of {heads.key_dim} and {heads.num_value} value heads of {heads.value_dim}"
    for name, array, shape in expected:
        if array is not None and array.shape != shape:
            raise ValueError(
                f"gated_delta_mixer: {name} is {array.shape}, expected {shape} with {given}; "
                f"check the head counts and sizes in the model's configuration"
            )
    if heads.num_value % heads.num_key:
        raise ValueError(f"gated_delta_mixer: {given} cannot share evenly; check the model's configuration")

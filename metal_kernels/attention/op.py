"""What a model calls: what surrounds softmax attention, with the choice between kernel and reference."""

import mlx.core as mx

from metal_kernels._backend import takes_kernel
from metal_kernels.attention import kernel, reference
from metal_kernels.attention.rotary import Rotary


def attention_prologue(
    qkv: mx.array,
    q_weight: mx.array,
    k_weight: mx.array,
    positions: mx.array,
    *,
    rotary: Rotary,
    num_heads: int,
    num_kv_heads: int,
    eps: float,
) -> tuple[mx.array, mx.array]:
    """Norm the heads of q and k, turn them to their positions, and put heads before tokens.

    All arithmetic is fp32 and rounded once. Angles are position · frequency, both rounded to fp32, as in transformers.
    Keys and values share an array, so that a cache takes both in one launch. The kernel takes heads of 8 to 512
    elements and rows at any strides; q and k differ from the reference by at most 2e-6 of the largest element of a head
    in fp32 and one unit in the last place of it in bf16 and fp16, v by nothing.

    Args:
        qkv: [B, T, (H + 2 Hkv) D + ...]: all heads of q, of k and of v; what follows is not read.
        q_weight, k_weight: fp32 [D], factors of the norms.
        positions: int; [] or [B], the position of each sequence's first token; or [3, B, T], of every token in time,
            height and width.
        rotary: dims at most D.
        num_heads, num_kv_heads: H, Hkv; without heads of q, keys and values alone, in plain MLX.
        eps: of the norms, added to the mean of squares.

    Returns:
        q [B, H, T, D] and keys and values [2, B, Hkv, T, D], in qkv's dtype.

    Raises:
        ValueError: shapes do not fit together.
    """
    _check_prologue_shapes(qkv, q_weight, k_weight, positions, rotary, num_heads + 2 * num_kv_heads)
    unsupported = kernel.prologue_unsupported(qkv, q_weight, k_weight, num_heads)
    prologue = reference.attention_prologue
    if takes_kernel("attention_prologue", unsupported):
        prologue = kernel.attention_prologue
    return prologue(
        qkv, q_weight, k_weight, positions, rotary=rotary, num_heads=num_heads, num_kv_heads=num_kv_heads, eps=eps
    )


def attention_epilogue(attended: mx.array, gate: mx.array) -> mx.array:
    """Put the heads of attention's output beside each other and gate them: y · sigmoid(gate), in fp32, rounded once.

    The kernel reads both at any strides. It differs from the reference by at most 2e-7 of the value in fp32, one unit
    in the last place in bf16 and fp16.

    Args:
        attended: [B, H, T, D].
        gate: [B, T, H D], of the same dtype.

    Returns:
        [B, T, H D] in the same dtype.

    Raises:
        ValueError: shapes do not fit together.
    """
    B, H, T, D = attended.shape
    if gate.shape != (B, T, H * D):
        raise ValueError(f"attention_epilogue: gate is {gate.shape}, expected {(B, T, H * D)} for {attended.shape}")
    if takes_kernel("attention_epilogue", kernel.epilogue_unsupported(attended, gate)):
        return kernel.attention_epilogue(attended, gate)
    return reference.attention_epilogue(attended, gate)


def _check_prologue_shapes(
    qkv: mx.array, q_weight: mx.array, k_weight: mx.array, positions: mx.array, rotary: Rotary, heads: int
) -> None:
    B, T, width = qkv.shape
    D = q_weight.size
    if width < heads * D or k_weight.size != D:
        raise ValueError(
            f"attention_prologue: {heads} heads of q, k and v need norm weights of one size D and rows of at least "
            f"{heads} D, found q {q_weight.shape}, k {k_weight.shape} and rows of {width}"
        )
    if positions.shape not in ((), (B,), (3, B, T)):
        raise ValueError(f"attention_prologue: positions are {positions.shape}, expected [], {[B]} or {[3, B, T]}")
    if rotary.dims % 2 or not 2 <= rotary.dims <= D:
        raise ValueError(f"attention_prologue: rotary.dims is {rotary.dims}, expected an even number from 2 to {D}")

"""Every way in which `mx.quantize` packs a matrix, decoded by the published definitions of its numbers.

E2M1, E4M3 and E8M0: OCP Microscaling Formats (MX) Specification 1.0, and OCP 8-bit Floating Point Specification 1.0.
"""

import mlx.core as mx
import numpy as np

from metal_kernels.moe_dispatch import ExpertWeights, SparseWeights

Packing = tuple[str, int, int]
AFFINE: list[Packing] = [("affine", bits, group) for bits, group in ((2, 64), (3, 32), (5, 128), (6, 32), (6, 64))]
FLOATS: list[Packing] = [("mxfp4", 4, 32), ("nvfp4", 4, 16), ("mxfp8", 8, 32)]
_NAN_BYTES = (0x7F, 0xFF)


def all_codes(*shape: int, packing: Packing, dtype: mx.Dtype = mx.float32, seed: int = 0) -> ExpertWeights:
    """A matrix [..., N, K] of random codes, each as likely as any other, whose values are around 1 / sqrt(K)."""
    mode, bits, group = packing
    rng, (*rows, K) = np.random.default_rng(seed), shape
    codes = rng.integers(0, 256, (*rows, K * bits // 8), dtype=np.uint8)
    groups = (*rows, K // group)
    if mode == "affine":
        step = K**-0.5 / 2**bits
        scales, biases = (mx.array(rng.normal(0, step * size, groups)).astype(dtype) for size in (1, 2**bits))
        return ExpertWeights(mx.array(codes.view(np.uint32)), scales, biases, group, bits, mode)
    if bits == 8:
        codes[np.isin(codes, _NAN_BYTES)] = 0
    # Powers of two from 2^-10 to 2^-4, or E4M3 from its smallest to 1/8.
    low, high = (0, 0x20) if mode == "nvfp4" else (117, 124)
    scales = mx.array(rng.integers(low, high, groups, dtype=np.uint8))
    return ExpertWeights(mx.array(codes.view(np.uint32)), scales, None, group, bits, mode)


def layer(E: int, K: int, I: int, packing: Packing, shared: Packing, dtype: mx.Dtype = mx.float32) -> SparseWeights:  # noqa: E741
    """A sparse layer whose experts and shared expert are packed in two ways."""
    return SparseWeights(
        all_codes(E, 2 * I, K, packing=packing, dtype=dtype, seed=1),
        all_codes(E, K, I, packing=packing, dtype=dtype, seed=2),
        (all_codes(2 * I, K, packing=shared, dtype=dtype, seed=3),),
        all_codes(K, I, packing=shared, dtype=dtype, seed=4),
    )


def decoded(matrix: ExpertWeights) -> np.ndarray:
    """The values of a packed matrix, in fp64."""
    assert matrix.scales is not None
    stored = np.array(matrix.weight).view(np.uint8)
    bits = np.unpackbits(stored, axis=-1, bitorder="little").reshape(*stored.shape[:-1], -1, matrix.bits)
    codes = (bits * (1 << np.arange(matrix.bits))).sum(-1)
    scales = np.array(matrix.scales.astype(mx.float32) if matrix.mode == "affine" else matrix.scales)
    if matrix.mode == "affine":
        assert matrix.biases is not None
        values, steps = codes.astype(np.float64), scales.astype(np.float64)
        biases = np.array(matrix.biases.astype(mx.float32)).astype(np.float64)
        return values * np.repeat(steps, matrix.group_size, -1) + np.repeat(biases, matrix.group_size, -1)
    steps = _float(scales, 4, 3, 7) if matrix.mode == "nvfp4" else 2.0 ** (scales.astype(np.float64) - 127)
    values = _float(codes, 2, 1, 1) if matrix.bits == 4 else _float(codes, 4, 3, 7)
    return values * np.repeat(steps, matrix.group_size, -1)


def _float(codes: np.ndarray, exponent_bits: int, mantissa_bits: int, bias: int) -> np.ndarray:
    """Sign, exponent, mantissa from the highest bit down; an exponent of 0 is subnormal."""
    codes = codes.astype(np.int64)
    mantissa = codes & (1 << mantissa_bits) - 1
    exponent = codes >> mantissa_bits & (1 << exponent_bits) - 1
    sign = 1 - 2 * (codes >> mantissa_bits + exponent_bits)
    whole = mantissa + (exponent > 0) * 2.0**mantissa_bits
    return sign * whole * 2.0 ** (np.maximum(exponent, 1) - bias - mantissa_bits)

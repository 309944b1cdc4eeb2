"""Round-to-nearest integer codes in groups, and their packing, for tests that write GPTQ, AWQ and others."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Codes:
    """`codes` [N, K]; `scales` and `zeros` [N, groups]; `values` [N, K] = scale · (code − zero) in fp32, exactly."""

    codes: Integers
    scales: Tensor
    zeros: Integers
    values: npt.NDArray[np.float32]


def nearest(
    weight: Tensor, groups: Integers, *, bits: int, symmetric: bool, scale_dtype: torch.dtype = torch.float16
) -> Codes:
    """The nearest codes of `weight` [N, K], whose column k belongs to group `groups[k]`. No zero is code 0."""
    exact, largest = weight.float().numpy(), (1 << bits) - 1
    count = int(groups.max()) + 1
    low = np.stack([exact[:, groups == g].min(axis=1) for g in range(count)], axis=1)
    high = np.stack([exact[:, groups == g].max(axis=1) for g in range(count)], axis=1)
    if symmetric:
        high = np.maximum(high, -low)
        low = -high
    scales = torch.from_numpy((high - low) / largest + 1e-4).to(scale_dtype)
    steps = scales.float().numpy()
    middle = np.full(low.shape, 1 << (bits - 1))
    zeros = middle if symmetric else np.clip(np.rint(-low / steps), 1, largest).astype(np.int64)
    codes = np.clip(np.rint(exact / steps[:, groups]) + zeros[:, groups], 0, largest).astype(np.int64)
    values = (codes - zeros[:, groups]).astype(np.float32) * steps[:, groups]
    return Codes(codes, scales, zeros, values)


def symmetric_gptq(weight: Tensor) -> tuple[dict[str, Tensor], npt.NDArray[np.float32]]:
    """GPTQ's tensors of 4 bits in groups of 32, with the zeros as they are, and the values that they stand for."""
    found = nearest(weight, np.arange(weight.shape[1]) // 32, bits=4, symmetric=True)
    return {
        "qweight": torch.from_numpy(little_endian(found.codes, 4).T.copy()),
        "qzeros": torch.from_numpy(little_endian(found.zeros.T, 4)),
        "scales": found.scales.T,
    }, found.values


def little_endian(codes: Integers, bits: int) -> npt.NDArray[np.int32]:
    """Codes [..., K] in int32 words [..., K · bits / 32], one bit after the other, the first in the lowest bits."""
    stream = (codes[..., None] >> np.arange(bits)) & 1
    by_byte = stream.reshape(*codes.shape[:-1], -1, 8).astype(np.uint8)
    return np.ascontiguousarray(np.packbits(by_byte, axis=-1, bitorder="little")[..., 0]).view("<i4")

"""Codes as MLX packs them: one stream of bits along a row, the lowest bits first."""

import numpy as np
import numpy.typing as npt

_LANES = 8  # codes that a 64-bit word holds, one a byte


def packed(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint32]:
    """Words [..., K · bits / 32] of codes [..., K] below 2^bits; K is a multiple of 32.

    Eight codes are taken as one 64-bit word whose bytes are pushed together in at most three steps.
    """
    *leading, columns = codes.shape
    if bits == _LANES:
        return np.ascontiguousarray(codes).view(np.uint32)
    words = np.ascontiguousarray(codes).view(np.uint64)
    for lane in (16, 32, 64):
        held = lane // _LANES * bits // 2
        lower, upper = _fields(held, lane)
        moved = words >> np.uint64(lane // 2 - held)
        moved &= upper
        words = words & lower
        words |= moved
        if 2 * held == 8:  # A byte's worth of each lane, and no more to push together.
            return words.view(f"u{lane // 8}").astype(np.uint8).view(np.uint32)
    data = words.view(np.uint8).reshape(*leading, columns // _LANES, _LANES)[..., :bits]
    return np.ascontiguousarray(data).reshape(*leading, columns * bits // 8).view(np.uint32)


def unpacked(words: npt.NDArray[np.uint32], bits: int) -> npt.NDArray[np.uint8]:
    """The codes [..., K] that `packed` made these words [..., K · bits / 32] of."""
    data = np.ascontiguousarray(words).view(np.uint8)
    stream = np.unpackbits(data, axis=-1, bitorder="little")
    fields = stream.reshape(*words.shape[:-1], words.shape[-1] * 32 // bits, bits)
    return np.packbits(fields, axis=-1, bitorder="little")[..., 0]


def _fields(held: int, lane: int) -> tuple[np.uint64, np.uint64]:
    """Masks of the lowest `held` bits of every lane of a 64-bit word, and of the `held` bits above them."""
    lower = sum(((1 << held) - 1) << shift for shift in range(0, 64, lane))
    return np.uint64(lower), np.uint64(lower << held)

"""What ranks that hold parts of one model send each other: sums of partial outputs, and parts of the logits."""

import mlx.core as mx
import mlx.nn as nn

from mlx_qwen.model.network import is_gathered
from mlx_qwen.model.sharding import Share


class SlicedEmbedding(nn.Module):
    """A rank's rows of the embedding: the sum over ranks, of which one has the row and the others zeros, is exact."""

    def __init__(self, rows: nn.Module, share: Share, group: mx.distributed.Group) -> None:
        super().__init__()
        self.rows = rows
        self._first, self._last = share.part(share.whole.vocab_size)
        self._group = group

    def __call__(self, x: mx.array) -> mx.array:
        """int [...] to vectors [..., size], on every rank."""
        own = (x >= self._first) & (x < self._last)
        vectors = self.rows(mx.where(own, x - self._first, 0))
        parts = mx.where(own[..., None], vectors, mx.zeros((), vectors.dtype))
        return summed(parts, self._group).astype(vectors.dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        """[..., size] to the logits of all ranks, [..., vocab_size]."""
        return gathered(self.rows.as_linear(x), self._group)


class SlicedHead(nn.Module):
    """A rank's rows of the output head."""

    def __init__(self, rows: nn.Module, group: mx.distributed.Group) -> None:
        super().__init__()
        self.rows = rows
        self._group = group

    def __call__(self, x: mx.array) -> mx.array:
        """[..., size] to the logits of all ranks, [..., vocab_size]."""
        return gathered(self.rows(x), self._group)


def summed(x: mx.array, group: mx.distributed.Group | None) -> mx.array:
    """The sum of every rank's x, of one shape and dtype, the same on all ranks; x itself where there is one rank.

    It is in fp32 where parts are gathered, see `is_gathered`: parts in bf16 whose sum is not rounded are together as
    near to the exact sum as one rank's output, which is rounded once. Otherwise it is in x's dtype.
    """
    if group is None:
        return x
    count = group.size()
    if not is_gathered(x.nbytes, count):
        return mx.distributed.all_sum(x, group=group)
    first, *others = mx.distributed.all_gather(x, group=group).reshape(count, *x.shape).astype(mx.float32)
    for part in others:
        first = first + part
    return first


def gathered_numbers(number: int, group: mx.distributed.Group | None) -> list[int]:
    """The number, below 2^31, that each rank gives, in the order of ranks; without a group this is the only one."""
    if group is None or group.size() == 1:
        return [number]
    numbers: list[int] = mx.distributed.all_gather(mx.array([number]), group=group).tolist()  # type: ignore[assignment]
    return numbers


def gathered(x: mx.array, group: mx.distributed.Group) -> mx.array:
    """Every rank's x [..., n], in the order of ranks, as one [..., ranks · n]."""
    rows = x.reshape(-1, x.shape[-1]).T
    whole = mx.distributed.all_gather(rows, group=group)
    return whole.T.reshape(*x.shape[:-1], -1)

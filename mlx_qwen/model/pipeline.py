"""Layers divided among ranks: each runs a stretch of them on what the rank before it sends, for Macs of unequal memory.

One rank computes while the others wait, so that it fits larger models and makes none faster. Every step is computed at
once: ranks would otherwise have different graphs to order their messages by.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import mlx.core as mx

from mlx_qwen.checkpoint.layout import Target
from mlx_qwen.checkpoint.names import Role, decoder_layer
from mlx_qwen.checkpoint.slices import Span
from mlx_qwen.errors import ShardingError
from mlx_qwen.model.collectives import summed

_GIB = 1 << 30


class Stages:
    """One rank's place among those that run a model's layers one after the other."""

    def __init__(self, group: mx.distributed.Group) -> None:
        self._group = group
        self.is_first, self.is_last = group.rank() == 0, group.rank() == group.size() - 1

    def entering(self, embeddings: mx.array) -> mx.array:
        """fp32 [B, T, hidden] from the rank before this one, or the embeddings themselves."""
        if self.is_first:
            return embeddings
        like = mx.zeros(embeddings.shape, mx.float32)
        return mx.distributed.recv_like(like, self._group.rank() - 1, group=self._group)

    def leaving(self, x: mx.array, last_shape: Sequence[int]) -> mx.array:
        """What the last rank's layers give, fp32 of `last_shape`, on every rank; x goes on to the next one."""
        if not self.is_last:
            sent = mx.distributed.send(x, self._group.rank() + 1, group=self._group)
            x = after(mx.zeros(last_shape, mx.float32), sent)
        whole = summed(x, self._group)
        mx.eval(whole)
        return whole

    def from_last(self, x: mx.array, head: Callable[[mx.array], mx.array], size: int) -> mx.array:
        """The last rank's head(x) [..., size] on every rank: the chips of others may round differently."""
        own = head(x) if self.is_last else after(mx.zeros((*x.shape[:-1], size), x.dtype), x)
        whole = summed(own, self._group).astype(own.dtype)
        mx.eval(whole)
        return whole


def after(x: mx.array, *earlier: mx.array) -> mx.array:
    """x, to be computed after `earlier`."""
    ordered: list[mx.array] = mx.depends([x], list(earlier))
    return ordered[0]


class Bytes(NamedTuple):
    """Stored bytes of a model: of each decoder layer, of the output head, and of what every rank holds."""

    layers: tuple[int, ...]
    head: int
    common: int


def stored_bytes(targets: Sequence[Target], layers: int) -> Bytes:
    """The bytes of a checkpoint's tensors, as they are on the disk."""
    each, head, common = [0] * layers, 0, 0
    for target in targets:
        infos = (*{id(s.tensor): s.tensor for s in target.sources}.values(), target.scales, target.biases)
        nbytes = sum(info.nbytes for info in infos if info is not None)
        if target.sources[0].rows is not None:  # one of three targets that fused experts give
            rows = target.sources[0].rows
            nbytes = nbytes * (rows[1] - rows[0]) // target.sources[0].tensor.shape[1]
        index = decoder_layer(target.spec.name)
        if index is not None:
            each[index] += nbytes
        elif target.spec.role is Role.HEAD:
            head += nbytes
        else:
            common += nbytes
    return Bytes(tuple(each), head, common)


def stages_of(stored: Bytes, usable: Sequence[int]) -> list[Span]:
    """Which layers each rank runs, so that the fullest of them, by what it may use, is as empty as can be.

    Args:
        stored: from `stored_bytes`.
        usable: bytes that each rank may use for weights.

    Raises:
        ShardingError: there are more ranks than layers, or the layers do not fit.
    """
    n, ranks = len(stored.layers), len(usable)
    if ranks > n:
        raise ShardingError(f"{ranks} ranks are more than the model has layers, {n}. Start at most {n}.")
    sums = [0]
    for nbytes in stored.layers:
        sums.append(sums[-1] + nbytes)

    def fullness(rank: int, first: int, last: int) -> float:
        held = stored.common + sums[last] - sums[first] + (stored.head if rank == ranks - 1 else 0)
        return held / usable[rank]

    # best[j]: the least fullness of ranks so far that run the first j layers, and where each of them begins.
    best: list[tuple[float, tuple[int, ...]]] = [(fullness(0, 0, j), (0,)) for j in range(n + 1)]
    for rank in range(1, ranks):
        best = [
            min(
                ((max(best[i][0], fullness(rank, i, j)), (*best[i][1], i)) for i in range(rank, j)),
                default=(float("inf"), ()),
            )
            for j in range(n + 1)
        ]
    full, starts = best[n]
    if full > 1:
        needed, have = (ranks * stored.common + sums[n] + stored.head) / _GIB, sum(usable) / _GIB
        raise ShardingError(
            f"The layers do not fit: {ranks} ranks need {needed:.2f} GiB for weights, {stored.common / _GIB:.2f} of "
            f"these on each, and may use {have:.2f} GiB. Add a rank, or convert the model with fewer bits."
        )
    return list(zip(starts, (*starts[1:], n), strict=True))

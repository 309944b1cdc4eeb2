"""The matrices of a sparse layer, as kernels and references take them."""

from typing import NamedTuple

import mlx.core as mx


class ExpertWeights(NamedTuple):
    """One matrix per expert, [E, N, K], or that of the shared expert, [N, K].

    Dense, or packed by `mx.quantize` along K (then with scales, and biases if affine).
    """

    weight: mx.array
    scales: mx.array | None = None
    biases: mx.array | None = None
    group_size: int = 64
    bits: int = 4
    mode: str = "affine"


class SparseWeights(NamedTuple):
    """All matrices of the experts and of the shared expert, whose intermediate size may differ from theirs.

    gate_up: [E, 2 I, K], the I rows of each gate matrix before those of its up matrix; down: [E, K, I].
    shared_gate_up: [2 Is, K] in one piece, or its rows in as many as have a precision of their own;
    shared_down: [K, Is].
    """

    gate_up: ExpertWeights
    down: ExpertWeights
    shared_gate_up: tuple[ExpertWeights, ...]
    shared_down: ExpertWeights


class Routing(NamedTuple):
    """Where N tokens go: indices uint32 [N, k], scores fp32 [N, k], and the shared expert's, fp32 [N, 1]."""

    indices: mx.array
    scores: mx.array
    shared_score: mx.array

"""Random sparse layers, packed in every way, and what they compute in fp64."""

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import numpy as np

from metal_kernels import _build
from metal_kernels.moe_dispatch import ExpertWeights, Routing, SparseWeights

DENSE = (0, 0)


def normal(*shape, dtype=mx.float32, scale=1.0, seed=0):
    return mx.array(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32) * scale).astype(dtype)


def matrix(*shape, packing=DENSE, dtype=mx.float32, seed=0):
    """Rows of about unit length, dense or packed with (bits, group size)."""
    weight = normal(*shape, dtype=dtype, scale=shape[-1] ** -0.5, seed=seed)
    bits, group = packing
    return ExpertWeights(*mx.quantize(weight, group, bits), group, bits) if bits else ExpertWeights(weight)


def sparse_weights(E=5, K=128, I=64, shared_I=64, packing=DENSE, shared=DENSE, dtype=mx.float32):  # noqa: E741
    return SparseWeights(
        matrix(E, 2 * I, K, packing=packing, dtype=dtype, seed=1),
        matrix(E, K, I, packing=packing, dtype=dtype, seed=2),
        (matrix(2 * shared_I, K, packing=shared, dtype=dtype, seed=3),),
        matrix(K, shared_I, packing=shared, dtype=dtype, seed=4),
    )


def random_routing(N, k, E, seed=0):
    """k different experts for every token, in random order, with random scores."""
    rng = np.random.default_rng(seed)
    indices = np.stack([rng.permutation(E)[:k] for _ in range(N)]).astype(np.uint32)
    scores = rng.random((N, k + 1)).astype(np.float32)
    return Routing(mx.array(indices), mx.array(scores[:, :k].copy()), mx.array(scores[:, k:].copy()))


def as_numpy(x):
    return np.array(x.astype(mx.float32)).astype(np.float64)


def dense(matrix):
    """The values of a matrix, in fp64."""
    if matrix.scales is None:
        return as_numpy(matrix.weight)
    if matrix.biases is None:
        return as_numpy(mx.dequantize(matrix.weight, matrix.scales, None, matrix.group_size, matrix.bits, matrix.mode))
    # In fp32, since mx.dequantize rounds to the type of the scales.
    scales, biases = matrix.scales.astype(mx.float32), matrix.biases.astype(mx.float32)
    return as_numpy(mx.dequantize(matrix.weight, scales, biases, matrix.group_size, matrix.bits))


def exact_activation(x, weight):
    gate, up = np.split(x @ weight.T, 2, axis=-1)
    return gate / (1 + np.exp(-gate)) * up


def exact_hidden(x, indices, weights):
    """[N, k, I] and [N, Is], what `expert_gate_up` approximates."""
    x, gate_up = as_numpy(x), dense(weights.gate_up)
    chosen = zip(x, np.array(indices), strict=True)
    hidden = [[exact_activation(row, gate_up[expert]) for expert in experts] for row, experts in chosen]
    return np.array(hidden), exact_activation(x, np.concatenate([dense(part) for part in weights.shared_gate_up]))


def exact_combination(hidden, shared_hidden, routing, weights):
    """[N, K], what `expert_down_combine` approximates; activations are given in fp64."""
    down = dense(weights.down)[np.array(routing.indices)]
    experts = np.einsum("nk,nki,nkoi->no", as_numpy(routing.scores), hidden, down)
    return experts + as_numpy(routing.shared_score) * (shared_hidden @ dense(weights.shared_down).T)


def exact_sparse_mlp(x, routing, weights):
    return exact_combination(*exact_hidden(x, routing.indices, weights), routing, weights)


def relative_error(found, expected):
    """Largest difference over the largest expected magnitude; nan when anything found is not finite."""
    return float(np.abs(as_numpy(found) - expected).max() / np.abs(expected).max())


@contextmanager
def edited_kernels(monkeypatch, sound: str, broken: str) -> Iterator[None]:
    """`.metal` sources with one piece of text replaced, where a file has it."""
    text = _build.source_text
    monkeypatch.setattr(_build, "source_text", lambda file: text(file).replace(sound, broken))
    _build._built.cache_clear()
    try:
        yield
    finally:
        _build._built.cache_clear()

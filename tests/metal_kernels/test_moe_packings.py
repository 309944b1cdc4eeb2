"""Experts of every precision that MLX packs, with every code there is: the kernels take them as they lie."""

import mlx.core as mx
import numpy as np
import pytest

from metal_kernels import OpStats, reset_stats, stats
from metal_kernels.moe_dispatch import ExpertWeights, reference, sparse_mlp
from tests.metal_emulator import emulated
from tests.metal_kernels import moe_layers
from tests.metal_kernels.moe_layers import as_numpy, exact_sparse_mlp, normal, random_routing, relative_error
from tests.metal_kernels.packings import AFFINE, FLOATS, Packing, all_codes, decoded, layer

PACKINGS = [*AFFINE, *FLOATS]
LAUNCHES = ["mlx_qwen_expert_gate_up", "mlx_qwen_expert_down_combine"]


@pytest.fixture(autouse=True)
def _metal_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_QWEN_KERNELS", "metal")
    monkeypatch.setattr(moe_layers, "dense", decoded)
    reset_stats()


@pytest.mark.parametrize("packing", [("affine", 4, 64), ("affine", 8, 64), *PACKINGS], ids=str)
def test_numbers_are_decoded_as_mlx_does(packing: Packing) -> None:
    matrix = all_codes(8, 256, packing=packing)
    assert matrix.scales is not None
    found = as_numpy(mx.dequantize(matrix.weight, matrix.scales, matrix.biases, *packing[:0:-1], packing[0]))
    # Products of such short floats are bf16 numbers, so MLX's are exact; sums in fp32 are not.
    assert np.allclose(decoded(matrix), found, rtol=0, atol=0 if packing in FLOATS else 1e-6)


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
def test_two_launches_multiply_with_every_code(packing: Packing) -> None:
    shared = PACKINGS[PACKINGS.index(packing) - 1]
    weights = layer(3, 640, 128, packing, shared)
    x, routing = normal(2, 640), random_routing(2, 2, 3)
    with emulated() as report:
        found = sparse_mlp(x, routing, weights)
    assert [launch.kernel for launch in report.launches] == LAUNCHES
    assert stats() == {name: OpStats(kernel=1) for name in ("expert_gate_up", "expert_down_combine")}
    assert relative_error(found, exact_sparse_mlp(x, routing, weights)) < 2e-6
    assert relative_error(found, as_numpy(reference.sparse_mlp(x, routing, weights))) < 4e-6


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
def test_nothing_else_is_read_and_nothing_twice(packing: Packing) -> None:
    E, K, I, k = 4, 256, 128, 2  # noqa: E741
    weights = layer(E, K, I, packing, packing, mx.bfloat16)
    x, routing = normal(1, K, dtype=mx.bfloat16), random_routing(1, k, E)
    with emulated(checked=True) as report:
        found = sparse_mlp(x, routing, weights)
    assert relative_error(found, exact_sparse_mlp(x, routing, weights)) < 2**-7
    for launch in report.launches:
        weight = launch.buffers["weight"]
        assert weight.read == weight.unique_read == weight.size * k // E
        assert launch.buffers["scales"].unique_read <= launch.buffers["scales"].size * k // E + 128


@pytest.mark.parametrize("packing", FLOATS, ids=str)
def test_what_mlx_itself_packs_is_taken(packing: Packing) -> None:
    mode, bits, group = packing
    x, routing = normal(2, 128), random_routing(2, 2, 3)
    packed = ExpertWeights(*mx.quantize(normal(3, 128, 128, scale=0.1), group, bits, mode), None, group, bits, mode)
    weights = layer(3, 128, 64, packing, packing)._replace(gate_up=packed)
    with emulated():
        assert relative_error(sparse_mlp(x, routing, weights), exact_sparse_mlp(x, routing, weights)) < 2e-6

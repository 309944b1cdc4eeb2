"""Launches are counted by one rule, and a decoded token of every size needs few of them."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
import pytest
from click.testing import CliRunner

from metal_kernels.moe_dispatch import op
from mlx_qwen.bench.as_on_gpu import as_on_gpu, weightless
from mlx_qwen.bench.graph import count_copies, count_nodes
from mlx_qwen.bench.launches import COUNTED_SIZES, count_launches
from mlx_qwen.checkpoint.layout import Quantization
from mlx_qwen.checkpoint.released import released
from mlx_qwen.cli import main
from mlx_qwen.convert.recipes import uniform

PAGE = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"
X = weightless((1, 4, 8), mx.float32)
W = weightless((8, 8), mx.float32)


def counted(build: Callable[[], mx.array]) -> tuple[Counter[str], int]:
    """Launches by name, and copies, of what `build` builds."""
    with as_on_gpu() as launches:
        return count_nodes(lambda: [build()], launches), count_copies(lambda: [build()], launches)


def double_by_kernel(x: mx.array, *, ensure_row_contiguous: bool) -> mx.array:
    kernel = mx.fast.metal_kernel(
        name="double",
        input_names=["x"],
        output_names=["y"],
        source="y[0] = 2 * x[0];",
        ensure_row_contiguous=ensure_row_contiguous,
    )
    doubled: mx.array = kernel(
        inputs=[x], grid=(1, 1, 1), threadgroup=(1, 1, 1), output_shapes=[x.shape], output_dtypes=[x.dtype]
    )[0]
    return doubled


@mx.compile
def fused(x: mx.array) -> mx.array:
    return mx.exp(x * 2 + 1)


def test_views_of_an_array_are_no_launch() -> None:
    assert counted(lambda: X[:, 1:3].transpose(0, 2, 1)[..., None].squeeze(0)) == (Counter(), 0)


def test_a_node_that_computes_is_a_launch() -> None:
    nodes, copies = counted(lambda: mx.exp(X.reshape(4, 8)) @ W)
    assert (nodes, copies) == (Counter(Exp=1, Matmul=1), 0)


def test_a_fused_group_is_one_launch_each_time_it_is_replayed() -> None:
    nodes, _ = counted(lambda: fused(fused(X)))
    assert list(nodes.values()) == [2]


def test_an_operation_of_mx_fast_is_one_launch() -> None:
    def attention() -> mx.array:
        q = mx.fast.rope(X[:, None], 8, traditional=False, base=1e4, scale=1.0, offset=3)
        y = mx.fast.scaled_dot_product_attention(q, q, X[:, None], scale=1.0)
        return mx.fast.rms_norm(y, weightless((8,), mx.float32), 1e-6)

    nodes, copies = counted(attention)
    assert (nodes, copies) == (Counter(rope=1, scaled_dot_product_attention=1, rms_norm=1), 0)


def test_a_packed_embedding_is_three_gathers_and_one_launch_to_unpack() -> None:
    embedding = nn.QuantizedEmbedding(16, 64)
    mx.eval(embedding.parameters())
    nodes, _ = counted(lambda: embedding(weightless((1, 1), mx.int32)))
    assert nodes == Counter(Gather=3, dequantize=1)


@pytest.mark.parametrize(("ensure_row_contiguous", "copies"), [(True, 1), (False, 0)])
def test_a_kernel_is_one_launch_and_one_more_for_an_input_it_wants_in_order(
    ensure_row_contiguous: bool, copies: int
) -> None:
    found = counted(lambda: double_by_kernel(X[..., :4], ensure_row_contiguous=ensure_row_contiguous))
    assert found == (Counter(double=1), copies)


def test_a_reshape_that_strides_cannot_describe_is_a_copy() -> None:
    assert counted(lambda: X[..., :4].reshape(1, 16)) == (Counter(), 1)
    assert counted(lambda: X[:, :2].reshape(1, 16)) == (Counter(), 0)


def test_mx_contiguous_is_a_copy_only_of_what_is_not_in_order() -> None:
    assert counted(lambda: mx.contiguous(X[..., :4])) == (Counter(), 1)
    assert counted(lambda: mx.contiguous(X[:, :3])) == (Counter(), 0)


def test_everything_is_as_before_after_counting() -> None:
    before = mx.default_device, mx.fast.metal_kernel, mx.fast.rms_norm, mx.dequantize
    counted(lambda: X * 2)
    assert (mx.default_device, mx.fast.metal_kernel, mx.fast.rms_norm, mx.dequantize) == before
    assert mx.array_equal(mx.fast.rms_norm(mx.ones((1, 8)), mx.ones(8), 0.0), mx.ones((1, 8)))


@contextmanager
def every_step_alone() -> Iterator[None]:
    """Nothing that joins two steps of a feed-forward half is used."""
    takes = op.takes_kernel

    def taken(name: str, unsupported: str | None) -> bool:
        return name not in ("routed_gate_up", "mlp_gate_up") and takes(name, unsupported)

    with patch.object(op, "takes_kernel", taken):
        yield


def activation_bytes(size: str, *, alone: bool) -> int:
    """What a decoded token's dense MLPs write and read up to their activations, weights and input apart, in bf16."""
    text = released(size).text
    layers, inner = text.sparse_layers.count(False), text.intermediate_size
    return 2 * layers * inner * (5 if alone else 1) if layers else 0


@pytest.mark.parametrize(("size", "most"), [("35B-A3B", 360), ("9B", 270), ("0.8B", 205)], ids=str)
def test_a_decoded_token_needs_few_launches_and_four_drafted_ones_hardly_more(size: str, most: int) -> None:
    precision = uniform(Quantization(bits=4, group_size=64)).precision
    count, verified = count_launches(size, precision), count_launches(size, precision, verified=4)
    assert 100 < count.total <= most
    assert count.total == count.ends.total() + count.periods * count.period.total()
    assert count.total <= verified.total <= 1.15 * count.total
    with every_step_alone():
        alone = count_launches(size, precision)
    before, after = (activation_bytes(size, alone=each) / 1e3 for each in (True, False))
    row = f"| {size} | {alone.total} | {count.total} | {verified.total} | {before:,.0f} | {after:,.0f} |"
    assert row in PAGE.read_text(encoding="utf-8"), row


def test_the_command_shows_launches_of_every_size_and_runs_no_model() -> None:
    result = CliRunner().invoke(main, ["bench", "--kernels", "--model", "nowhere"])
    assert result.exit_code == 0, result.output
    assert all(f"| {size} " in result.stdout for size in COUNTED_SIZES)

"""Launches of a decoded token by this project's model and by mlx-lm's of the same size, counted by one rule."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import reload
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_qwen.bench.as_on_gpu import Launches, as_on_gpu
from mlx_qwen.bench.launches import COUNTED_SIZES, LaunchCount, count_launches, launches_of_size, without_weights
from mlx_qwen.bench.table import Table
from mlx_qwen.bench.timing import OURS, PEER
from mlx_qwen.checkpoint.layout import Quantization
from mlx_qwen.config import ModelConfig
from mlx_qwen.convert.recipes import uniform
from tools.benchmarks.peer import cache_arrays, peer_model

_PACKED = Quantization(bits=4, group_size=64)
# The peer makes its kernels when this module is imported, if there is Metal then.
_PEER_KERNELS = "mlx_lm.models.gated_delta"


@dataclass(frozen=True, slots=True)
class LaunchReport:
    """Launches of a decoded token by this project's model and by mlx-lm's of the same size, both at 4 bits."""

    size: str
    ours: LaunchCount
    peer: LaunchCount


def compare_launches(size: str) -> LaunchReport:
    """Count the launches of the decode step of a released size such as "35B-A3B" in both.

    Raises:
        ConfigError: no released size has this name.
    """
    ours = count_launches(size, uniform(_PACKED).precision)
    with peer_as_on_gpu() as launches:
        peer = launches_of_size(size, _their_model, cache_arrays, launches)
    return LaunchReport(size, ours, peer)


def bench_launches(sizes: Sequence[str] = COUNTED_SIZES) -> Table:
    """Launches of a decoded token for each size, beside mlx-lm's."""
    rows = []
    for size in sizes:
        report = compare_launches(size)
        ours, peer = report.ours.total, report.peer.total
        rows.append((size, str(ours), str(peer), f"{peer / ours:.2f}"))
    note = "Nodes of the decode graph that run a kernel on a GPU, at 4 bits; copies of inputs included."
    return Table("Kernel launches of a decoded token", note, ("", OURS, PEER, "ratio"), rows)


@contextmanager
def peer_as_on_gpu() -> Iterator[Launches]:
    """As `as_on_gpu`, for mlx-lm's models too."""
    try:
        with as_on_gpu() as launches:
            _remake_peer_kernels()
            yield launches
    finally:
        _remake_peer_kernels()


def _remake_peer_kernels() -> None:
    if _PEER_KERNELS in sys.modules:
        reload(sys.modules[_PEER_KERNELS])


def _their_model(config: ModelConfig) -> Any:
    model = peer_model(config)
    wanted = model.quant_predicate or (lambda *_: True)
    nn.quantize(
        model,
        _PACKED.group_size,
        _PACKED.bits,
        class_predicate=lambda path, module: hasattr(module, "to_quantized") and wanted(path, module),
    )
    model.eval()
    model.apply(lambda array: array.astype(mx.bfloat16) if array.dtype == mx.float32 else array)
    for layer in model.layers:
        if layer.is_linear:
            layer.linear_attn.A_log = layer.linear_attn.A_log.astype(mx.float32)
    return without_weights(model)

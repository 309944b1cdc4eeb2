"""MLX_QWEN_KERNELS picks the backend, and stats tell what ran."""

import mlx.core as mx
import pytest

from metal_kernels import Backend, OpStats, backend, reset_stats, stats
from metal_kernels.gated_delta import gated_delta_rule


@pytest.fixture(autouse=True)
def _fresh_counts():
    reset_stats()
    yield
    reset_stats()


@pytest.mark.parametrize(("value", "expected"), [("metal", Backend.METAL), ("reference", Backend.REFERENCE)])
def test_the_variable_is_read_at_every_call(monkeypatch, value, expected):
    monkeypatch.setenv("MLX_QWEN_KERNELS", "auto")
    backend()
    monkeypatch.setenv("MLX_QWEN_KERNELS", value)
    assert backend() is expected


def test_auto_is_metal_only_on_a_gpu_that_has_it(monkeypatch):
    on_metal = mx.default_device() == mx.gpu and mx.metal.is_available()
    monkeypatch.delenv("MLX_QWEN_KERNELS", raising=False)
    assert backend() is (Backend.METAL if on_metal else Backend.REFERENCE)
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    assert backend() is Backend.METAL


def test_a_wrong_value_is_one_clear_error(monkeypatch):
    monkeypatch.setenv("MLX_QWEN_KERNELS", "cuda")
    with pytest.raises(ValueError, match="MLX_QWEN_KERNELS is 'cuda', expected auto, metal or reference"):
        backend()


def test_stats_count_every_call_with_its_reason_until_reset(monkeypatch):
    monkeypatch.setenv("MLX_QWEN_KERNELS", "reference")
    heads, gates = mx.zeros((1, 1, 1, 4)), mx.zeros((1, 1, 1))
    for _ in range(3):
        gated_delta_rule(heads, heads, heads, gates, gates)
    assert stats() == {"gated_delta_rule": OpStats(kernel=0, reference={"reference backend": 3})}
    reset_stats()
    assert stats() == {}

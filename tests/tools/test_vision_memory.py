"""The benchmark of the vision tower's memory measures both towers, and grows with the area alone."""

import pytest

from mlx_qwen.config import VisionConfig
from mlx_qwen.media.grids import Grid
from mlx_qwen.model import vision as tower
from tools.benchmarks import vision_tower as vision
from tools.benchmarks.vision_tower import OURS, PEER, bench_vision, tower_peak


@pytest.fixture(autouse=True)
def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tower of the same form whose blocks are quick."""
    monkeypatch.setattr(vision, "_config", lambda depth: VisionConfig(depth, 32, 64, 1, 3, 16, 2, 2, 2304, 32))


def test_four_times_the_area_takes_about_four_times_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tower, "_SCORES", 1 << 12)
    small, large = tower_peak(OURS, 16, 16, 1), tower_peak(OURS, 32, 32, 1)
    assert 2 * small < large < 6 * small


def test_the_peers_tower_is_measured_beside_ours() -> None:
    pytest.importorskip("mlx_vlm")
    assert tower_peak(PEER, 8, 8, 1) > 0


def test_a_peer_that_would_fill_the_memory_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision, "_peak", lambda name, grid, depth: 1_000_000)
    monkeypatch.setattr(vision, "find_spec", lambda name: name)
    monkeypatch.setattr(vision, "_free_memory", lambda: 1 << 30)
    monkeypatch.setattr(vision, "_on_gpu", lambda: False)
    rows = bench_vision(grids=(Grid(1, 16, 16), Grid(1, 128, 128))).rows
    assert [row[2:] for row in rows] == [("1 MB", "1 MB"), ("1 MB", "not run: scores of 1.1 GB")]

"""Peak memory of the vision tower for images of growing area, beside mlx-vlm's, each in a process of its own."""

import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

from mlx_qwen.bench.table import Table
from mlx_qwen.checkpoint.released import released
from mlx_qwen.config import VisionConfig
from mlx_qwen.errors import MLXQwenError
from mlx_qwen.media.grids import Grid
from mlx_qwen.model.vision import VisionTower

OURS, PEER = "mlx-qwen", "mlx-vlm"
# Patches of 16 x 16 pixels: about 1, 2 and 4 megapixels.
GRIDS = (Grid(1, 64, 64), Grid(1, 64, 128), Grid(1, 128, 128))


def bench_vision(*, grids: tuple[Grid, ...] = GRIDS, depth: int | None = None) -> Table:
    """Peak memory above weights and pixels of 0.8B's vision tower, random weights, one image at a time.

    `depth` is the number of its blocks, all 12 on a GPU and one on a CPU if None: the blocks run one after the other,
    so that memory does not grow with them. On a CPU, mlx-vlm holds the scores of all patches with all others; it is
    left out where they alone would fill the machine's free memory. Raises MLXQwenError when a process fails.
    """
    on_gpu = _on_gpu()
    depth = depth or (12 if on_gpu else 1)
    config = _config(depth)
    rows = []
    for grid in grids:
        scores = 4 * config.num_heads * grid.patches**2
        runs = {OURS: f"{_peak(OURS, grid, depth) / 1e6:,.0f} MB"}
        if find_spec("mlx_vlm") is None:
            runs[PEER] = "not installed"
        elif not on_gpu and 2 * scores > _free_memory():
            runs[PEER] = f"not run: scores of {scores / 1e9:,.1f} GB"
        else:
            runs[PEER] = f"{_peak(PEER, grid, depth) / 1e6:,.0f} MB"
        pixels = grid.patches * config.patch_size**2
        rows.append((f"{pixels / 1e6:.1f} megapixels", f"{grid.patches:,} patches", runs[OURS], runs[PEER]))
    where = "bf16 on the GPU" if on_gpu else "fp32 on the CPU"
    note = f"0.8B's tower, {depth} of 12 blocks, {where}: most memory beyond weights and pixels."
    return Table("Memory of the vision tower", note, ("image", "", OURS, PEER), rows)


def tower_peak(name: str, rows: int, columns: int, depth: int) -> int:
    """Bytes that the tower of `name` takes at most for one image, beyond its weights and the pixels."""
    dtype = mx.bfloat16 if _on_gpu() else mx.float32
    config, grid = _config(depth), Grid(1, rows, columns)
    tower: Any = VisionTower(config) if name == OURS else _peer_tower(config)
    tower.update(tree_map(lambda x: x.astype(dtype), tower.parameters()))
    pixels = mx.random.normal((grid.patches, config.in_channels * config.temporal_patch_size * config.patch_size**2))
    mx.eval(tower.parameters(), pixels)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(tower(pixels, [grid]) if name == OURS else tower(pixels, mx.array([grid])))
    return mx.get_peak_memory() - before


def _on_gpu() -> bool:
    return bool(mx.default_device().type == mx.DeviceType.gpu)


def _config(depth: int) -> VisionConfig:
    vision = released("0.8B").vision
    assert vision is not None, "released sizes have a vision tower"
    return replace(vision, depth=depth)


def _peer_tower(config: VisionConfig) -> Any:
    from mlx_vlm.models.qwen3_5.config import VisionConfig as PeerConfig
    from mlx_vlm.models.qwen3_5.vision import VisionModel

    sizes = {name: getattr(config, name) for name in VisionConfig.__slots__}
    return VisionModel(PeerConfig(model_type="qwen3_5", deepstack_visual_indexes=[], **sizes))


def _peak(name: str, grid: Grid, depth: int) -> int:
    call = f"tower_peak({name!r}, {grid.rows}, {grid.columns}, {depth})"
    code = f"from tools.benchmarks.vision_tower import tower_peak; print({call})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise MLXQwenError(f"{name} failed with exit code {done.returncode}: {done.stderr.strip()[-2000:]}")
    return int(done.stdout.split()[-1])


def _free_memory() -> int:
    """Bytes that processes can still take; on systems that do not tell, all there is."""
    facts = Path("/proc/meminfo")
    if not facts.is_file():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    lines = facts.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))

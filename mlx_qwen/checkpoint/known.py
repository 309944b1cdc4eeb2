"""Repositories by the name of a released size: Qwen's own, and conversions to 4 bits by mlx-community."""

from pathlib import Path

from mlx_qwen.checkpoint.released import SIZES

_OWNER = "Qwen/Qwen3.5-"
CONVERSIONS = {
    "0.8B": "mlx-community/Qwen3.5-0.8B-MLX-4bit",
    "2B": "mlx-community/Qwen3.5-2B-MLX-4bit",
    "4B": "mlx-community/Qwen3.5-4B-MLX-4bit",
    "9B": "mlx-community/Qwen3.5-9B-MLX-4bit",
    "27B": "mlx-community/Qwen3.5-27B-4bit",
    "35B-A3B": "mlx-community/Qwen3.5-35B-A3B-4bit",
    "122B-A10B": "mlx-community/Qwen3.5-122B-A10B-4bit",
    "397B-A17B": "mlx-community/Qwen3.5-397B-A17B-4bit",
}


def size_named(name: str) -> str | None:
    """The released size that `name` means, in any case and also without its active part ("35b"); None for others."""
    wanted = name.casefold()
    return next((size for size in SIZES if wanted in (size.casefold(), size.partition("-")[0].casefold())), None)


def original(size: str) -> str:
    """Qwen's repository of a size, in bf16."""
    return f"{_OWNER}{size}"


def repository_named(name: str | Path) -> str | Path:
    """Qwen's repository where `name` is that of a size and no folder is called so; `name` itself otherwise."""
    size = size_named(str(name))
    return name if size is None or Path(name).expanduser().exists() else original(size)

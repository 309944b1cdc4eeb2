"""What of models lies in the Hub's cache: how large, in which precision, and what reads it."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_qwen.checkpoint.foreign import CONVERTED, foreign_quantization
from mlx_qwen.config import ModelConfig
from mlx_qwen.errors import CheckpointError, MLXQwenError
from mlx_qwen.json_files import read_json_object
from mlx_qwen.json_types import Json

if TYPE_CHECKING:
    from huggingface_hub import HFCacheInfo

_RUNTIMES, _TEXT_ONLY = ("mlx-qwen", "mlx-lm", "mlx-vlm"), ("mlx-qwen", "mlx-lm")


@dataclass(frozen=True, slots=True)
class CachedModel:
    """A repository in the Hub's cache, at its newest revision.

    `nbytes` counts all revisions, `precision` is in words, `readers` are the runtimes that load it: none for what has
    to be converted first, for other families, and where weights are missing, which `note` then says.
    """

    repository: str
    folder: Path
    nbytes: int
    precision: str
    readers: tuple[str, ...]
    note: str = ""


def cached_models() -> list[CachedModel]:
    """Every model of the cache that has a config.json, the largest first."""
    info = _scan()
    repositories = () if info is None else info.repos
    found = []
    for repository in repositories:
        newest = max(repository.revisions, key=lambda revision: revision.last_modified, default=None)
        if repository.repo_type == "model" and newest is not None and (newest.snapshot_path / "config.json").is_file():
            found.append(_described(repository.repo_id, newest.snapshot_path, repository.size_on_disk))
    return sorted(found, key=lambda model: (-model.nbytes, model.repository))


def delete_cached(repository: str) -> int:
    """Remove a repository from the cache, all revisions of it; returns the bytes that this freed.

    Raises CheckpointError when the cache has none of that name.
    """
    info = _scan()
    found = [] if info is None else [each for each in info.repos if each.repo_id == repository]
    if info is None or not found:
        raise CheckpointError(f"The Hub's cache has no {repository}. `mlx-qwen models` lists what is there.")
    strategy = info.delete_revisions(*(revision.commit_hash for each in found for revision in each.revisions))
    strategy.execute()
    return int(strategy.expected_freed_size)


def _scan() -> "HFCacheInfo | None":
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        return scan_cache_dir(constants.HF_HUB_CACHE)
    except CacheNotFound:
        return None


def _described(repository: str, folder: Path, nbytes: int) -> CachedModel:
    try:
        raw = read_json_object(folder / "config.json")
        precision = _precision(raw)
        config = ModelConfig.from_directory(folder)
        settings = foreign_quantization(config) if config.quantization is None else None
    except MLXQwenError:
        return CachedModel(repository, folder, nbytes, "", (), "of another family, or damaged")
    if not any(folder.glob("*.safetensors")):
        return CachedModel(repository, folder, nbytes, precision, (), "without weights")
    if settings is not None:
        note = "to be converted" if settings["quant_method"] in CONVERTED else "of a format that is read nowhere here"
        return CachedModel(repository, folder, nbytes, str(settings["quant_method"]), (), note)
    return CachedModel(repository, folder, nbytes, precision, _TEXT_ONLY if config.is_next else _RUNTIMES)


def _precision(raw: dict[str, Json]) -> str:
    """Bits of packed weights, mixtures as from the least to the most, or the dtype of unpacked ones."""
    settings = raw.get("quantization")
    if isinstance(settings, dict):
        modules = [settings, *(each for each in settings.values() if isinstance(each, dict))]
        bits = sorted({bits for each in modules if isinstance(bits := each.get("bits"), int)})
        mode = settings.get("mode", "affine")
        shown = f"{bits[0]} bits" if len(bits) == 1 else f"{bits[0]} to {bits[-1]} bits" if bits else "packed"
        return shown if mode == "affine" else f"{mode}, {shown}"
    text = raw.get("text_config")
    places = (text if isinstance(text, dict) else {}, raw)
    return str(next((place[key] for place in places for key in ("dtype", "torch_dtype") if place.get(key)), ""))

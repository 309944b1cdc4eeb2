"""The house: which room of the project may import which, and how imports are read.

A room is a folder or a few loose files. It may import the rooms named beside it and whatever stands below those.
`docs/architecture.md` draws this table.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import resolve_name
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("metal_kernels", "mlx_qwen", "convert")


@dataclass(frozen=True)
class Room:
    """Folders and files, as paths from the root of the sources, and the rooms they stand on."""

    paths: tuple[str, ...]
    below: tuple[str, ...]


def _loose(*names: str) -> tuple[str, ...]:
    return tuple(f"mlx_qwen/{name}.py" for name in names)


HOUSE = {
    "metal_kernels": Room(("metal_kernels",), ()),
    "errors": Room(_loose("errors", "json_types"), ()),
    "helpers": Room(
        _loose(
            "fields",
            "declared",
            "value_types",
            "json_files",
            "status_line",
            "canvas",
            "version",
            "forked",
            "remembered",
            "sizes",
            "machine",
            "command_buffers",
        ),
        ("errors",),
    ),
    "config": Room(_loose("config", "rope_config"), ("helpers",)),
    "checkpoint": Room(("mlx_qwen/checkpoint",), ("config",)),
    "media": Room(("mlx_qwen/media",), ("config",)),
    "model": Room(("mlx_qwen/model",), ("metal_kernels", "checkpoint", "media")),
    "options": Room(_loose("options", "settings", "keywords", "recommended", "tool_choice"), ("media",)),
    "answer": Room(("mlx_qwen/answer",), ("errors",)),
    "prompt": Room(("mlx_qwen/prompt",), ("options", "answer")),
    "demo": Room(("mlx_qwen/demo",), ("errors",)),
    "loading": Room(_loose("loading"), ("model", "prompt", "demo")),
    "engine": Room(("mlx_qwen/engine",), ("model", "prompt")),
    "generation": Room(
        _loose("generation", "async_generation", "conversation", "requests", "drafting"), ("engine", "loading")
    ),
    "distributed": Room(("mlx_qwen/distributed",), ("generation",)),
    "server": Room(("mlx_qwen/server",), ("generation", "loading")),
    "launch": Room(("mlx_qwen/launch",), ("errors",)),
    "bench": Room(("mlx_qwen/bench",), ("engine", "loading")),
    "convert": Room(("convert",), ("loading",)),
    "mlx_qwen": Room(_loose("__init__"), ("generation", "distributed", "convert")),
    "cli": Room(
        ("mlx_qwen/cli", *_loose("__main__")), ("generation", "distributed", "server", "launch", "bench", "convert")
    ),
}


def room_of(file: Path) -> str:
    """The room that a file stands in."""
    path = file.relative_to(ROOT).as_posix()
    (room,) = (name for name, room in HOUSE.items() if any(path == p or path.startswith(f"{p}/") for p in room.paths))
    return room


def reach(room: str) -> set[str]:
    """The room itself and everything below it."""
    return {room}.union(*(reach(below) for below in HOUSE[room].below))


def files() -> dict[str, Path]:
    """Every file of the project's packages by the module it is installed as."""
    return {module_of(file): file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))}


def module_of(file: Path) -> str:
    """The module that a file is installed as: convert/ is mlx_qwen.convert."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    parts = ("mlx_qwen", *parts) if parts[0] == "convert" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(source: str, *, package: str) -> Iterator[str]:
    """Modules, and names taken from them as if they were modules, that `source` imports anywhere."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package)
            yield from (f"{module}.{alias.name}" for alias in node.names)


def imports(file: Path) -> list[str]:
    """What a file imports anywhere, see `imported`."""
    module = module_of(file)
    package = module if file.stem == "__init__" else module.rpartition(".")[0]
    return list(imported(file.read_text(encoding="utf-8"), package=package))


def modules(names: list[str], known: dict[str, Path]) -> set[str]:
    """The project's modules among imported names: `a.b.c` is module `a.b.c`, or `c` taken from module `a.b`."""
    found = (name if name in known else name.rpartition(".")[0] for name in names)
    return {name for name in found if name in known}

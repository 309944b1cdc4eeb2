"""Dependencies point one way, and the way to the first token is short."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"metal_kernels": ROOT / "metal_kernels", "mlx_qwen": ROOT / "mlx_qwen", "convert": ROOT / "convert"}


def package_of(file: Path) -> str:
    """Which of the project's parts a file belongs to."""
    relative = file.relative_to(ROOT).parts
    outermost = {("mlx_qwen", "cli"), ("mlx_qwen", "bench"), ("mlx_qwen", "planning"), ("mlx_qwen", "__main__.py")}
    return "cli" if relative[:2] in outermost else relative[0]


def part_of(module: str) -> str | None:
    """Which of the project's parts an imported module belongs to."""
    for prefix, part in (
        ("mlx_qwen.cli", "cli"),
        ("mlx_qwen.bench", "cli"),
        ("mlx_qwen.convert.planning", "cli"),
        ("mlx_qwen.convert", "convert"),
        ("mlx_qwen", "mlx_qwen"),
        ("metal_kernels", "metal_kernels"),
    ):
        if module == prefix or module.startswith(f"{prefix}."):
            return part
    return None


def imports(file: Path) -> Iterator[str]:
    """The modules, and the names taken from them, that a file imports anywhere."""
    yield from imported(file.read_text(encoding="utf-8"), package=import_path(file.parent))


def import_path(folder: Path) -> str:
    """The package that a folder is installed as."""
    parts = folder.relative_to(ROOT).parts
    return ".".join(("mlx_qwen", *parts) if parts[0] == "convert" else parts)


def imported(source: str, *, package: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package)
            yield from (f"{module}.{alias.name}" for alias in node.names)


ALLOWED = {
    "metal_kernels": {"metal_kernels"},
    "mlx_qwen": {"mlx_qwen", "metal_kernels"},
    "convert": {"convert", "mlx_qwen", "metal_kernels"},
    "cli": {"cli", "convert", "mlx_qwen", "metal_kernels"},
}
FILES = [file for folder in FOLDERS.values() for file in sorted(folder.rglob("*.py"))]


@pytest.mark.parametrize(
    ("statement", "module"),
    [
        ("from ..cli import main", "mlx_qwen.cli.main"),
        ("from .. import cli", "mlx_qwen.cli"),
        ("from . import arrays", "mlx_qwen.convert.arrays"),
        ("from mlx_qwen import cli", "mlx_qwen.cli"),
        ("def f():\n    import mlx_qwen.cli", "mlx_qwen.cli"),
    ],
)
def test_every_form_of_import_is_seen(statement: str, module: str) -> None:
    assert list(imported(statement, package=import_path(ROOT / "convert"))) == [module]


def test_there_are_files_to_check() -> None:
    assert len(FILES) > 30


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_from_the_command_line_to_the_kernels_only(file: Path) -> None:
    reached = {part for module in imports(file) if (part := part_of(module)) is not None}
    assert reached <= ALLOWED[package_of(file)]


def test_the_kernels_need_mlx_and_the_standard_library_only() -> None:
    names = {module.split(".")[0] for file in FOLDERS["metal_kernels"].rglob("*.py") for module in imports(file)}
    assert names - set(sys.stdlib_module_names) <= {"mlx", "metal_kernels"}


FORBIDDEN = ("transformers", "mlx_lm", "mlx_vlm", "torch")


def loaded_by(code: str, *arguments: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after `code`."""
    program = f"{code}\nimport sys; print(' '.join({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(done.stdout.splitlines()[-1].split())


def test_importing_the_package_loads_no_heavy_library() -> None:
    loaded = loaded_by("import mlx_qwen")
    assert "mlx_qwen" in loaded
    assert loaded.isdisjoint(FORBIDDEN)


def test_the_way_to_a_token_loads_no_heavy_library(chat_folder: Path) -> None:
    code = (
        "import sys, mlx_qwen; model, processor = mlx_qwen.load(sys.argv[1]);"
        "mlx_qwen.generate(model, processor, [{'role': 'user', 'content': 'hi'}], max_tokens=2)"
    )
    loaded = loaded_by(code, str(chat_folder))
    assert "tokenizers" in loaded
    assert loaded.isdisjoint(FORBIDDEN)


def test_the_commands_way_to_a_token_loads_no_heavy_library(chat_folder: Path) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "mlx_qwen", "generate", "--model", str(chat_folder)]
    done = subprocess.run(
        [*command, "--prompt", "hi", "--max-tokens", "2"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert "Generation: " in done.stderr
    listed = [line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")]
    loaded = {name.split(".")[0] for name in listed}
    assert "tokenizers" in loaded
    assert loaded.isdisjoint(FORBIDDEN)

"""The wheel holds the two packages with every data file, and nothing else."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """File names in the wheel built from a copy of the sources."""
    target, copy = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("sources")
    for name in ("metal_kernels", "mlx_qwen", "convert"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(target), str(copy)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = target.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def sources(folder: str, installed_as: str) -> set[str]:
    root = ROOT / folder
    kinds = ("*.py", "*.pyi", "*.metal", "*.h", "py.typed", "*.safetensors", "*.json", "*.jinja", "*.txt")
    return {f"{installed_as}/{file.relative_to(root).as_posix()}" for kind in kinds for file in root.rglob(kind)}


def test_the_wheel_holds_two_packages_and_their_metadata(wheel_names: set[str]) -> None:
    assert {name.split("/")[0].split("-")[0] for name in wheel_names} == {"mlx_qwen", "metal_kernels"}


def test_the_wheel_holds_every_source_and_data_file(wheel_names: set[str]) -> None:
    expected = sources("mlx_qwen", "mlx_qwen") | sources("metal_kernels", "metal_kernels")
    expected |= sources("convert", "mlx_qwen/convert")
    packed = {name for name in wheel_names if ".dist-info/" not in name}
    assert packed == expected


def test_both_packages_are_marked_as_typed(wheel_names: set[str]) -> None:
    assert {"mlx_qwen/py.typed", "metal_kernels/py.typed"} <= wheel_names

"""The wheel holds the two packages with every data file, and nothing else."""

import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel_names(wheel: Path) -> set[str]:
    """File names in the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def sources(folder: str, installed_as: str) -> set[str]:
    root = ROOT / folder
    kinds = ("*.py", "*.pyi", "*.metal", "*.h", "py.typed", "*.safetensors", "*.json", "*.jinja", "*.html", "*.txt")
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

"""Dependencies point one way, and the way to the first token is short."""

import inspect
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import mlx_qwen
from tests.support.house import HOUSE, ROOT, files, imported, imports, module_of, modules, reach, room_of

FILES = files()
PEERS = {"mlx_lm", "mlx_vlm", "transformers", "torch"}


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
    assert list(imported(statement, package=module_of(ROOT / "convert" / "__init__.py"))) == [module]


def test_every_file_stands_in_one_room_and_no_room_is_empty() -> None:
    assert len(FILES) > 100
    assert {room_of(file) for file in FILES.values()} == set(HOUSE)
    assert all((ROOT / path).exists() for room in HOUSE.values() for path in room.paths)


def test_no_room_stands_on_itself() -> None:
    order = TopologicalSorter({name: room.below for name, room in HOUSE.items()}).static_order()
    assert set(order) == set(HOUSE)


@pytest.mark.parametrize("file", FILES.values(), ids=lambda file: str(file.relative_to(ROOT)))
def test_a_file_imports_its_own_room_and_those_below(file: Path) -> None:
    reached = {room_of(FILES[module]) for module in modules(imports(file), FILES)}
    assert reached <= reach(room_of(file))


@pytest.mark.parametrize("file", FILES.values(), ids=lambda file: str(file.relative_to(ROOT)))
def test_a_file_imports_nothing_that_only_a_checkout_has(file: Path) -> None:
    assert {name.partition(".")[0] for name in imports(file)}.isdisjoint({"tools", "tests", "convert"})


@pytest.mark.parametrize(("room", "below"), [(name, below) for name, room in HOUSE.items() for below in room.below])
def test_every_arrow_stands_for_an_import(room: str, below: str) -> None:
    inside = [file for file in FILES.values() if room_of(file) == room]
    names = [name for file in inside for name in imports(file)] + (public() if room == "mlx_qwen" else [])
    assert below in {room_of(FILES[module]) for module in modules(names, FILES)}


def public() -> list[str]:
    """The modules that the package's lazy names come from."""
    values = (getattr(mlx_qwen, name) for name in {*mlx_qwen.__all__, "convert"})
    return [value.__name__ if inspect.ismodule(value) else getattr(value, "__module__", "") for value in values]


def test_public_names_come_from_below() -> None:
    assert {room_of(FILES[module]) for module in public() if module in FILES} <= reach("mlx_qwen")


def test_no_files_import_each_other_in_a_circle() -> None:
    needs = {module: modules(imports(file), FILES) - {module} for module, file in FILES.items()}
    assert len(list(TopologicalSorter(needs).static_order())) == len(FILES)


def test_only_the_public_names_and_the_command_line_reach_the_converter() -> None:
    assert [name for name in HOUSE if name != "convert" and "convert" in reach(name)] == ["mlx_qwen", "cli"]


def test_the_drawing_of_the_house_is_this_table() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    (drawing,) = re.findall(r"```mermaid\n(flowchart.*?)```", page, flags=re.DOTALL)
    drawn = re.findall(r"^ *(\w+) --> (.+)$", drawing, flags=re.MULTILINE)
    arrows = {(room, below) for room, many in drawn for below in many.split(" & ")}
    assert arrows == {(name, below) for name, room in HOUSE.items() for below in room.below}


def test_only_the_benchmark_imports_peers() -> None:
    users = {room_of(file) for file in FILES.values() if PEERS & {name.partition(".")[0] for name in imports(file)}}
    assert users == {"bench"}


def test_the_kernels_need_mlx_and_the_standard_library_only() -> None:
    kernels = [file for file in FILES.values() if room_of(file) == "metal_kernels"]
    names = {module.split(".")[0] for file in kernels for module in imports(file)}
    assert names - set(sys.stdlib_module_names) <= {"mlx", "metal_kernels"}


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
    assert loaded.isdisjoint(PEERS)


def test_the_way_to_a_token_loads_no_heavy_library(chat_folder: Path) -> None:
    code = (
        "import sys, mlx_qwen; model, processor = mlx_qwen.load(sys.argv[1]);"
        "mlx_qwen.generate(model, processor, [{'role': 'user', 'content': 'hi'}], max_tokens=2)"
    )
    loaded = loaded_by(code, str(chat_folder))
    assert "tokenizers" in loaded
    assert loaded.isdisjoint(PEERS)


def test_the_commands_way_to_a_token_loads_no_heavy_library(chat_folder: Path) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "mlx_qwen", "generate", "--model", str(chat_folder)]
    done = subprocess.run(
        [*command, "--prompt", "hi", "--max-tokens", "2"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert "Generation: " in done.stderr
    listed = [line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")]
    loaded = {name.split(".")[0] for name in listed}
    assert "tokenizers" in loaded
    assert loaded.isdisjoint(PEERS)

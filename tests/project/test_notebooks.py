"""The notebooks keep clean outputs, use the public interface alone, and run with one line changed for another model."""

import ast
import importlib
import inspect
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("1-quickstart", "2-convert", "3-seeing", "4-inside-the-gated-delta-rule")
PUBLIC = {
    "metal_kernels",
    "metal_kernels.gated_delta",
    "mlx_qwen",
    "mlx_qwen.convert",
    "mlx_qwen.demo",
    "mlx_qwen.demo.tasks",
    "mlx_qwen.convert.planning",
}
OTHERS = {"matplotlib.pyplot", "mlx.core", "numpy", "PIL"}
MODEL_LINES = {"2-convert": "source = demo_folder()"}
MOST_BYTES = 1_000_000


def notebook(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))
    return loaded


def code_cells(name: str) -> list[dict[str, Any]]:
    return [cell for cell in notebook(name)["cells"] if cell["cell_type"] == "code"]


def source(name: str) -> str:
    return "\n\n".join("".join(cell["source"]) for cell in code_cells(name))


def outputs(name: str) -> Iterator[dict[str, Any]]:
    for cell in code_cells(name):
        yield from cell["outputs"]


def imported(name: str) -> Iterator[tuple[str, str | None, str]]:
    """Module, name taken from it (or None for the module itself), and what it is called in the notebook."""
    for node in ast.walk(ast.parse(source(name))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None, alias.asname or alias.name.partition(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            yield from ((node.module, alias.name, alias.asname or alias.name) for alias in node.names)


def bound(name: str) -> dict[str, object]:
    """What the notebook's imports of the project and of MLX bind."""
    found: dict[str, object] = {}
    for module, taken, called in imported(name):
        if module.partition(".")[0] in {"mlx", "mlx_qwen", "metal_kernels"}:
            loaded = importlib.import_module(module)
            found[called] = loaded if taken is None else getattr(loaded, taken)
    return found


def resolved(node: ast.expr, names: dict[str, object]) -> object | None:
    """What an attribute of an imported module stands for; None for anything else."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = resolved(node.value, names)
        return getattr(owner, node.attr) if isinstance(owner, ModuleType) else None
    return None


def test_these_are_the_notebooks() -> None:
    assert sorted(file.stem for file in (ROOT / "notebooks").glob("*.ipynb")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_cell_has_an_id_of_its_own_and_every_code_cell_was_run_in_order(name: str) -> None:
    cells = notebook(name)["cells"]
    ids = [cell["id"] for cell in cells]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[a-z][a-z0-9-]{2,63}", identifier) for identifier in ids)
    assert [cell["execution_count"] for cell in code_cells(name)] == list(range(1, len(code_cells(name)) + 1))


@pytest.mark.parametrize("name", NAMES)
def test_kept_outputs_hold_no_error_and_nothing_on_stderr(name: str) -> None:
    kinds = {(output["output_type"], output.get("name")) for output in outputs(name)}
    assert all(kind != "error" and stream != "stderr" for kind, stream in kinds)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_kept_names_a_place_on_a_machine_or_when_it_ran(name: str) -> None:
    loaded = notebook(name)
    for output in outputs(name):
        output.get("data", {}).pop("image/png", None)
    text = re.sub(r'"image/png": "[^"]*"', "", json.dumps(loaded))
    assert not re.search(r"/(work|root|tmp|home|Users|var)/|iopub|execute_input", text)


@pytest.mark.parametrize("name", NAMES)
def test_plots_are_kept_and_the_file_stays_small(name: str) -> None:
    assert any("image/png" in output.get("data", {}) for output in outputs(name))
    assert (ROOT / "notebooks" / f"{name}.ipynb").stat().st_size < MOST_BYTES


@pytest.mark.parametrize("name", NAMES)
def test_only_the_public_interface_is_imported(name: str) -> None:
    for module, taken, _ in imported(name):
        known = module in PUBLIC | OTHERS or module.partition(".")[0] in sys.stdlib_module_names
        assert known, module
        if module in PUBLIC and taken is not None:
            loaded = importlib.import_module(module)
            assert not taken.startswith("_")
            assert taken in getattr(loaded, "__all__", dir(loaded))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_private_is_touched(name: str) -> None:
    attributes = {node.attr for node in ast.walk(ast.parse(source(name))) if isinstance(node, ast.Attribute)}
    assert not {attribute for attribute in attributes if attribute.startswith("_")}


@pytest.mark.parametrize("name", NAMES)
def test_everything_used_exists_and_takes_the_keywords_it_is_given(name: str) -> None:
    names = bound(name)
    calls = [node for node in ast.walk(ast.parse(source(name))) if isinstance(node, ast.Call)]
    checked = 0
    for call in calls:
        function = resolved(call.func, names)
        module = getattr(function, "__module__", None) or ""
        if callable(function) and module.partition(".")[0] in {"mlx_qwen", "metal_kernels"}:
            parameters = set(inspect.signature(function).parameters)
            assert {keyword.arg for keyword in call.keywords if keyword.arg is not None} <= parameters
            checked += 1
    assert checked


@pytest.mark.parametrize("name", NAMES)
def test_one_line_names_the_model(name: str) -> None:
    line = MODEL_LINES.get(name, "model, processor = mlx_qwen.load()")
    lines = [each for each in source(name).splitlines() if "demo_folder()" in each or "mlx_qwen.load()" in each]
    assert len(lines) == 1
    assert lines[0].startswith(line)


@pytest.mark.parametrize("name", NAMES)
def test_links_between_notebooks_lead_somewhere(name: str) -> None:
    text = "\n".join("".join(cell["source"]) for cell in notebook(name)["cells"])
    linked = re.findall(r"\]\(([^):]+\.ipynb)\)", text)
    pages = re.findall(r"`(docs/[\w-]+\.md)`", text)
    assert all((ROOT / "notebooks" / target).exists() for target in linked)
    assert all((ROOT / page).exists() for page in pages)


def test_one_command_executes_all_of_them_and_ci_does() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    target = re.search(r"^notebooks:.*\n\t(.*)", makefile, flags=re.MULTILINE)
    assert target is not None
    assert "notebooks/execute.py" in target[1]
    assert "make notebooks" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")

"""What becomes of a `.metal` file on the way to MLX."""

from pathlib import Path

import pytest

import metal_kernels
from metal_kernels import _build
from metal_kernels._build import MetalKernel, compact, source_text


def test_includes_are_taken_in_from_beside_the_file_that_names_them_and_once(tmp_path: Path) -> None:
    files = {
        "shared.h": "int shared;\n",
        "rule/own.h": '#include "../shared.h"\nint own;\n',
        "rule/kernel.metal": '#include <metal_stdlib>\n#include "own.h"\n#include "../shared.h"\nint kernel;\n',
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    lines = [line for line in source_text(tmp_path / "rule" / "kernel.metal").splitlines() if line]
    assert lines == ["#include <metal_stdlib>", "int shared;", "int own;", "int kernel;"]


def test_a_missing_include_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "kernel.metal").write_text('#include "missing.h"\n')
    with pytest.raises(FileNotFoundError, match=r"missing\.h"):
        source_text(tmp_path / "kernel.metal")


def test_comments_indentation_and_empty_lines_are_left_out_and_nothing_else() -> None:
    text = "#pragma once\n// a \u00b7 b\nint a;  // c\n\n  int /* d\n e */ b = 4 / 2;\n#define TWO 2\n"
    assert compact(text) == "int a;\nint   b = 4 / 2;\n#define TWO 2\n"


def test_what_is_not_ascii_outside_comments_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be ASCII outside comments, found 'int \u00b5;'"):
        compact("int \u00b5;\n")


@pytest.mark.parametrize(
    "file", sorted(Path(metal_kernels.__file__).parent.rglob("*.metal")), ids=lambda file: file.stem
)
def test_mlx_is_given_ascii_without_comments(file: Path) -> None:
    given: dict[str, str] = {}
    kernel = MetalKernel(file, "mlx_qwen::made", ("x",), ("y",), (), ("x", "y"))
    _build._built.__wrapped__(kernel, lambda **arguments: given.update(arguments))
    header = given["header"]
    assert header.isascii()
    assert not any(mark in header for mark in ("//", "/*", "\n\n", '#include "'))
    assert header.count("{") == header.count("}") > 0

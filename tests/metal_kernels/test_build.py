"""What becomes of a `.metal` file on the way to MLX."""

from pathlib import Path

import pytest

from metal_kernels._build import source_text


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

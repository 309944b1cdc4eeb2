"""The page on the server tells of every file of its code, and how long it is."""

import re
from pathlib import Path

import mlx_qwen.server

FOLDER = Path(mlx_qwen.server.__file__).parent
PAGE = Path(__file__).resolve().parents[2] / "docs" / "server.md"


def test_lines_by_file_are_those_of_the_files():
    table = PAGE.read_text(encoding="utf-8").partition("## Its code")[2]
    told = {name: int(lines) for name, lines in re.findall(r"`(\w+\.(?:py|html))` (\d+)", table)}
    there = {file.name: len(file.read_text(encoding="utf-8").splitlines()) for file in FOLDER.glob("*.*")}
    assert told.keys() == there.keys() - {"__init__.py"}
    assert {name: lines for name, lines in told.items() if abs(lines - there[name]) > 20} == {}
    python = sum(lines for name, lines in there.items() if name.endswith(".py"))
    assert abs(int(re.search(r"About ([\d,]+) lines", table)[1].replace(",", "")) - python) <= 200

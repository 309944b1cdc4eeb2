"""What docs/ and the README name exists, and the code they show runs."""

import re
import shlex
from pathlib import Path

import click
import pytest

from mlx_qwen.cli import COMMANDS, main
from mlx_qwen.convert import RECIPES
from mlx_qwen.media.images import ImageProcessor
from tools.benchmarks.__main__ import SECTIONS

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
CODE_FOLDERS = ("metal_kernels", "mlx_qwen", "convert", "tests", "docs", "notebooks", "tools")
MODEL = "qwen3.5-0.8b"


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(language: str) -> list[tuple[str, str]]:
    """Code blocks of all pages, with their page."""
    return [
        (page.name, block)
        for page in PAGES
        for block in re.findall(rf"```{language}\n(.*?)```", text_of(page), flags=re.DOTALL)
    ]


def names(page: Path) -> list[str]:
    """What stands between backticks outside of code blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL))


def everything() -> str:
    """All sources as one text, in which a name that the pages use has to occur."""
    kinds = ("*.py", "*.metal", "*.h", "*.toml")
    return "\n".join(text_of(file) for folder in CODE_FOLDERS for kind in kinds for file in (ROOT / folder).rglob(kind))


SOURCES = everything()
COMMAND_LINES = [
    line
    for language in ("console", "bash")
    for _, block in blocks(language)
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("mlx-qwen ")
]
IN_TEXT = [name for page in PAGES for name in names(page) if name.startswith("mlx-qwen ")]


def test_these_pages_are_there() -> None:
    using, making = {"checkpoint-format", "recipes", "vision"}, {"architecture", "kernels", "CONTRIBUTING"}
    assert {page.stem for page in PAGES} >= using | making | {"comparison", "measured"}


@pytest.mark.parametrize("line", dict.fromkeys([*COMMAND_LINES, *IN_TEXT]))
def test_every_command_line_is_understood(line: str) -> None:
    name, *arguments = shlex.split(line)[1:]
    assert name in COMMANDS
    command = main.get_command(click.Context(main), name)
    assert command is not None
    command.make_parser(click.Context(command)).parse_args(arguments)


FLAGS = sorted({flag for page in PAGES for name in names(page) for flag in re.findall(r"^--[a-z][\w-]+", name)})


@pytest.mark.parametrize("flag", FLAGS)
def test_every_flag_is_an_option_of_some_command(flag: str) -> None:
    known: set[str] = set()
    for name in COMMANDS:
        command = main.get_command(click.Context(main), name)
        assert command is not None
        known.update(option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts))
    assert flag in known


@pytest.mark.parametrize(("page", "block"), blocks("python"))
def test_every_python_block_runs(page: str, block: str, chat_folder: Path) -> None:
    exec(compile(block.replace(MODEL, str(chat_folder)), page, "exec"), {"folder": chat_folder})


PATHS = sorted({name for page in PAGES for name in names(page) if re.match(rf"({'|'.join(CODE_FOLDERS)})/", name)})


@pytest.mark.parametrize("path", PATHS)
def test_every_path_exists(path: str) -> None:
    assert (ROOT / path).exists()


IDENTIFIER = re.compile(r"[A-Za-z_][\w.]*(\(.*\))?")
NAMED = sorted({name for page in PAGES for name in names(page) if IDENTIFIER.fullmatch(name)})


@pytest.mark.parametrize("name", NAMED)
def test_every_name_occurs_in_the_sources(name: str) -> None:
    last = re.sub(r"\(.*\)$", "", name)
    files = {file.name for folder in CODE_FOLDERS for file in (ROOT / folder).rglob("*")}
    assert name in files or last in SOURCES or last.rpartition(".")[2] in SOURCES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_name_no_place_on_a_machine(page: Path) -> None:
    assert not re.search(r"(?<!\w)/(work|root|tmp|home|Users)/", text_of(page))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text_of(page))
    assert all((page.parent / target).exists() for target in targets)


@pytest.mark.parametrize(
    ("picture", "resized", "tokens"),
    re.findall(r"^\| ([\d ×]+) \| ([\d ×]+) \| ([\d,]+) \|", text_of(ROOT / "docs" / "vision.md"), flags=re.MULTILINE),
)
def test_the_table_of_tokens_is_what_the_processor_makes(picture: str, resized: str, tokens: str) -> None:
    width, height = map(int, picture.split("×"))
    processor = ImageProcessor()
    new_height, new_width = processor.resized(height, width)
    assert resized == f"{new_width} × {new_height}"
    assert tokens == f"{new_width * new_height // processor.layout.unit**2:,}"


def test_every_measurement_names_a_section_of_the_benchmark() -> None:
    page = text_of(ROOT / "docs" / "measured.md")
    measured = page.partition("## Speed and memory")[2].partition("\n## ")[0]
    named = set(re.findall(r"\| `([\w-]+)` \|$", measured, flags=re.MULTILINE))
    named |= set(re.findall(r"python -m tools\.benchmarks (\w+)", page))
    assert {"convert", "host", "rule", "start", "quality", "recipes"} <= named <= set(SECTIONS)
    assert measured.count("\n| ") > 10


def test_the_emulators_page_shows_code_that_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(
        r"```python\n(.*?)```", text_of(ROOT / "tests" / "metal_emulator" / "README.md"), flags=re.DOTALL
    )
    exec(compile(code, "README.md", "exec"), {})
    assert "14" in capsys.readouterr().out


def test_every_recipe_is_described() -> None:
    assert set(RECIPES) <= set(names(ROOT / "docs" / "recipes.md"))

"""What an answer is held to on the command line: a schema in place or in a file, a grammar in a file."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from mlx_qwen.cli import main

SCHEMA = (
    '{"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": false}'
)


def generate(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["generate", "Is it warm?", "--quiet", "--temp", "0", *arguments])
    return result.exit_code, result.stdout.strip(), result.stderr


@pytest.mark.parametrize("in_file", [True, False])
def test_a_schema_may_stand_on_the_line_or_in_a_file(tmp_path: Path, in_file: bool) -> None:
    (tmp_path / "schema.json").write_text(SCHEMA)
    code, written, _ = generate("--schema", str(tmp_path / "schema.json") if in_file else SCHEMA)
    assert code == 0
    assert written.replace(" ", "").replace("\n", "") in ('{"ok":true}', '{"ok":false}')


def test_a_grammar_stands_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "g.lark").write_text('start: "yes" | "no"')
    assert generate("--grammar", str(tmp_path / "g.lark"))[:2] in [(0, "yes"), (0, "no")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--schema", "missing.json"], "schema cannot be read from missing.json"),
        (["--schema", "{bad"], "no JSON"),
        (["--grammar", "missing.lark"], "grammar cannot be read from missing.lark"),
        (["--regex", "("], "unclosed group"),
        (["--tool-choice", "required"], "were given: none"),
    ],
)
def test_what_cannot_be_used_is_one_error(arguments: list[str], message: str) -> None:
    code, _, stderr = generate(*arguments)
    assert code != 0
    assert message in stderr
    assert "Traceback" not in stderr

"""`mlx-qwen demo` shows the main job on any machine."""

import re
from pathlib import Path

from click.testing import CliRunner

from mlx_qwen.cli import main
from mlx_qwen.files import checkpoint_tensors


def test_the_demo_converts_a_checkpoint_and_writes_tokens_with_it(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["demo", "--keep", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert re.search(r"Generation: [1-9]\d* tokens", result.stderr)
    assert any(name.endswith(".scales") for name in checkpoint_tensors(tmp_path / "demo-4bit"))

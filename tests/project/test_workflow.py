"""The workflow for a hosted Mac, which no host has run, calls what there is."""

import re
import shlex
from pathlib import Path

import click
import pytest
import yaml

from mlx_qwen.cli import main

ROOT = Path(__file__).resolve().parents[2]
WORKFLOW = ROOT / ".github" / "workflows" / "macos.yml"


def commands() -> list[str]:
    """Every line that the workflow's steps run."""
    (job,) = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))["jobs"].values()
    return [line for step in job["steps"] for line in step.get("run", "").splitlines()]


@pytest.mark.parametrize("command", [line for line in commands() if "mlx-qwen" in line])
def test_every_command_has_the_options_that_it_is_given(command: str) -> None:
    program, name, *options = shlex.split(command)
    assert program == ".venv/bin/mlx-qwen"
    found = main.get_command(click.Context(main), name)
    assert found is not None
    assert found.make_context(name, options).params


@pytest.mark.parametrize("command", [line for line in commands() if "mlx-qwen" not in line])
def test_every_other_line_makes_a_target_or_runs_a_module(command: str) -> None:
    program, *arguments = shlex.split(command)
    if program == "make":
        rules = (ROOT / "Makefile").read_text(encoding="utf-8").replace("$(VENV)", ".venv")
        assert all(re.search(rf"^{re.escape(target)}:", rules, re.MULTILINE) for target in arguments)
    else:
        assert (program, arguments[:2]) == (".venv/bin/python", ["-m", "build"])


def test_the_workflow_builds_proves_tests_and_measures() -> None:
    text = "\n".join(commands())
    assert all(word in text for word in ("build", "doctor --tune", "make test", "bench"))

"""`make` finds a Python that is new enough, or says what to do, and recovers from a `.venv` that is no good."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("make", "rm", "sh", "mkdir", "ln")
OLD = """#!/bin/sh
[ "$1" = --version ] && echo Python 3.9.6 && exit 0
[ "$1" = -m ] && mkdir -p "$3/bin" && exit 0
exit 1
"""
# Makes an environment without the half minute that installing pip takes.
NEW = f"""#!/bin/sh
[ "$1" = -m ] && mkdir -p "$3/bin" && ln -s {sys.executable} "$3/bin/python" && exit 0
exec {sys.executable} "$@"
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with the Makefile, and `bin/` with an old python3: all that a PATH of it alone finds."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in TOOLS:
        found = shutil.which(tool)
        assert found is not None
        (folder / tool).symlink_to(found)
    script(folder / "python3", OLD)
    return tmp_path


def script(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    file.chmod(0o755)


def make(clone: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`make venv`, or what is asked for, with nothing but the clone's `bin/` on the PATH."""
    # The interpreters that a developer's machine may have elsewhere are not looked for.
    text = (clone / "Makefile").read_text().replace("/opt/homebrew/bin/python3 /usr/local/bin/python3", "")
    (clone / "Makefile").write_text(text)
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "PYTHON")}
    return subprocess.run(
        [shutil.which("make") or "make", *(arguments or ["venv"])],
        capture_output=True,
        text=True,
        check=False,
        cwd=clone,
        env={**environment, "PATH": str(clone / "bin")},
    )


def is_sound(clone: Path) -> bool:
    """Whether the clone's `.venv` has a Python of this version."""
    code = "import pip, sys; print(*sys.version_info[:2])"
    done = subprocess.run([clone / ".venv/bin/python", "-c", code], capture_output=True, text=True, check=True)
    return tuple(map(int, done.stdout.split())) == sys.version_info[:2]


def planned(clone: Path) -> str:
    """What `make demo` would do where the runtime was installed."""
    shutil.copy(ROOT / "pyproject.toml", clone)
    (clone / ".venv" / ".runtime").touch()
    return make(clone, "--dry-run", "demo").stdout


def test_an_old_python_alone_is_named_with_what_to_do_and_leaves_nothing(clone: Path) -> None:
    done = make(clone)
    assert done.returncode != 0
    assert "python3 is Python 3.9.6" in done.stderr
    assert "3.11 or newer" in done.stderr and "make demo PYTHON=" in done.stderr
    assert not (clone / ".venv").exists()


def test_a_newer_python_beside_an_old_one_is_found(clone: Path) -> None:
    script(clone / "bin" / "python3.12", NEW)
    assert make(clone).returncode == 0
    assert is_sound(clone)


def test_the_python_that_is_named_is_taken_and_its_venv_is_kept(clone: Path) -> None:
    assert make(clone, "venv", f"PYTHON={sys.executable}").returncode == 0
    assert is_sound(clone)
    commands = planned(clone)
    assert "-m venv" not in commands and "pip install" not in commands
    assert "mlx-qwen demo" in commands


@pytest.mark.parametrize("broken", ["older", "dangling", "half-made"])
def test_a_venv_that_is_no_good_is_made_anew(clone: Path, broken: str) -> None:
    script(clone / "bin" / "python3.12", NEW)
    python = clone / ".venv" / "bin" / "python"
    if broken == "older":
        script(python, OLD)
    else:
        python.parent.mkdir(parents=True)
        python.symlink_to(clone / "gone" if broken == "dangling" else "/bin/false")
    commands = planned(clone)
    assert "-m venv" in commands and "pip install" in commands
    assert make(clone).returncode == 0
    assert is_sound(clone)

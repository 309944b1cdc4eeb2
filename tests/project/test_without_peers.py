"""The wheel does all its work where neither mlx-lm nor transformers nor torch is installed."""

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

PEERS = ("mlx_lm", "mlx_vlm", "transformers", "torch", "accelerate", "compressed_tensors")
OURS = ("mlx_qwen", "metal_kernels", "__editable__")


@pytest.fixture(scope="module")
def alone(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts of an environment with the wheel and all packages of this one but peers, as links."""
    environment = tmp_path_factory.mktemp("alone") / "env"
    venv.create(environment, with_pip=False, symlinks=True)
    paths = sysconfig.get_paths(vars={"base": str(environment), "platbase": str(environment)})
    packages, scripts = Path(paths["purelib"]), Path(paths["scripts"])
    for folder in dict.fromkeys(
        path for path in map(Path, sys.path) if path.name in ("site-packages", "dist-packages")
    ):
        for entry in folder.iterdir():
            link = packages / entry.name
            if entry.suffix != ".pth" and not entry.name.startswith((*PEERS, *OURS)) and not link.exists():
                link.symlink_to(entry)
    install = ["install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "--python", scripts / "python", *install], check=True)
    return scripts


def run(alone: Path, folder: Path, program: str, *arguments: str, fails: bool = False) -> str:
    """What a program of the environment says, run where no sources lie."""
    done = subprocess.run(
        [alone / program, *arguments], capture_output=True, text=True, check=False, cwd=folder, stdin=subprocess.DEVNULL
    )
    assert (done.returncode != 0) == fails, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("module", ["mlx_lm", "transformers", "torch"])
def test_the_environment_has_no_peers(alone: Path, tmp_path: Path, module: str) -> None:
    assert "ModuleNotFoundError" in run(alone, tmp_path, "python", "-c", f"import {module}", fails=True)


def test_the_environment_has_the_wheel(alone: Path, tmp_path: Path) -> None:
    said = run(alone, tmp_path, "python", "-c", "import mlx_qwen; print(mlx_qwen.__file__)")
    assert Path(said.strip()).is_relative_to(alone.parent)


def test_the_doctor_says_that_mlx_lm_is_missing_and_goes_on(alone: Path, tmp_path: Path) -> None:
    said = run(alone, tmp_path, "mlx-qwen", "doctor", "--repeats", "1")
    assert [line.split()[1:] for line in said.splitlines() if line.startswith("mlx-lm ")] == [["not", "installed"]]


def test_a_model_is_converted_planned_compared_and_answers(alone: Path, tmp_path: Path, chat_folder: Path) -> None:
    converted = ["--hf-path", str(chat_folder), "--mlx-path", "out"]
    assert "out" in run(alone, tmp_path, "mlx-qwen", "convert", *converted)
    assert "Generation: " in run(
        alone, tmp_path, "mlx-qwen", "generate", "--model", "out", "--prompt", "hi", "--max-tokens", "2"
    )
    assert "context" in run(alone, tmp_path, "mlx-qwen", "plan", "--model", "out").lower()
    assert "perplexity" in run(alone, tmp_path, "mlx-qwen", "compare", str(chat_folder), "out").lower()


def test_speed_is_measured_and_a_peer_asked_for_is_named(alone: Path, tmp_path: Path, chat_folder: Path) -> None:
    few = ["--model", str(chat_folder), "--prompt-tokens", "3", "--generate-tokens", "2", "--repeats", "1"]
    assert "decode after 3" in run(alone, tmp_path, "mlx-qwen", "bench", *few)
    assert "pip install mlx-lm" in run(alone, tmp_path, "mlx-qwen", "bench", *few, "--vs", "mlx-lm", fails=True)


def test_the_bundled_model_answers_from_python(alone: Path, tmp_path: Path) -> None:
    code = (
        "import mlx_qwen; model, processor = mlx_qwen.load();"
        "print(mlx_qwen.generate(model, processor, [{'role': 'user', 'content': 'What is 37+58?'}], max_tokens=64))"
    )
    assert "95" in run(alone, tmp_path, "python", "-c", code)

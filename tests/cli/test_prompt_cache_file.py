"""A text that is read once into a file is gone on with as if the whole prompt had been given."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import mlx_qwen
from mlx_qwen.cli import main
from mlx_qwen.demo import demo_folder

TEXT = "What is 3 + 4? "


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(each) for each in arguments])


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("cache") / "text.safetensors"
    done = run("cache-prompt", "--prompt", TEXT, "--prompt-cache-file", file)
    assert done.exit_code == 0, done.output
    return file


def test_the_answer_is_that_of_the_whole_prompt_and_the_file_may_be_used_again(cached: Path) -> None:
    whole = json.loads(run("generate", TEXT + "Answer it.", "--temp", 0, "--json", "--no-thinking").stdout)
    for _ in range(2):
        done = run("generate", "Answer it.", "--prompt-cache-file", cached, "--temp", 0, "--json", "--no-thinking")
        assert done.exit_code == 0, done.output
        found = json.loads(done.stdout)
        assert found["text"] == whole["text"]
        assert 0 < found["usage"]["cached_tokens"] < found["usage"]["prompt_tokens"]


def test_python_goes_on_with_the_same_file(cached: Path) -> None:
    model, processor = mlx_qwen.load()
    cache = mlx_qwen.load_prompt_cache(cached, model)
    responses = list(mlx_qwen.stream_generate(model, processor, "Answer it.", prompt_cache=cache, max_tokens=2))
    assert responses[-1].cached_tokens == len(mlx_qwen.load_prompt_cache(cached, model).tokens) > 0


def test_what_cannot_be_used_is_one_line(cached: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(cached.read_bytes()[:-1])
    other = tmp_path / "other"
    other.mkdir()
    for file in demo_folder().iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    for arguments, words in (
        (("--prompt-cache-file", damaged), "is no prompt cache of mlx-qwen, or damaged"),
        (("--prompt-cache-file", tmp_path / "none"), "cannot be read"),
        (("--prompt-cache-file", cached, "--model", other), "is of another model"),
        (("--prompt-cache-file", cached, "--system-prompt", "x"), "--system-prompt belongs to the cached text"),
        (("--prompt-cache-file", cached, "--kv-bits", 8), "kv_bits belongs to the cache"),
        (("--max-kv-size", 4096), "max_kv_size is 4096, but these models keep all that they read"),
    ):
        done = run("generate", "Why?", *arguments)
        assert done.exit_code != 0
        assert words in done.output
        assert "Traceback" not in done.output
    twice = run("cache-prompt", "--prompt", "a", "--prompt-file", "b", "--prompt-cache-file", tmp_path / "c")
    assert "Expected the text once" in twice.output

"""`mlx-qwen generate` prints what the Python functions return, and ends as a command should."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from mlx_qwen.answer.response import GenerationResponse
from mlx_qwen.cli import COMMANDS, main
from mlx_qwen.cli.printer import AnswerPrinter
from mlx_qwen.cli.reading import check_whole
from mlx_qwen.engine.emission import Emission
from mlx_qwen.engine.scheduler import Scheduler
from mlx_qwen.engine.sequence import Sequence
from mlx_qwen.engine.step import Batch
from mlx_qwen.errors import PromptError
from mlx_qwen.generation import generate, stream_generate
from mlx_qwen.loading import load
from tests.vision.drawing import drawing

GREEDY = ("--temp", "0", "-m", "12")


def run(*arguments: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], input=stdin)


def expected(folder: Path, prompt: object, **options: object) -> str:
    return generate(*load(folder), prompt, temperature=0, max_tokens=12, **options)  # type: ignore[arg-type]


def test_the_answer_equals_generate_and_statistics_stay_off_stdout(folder: Path) -> None:
    result = run("generate", "--model", folder, "-p", "Hello", "--system-prompt", "Be kind.", *GREEDY)
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
    assert result.exit_code == 0
    assert result.stdout == expected(folder, messages) + "\n"
    assert "tokens-per-sec" in result.stderr
    assert "Peak memory" in result.stderr


def test_quiet_prints_the_answer_and_nothing_else(folder: Path) -> None:
    result = run("generate", "--model", folder, "-p", "Hello", "--quiet", *GREEDY)
    assert result.stderr == ""
    assert result.stdout


def test_a_dash_reads_the_prompt_from_stdin(folder: Path) -> None:
    result = run("generate", "--model", folder, "-p", "-", "--ignore-chat-template", *GREEDY, stdin="Hello from a pipe")
    assert result.stdout == expected(folder, "Hello from a pipe") + "\n"


def test_thinking_flags_reach_the_template(folder: Path) -> None:
    outputs = [
        run("generate", "--model", folder, "-p", "Hello", flag, "--quiet", *GREEDY).stdout
        for flag in ("--enable-thinking", "--no-thinking")
    ]
    messages = [{"role": "user", "content": "Hello"}]
    assert outputs == [expected(folder, messages, enable_thinking=value) + "\n" for value in (True, False)]


def test_kv_bits_says_which_layers_are_packed(folder: Path) -> None:
    result = run("generate", "--model", folder, "-p", "Hello", "--kv-bits", 8, *GREEDY)
    assert "KV cache: 8 bits in 1 attention layers (3)" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--top-p", 0), "top_p is 0.0; expected above 0"),
        (("--kv-bits", 3), "kv_bits is 3"),
        (("-m", 0), "max_tokens is 0"),
    ],
)
def test_an_impossible_option_is_one_line_and_exit_code_1(
    folder: Path, arguments: tuple[object, ...], complaint: str
) -> None:
    result = run("generate", "--model", folder, "-p", "Hello", *arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: {complaint}")
    assert result.stderr.count("\n") == 1


def test_a_prompt_longer_than_the_context_is_one_line(folder: Path) -> None:
    result = run("generate", "--model", folder, "-p", "-", stdin="x " * 3000)
    assert result.exit_code == 1
    assert "context ends at 2,048" in result.stderr


def test_bytes_that_are_no_text_are_one_line(folder: Path) -> None:
    result = CliRunner().invoke(main, ["generate", "--model", str(folder), "-p", "-"], input=b"Caf\xe9")
    assert result.exit_code == 1
    assert "not UTF-8" in result.stderr
    assert result.stderr.count("\n") == 1


def test_output_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "read only").touch()
    command = [sys.executable, "-m", "mlx_qwen", "generate", "--help"]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with (tmp_path / "read only").open() as unwritable:
        done = subprocess.run(command, stdout=unwritable, stderr=subprocess.PIPE, text=True, check=False, env=buffered)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1


def test_a_missing_tokenizer_is_one_line(folder: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / "tokenizer.json").unlink()
    result = run("generate", "--model", broken, "-p", "Hello")
    assert result.exit_code == 1
    assert "no tokenizer.json" in result.stderr


def test_without_a_model_the_bundled_one_answers_and_says_so() -> None:
    result = run("generate", "-p", "What is 12+30?")
    assert result.exit_code == 0
    assert "42" in result.stdout
    assert "bundled" in result.stderr


def test_a_system_prompt_without_the_template_is_a_usage_error(folder: Path) -> None:
    result = run("generate", "--model", folder, "-p", "x", "--system-prompt", "y", "--ignore-chat-template")
    assert result.exit_code == 2
    assert "--system-prompt" in result.stderr


SUM = [{"role": "user", "content": "What is 12+30?"}]


@pytest.mark.parametrize(
    ("arguments", "typed"),
    [
        (["What is 12+30?"], None),
        (["--prompt", "What is 12+30?"], None),
        ([], "What is 12+30?"),
        (["-"], "What is 12+30?"),
        (["-p", "-"], "What is 12+30?"),
        (["--prompt-file", "-"], "What is 12+30?"),
        (["--prompt-file", "question.txt"], None),
    ],
    ids=["word", "flag", "pipe", "dash", "flag-dash", "file-dash", "file"],
)
def test_a_prompt_is_a_word_a_flag_a_file_or_a_pipe(
    arguments: list[str], typed: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("question.txt").write_text("What is 12+30?")
    result = run("generate", *arguments, "--quiet", stdin=typed)
    assert (result.exit_code, result.stdout) == (0, "42\n")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["-p", "-"], "Standard input is empty"),
        ([], "Standard input is empty"),
        (["--prompt-file", "-"], "Standard input is empty"),
        (["--prompt-file", "nothing.txt"], "nothing.txt is empty"),
        (["--prompt-file", "missing.txt"], "cannot be read from missing.txt (No such file"),
        (["--prompt-file", "."], "cannot be read from . (Is a directory"),
        (["--prompt-file", "picture.png"], "Give a file of UTF-8 text"),
        (["What?", "--tools", "missing.json"], "The tools cannot be read from missing.json"),
        (["What?", "--tools", "nothing.txt"], "The tools cannot be read from nothing.txt"),
        (["What?", "--tools", "number.json"], "number.json holds no list of tools"),
        (["What?", "--tools", "unnamed.json"], "tools is [{'a': 1}]; expected a list like"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_a_prompt_or_tools_that_are_not_there_are_one_line(
    arguments: list[str], complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("nothing.txt").write_text(" \n")
    Path("number.json").write_text("5")
    Path("unnamed.json").write_text('[{"a": 1}]')
    drawing(32, 32).save("picture.png")
    result = run("generate", *arguments, stdin=" \n")
    assert result.exit_code == 1
    assert complaint in result.stderr.splitlines()[-1]
    assert result.stdout == ""


def test_two_prompts_are_a_usage_error() -> None:
    result = run("generate", "one", "-p", "two")
    assert result.exit_code == 2
    assert "'one' and as 'two'" in result.stderr


def test_json_is_one_object_with_what_the_last_response_holds() -> None:
    result = run("generate", "What is 12+30?", "--enable-thinking", "--temp", 0, "--json")
    assert (result.exit_code, result.stdout.count("\n")) == (0, 1)
    assert "tokens-per-sec" not in result.stderr
    responses = list(stream_generate(*load(), SUM, enable_thinking=True, temperature=0))
    shown, last = json.loads(result.stdout), responses[-1]
    assert shown["text"] == "".join(response.text for response in responses)
    assert (shown["content"], shown["reasoning"]) == (last.content, last.reasoning)
    assert (shown["tool_calls"], shown["finish_reason"]) == ([], "stop")
    usage = shown["usage"]
    assert usage["prompt_tokens"] == last.prompt_tokens + last.cached_tokens
    assert usage["completion_tokens"] == last.generation_tokens == usage["total_tokens"] - usage["prompt_tokens"]
    assert all(rate > 0 for rate in shown["rates"].values())


def test_tools_of_a_file_are_called_and_the_call_goes_back_into_messages(tmp_path: Path) -> None:
    parameters = {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]}
    function = {"name": "calculator", "description": "Multiplies two whole numbers.", "parameters": parameters}
    tools = [{"type": "function", "function": function}]
    (tmp_path / "tools.json").write_text(json.dumps(tools))
    flags = ("--tools", tmp_path / "tools.json", "--json")
    shown = json.loads(run("generate", "How much is 8216*662?", *flags).stdout)
    assert shown["finish_reason"] == "tool_calls"
    assert shown["tool_calls"] == [
        {"type": "function", "function": {"name": "calculator", "arguments": {"expression": "8216*662"}}}
    ]
    messages = [
        {"role": "user", "content": "How much is 8216*662?"},
        {"role": "assistant", "content": shown["content"], "tool_calls": shown["tool_calls"]},
        {"role": "tool", "content": json.dumps({"result": 8216 * 662})},
    ]
    assert "5438992" in generate(*load(), messages, tools=tools)


def test_an_answer_that_the_limit_cuts_says_so_and_is_no_failure() -> None:
    cut = run("generate", "What is 12+30?", "-m", 1)
    assert (cut.exit_code, cut.stdout) == (0, "4\n")
    assert "The answer was cut at 1 tokens; --max-tokens allows more." in cut.stderr
    assert json.loads(run("generate", "What is 12+30?", "-m", 1, "--json").stdout)["finish_reason"] == "length"


def test_a_line_that_a_terminal_may_have_cut_is_refused() -> None:
    check_whole("x" * 1_000)
    with pytest.raises(PromptError, match="may be cut"):
        check_whole("ä" * 2_048)


def test_ctrl_c_prints_the_statistics_so_far_and_exits_with_130(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: list[str] = []
    original = AnswerPrinter.push

    def interrupted(self: AnswerPrinter, response: GenerationResponse) -> None:
        pushed.append(response.text)
        original(self, response)
        if len(pushed) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(AnswerPrinter, "push", interrupted)
    result = run("generate", "--model", folder, "-p", "Hello", *GREEDY)
    assert result.exit_code == 130
    assert "Generation: 3 tokens" in result.stderr
    assert result.stdout == "".join(pushed) + "\n"


def test_a_device_that_fails_is_one_line_and_exit_code_1(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, passes = Scheduler._pass, []

    def failing(self: Scheduler, batch: Batch) -> list[tuple[Sequence, Emission]]:
        passes.append(batch)
        if len(passes) == 9:
            raise RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory")
        return original(self, batch)

    whole = expected(folder, [{"role": "user", "content": "Hello"}])
    monkeypatch.setattr(Scheduler, "_pass", failing)
    result = run("generate", "--model", folder, "-p", "Hello", "--quiet", "--mtp", "0", *GREEDY)
    assert (result.exit_code, len(passes)) == (1, 9)
    assert result.stdout.strip()
    assert whole.startswith(result.stdout.strip("\n"))
    assert [line[:26] for line in result.stderr.splitlines()] == ["Error: The device failed: "]
    assert "Insufficient Memory" in result.stderr


def test_help_lists_the_commands_without_importing_mlx() -> None:
    code = (
        "import sys, json\n"
        "from mlx_qwen.cli import main\n"
        "main(['--help'], standalone_mode=False)\n"
        "main(['generate', '--help'], standalone_mode=False)\n"
        "print(json.dumps([name for name in sys.modules if name.split('.')[0] in ('mlx', 'numpy', 'tokenizers')]))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(output.splitlines()[-1]) == []
    assert all(help_text in " ".join(output.split()) for help_text in COMMANDS.values())


@pytest.mark.parametrize("name", COMMANDS)
def test_the_list_of_commands_says_what_each_command_says_of_itself(name: str) -> None:
    command = main.get_command(click.Context(main), name)
    assert command is not None
    assert " ".join((command.help or "").split("\n\n")[0].split()) == COMMANDS[name]

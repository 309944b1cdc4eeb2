"""`mlx-qwen chat` keeps the conversation and its cache, and obeys its commands."""

from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest
from click.testing import CliRunner, Result

from mlx_qwen.answer.response import GenerationResponse
from mlx_qwen.cli import main
from mlx_qwen.cli.printer import AnswerPrinter
from mlx_qwen.conversation import Conversation, Turn
from mlx_qwen.engine.emission import Emission
from mlx_qwen.engine.scheduler import Scheduler
from mlx_qwen.engine.sequence import Sequence
from mlx_qwen.engine.step import Batch
from mlx_qwen.generation import generate
from mlx_qwen.json_types import Message
from mlx_qwen.loading import load
from mlx_qwen.model import Model
from mlx_qwen.options import GenerationOptions
from mlx_qwen.prompt import Processor
from mlx_qwen.prompt.template import ChatTemplate
from tests.support.tokenizers import tiny_tokenizer

PLAIN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    "{{ '<|im_start|>assistant\n' }}"
)


def chat(folder: Path, *lines: str, arguments: tuple[str, ...] = ()) -> Result:
    flags = ["--model", str(folder), "--temp", "0", "-m", "8", "--no-thinking", *arguments]
    return CliRunner().invoke(main, ["chat", *flags], input="\n".join(lines) + "\n")


@pytest.fixture
def talk(folder: Path) -> Iterator[tuple[Model, Processor]]:
    """A model whose template keeps history as it was written, and that never ends a turn by itself."""
    model, _ = load(folder)
    template = ChatTemplate({"default": PLAIN_TEMPLATE})
    yield model, Processor(tiny_tokenizer(), template=template, end_token_ids=frozenset())


def only_digits(tokens: mx.array, logits: mx.array) -> mx.array:
    """Digits never merge in this vocabulary, so that the text of an answer is read back as the same tokens."""
    digits = mx.array(tiny_tokenizer().encode("0123456789").ids)
    return mx.where((mx.arange(logits.shape[-1])[:, None] == digits).any(-1), logits, -mx.inf)


OPTIONS = GenerationOptions(temperature=0, max_tokens=8, logits_processors=[only_digits])


def ask(conversation: Conversation, question: str) -> tuple[list[int], int, int]:
    """Token ids of the answer, how many tokens the cache already held, and how many were read."""
    turn = conversation.ask(question)
    last = list(turn)[-1]
    conversation.remember(turn)
    return turn.tokens, last.cached_tokens, last.prompt_tokens


def test_answers_equal_generate_on_the_whole_history(folder: Path) -> None:
    result = chat(folder, "Hello", "Again", "/quit")
    history = [{"role": "user", "content": "Hello"}]
    for _ in range(2):
        answer = generate(*load(folder), history, temperature=0, max_tokens=8, enable_thinking=False)
        assert answer in result.stdout
        history += [{"role": "assistant", "content": answer}, {"role": "user", "content": "Again"}]
    assert result.exit_code == 0


def forget(talk: tuple[Model, Processor]) -> None:
    """Let the model's engine forget all that it has read."""
    talk[0].engine = None


def test_the_next_turn_reads_only_what_is_new(talk: tuple[Model, Processor]) -> None:
    forget(talk)
    conversation, fresh = Conversation(*talk, OPTIONS), Conversation(*talk, OPTIONS)
    first, cached, read = ask(conversation, "Hello")
    assert cached == 0
    second, still_cached, read_then = ask(conversation, "Again")
    assert still_cached == read + len(first) - 1
    forget(talk)
    fresh.turns += conversation.turns[:2]
    assert ask(fresh, "Again") == (second, 0, still_cached + read_then)


def test_a_question_interrupted_before_its_answer_leaves_no_trace(talk: tuple[Model, Processor]) -> None:
    conversation = Conversation(*talk, OPTIONS)
    conversation.remember(conversation.ask("Never mind"))
    forget(talk)
    found = ask(conversation, "Hello")
    forget(talk)
    assert found == ask(Conversation(*talk, OPTIONS), "Hello")


def test_a_prompt_that_does_not_extend_the_last_one_is_read_as_from_the_start(talk: tuple[Model, Processor]) -> None:
    conversation = Conversation(*talk, OPTIONS)
    ask(conversation, "Hello")
    conversation.turns[0] = {"role": "user", "content": "Other"}
    fresh = Conversation(*talk, OPTIONS)
    fresh.turns += conversation.turns
    found, cached, read = ask(conversation, "Again")
    forget(talk)
    assert ask(fresh, "Again") == (found, 0, cached + read)


def test_an_interrupted_answer_stays_in_the_conversation(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: list[str] = []
    original = AnswerPrinter.push

    def interrupted(self: AnswerPrinter, response: GenerationResponse) -> None:
        pushed.append(response.text)
        original(self, response)
        if len(pushed) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(AnswerPrinter, "push", interrupted)
    result = chat(folder, "Hello", "Again", "/quit")
    assert result.exit_code == 0
    assert "(stopped)" in result.stdout
    history = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "".join(pushed[:3])},
        {"role": "user", "content": "Again"},
    ]
    assert generate(*load(folder), history, temperature=0, max_tokens=8, enable_thinking=False) == "".join(pushed[3:])


@pytest.mark.parametrize("error", [RuntimeError("[METAL] Insufficient\nMemory"), MemoryError("std::bad_alloc")])
def test_a_device_that_fails_is_one_line_and_the_conversation_is_as_before(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    histories: list[list[Message]] = []
    original_ask, original_pass, passes = Conversation.ask, Scheduler._pass, 0

    def noted(self: Conversation, question: str) -> Turn:
        histories.append([*self.turns])
        return original_ask(self, question)

    def failing(self: Scheduler, batch: Batch) -> list[tuple[Sequence, Emission]]:
        nonlocal passes
        passes += len(histories) == 2
        if len(histories) == 2 and passes == 3:
            raise error
        return original_pass(self, batch)

    monkeypatch.setattr(Conversation, "ask", noted)
    monkeypatch.setattr(Scheduler, "_pass", failing)
    result = chat(folder, "Hello", "Fail", "Again", arguments=("--mtp", "0"))
    assert result.exit_code == 0
    assert result.stderr.count("Error: The device failed: ") == 1
    assert " ".join(str(error).split()) in result.stderr
    assert passes == 3
    assert len(histories[1]) == 2
    assert histories[2] == histories[1]


def test_a_fault_of_the_program_is_no_device_failure(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def faulty(self: Scheduler, batch: Batch) -> list[tuple[Sequence, Emission]]:
        raise NotImplementedError

    monkeypatch.setattr(Scheduler, "_pass", faulty)
    assert isinstance(chat(folder, "Hello").exception, NotImplementedError)


def test_kv_bits_says_which_layers_are_packed(folder: Path) -> None:
    assert "KV cache: 8 bits in 1 attention layers (3)" in chat(folder, arguments=("--kv-bits", "8")).stderr


def test_bytes_that_are_no_text_are_refused_and_the_chat_goes_on(folder: Path) -> None:
    flags = ["--model", str(folder), "--temp", "0", "-m", "8"]
    result = CliRunner().invoke(main, ["chat", *flags], input=b"Caf\xe9\n/help\n")
    assert "not UTF-8" in result.stderr
    assert "/reset" in result.stdout
    assert result.exit_code == 0


def test_reset_and_system_begin_anew(folder: Path) -> None:
    again = chat(folder, "Hello", "/reset", "Hello").stdout.split(">>> ")
    assert again[1] == again[3]
    with_system = chat(folder, "/system Be kind.", "Hello").stdout.split(">>> ")
    assert with_system[2] == chat(folder, "Hello", arguments=("--system-prompt", "Be kind.")).stdout.split(">>> ")[1]
    assert with_system[2] != again[1]


def test_help_lists_the_commands_and_an_unknown_one_is_named(folder: Path) -> None:
    result = chat(folder, "/help", "/dance", "/quit", "never read")
    assert all(word in result.stdout for word in ("/reset", "/system", "/quit"))
    assert "Unknown command /dance" in result.stderr
    assert result.exit_code == 0


def test_the_end_of_the_input_ends_the_chat(folder: Path) -> None:
    assert chat(folder).exit_code == 0


def test_a_question_too_long_is_refused_and_the_chat_goes_on(folder: Path) -> None:
    result = chat(folder, "x " * 3000, "Hello", arguments=("--verbose",))
    assert "context ends at 2,048" in result.stderr
    assert result.stderr.count("Peak memory") == 1
    assert result.exit_code == 0


def test_ctrl_c_at_the_prompt_exits_with_130(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(prompt: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    assert chat(folder).exit_code == 130

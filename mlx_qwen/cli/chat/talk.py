"""A chat in progress: the conversation, its answers on the screen, and what the last one was."""

from collections.abc import Callable
from contextlib import suppress

import click

from mlx_qwen.cli.chat.keyboard import Interrupts, unechoed
from mlx_qwen.cli.printer import AnswerPrinter
from mlx_qwen.conversation import Conversation, Turn
from mlx_qwen.errors import PromptError


class Talk:
    """Asks a conversation's questions and shows the answers.

    Attributes:
        conversation: its messages and options.
        model: what the model is called.
        folded: whether a line stands for reasoning on the screen.
        verbose: whether statistics follow each answer.
    """

    def __init__(self, conversation: Conversation, *, model: str, verbose: bool, rich: bool) -> None:
        self.conversation = conversation
        self.model = model
        self.folded = False
        self.verbose = verbose
        self._rich = rich
        self._last: Turn | None = None
        self._results: list[str] = []

    def ask(self, question: str) -> None:
        """Shows the answer to a question; raises MLXQwenError when there can be none."""
        self._results.clear()
        self._answer(lambda: self.conversation.ask(question))

    def result(self, text: str) -> None:
        """Takes what a called function returned, and shows what the model makes of it once all have."""
        turns = self.conversation.turns
        calls = turns[-1].get("tool_calls") if turns else None
        if not isinstance(calls, list):
            raise PromptError("The last answer calls no function.")
        self._results.append(text)
        if len(self._results) == len(calls):
            results = self._results
            self._results = results[:-1]  # where there is no answer, the last one can be given again
            self._answer(lambda: self.conversation.give_results(results))
            self._results = []

    def statistics(self, text: str = "") -> str:
        """Tokens, speed and memory of the last answer; raises PromptError before the first."""
        last = self._last.last if self._last is not None else None
        if last is None:
            raise PromptError("There is no answer yet.")
        total = last.cached_tokens + last.prompt_tokens + last.generation_tokens
        messages = len(self.conversation.turns)
        return f"{last.statistics()}\nConversation: {messages} messages, {total:,} tokens"

    def reasoning(self) -> str:
        """The reasoning of the last answer, "" where there was none."""
        return str(self._last.answer().get("reasoning_content", "")).strip() if self._last is not None else ""

    def _answer(self, begin: Callable[[], Turn]) -> None:
        """Shows an answer and keeps it; when Ctrl-C stops it, what had come, and of one that fails nothing."""
        printer, turn, stopped, failed = self._printer(), None, False, False
        with unechoed(), Interrupts() as ctrl_c:
            try:
                turn = begin()
                for response in turn:
                    with ctrl_c.step():
                        printer.push(response)
            except KeyboardInterrupt:
                stopped = True
            except Exception:
                failed = True
                raise
            finally:
                with suppress(KeyboardInterrupt), ctrl_c.step():
                    self._keep(turn, failed=failed)
                    printer.finish(stopped=stopped)
        if self.verbose and turn is not None and turn.last is not None:
            click.echo(turn.last.statistics(), err=True)

    def _keep(self, turn: Turn | None, *, failed: bool) -> None:
        if turn is not None:
            turn.close()
        if turn is not None and not failed:
            self.conversation.remember(turn)
            self._last = turn if turn.tokens else self._last

    def _printer(self) -> AnswerPrinter:
        if not self._rich:
            return AnswerPrinter()
        from mlx_qwen.cli.chat.screen import AnswerScreen

        return AnswerScreen(folded=self.folded)

"""Follows one answer from token to token: its text, its end, and what it consists of."""

from collections.abc import Sequence, Set

from mlx_qwen.answer import AnswerDelta, AnswerStream, FinishReason, ParsedAnswer, TextStream
from mlx_qwen.engine.thinking import Thinking
from mlx_qwen.json_types import Tools


class Answer:
    """One answer in the making.

    Args:
        decoder: a fresh decoder of token ids to text.
        end_token_ids: any of these ends the answer and is not part of its text.
        max_tokens: most tokens; the one that reaches it is the last.
        inside_thinking: whether the prompt already opened the think block.
        tools: the function descriptions that the model was given; PromptError where their schemas make no sense.
        stop: strings that end the answer, searched behind the reasoning.
        stop_in_reasoning: whether they are searched inside the reasoning too.
        thinking: the rule that may close the think block for the model; a `</think>` that it then writes itself is no
            content.
        most_calls: how many calls end the answer; None for any number, and 0 where calls are text like any other.

    Attributes:
        num_tokens: tokens so far.
        finish_reason: set with the last token.
        parsed: the whole answer, set with the last token.
    """

    def __init__(
        self,
        decoder: TextStream,
        *,
        end_token_ids: Set[int],
        max_tokens: int,
        inside_thinking: bool,
        tools: Tools | None = None,
        stop: Sequence[str] = (),
        stop_in_reasoning: bool = False,
        thinking: Thinking | None = None,
        most_calls: int | None = None,
    ) -> None:
        self.num_tokens = 0
        self.finish_reason: FinishReason | None = None
        self.parsed: ParsedAnswer | None = None
        self._decoder = decoder
        self._end_token_ids = end_token_ids
        self._max_tokens = max_tokens
        self._thinking = thinking
        self._stream = AnswerStream(
            inside_thinking=inside_thinking,
            tools=tools,
            stop=stop,
            stop_in_reasoning=stop_in_reasoning,
            most_calls=most_calls,
        )
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        """Everything written so far, raw."""
        return "".join(self._pieces)

    @property
    def stopped_by(self) -> str | None:
        """The stop string that ended it."""
        return self._stream.stopped_by

    def push(self, token: int) -> AnswerDelta:
        """What is certain with this token; its text is "" while a character or a stop string may be incomplete."""
        self.num_tokens += 1
        if self._thinking is not None and self._thinking.closed_by is not None:
            self._stream.expect_late_end()
        ended = token in self._end_token_ids
        delta = AnswerDelta() if ended else self._stream.push(self._decoder.push(token))
        if ended or self._stream.stopped or self.num_tokens == self._max_tokens:
            last = self._stream.push("" if self._stream.stopped else self._decoder.finish())
            delta = delta + last + self._stream.finish(ended=ended)
            self.parsed = self._stream.answer("stop" if ended or self._stream.stopped else "length")
            self.finish_reason = self.parsed.finish_reason
        self._pieces.append(delta.text)
        return delta

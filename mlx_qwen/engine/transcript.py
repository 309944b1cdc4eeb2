"""Follows one answer from token to token: its text, its end, and what it consists of."""

from mlx_qwen.answer import AnswerParser
from mlx_qwen.answer.response import FinishReason
from mlx_qwen.answer.stopping import StopStrings
from mlx_qwen.options import GenerationOptions
from mlx_qwen.prompt import Processor


class Answer:
    """Text of the tokens so far; `finish_reason` is set with the last one."""

    def __init__(
        self, processor: Processor, options: GenerationOptions, *, inside_thinking: bool, max_tokens: int
    ) -> None:
        self.num_tokens = 0
        self.finish_reason: FinishReason | None = None
        self._max_tokens = max_tokens
        self._end_token_ids = processor.end_token_ids
        self._stream = processor.stream()
        self._stop = StopStrings(options.stop_strings)
        self._parser = AnswerParser(inside_thinking=inside_thinking, tools=options.tools)
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        """Everything written so far, raw."""
        return "".join(self._pieces)

    def push(self, token: int) -> str:
        """The text that is certain with this token: "" while a character or a stop string may be incomplete."""
        self.num_tokens += 1
        ended = token in self._end_token_ids
        piece = "" if ended else self._stop.push(self._stream.push(token))
        if ended or self._stop.reached:
            self.finish_reason = "stop"
        elif self.num_tokens == self._max_tokens:
            self.finish_reason = "length"
        if self.finish_reason:
            piece += self._stop.push(self._stream.finish()) + self._stop.finish()
        self._pieces.append(piece)
        return piece

    def parsed(self) -> AnswerParser:
        """The finished answer taken apart; call once, at the end."""
        self._parser.push(self.text)
        self._parser.finish()
        return self._parser

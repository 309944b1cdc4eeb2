"""`/v1/completions`: text that is gone on with as it stands."""

import time

from mlx_qwen.json_types import Json
from mlx_qwen.server.exchange import new_id
from mlx_qwen.server.fields import Fields
from mlx_qwen.server.openai_fields import MOST_ANSWERS, given, sampling, usage
from mlx_qwen.server.reading import Reading
from mlx_qwen.server.refusals import Body, Refusal, openai_error
from mlx_qwen.server.wire import event
from mlx_qwen.server.work import Ask, Likelihood, Piece, Prepared


def read_completion(body: Body, reading: Reading) -> Ask:
    """What a request asks for."""
    fields = Fields(body)
    fields.forbid(echo="the prompt is not repeated.", suffix="nothing can be inserted.")
    count = fields.whole("n", least=1, most=MOST_ANSWERS) or 1
    best = fields.whole("best_of", least=1, most=MOST_ANSWERS)
    if best is not None and best != count:
        raise Refusal(400, f"best_of is {best}; expected it to be n, or left out.", param="best_of")
    top = fields.whole("logprobs", least=0, most=5)
    return Ask(
        model=fields.text("model"),
        prompt=_prompt(body.get("prompt")),
        choices={**sampling(fields), **given({"max_tokens": fields.whole("max_tokens", least=1), "logprobs": top})},
        count=count,
        stream=fields.flag("stream"),
        notes=tuple(reading.notes),
    )


def _prompt(prompt: Json) -> str | list[int]:
    """A text or token ids, also as the only one of a list."""
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str) and prompt:
        return prompt
    ids = [one for one in prompt if isinstance(one, int) and one is not True] if isinstance(prompt, list) else []
    if not ids or not isinstance(prompt, list) or len(ids) != len(prompt):
        raise Refusal(400, "prompt is no text and no list of token ids; send one at a time.", param="prompt")
    return ids


class CompletionExchange:
    """One completion."""

    def __init__(self, body: Body, reading: Reading) -> None:
        self.ask = read_completion(body, reading)
        self._with_usage = Fields(body).inner("stream_options").flag("include_usage")
        count = self.ask.count
        self._texts: list[list[str]] = [[] for _ in range(count)]
        self._likelihoods: list[list[Likelihood]] = [[] for _ in range(count)]
        self._last = [Piece.nothing() for _ in range(count)]
        self._head: Body = {"id": new_id("cmpl-"), "object": "text_completion", "created": int(time.time())}
        self._prompt_tokens = 0

    def begin(self, prepared: Prepared) -> bytes:
        """Nothing is sent yet."""
        self._head["model"] = prepared.model
        self._prompt_tokens = prepared.prompt_tokens
        return b""

    def add(self, index: int, piece: Piece) -> bytes:
        """A chunk with the text that was added, tags and calls included; the last one says why it ends."""
        self._last[index] = piece
        offset = sum(map(len, self._texts[index]))
        self._texts[index].append(piece.delta.text)
        self._likelihoods[index] += piece.likelihoods
        if not piece.delta.text and piece.finish is None and not piece.likelihoods:
            return b""
        return self._chunk(self._choice(index, piece.delta.text, list(piece.likelihoods), offset))

    def end(self) -> bytes:
        """Usage, where it was asked for, and the end of the stream."""
        last = event({**self._head, "choices": [], "usage": self._usage()})
        return (last if self._with_usage else b"") + b"data: [DONE]\n\n"

    def ping(self) -> bytes:
        """A chunk that adds nothing."""
        return self._chunk({"index": 0, "text": "", "logprobs": None, "finish_reason": None})

    def failed(self, refusal: Refusal) -> bytes:
        """The error as an event."""
        return event(openai_error(refusal))

    def body(self) -> Body:
        """The completion."""
        choices: list[Json] = [
            self._choice(index, "".join(texts), self._likelihoods[index]) for index, texts in enumerate(self._texts)
        ]
        return {**self._head, "choices": choices, "usage": self._usage()}

    def _choice(self, index: int, text: str, likelihoods: list[Likelihood], offset: int = 0) -> Body:
        finish = self._last[index].finish
        return {
            "index": index,
            "text": text,
            "logprobs": _logprobs(likelihoods, offset) if "logprobs" in self.ask.choices else None,
            "finish_reason": "stop" if finish == "tool_calls" else finish,
        }

    def _chunk(self, choice: Body) -> bytes:
        chunk: Body = {"model": self.ask.model, **self._head, "choices": [choice]}
        return event({**chunk, "usage": None} if self._with_usage else chunk)

    def _usage(self) -> Body:
        written, reasoning = sum(one.tokens for one in self._last), sum(one.reasoning_tokens for one in self._last)
        return usage(self._prompt_tokens, written, self._last[0].cached, reasoning)


def _logprobs(likelihoods: list[Likelihood], offset: int) -> Body:
    """The legacy form: lists side by side."""
    offsets: list[Json] = []
    for one in likelihoods:
        offsets.append(offset)
        offset += len(one.text)
    return {
        "tokens": [one.text for one in likelihoods],
        "token_logprobs": [one.logprob for one in likelihoods],
        "top_logprobs": [{other.text: other.logprob for other in one.others} for one in likelihoods],
        "text_offset": offsets,
    }

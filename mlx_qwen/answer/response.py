"""What `stream_generate` yields."""

from dataclasses import dataclass, field
from time import perf_counter

import mlx.core as mx

from mlx_qwen.answer.deltas import AnswerDelta, ClosedBy, FinishReason, ParsedAnswer
from mlx_qwen.json_types import ToolCall


@dataclass(frozen=True, slots=True)
class Drafting:
    """How well the tokens of one answer were guessed ahead.

    Attributes:
        acceptance: how often the first, second, … guess of a pass was right where all before it were.
        tokens_per_pass: how many tokens a pass of the model wrote; 1 where no guess was right.
    """

    acceptance: tuple[float, ...]
    tokens_per_pass: float


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and its natural log-probability after penalties and before temperature.

    `data` are its bytes, `text` the same as text: a byte that alone is no character stands there as U+FFFD.
    """

    token: int
    text: str
    data: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class GenerationResponse:
    """One token of an answer, with mlx-lm's field names.

    Attributes:
        text: the text that the token completes, raw (reasoning tags and tool calls included); may be empty.
        token: its id.
        logprobs: fp32 [V], log-probabilities after penalties and before temperature; computed when they are used. Until
            then and after they take 4 V bytes of whoever keeps the response, 1 MB at a vocabulary of 248,320.
        from_draft: whether a draft proposed the token.
        prompt_tokens: tokens of the prompt, without those that the cache already held.
        prompt_tps: prompt tokens per second.
        generation_tokens: tokens generated so far, this one included.
        generation_tps: generated tokens per second.
        peak_memory: highest memory use so far, in GB (10^9 bytes).
        finish_reason: on the last response only: "stop" (end token or stop string), "tool_calls" (the same, after calls
            of tools) or "length".
        cached_tokens: tokens that the cache held before the prompt.
        delta: what the token added to the answer: `content`, `reasoning` and `tool_calls`, each without the tags around
            it. A call's name comes as soon as it stands, its arguments in pieces of JSON text.
        own_logprob: the token with its log-probability, where the option `logprobs` asks for it.
        top_logprobs: the likeliest tokens in its place, likeliest first, as many as `logprobs` says.
        answer: on the last response: the whole answer, which is the deltas summed.
        drafting: on the last response: how well tokens were guessed ahead; None where none were.
        reasoning_tokens: how many of the `generation_tokens` the model spent inside its think block, tags not counted.
        thinking_closed_by: "budget" or "loop" once the block was closed for the model, else None.
        content: on the last response: the words for the user, without reasoning and tool calls; None before.
        reasoning: on the last response: the text of the think block, None when there was none.
        tool_calls: on the last response: the tools that the model calls.
    """

    text: str
    token: int
    logprobs: mx.array
    from_draft: bool
    prompt_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    peak_memory: float
    finish_reason: FinishReason | None = None
    cached_tokens: int = 0
    delta: AnswerDelta = field(default_factory=AnswerDelta)
    own_logprob: TokenLogprob | None = None
    top_logprobs: tuple[TokenLogprob, ...] = ()
    answer: ParsedAnswer | None = None
    drafting: Drafting | None = None
    reasoning_tokens: int = 0
    thinking_closed_by: ClosedBy | None = None
    content: str | None = field(init=False)
    reasoning: str | None = field(init=False)
    tool_calls: tuple[ToolCall, ...] = field(init=False)

    def __post_init__(self) -> None:
        whole = self.answer
        object.__setattr__(self, "content", whole and whole.content)
        object.__setattr__(self, "reasoning", whole and whole.reasoning)
        object.__setattr__(self, "tool_calls", whole.tool_calls if whole else ())

    def statistics(self) -> str:
        """Three lines on tokens, speed and memory, as mlx-lm prints them, and one on drafts where there were any."""
        lines = [
            f"Prompt: {self.prompt_tokens} tokens, {self.prompt_tps:.3f} tokens-per-sec",
            f"Generation: {self.generation_tokens} tokens, {self.generation_tps:.3f} tokens-per-sec",
            f"Peak memory: {self.peak_memory:.3f} GB",
        ]
        if self.drafting is not None:
            shares = " ".join(f"{share:.2f}" for share in self.drafting.acceptance)
            lines.append(f"Drafts: {self.drafting.tokens_per_pass:.2f} tokens a pass, accepted by depth {shares}")
        return "\n".join(lines)


class Clock:
    """Times one answer: the prompt until its logits are there, then the tokens."""

    def __init__(self) -> None:
        self._start = perf_counter()
        self.prompt_seconds: float | None = None

    def prompt_done(self) -> None:
        """The prompt has been read; from now on tokens are counted."""
        now = perf_counter()
        self.prompt_seconds, self._start = now - self._start, now

    def prompt_tps(self, tokens: int) -> float:
        """Prompt tokens per second."""
        return tokens / max(self.prompt_seconds or 0.0, 1e-9)

    def generation_tps(self, tokens: int) -> float:
        """Generated tokens per second so far."""
        return tokens / max(perf_counter() - self._start, 1e-9)

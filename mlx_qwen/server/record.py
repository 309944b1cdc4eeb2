"""One request as the log and the metrics see it: how much it read and wrote, how fast, and why it ended."""

import logging
from time import perf_counter

from mlx_qwen.server.metrics import Metrics
from mlx_qwen.server.refusals import Refusal, refusal_of
from mlx_qwen.server.work import Ask, Piece, Prepared

LOG = logging.getLogger("mlx_qwen.server")
# Seconds between two lines on a prompt that is being read.
_BETWEEN = 2.0
LEFT = 499


class Record:
    """Follows one request."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.model = ""
        self.prompt_tokens = 0
        self.notes: tuple[str, ...] = ()
        self._began = self._told = perf_counter()
        self._first: float | None = None
        self._last: dict[int, Piece] = {}

    def asks(self, ask: Ask, *, log_prompt: bool) -> None:
        """The request was understood."""
        self.notes = ask.notes
        if log_prompt:
            LOG.info("%s prompt: %r", self.path, ask.prompt)

    def prepared(self, prepared: Prepared) -> None:
        """The prompt was tokenized."""
        self.model, self.prompt_tokens = prepared.model, prepared.prompt_tokens

    def progress(self, done: int, total: int) -> None:
        """A part of the prompt was read; a line now and then, where that takes long."""
        now = perf_counter()
        if now - self._told >= _BETWEEN and done < total:
            self._told = now
            LOG.info("%s reading the prompt: %s of %s tokens", self.path, f"{done:,}", f"{total:,}")

    def saw(self, index: int, piece: Piece) -> None:
        """More was written."""
        if self._first is None:
            self._first = perf_counter()
        self._last[index] = piece

    def end(self, status: int, metrics: Metrics, reason: str = "") -> None:
        """The request is over: its line, and what it adds to the metrics."""
        seconds = perf_counter() - self._began
        written, cached = sum(piece.tokens for piece in self._last.values()), self._cached
        metrics.requests[self.path, status] += 1
        metrics.tokens["prompt_tokens_total"] += self.prompt_tokens if self._last else 0
        metrics.tokens["cached_tokens_total"] += cached
        metrics.tokens["generated_tokens_total"] += written
        metrics.tokens["drafts_verified_total"] += sum(piece.guessed for piece in self._last.values())
        metrics.tokens["drafts_accepted_total"] += sum(piece.taken for piece in self._last.values())
        if self._first is not None:
            metrics.first_token.saw(self._first - self._began)
            metrics.whole_answer.saw(seconds)
        LOG.info("%s", self._line(status, seconds, written, reason))

    @property
    def _cached(self) -> int:
        return next((piece.cached for piece in self._last.values()), 0)

    def _line(self, status: int, seconds: float, written: int, reason: str) -> str:
        parts = [f"{self.path} {status}"]
        if self.model:
            parts.append(f"{self.model}: {self.prompt_tokens:,} prompt tokens")
        if self._first is not None:
            reading, writing = self._first - self._began, max(seconds - (self._first - self._began), 1e-9)
            computed = self.prompt_tokens - self._cached
            parts[-1] += f" ({self._cached:,} cached)"
            parts.append(f"first after {reading:.2f} s ({computed / max(reading, 1e-9):,.0f}/s)")
            parts.append(f"{written:,} written ({max(written - 1, 0) / writing:,.1f}/s)")
        finishes = dict.fromkeys(piece.finish for piece in self._last.values() if piece.finish)
        parts += [" ".join(map(str, finishes)) or reason or f"{seconds:.2f} s", *self.notes]
        return ", ".join(parts)


def told(error: Exception, path: str) -> Refusal:
    """What a client is told of an error; one that nobody foresaw goes to the log."""
    refusal = refusal_of(error)
    if refusal.status == 500:
        LOG.error("%s failed", path, exc_info=error)
    return refusal

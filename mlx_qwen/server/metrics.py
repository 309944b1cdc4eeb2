"""What the server counts, as Prometheus reads it."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

_BOUNDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_PREFIX = "mlx_qwen_"


@dataclass(slots=True)
class Histogram:
    """Seconds, counted by upper bounds."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(_BOUNDS) + 1))
    total: float = 0.0

    def saw(self, seconds: float) -> None:
        """Count one more."""
        self.counts[bisect_left(_BOUNDS, seconds)] += 1
        self.total += seconds

    def lines(self, name: str) -> Iterator[str]:
        """Its lines in Prometheus' text."""
        below = 0
        for bound, count in zip((*map(str, _BOUNDS), "+Inf"), self.counts, strict=True):
            below += count
            yield f'{_PREFIX}{name}_bucket{{le="{bound}"}} {below}'
        yield f"{_PREFIX}{name}_sum {self.total:.6f}"
        yield f"{_PREFIX}{name}_count {below}"


@dataclass(slots=True)
class Metrics:
    """Counters since the server began."""

    requests: Counter[tuple[str, int]] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    first_token: Histogram = field(default_factory=Histogram)
    whole_answer: Histogram = field(default_factory=Histogram)

    def text(self, gauges: Sequence[tuple[str, str, float]]) -> str:
        """Everything as text; `gauges` are (name, help, value) of the moment."""
        lines = [f"# HELP {_PREFIX}requests_total Requests by endpoint and status; 499: the client left."]
        lines.append(f"# TYPE {_PREFIX}requests_total counter")
        for (path, status), count in sorted(self.requests.items()):
            lines.append(f'{_PREFIX}requests_total{{path="{path}",status="{status}"}} {count}')
        for name, help_ in _TOKENS.items():
            lines += [f"# HELP {_PREFIX}{name} {help_}", f"# TYPE {_PREFIX}{name} counter"]
            lines.append(f"{_PREFIX}{name} {self.tokens[name]}")
        histograms = (
            ("first_token_seconds", "From a request to its first token.", self.first_token),
            ("request_seconds", "From a request to the end of its answer.", self.whole_answer),
        )
        for name, help_, histogram in histograms:
            lines += [f"# HELP {_PREFIX}{name} {help_}", f"# TYPE {_PREFIX}{name} histogram", *histogram.lines(name)]
        for name, help_, value in gauges:
            lines += [f"# HELP {_PREFIX}{name} {help_}", f"# TYPE {_PREFIX}{name} gauge", f"{_PREFIX}{name} {value:g}"]
        return "\n".join([*lines, ""])


_TOKENS = {
    "prompt_tokens_total": "Tokens of prompts.",
    "cached_tokens_total": "Those of them that were read before.",
    "generated_tokens_total": "Tokens written.",
    "drafts_verified_total": "Tokens that drafts proposed and the model judged.",
    "drafts_accepted_total": "Those of them that the model took.",
}

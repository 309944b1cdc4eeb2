"""Rules that an answer keeps while it is written: each says what must come next, and what may."""

from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx

from mlx_qwen.engine.thinking import Thinking
from mlx_qwen.errors import MLXQwenError


class Rule(Protocol):
    """What steers one answer; asked on the host, once a token, while the device computes."""

    def forced(self) -> int | None:
        """The token that must come next; None while there is a choice."""

    def allowed(self) -> mx.array | None:
        """Which tokens may come next, bool [1, V]; None for all."""

    def saw(self, token: int) -> None:
        """Takes note of a token that the answer now holds."""

    def fork(self) -> "Rule":
        """The same rule at the same place, which goes on by itself."""

    @property
    def failure(self) -> MLXQwenError | None:
        """Why the answer cannot go on; None as long as it can."""


class Rules:
    """The rules of one answer; the first that forces a token decides."""

    def __init__(self, rules: Sequence[Rule] = (), *, constrain: bool = False) -> None:
        self._rules = tuple(rules)
        # Whether `allowed` may say something, for which the tokens before have to be known on the host.
        self.constrain = constrain

    @property
    def thinking(self) -> Thinking | None:
        """The rule that follows the reasoning."""
        return next((rule for rule in self._rules if isinstance(rule, Thinking)), None)

    @property
    def failure(self) -> MLXQwenError | None:
        """Why the answer cannot go on; None as long as it can."""
        return next((rule.failure for rule in self._rules if rule.failure is not None), None)

    def forced(self) -> int | None:
        """See `Rule.forced`."""
        return next((token for rule in self._rules if (token := rule.forced()) is not None), None)

    def allowed(self) -> mx.array | None:
        """See `Rule.allowed`; what all rules allow."""
        both: mx.array | None = None
        for rule in self._rules:
            mask = rule.allowed()
            both = mask if both is None or mask is None else both & mask
        return both

    def saw(self, token: int) -> None:
        """See `Rule.saw`."""
        for rule in self._rules:
            rule.saw(token)

    def allowed_behind(self, tokens: Sequence[int]) -> list[mx.array | None]:
        """What `allowed` would say after each of the tokens, if they came; nothing is noted.

        Behind a token that is not allowed itself, nothing is said.
        """
        ahead = Rules([rule.fork() for rule in self._rules])
        masks: list[mx.array | None] = []
        for token in tokens:
            ahead.saw(token)
            masks.append(None if ahead.failure else ahead.allowed())
        return masks

"""Tokens and their log-probabilities as callers read them: ids, texts and bytes."""

from functools import lru_cache

import numpy as np
from tokenizers import Tokenizer

from mlx_qwen.answer.response import TokenLogprob
from mlx_qwen.engine.choice import Choice


class TokenNames:
    """What the tokens of one tokenizer are called."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._added = {number: token.content for number, token in tokenizer.get_added_tokens_decoder().items()}

    def own(self, token: int, choice: Choice) -> TokenLogprob:
        """The token that was chosen, or that a rule put in its place."""
        return self._named(token, float(np.array(choice.logprob).item()))

    def top(self, choice: Choice) -> tuple[TokenLogprob, ...]:
        """The likeliest tokens in its place, likeliest first; as many as the sampler was asked for."""
        if not choice.top:
            return ()
        tokens, logprobs = (np.array(part[0]) for part in choice.top)
        return tuple(self._named(int(token), float(logprob)) for token, logprob in zip(tokens, logprobs, strict=True))

    def bytes_of(self, token: int) -> bytes:
        """The bytes that a token stands for, which alone may be no character; none for ids without a token."""
        if token in self._added:
            return self._added[token].encode()
        letters: str = self._tokenizer.id_to_token(token) or ""
        known = _byte_letters()
        if all(letter in known for letter in letters):
            return bytes(known[letter] for letter in letters)
        return letters.encode()

    def _named(self, token: int, logprob: float) -> TokenLogprob:
        data = self.bytes_of(token)
        return TokenLogprob(token, data.decode(errors="replace"), data, logprob)


@lru_cache(maxsize=1)
def _byte_letters() -> dict[str, int]:
    """The letters by which byte-level vocabularies write bytes: printable ones as they are, the others from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}

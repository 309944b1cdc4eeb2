"""Special tokens that people type are text: they never become the control tokens of a chat template.

Templates print people's text among their own tokens, and a tokenizer cannot tell them apart any more. So what could be
read as a token is replaced by digits that nobody can guess before the template runs, and put back behind it, where
stretches that hold any are encoded without special tokens.
"""

import re
from collections.abc import Iterator
from secrets import randbelow

from tokenizers import Tokenizer

from mlx_qwen.json_types import Json

# Digits pass through whatever templates do to text: trimming, cases, JSON.
_DIGITS, _INDEX_DIGITS = 24, 6


class TypedTokens:
    """Text of people for one rendering: `hide` it first, then `restore` or `encode` what the template made of it.

    What a token may begin with is hidden at a text's end too, as a template may put two texts side by side.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder().values()
        # The longest first, as the tokenizer itself matches them.
        tokens = sorted({token.content for token in added if token.content}, key=len, reverse=True)
        self._tokens = re.compile("|".join(map(re.escape, tokens)) or r"(?!)")
        self._beginnings = {token[:end] for token in tokens for end in range(1, len(token))}
        self._longest = max((len(token) for token in tokens), default=0)
        self._mark = str(10 ** (_DIGITS - 1) + randbelow(9 * 10 ** (_DIGITS - 1)))
        self._hidden: list[str] = []
        self._numbers: dict[str, int] = {}
        self._stand_in = re.compile(rf"{self._mark}(\d{{{_INDEX_DIGITS}}})")

    def hide(self, value: Json) -> Json:
        """A copy of the value in which every text, also that of a key, holds stand-ins for tokens."""
        if isinstance(value, str):
            return self._hide_text(value)
        if isinstance(value, list):
            return [self.hide(item) for item in value]
        if isinstance(value, dict):
            return {self._hide_text(key): self.hide(item) for key, item in value.items()}
        return value

    def restore(self, text: str) -> str:
        """The rendered text as people typed their parts of it."""
        return self._stand_in.sub(lambda found: self._hidden[int(found[1])], text) if self._hidden else text

    def encode(self, text: str) -> list[int]:
        """Token ids of the rendered text: special tokens are the template's own, what was typed is text."""
        ids: list[int] = []
        for stretch, is_typed in self._stretches(text):
            if is_typed:
                ids += _plain_ids(self._tokenizer, self.restore(stretch))
            else:
                ids += self._tokenizer.encode(stretch, add_special_tokens=False).ids
        return ids

    def _hide_text(self, text: str) -> str:
        text = self._tokens.sub(lambda found: self._replaced(found[0]), text)
        reach = range(min(self._longest, len(text)), 0, -1)
        end = next((length for length in reach if text[-length:] in self._beginnings), 0)
        return text[:-end] + self._replaced(text[-end:]) if end else text

    def _replaced(self, token: str) -> str:
        number = self._numbers.setdefault(token, len(self._hidden))
        if number == len(self._hidden):
            self._hidden.append(token)
        return f"{self._mark}{number:0{_INDEX_DIGITS}}"

    def _stretches(self, text: str) -> Iterator[tuple[str, bool]]:
        """The text cut at tokens around each stretch in which something was typed, and whether it is such a one."""
        begun, place = 0, 0
        for token in [*self._tokens.finditer(text), None]:
            end = token.start() if token else len(text)
            if self._stand_in.search(text, place, end):
                yield text[begun:place], False
                yield text[place:end], True
                begun = end
            place = token.end() if token else end
        yield text[begun:], False


def _plain_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of text in which no special token is recognised."""
    normalizer, pre_tokenizer, model = tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.model
    text = normalizer.normalize_str(text) if normalizer else text
    words = [word for word, _ in pre_tokenizer.pre_tokenize_str(text)] if pre_tokenizer else [text]
    known = {word: [token.id for token in model.tokenize(word)] for word in dict.fromkeys(words)}
    return [token for word in words for token in known[word]]

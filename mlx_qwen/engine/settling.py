"""Finds out from the first answers what the MTP layer reads, where its checkpoint does not say it."""

from mlx_qwen.engine.sequence import Sequence
from mlx_qwen.model import Model
from mlx_qwen.model.mtp_likelihood import Text, settle_mtp_reads

ENOUGH_TOKENS = 256
_MOST_TOKENS = 512


class Settling:
    """Collects answers until they tell enough, then measures once, at the cost of a short prompt."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._texts: list[Text] = []

    def saw(self, row: Sequence) -> None:
        """Note an answer that drafts were allowed for, to a prompt of text that is known from its beginning."""
        if self._model.mtp_unsettled is None or row.drafts.fixed == 0 or row.media or row.prompt_cache is not None:
            return
        # Of a long conversation, the end of the prompt and the beginning of the answer.
        prompt, written = row.ids[-_MOST_TOKENS:], row.written[:_MOST_TOKENS]
        self._texts.append(Text(prompt + written, len(prompt)))

    def settle(self) -> None:
        """Measure, if there is enough to measure with; only in the computing thread."""
        if self._model.mtp_unsettled is None or sum(text.drafted for text in self._texts) < ENOUGH_TOKENS:
            return
        texts, self._texts = self._texts, []
        settle_mtp_reads(self._model, texts)

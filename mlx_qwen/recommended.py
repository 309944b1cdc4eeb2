"""The sampling that Qwen recommends for each size and mode (model cards of Qwen3.5)."""

from dataclasses import dataclass

from mlx_qwen.config import TextConfig, is_small


@dataclass(frozen=True, slots=True)
class SamplingParameters:
    """How the next token is drawn. Temperature 0 takes the likeliest; top_k 0, top_p 1 and min_p 0 cut nothing.

    presence_penalty is subtracted from the logits of tokens already in the answer (0: none); repetition_penalty
    divides positive and multiplies negative logits of tokens in the prompt or the answer (1: none).
    """

    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0


GREEDY = SamplingParameters(temperature=0.0)

_SMALL_THINKING = SamplingParameters(temperature=1.0, top_p=0.95, top_k=20, presence_penalty=1.5)
_SMALL_DIRECT = SamplingParameters(temperature=1.0, top_p=1.0, top_k=20, presence_penalty=2.0)
_THINKING = SamplingParameters(temperature=1.0, top_p=0.95, top_k=20, presence_penalty=1.5)
_DIRECT = SamplingParameters(temperature=0.7, top_p=0.8, top_k=20, presence_penalty=1.5)


def recommended_sampling(text: TextConfig, *, thinking: bool) -> SamplingParameters:
    """Qwen's values for a model of this size, for an answer that begins with or without reasoning."""
    if is_small(text):
        return _SMALL_THINKING if thinking else _SMALL_DIRECT
    return _THINKING if thinking else _DIRECT

"""How tokens are drawn, and what a checkpoint or Qwen recommends (generation_config.json, model cards)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from mlx_qwen.config import TextConfig, is_small
from mlx_qwen.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class SamplingParameters:
    """How the next token is drawn. Temperature 0 takes the likeliest; top_k 0, top_p 1 and min_p 0 cut nothing.

    presence_penalty is subtracted from the logits of tokens already in the answer (0: none), frequency_penalty as often
    as they are there; repetition_penalty divides positive and multiplies negative logits of tokens in the prompt or the
    answer (1: none). With xtc_probability (0: never) all tokens above xtc_threshold but the least likely are left out.
    """

    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1


GREEDY = SamplingParameters(temperature=0.0)

# What transformers draws by where a checkpoint says less.
_PLAIN = SamplingParameters(temperature=1.0)
_STATED = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")

# The sizes that Qwen3.6 and Qwen3.8 come in.
_WIDTH_OF_27B, _WIDTH_OF_35B = 5120, 2048

_SMALL_DIRECT = SamplingParameters(temperature=1.0, top_k=20, presence_penalty=2.0)
_SMALL_SEEING = SamplingParameters(temperature=0.6, top_p=0.95, top_k=20)
_THINKING = SamplingParameters(temperature=1.0, top_p=0.95, top_k=20, presence_penalty=1.5)
_DIRECT = SamplingParameters(temperature=0.7, top_p=0.8, top_k=20, presence_penalty=1.5)
_NEXT_THINKING = SamplingParameters(temperature=0.6, top_p=0.95, top_k=20)
_NEXT_DIRECT = SamplingParameters(temperature=0.7, top_p=0.8, top_k=20)
_CODER = SamplingParameters(temperature=1.0, top_p=0.95, top_k=40)


def stated_sampling(config: Mapping[str, object]) -> SamplingParameters | None:
    """What a checkpoint's generation_config.json asks for as a whole; None where it says nothing about sampling.

    Raises CheckpointError for numbers that no sampling has.
    """
    stated = {name: config[name] for name in _STATED if config.get(name) is not None}
    if config.get("do_sample") is False or stated.get("temperature") == 0:
        return GREEDY
    for name, value in stated.items():
        least, most = _BOUNDS.get(name, (0, 100))
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            raise CheckpointError(
                f"generation_config.json says {name} is {value!r:.60}; expected a number from {least} to {most}. Mend "
                "or delete that line."
            )
    stated = {**stated, "top_k": int(stated.get("top_k", 0))}  # type: ignore[call-overload]
    return replace(_PLAIN, **stated) if len(stated) > 1 or stated["top_k"] else None  # type: ignore[arg-type]


def passed_over(config: Mapping[str, object]) -> list[str]:
    """What a generation_config.json asks for, beyond the usual, that no answer here follows, by name."""
    return [name for name, usual in _NOT_FOLLOWED.items() if config.get(name, usual) not in (usual, None, [], {})]


def recommended_sampling(
    text: TextConfig, *, thinking: bool, pictures: bool = False, is_next: bool = False, template: str = ""
) -> SamplingParameters:
    """Qwen's values for a model of this size and version, with or without reasoning, about pictures or not.

    `is_next`: whether it is a Qwen3-Next. Other versions share their architecture, so that the chat `template` tells
    them apart: Qwen3.6 and later preserve thinking where they are asked to, and Coder models write calls in XML.
    """
    if is_next:
        if "<function=" in template:
            return _CODER
        return _NEXT_THINKING if thinking else _NEXT_DIRECT
    if is_small(text):
        if pictures:
            return _SMALL_SEEING if thinking else _DIRECT
        return _THINKING if thinking else _SMALL_DIRECT
    later = text.hidden_size == _WIDTH_OF_35B if text.moe else text.hidden_size == _WIDTH_OF_27B
    if thinking and later and "preserve_thinking" in template:
        return replace(_THINKING, presence_penalty=0.0)
    return _THINKING if thinking else _DIRECT


_BOUNDS: dict[str, tuple[float, float]] = {
    "top_p": (1e-6, 1),
    "min_p": (0, 1),
    "top_k": (0, 10**6),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "repetition_penalty": (0.01, 100),
}

# What else changes which tokens transformers writes, and the values with which it changes nothing.
_NOT_FOLLOWED: dict[str, object] = {
    **{"num_beams": 1, "num_beam_groups": 1, "penalty_alpha": None, "dola_layers": None, "guidance_scale": 1.0},
    **{"typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "top_h": None, "watermarking_config": None},
    **{"encoder_repetition_penalty": 1.0, "length_penalty": 1.0, "diversity_penalty": 0.0},
    **{"no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "exponential_decay_length_penalty": None},
    **{"bad_words_ids": None, "force_words_ids": None, "constraints": None, "sequence_bias": None},
    **{"suppress_tokens": None, "begin_suppress_tokens": None, "remove_invalid_values": False},
    **{"forced_bos_token_id": None, "forced_eos_token_id": None, "token_healing": False},
    **{"min_length": 0, "min_new_tokens": None, "stop_strings": None, "renormalize_logits": False},
}

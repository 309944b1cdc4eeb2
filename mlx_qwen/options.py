"""Everything a caller can choose about an answer, checked once."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import mlx.core as mx

from mlx_qwen.errors import PromptError
from mlx_qwen.json_types import Tools
from mlx_qwen.media.limits import MediaLimits
from mlx_qwen.model.cache import HybridCache
from mlx_qwen.recommended import GREEDY, SamplingParameters

if TYPE_CHECKING:
    from mlx_qwen.media.image_sources import ImageSource
    from mlx_qwen.media.video_sources import VideoSource

# As in mlx-lm: log-probabilities [1, V] to a token [1]; and all tokens so far [n] with logits [1, V] to logits [1, V].
Sampler: TypeAlias = Callable[[mx.array], mx.array]
LogitsProcessor: TypeAlias = Callable[[mx.array, mx.array], mx.array]
Progress: TypeAlias = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """The keywords of `stream_generate`, where their meaning is described. None means: not chosen.

    Raises PromptError for values that cannot be used.
    """

    max_tokens: int = 2048
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    tools: Tools | None = None
    enable_thinking: bool | None = None
    thinking_budget: int | None = None
    preserve_thinking: bool | None = None
    stop: str | Sequence[str] | None = None
    sampler: Sampler | None = None
    logits_processors: Sequence[LogitsProcessor] | None = None
    prompt_cache: HybridCache | None = None
    prefill_step_size: int = 2048
    kv_bits: int | None = None
    images: "Sequence[ImageSource] | None" = None
    videos: "Sequence[VideoSource] | None" = None
    max_pixels: int | None = None
    min_pixels: int | None = None
    total_pixels: int | None = None
    fps: float | None = None
    min_frames: int | None = None
    max_frames: int | None = None
    progress: Progress | bool = False

    def __post_init__(self) -> None:
        _check("max_tokens", self.max_tokens, self.max_tokens >= 1, "at least 1")
        _check("prefill_step_size", self.prefill_step_size, self.prefill_step_size >= 1, "at least 1")
        _check("temperature", self.temperature, _between(self.temperature, 0, math.inf), "0 (greedy) or more")
        _check("top_p", self.top_p, self.top_p != 0 and _between(self.top_p, 0, 1), "above 0 and at most 1 (off)")
        _check("top_k", self.top_k, _between(self.top_k, 0, math.inf), "0 (off) or more")
        _check("min_p", self.min_p, _between(self.min_p, 0, 1), "from 0 (off) to 1")
        _check("presence_penalty", self.presence_penalty, _between(self.presence_penalty, -2, 2), "from -2 to 2")
        penalty = self.repetition_penalty
        _check("repetition_penalty", penalty, penalty != 0 and _between(penalty, 0, math.inf), "above 0 (1 is off)")
        _check("thinking_budget", self.thinking_budget, _between(self.thinking_budget, 0, math.inf), "0 or more tokens")
        _check("seed", self.seed, _between(self.seed, 0, math.inf), "0 or more")
        _check("stop", self.stop, _is_stop(self.stop), "a string that is not empty, or a list of such")
        _check("images", type(self.images), _is_list(self.images), "a list of images, also for a single one")
        _check("videos", type(self.videos), _is_list(self.videos), "a list of videos, also for a single one")
        _ = self.media_limits
        known_cache = self.prompt_cache is None or isinstance(self.prompt_cache, HybridCache)
        _check("prompt_cache", self.prompt_cache, known_cache, "what model.make_cache() returns")
        if self.kv_bits is not None and self.prompt_cache is not None:
            raise PromptError("kv_bits belongs to the cache: pass model.make_cache(kv_bits=...) as prompt_cache.")
        if self.sampler is not None:
            drawing = ("temperature", "top_p", "top_k", "min_p", "seed")
            extra = [name for name in drawing if getattr(self, name) is not None]
            if extra:
                raise PromptError(f"sampler replaces {', '.join(drawing)}; drop it or {', '.join(extra)}.")

    @property
    def media_limits(self) -> MediaLimits:
        """The choices that images and videos are prepared by; raises PromptError where they cannot be used."""
        return MediaLimits(
            min_pixels=self.min_pixels,
            max_pixels=self.max_pixels,
            total_pixels=self.total_pixels,
            fps=self.fps,
            min_frames=self.min_frames,
            max_frames=self.max_frames,
        )

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings as a tuple."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def sampling(self, recommended: SamplingParameters) -> SamplingParameters:
        """What the caller chose, and for the rest `recommended`; an answer at temperature 0 gets no penalty unasked."""
        temperature = recommended.temperature if self.temperature is None else self.temperature
        base = GREEDY if temperature == 0 else recommended
        return SamplingParameters(
            temperature=temperature,
            top_p=base.top_p if self.top_p is None else self.top_p,
            top_k=base.top_k if self.top_k is None else self.top_k,
            min_p=base.min_p if self.min_p is None else self.min_p,
            presence_penalty=base.presence_penalty if self.presence_penalty is None else self.presence_penalty,
            repetition_penalty=base.repetition_penalty if self.repetition_penalty is None else self.repetition_penalty,
        )


def _between(value: float | None, low: float, high: float) -> bool:
    return value is None or (low <= value <= high and math.isfinite(value))


def _is_list(media: object) -> bool:
    return media is None or (isinstance(media, Sequence) and not isinstance(media, str | bytes))


def _is_stop(stop: object) -> bool:
    strings = [stop] if isinstance(stop, str) else stop
    if strings is None:
        return True
    return isinstance(strings, Sequence) and all(isinstance(string, str) and string for string in strings)


def _check(name: str, value: object, fits: bool, expected: str) -> None:
    if not fits:
        raise PromptError(f"{name} is {value!r}; expected {expected}.")

"""The options of an answer and the settings of the engine, as the keywords that `generate` takes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from mlx_qwen.declared import check_keywords, chosen
from mlx_qwen.json_types import Tools
from mlx_qwen.options import Effort, GenerationOptions, LogitsProcessor, Sampler
from mlx_qwen.settings import EngineSettings, Progress

if TYPE_CHECKING:
    from mlx_qwen.media.image_sources import ImageSource
    from mlx_qwen.media.video_sources import VideoSource


class SettingKeywords(TypedDict, total=False):
    """The fields of `EngineSettings`, for type checkers."""

    kv_bits: int | None
    max_kv_size: int | None
    prefill_step_size: int
    mtp: str | int | bool
    draft_model: object
    prompt_lookup: bool
    num_draft_tokens: int | None
    draft_vocabulary: int | None
    prefix_cache: bool
    prefix_cache_bytes: int | None
    prefix_cache_dir: str | Path | None
    prefix_cache_dir_bytes: int | None
    progress: Progress | bool


class OptionKeywords(SettingKeywords, total=False):
    """What `generate` takes by name, for type checkers: the fields of `GenerationOptions` and of `EngineSettings`."""

    max_tokens: int
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    logit_bias: Mapping[int, float] | None
    xtc_probability: float | None
    xtc_threshold: float | None
    seed: int | None
    logprobs: int | None
    tools: Tools | None
    tool_choice: str | Mapping[str, object] | None
    parallel_tool_calls: bool
    schema: Mapping[str, object] | type | None
    response_format: Mapping[str, object] | None
    regex: str | None
    grammar: str | None
    enable_thinking: bool | None
    thinking_budget: int | None
    close_loops: bool
    reasoning_effort: Effort | None
    preserve_thinking: bool | None
    chat_template_kwargs: Mapping[str, object] | None
    continue_final_message: bool
    stop: str | Sequence[str] | None
    stop_in_reasoning: bool
    sampler: Sampler | None
    logits_processors: Sequence[LogitsProcessor] | None
    images: Sequence["ImageSource"] | None
    videos: Sequence["VideoSource"] | None
    max_pixels: int | None
    min_pixels: int | None
    total_pixels: int | None
    fps: float | None
    min_frames: int | None
    max_frames: int | None
    source_fps: float | None


def options_and_settings(
    keywords: Mapping[str, object], options: GenerationOptions | None = None, settings: EngineSettings | None = None
) -> tuple[GenerationOptions, EngineSettings]:
    """The two values that keywords make, where they are given in place of those of `options` and `settings`.

    Raises PromptError for a keyword that is unknown, or whose value cannot be used.
    """
    check_keywords(keywords, GenerationOptions, EngineSettings)
    return chosen(GenerationOptions, keywords, options), chosen(EngineSettings, keywords, settings)

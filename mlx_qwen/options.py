"""Everything that a caller can choose about an answer, each declared once."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Literal, TypeAlias

from mlx_qwen.declared import documented, option
from mlx_qwen.errors import PromptError
from mlx_qwen.json_types import Tools, tool_name
from mlx_qwen.media.limits import MediaLimits
from mlx_qwen.recommended import GREEDY, SamplingParameters
from mlx_qwen.tool_choice import called_tools

if TYPE_CHECKING:
    import mlx.core as mx

    from mlx_qwen.media.image_sources import ImageSource
    from mlx_qwen.media.video_sources import VideoSource

# As in mlx-lm: log-probabilities [1, V] to a token [1]; and all tokens so far [n] with logits [1, V] to logits [1, V].
Sampler: TypeAlias = Callable[["mx.array"], "mx.array"]
LogitsProcessor: TypeAlias = Callable[["mx.array", "mx.array"], "mx.array"]

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
# Most tokens of reasoning at an effort that is bounded.
EFFORT_BUDGETS = {"none": 0, "minimal": 512, "low": 2048, "medium": 8192, "high": 24576}

# Each says by itself what the answer is.
_HOLDING = ("schema", "response_format", "regex", "grammar")
# What a sampler of the caller's own does in their place.
_DRAWING = ("temperature", "top_p", "top_k", "min_p", "xtc_probability", "xtc_threshold", "seed")


def _none_empty(texts: str | Sequence[str]) -> bool:
    return bool(texts) if isinstance(texts, str) else all(texts)


def _all_named(described: Tools) -> bool:
    return None not in map(tool_name, described)


def _is_response_format(wanted: Mapping[str, object]) -> bool:
    described = wanted.get("json_schema", wanted)
    has_schema = isinstance(described, Mapping) and isinstance(described.get("schema"), Mapping)
    return wanted.get("type") in ("text", "json_object") or (wanted.get("type") == "json_schema" and has_schema)


def _are_biases(biases: Mapping[int, float]) -> bool:
    return all(token >= 0 and abs(bias) <= 100 for token, bias in biases.items())


def _are_variables(variables: Mapping[str, object]) -> bool:
    return not {"messages", "tools", "add_generation_prompt"} & set(variables)


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationOptions(MediaLimits):
    """What one request chooses about its answer: the keywords of `generate` as one value. None means: not chosen.

    Raises PromptError for values that cannot be used.

    Attributes:
        {options}
    """

    max_tokens: int = option(
        2048,
        help="most tokens to generate; fewer where the model's context ends.",
        least=1,
        flag=("-m", "--max-tokens"),
    )
    temperature: float | None = option(
        None,
        help="0 takes the likeliest token. Sampling options that are left out are those of the checkpoint's "
        "generation_config.json, or where it states none, as Qwen recommends for the model's size and mode.",
        least=0,
        flag=("--temp", "--temperature"),
    )
    top_p: float | None = option(
        None,
        help="keep the likeliest tokens that together reach this probability; 1 keeps all.",
        above=0,
        most=1,
        flag="--top-p",
    )
    top_k: int | None = option(
        None, help="keep this many of the likeliest tokens; 0 keeps all.", least=0, flag="--top-k"
    )
    min_p: float | None = option(
        None,
        help="keep tokens with at least this fraction of the likeliest one's probability; 0 keeps all.",
        least=0,
        most=1,
        flag="--min-p",
    )
    presence_penalty: float | None = option(
        None,
        help="subtracted from the logits of every token that is already in the answer.",
        least=-2,
        most=2,
        flag="--presence-penalty",
    )
    frequency_penalty: float | None = option(
        None,
        help="subtracted from a token's logit as often as the answer has it.",
        least=-2,
        most=2,
        flag="--frequency-penalty",
    )
    repetition_penalty: float | None = option(
        None,
        help="divides positive logits of tokens in cache, prompt and answer, and multiplies negative ones; 1 is off.",
        above=0,
        flag="--repetition-penalty",
    )
    logit_bias: Mapping[int, float] | None = option(
        None,
        help="added to the logits of tokens, by their ids; -100 bans a token.",
        expected="a dictionary of token ids and numbers from -100 to 100, like {1234: -100}",
        check=_are_biases,
        flag="--logit-bias",
        metavar="JSON",
    )
    xtc_probability: float | None = option(
        None,
        help="how often the likely tokens but the least likely of them are left out; 0 for never.",
        least=0,
        most=1,
        flag="--xtc-probability",
    )
    xtc_threshold: float | None = option(
        None,
        help="from which probability on a token is a likely one for it, by default 0.1.",
        least=0,
        most=0.5,
        flag="--xtc-threshold",
    )
    seed: int | None = option(
        None, help="makes sampling repeatable; without it, each answer draws one.", least=0, flag="--seed"
    )
    logprobs: int | None = option(
        None,
        help="how many of the likeliest tokens each response names in `top_logprobs`, beside its own in `own_logprob`; "
        "0 for its own alone.",
        least=0,
        most=20,
    )
    tools: Tools | None = option(
        None,
        help="functions that the model may call, as JSON descriptions; used with chat messages.",
        expected='a list like [{"type": "function", "function": {"name": ..., "parameters": {...}}}]',
        check=_all_named,
        flag="--tools",
        metavar="FILE",
    )
    tool_choice: str | Mapping[str, object] | None = option(
        None,
        help="whether tools are called: as the model sees fit (auto, the default), not (none), in any case (required), "
        "or the one of this name, also in OpenAI's form. The last two need the extra `grammar`.",
        expected='"auto", "none", "required", the name of one of the tools, or {"type": "function", "function": '
        '{"name": ...}}',
        flag="--tool-choice",
        metavar="auto|none|required|NAME",
    )
    parallel_tool_calls: bool = option(True, help="whether an answer may call more than one tool.")
    schema: Mapping[str, object] | type | None = option(
        None,
        help="the answer, behind its reasoning, is JSON that this JSON schema accepts. Also a pydantic model, a "
        "dataclass or a TypedDict. Needs the extra `grammar`, as do the next three.",
        expected="a JSON schema as a dictionary, a pydantic model, a dataclass or a TypedDict",
        flag="--schema",
        metavar="FILE|JSON",
    )
    response_format: Mapping[str, object] | None = option(
        None,
        help="the same in OpenAI's form: text, json_object, or json_schema, whose `strict` refuses schemas that can be "
        "enforced in part only.",
        expected='{"type": "text"}, {"type": "json_object"} or {"type": "json_schema", "json_schema": {"schema": '
        "{...}}}",
        check=_is_response_format,
    )
    regex: str | None = option(
        None,
        help="the answer, behind its reasoning, matches this regular expression as a whole (Rust's syntax, without "
        "look-around).",
        flag="--regex",
    )
    grammar: str | None = option(
        None,
        help="the answer, behind its reasoning, is what the rule `start` of this Lark grammar accepts (llguidance's "
        "variant).",
        flag="--grammar",
        metavar="FILE",
    )
    enable_thinking: bool | None = option(
        None,
        help="whether a chat answer begins with reasoning, by default as is best for the model's size.",
        flag="--enable-thinking/--no-thinking",
    )
    thinking_budget: int | None = option(
        None,
        help="most tokens of reasoning; after them it is closed, and the answer follows.",
        least=0,
        flag="--thinking-budget",
    )
    close_loops: bool = option(
        True,
        help="whether reasoning that repeats itself word for word, for hundreds of tokens, is closed.",
        flag="--close-loops/--keep-loops",
    )
    reasoning_effort: Effort | None = option(
        None,
        help="how much to reason, in the chat template's own words where it has some; else `none` answers at once, "
        "minimal, low, medium and high bound the reasoning to 512, 2,048, 8,192 and 24,576 tokens and to half of "
        "max_tokens, and with xhigh and max it is free.",
        flag="--reasoning-effort",
    )
    preserve_thinking: bool | None = option(
        None,
        help="whether earlier turns keep their reasoning, for templates that know the choice.",
        flag="--preserve-thinking/--drop-thinking",
    )
    chat_template_kwargs: Mapping[str, object] | None = option(
        None,
        help="variables for the chat template, before those that other options set.",
        expected="a dictionary of the template's variables, without messages, tools and add_generation_prompt",
        check=_are_variables,
        flag="--chat-template-config",
        metavar="JSON",
    )
    continue_final_message: bool = option(
        False, help="whether the answer goes on with the last chat message rather than begins one."
    )
    stop: str | Sequence[str] | None = option(
        None,
        help="text that ends the answer behind its reasoning, and is not part of it.",
        expected="a text that is not empty, or a list of such",
        check=_none_empty,
        flag="--stop",
    )
    stop_in_reasoning: bool = option(
        False, help="whether `stop` is looked for inside the reasoning too.", flag="--stop-in-reasoning"
    )
    sampler: Sampler | None = option(
        None, help="draws the token instead: log-probabilities fp32 [1, V] to a token [1]."
    )
    logits_processors: Sequence[LogitsProcessor] | None = option(
        None, help="each maps all tokens so far [n] and logits fp32 [1, V] to logits, after the penalties."
    )
    images: Sequence["ImageSource"] | None = option(
        None,
        help="images to ask about: in front of the last user's words in chat messages, or at the placeholders of any "
        "other prompt.",
        expected="a list of images, also for a single one",
        flag="--image",
        metavar="PATH|URL",
    )
    videos: Sequence["VideoSource"] | None = option(
        None,
        help="videos to ask about, placed behind all images. Files need the extra `video`; animations and lists of "
        "frames do not.",
        expected="a list of videos, also for a single one",
        flag="--video",
        metavar="PATH|URL",
    )

    def __post_init__(self) -> None:
        MediaLimits.__post_init__(self)  # with slots, super() would look in the class that they replaced
        extra = [name for name in _DRAWING if getattr(self, name) is not None]
        if self.sampler is not None and extra:
            raise PromptError(f"sampler replaces {', '.join(_DRAWING)}; drop it or {', '.join(extra)}.")
        held = [name for name in _HOLDING if getattr(self, name) is not None]
        if len(held) > 1:
            raise PromptError(f"{' and '.join(held)} both say what the answer is. Give one of them.")
        self.called_tools  # noqa: B018, a name that no tool has is refused here

    @property
    def media_limits(self) -> MediaLimits:
        """The choices that images and videos are prepared by."""
        return MediaLimits().over(self)

    @property
    def called_tools(self) -> tuple[Literal["auto", "none", "required"], Tools]:
        """What `tool_choice` comes to, and the tools that may be called: all, or the one that was named."""
        return called_tools(self.tool_choice, self.tools or ())

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings as a tuple."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def sampling(self, recommended: SamplingParameters) -> SamplingParameters:
        """What the caller chose, and for the rest `recommended`; an answer at temperature 0 gets no penalty unasked."""
        temperature = recommended.temperature if self.temperature is None else self.temperature
        own = {field.name: getattr(self, field.name) for field in fields(SamplingParameters)}
        chosen = {name: value for name, value in own.items() if value is not None}
        return replace(GREEDY if temperature == 0 else recommended, **chosen)

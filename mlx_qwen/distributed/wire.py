"""Requests and turns as frames, and back: what every rank makes the same sequence of."""

from collections.abc import Mapping
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_qwen.answer.typed_schemas import schema_of
from mlx_qwen.distributed.frames import Frame, packed
from mlx_qwen.engine.sequence import Sequence
from mlx_qwen.engine.turn import Passed, Turn
from mlx_qwen.errors import PromptError
from mlx_qwen.media.grids import Grid, Kind
from mlx_qwen.media.limits import MediaLimits
from mlx_qwen.media.patches import Patches
from mlx_qwen.options import GenerationOptions
from mlx_qwen.prompt.inputs import PromptInputs
from mlx_qwen.prompt.placed import Placed
from mlx_qwen.requests import Asked
from mlx_qwen.settings import EngineSettings

# What a prompt was made with: it is sent as ids and patches.
_SPENT = {field.name for field in fields(MediaLimits)} | {
    *("images", "videos", "chat_template_kwargs", "continue_final_message", "preserve_thinking")
}
_FUNCTIONS = ("sampler", "logits_processors")


def request_frame(sequence: Sequence) -> Frame:
    """A request for the other ranks, made of what the sequence was made of.

    Raises PromptError as `check_request` does.
    """
    asked, values = check_request(sequence)
    media, parts = [], [np.array(asked.inputs.ids, np.int64).tobytes()]
    for one in asked.inputs.media:
        pixels = one.patches.pixel_values
        media.append([int(one.kind), one.start, [list(grid) for grid in one.patches.grids], list(pixels.shape)])
        parts.append(np.array(pixels.astype(mx.float32)).tobytes())
    told = {"number": sequence.number, "seed": sequence.sampler.seed, "index": asked.index}
    return Frame("request", {**told, **values, "media": media}, parts)


def check_request(sequence: Sequence) -> tuple[Asked, dict[str, Any]]:
    """What a sequence was made of, and its options and settings as JSON values.

    Raises PromptError for what cannot be sent: a function or a cache of the caller's own.
    """
    asked = sequence.asked
    if not isinstance(asked, Asked) or sequence.prompt_cache is not None:
        raise PromptError("prompt_cache holds one rank's share of a state. On several ranks, use prefix_cache_dir.")
    values = {"options": _options(asked.options), "settings": _settings(asked.settings)}
    try:
        packed(Frame("request", values))
    except (TypeError, ValueError) as error:
        raise PromptError(f"An option cannot be sent to the other ranks: {error}. Give it as plain JSON.") from error
    return asked, values


def asked_of(frame: Frame) -> Asked:
    """What a request asks for."""
    values, (ids, *pixels) = frame.values, frame.parts
    media = []
    for (kind, start, grids, shape), part in zip(values["media"], pixels, strict=True):
        patches = Patches(mx.array(np.frombuffer(part, np.float32).reshape(shape)), tuple(Grid(*g) for g in grids))
        media.append(Placed(Kind(kind), patches, start))
    given = dict(values["options"])
    if "logit_bias" in given:
        given["logit_bias"] = {int(token): bias for token, bias in given["logit_bias"]}
    inputs = PromptInputs(np.frombuffer(ids, np.int64).tolist(), tuple(media))
    return Asked(inputs, GenerationOptions(**given), EngineSettings(**values["settings"]), values["index"])


def turn_frame(turn: Turn) -> Frame:
    """A turn for the other ranks; they know the sequences by their numbers."""
    values: dict[str, Any] = {
        "coming": [one.number for one in turn.coming],
        "cancelled": sorted(turn.cancelled),
        "behind": sorted(turn.behind),
        "passed": [list(one) for one in turn.passed],
    }
    told = {name: value for name, value in values.items() if value}
    return Frame("turn", {**told, "most_rows": turn.most_rows})


def turn_of(frame: Frame, prepared: dict[int, Sequence]) -> Turn:
    """A turn, whose new sequences are taken out of those that are prepared."""
    values = frame.values
    return Turn(
        tuple(prepared.pop(number) for number in values.get("coming", ())),
        frozenset(values.get("cancelled", ())),
        frozenset(values.get("behind", ())),
        tuple(Passed(*one) for one in values.get("passed", ())),
        values["most_rows"],
    )


def _options(options: GenerationOptions) -> dict[str, Any]:
    chosen = _chosen(options)
    for name in _FUNCTIONS:
        if name in chosen:
            raise PromptError(f"{name} is a function of this process: on several ranks, use the other options.")
    given = {name: value for name, value in chosen.items() if name not in _SPENT}
    if options.logit_bias is not None:
        given["logit_bias"] = [[token, bias] for token, bias in options.logit_bias.items()]
    if options.schema is not None and not isinstance(options.schema, Mapping):
        given["schema"] = schema_of(options.schema)
    return given


def check_settings(settings: EngineSettings) -> None:
    """Raises PromptError for settings that cannot be sent to the other ranks."""
    _settings(settings)


def _settings(settings: EngineSettings) -> dict[str, Any]:
    given = _chosen(replace(settings, progress=False))
    if settings.prefix_cache_dir is not None:
        given["prefix_cache_dir"] = str(settings.prefix_cache_dir)
    if isinstance(settings.draft_model, Path):
        given["draft_model"] = str(settings.draft_model)
    if not isinstance(settings.draft_model, str | Path | None):
        raise PromptError("draft_model is loaded in this process: on several ranks, give its path or repository.")
    return given


def _chosen(values: GenerationOptions | EngineSettings) -> dict[str, Any]:
    """Fields that are not as they are unless chosen."""
    found = {}
    for field in fields(values):
        value = getattr(values, field.name)
        if field.default is MISSING or value is not field.default:
            found[field.name] = value
    return found

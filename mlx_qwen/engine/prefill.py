"""Reads the prompt into the cache, in pieces that bound the memory it takes."""

import mlx.core as mx

from mlx_qwen.engine.interrupts import Uninterrupted
from mlx_qwen.model import Model
from mlx_qwen.model.multimodal import Embedded
from mlx_qwen.model.state import HybridCache
from mlx_qwen.options import Progress
from mlx_qwen.status_line import StatusLine


def prefill(
    model: Model,
    tokens: mx.array,
    cache: HybridCache,
    *,
    mask: mx.array | None = None,
    embedded: Embedded | None = None,
    step_size: int = 2048,
    progress: Progress | None = None,
) -> mx.array:
    """The logits [B, V] after the last token of `tokens` [B, T]; the head never sees the others.

    `mask` [B, T] is False at left padding; `embedded` is given where the tokens hold images. `progress` is called with
    the tokens done and T after every piece. An interrupt leaves the cache at the end of a piece.
    """
    T = tokens.shape[1]
    report = progress or _ignore
    report(0, T)
    last = (T - 1) // step_size * step_size
    for start in range(0, last, step_size):
        end = start + step_size
        with Uninterrupted():
            part = embedded and embedded.part(start, end)
            model.hidden_states(tokens[:, start:end], cache, mask=_part(mask, start, end), embedded=part)
        mx.eval(cache.arrays())
        mx.clear_cache()
        report(end, T)
    with Uninterrupted():
        part = embedded and embedded.part(last, T)
        hidden = model.hidden_states(tokens[:, last:], cache, mask=_part(mask, last, T), embedded=part)
    logits = model.logits(hidden[:, -1:])[:, -1]
    mx.eval(logits, cache.arrays())
    report(T, T)
    return logits


def progress_callback(progress: Progress | bool) -> Progress | None:
    """The caller's own callback, a line on stderr for True, nothing for False."""
    if isinstance(progress, bool):
        return _shown_progress() if progress else None
    return progress


def _shown_progress() -> Progress:
    """A line that counts the tokens, and goes when all are read from where someone watched it."""
    line = StatusLine()

    def show(done: int, total: int) -> None:
        line.show(f"Reading the prompt: {done:,} of {total:,} tokens")
        if done == total:
            line.finish(keep=not line.watched)

    return show


def _part(mask: mx.array | None, start: int, end: int) -> mx.array | None:
    return None if mask is None else mask[:, start:end]


def _ignore(done: int, total: int) -> None:
    return

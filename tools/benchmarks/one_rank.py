"""One rank of `ranks`, in a process of its own, which loads a checkpoint with both runtimes and lets them answer."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx.utils import tree_flatten

from mlx_qwen.checkpoint import shards
from mlx_qwen.config import ModelConfig
from mlx_qwen.loading import load_model

_PROMPT = 32
Model = Callable[[mx.array, Any], mx.array]


def main(folder: Path, tokens: int, turns: int, result: Path) -> None:
    """Load both models, let them read and write in alternation, and write what was seen as JSON.

    Without MLX_RANK in its environment the process is the only rank, and holds the whole model.
    """
    group = mx.distributed.init(strict=True, backend="ring") if "MLX_RANK" in os.environ else None
    read = _counted()
    config, before = ModelConfig.from_directory(folder), mx.get_active_memory()
    mx.reset_peak_memory()
    ours = load_model(folder, config, group=group)
    peak = mx.get_peak_memory() - before
    theirs = load_theirs(folder, group)
    caches = {"ours": ours.make_cache, "theirs": theirs.make_cache}
    models: dict[str, Model] = {"ours": ours, "theirs": lambda ids, cache: theirs(ids, cache=cache)}
    ids = mx.array(np.random.default_rng(0).integers(0, config.text.vocab_size, (1, _PROMPT)))
    seconds: dict[str, list[float]] = {name: [] for name in models}
    answers: dict[str, list[int]] = {}
    for turn in range(turns + 1):
        for name, model in models.items():
            took, answers[name] = written(model, caches[name](), ids, tokens)
            seconds[name] += [took] if turn else []
    found = {
        "held": sum(array.nbytes for array in dict(tree_flatten(ours.parameters())).values()),
        "read": sum(read),
        "peak": peak,
        "seconds": {name: median(took) for name, took in seconds.items()},
        "logits": {name: model(ids, caches[name]())[0, -1].tolist() for name, model in models.items()},
        "answers": answers,
        "leads": {name: _leads(model, caches[name](), ids, answers[name]) for name, model in models.items()},
    }
    result.write_text(json.dumps(found), encoding="utf-8")


def _counted() -> list[int]:
    """Bytes of every part that is read from now on; tensors that are read whole and later are not among them."""
    read: list[int] = []
    as_mlx = shards._as_mlx

    def counting(values: npt.NDArray[np.generic], kind: mx.Dtype | None) -> mx.array:
        read.append(values.nbytes)
        return as_mlx(values, kind)

    shards._as_mlx = counting  # type: ignore[assignment]
    return read


def load_theirs(folder: Path, group: mx.distributed.Group | None) -> Any:
    """mlx-lm's model, sharded as its `sharded_load` does."""
    from mlx_lm.utils import load_model as load

    model, _ = load(folder, lazy=True)
    if group is not None:
        model.shard(group)
    mx.eval(model.parameters())
    return model


def written(model: Model, cache: Any, ids: mx.array, tokens: int) -> tuple[float, list[int]]:
    """Seconds a token of a greedy answer, without its prompt, and the tokens."""
    token = mx.argmax(model(ids, cache)[:, -1:], axis=-1)
    written = [int(token)]
    start = time.perf_counter()
    for _ in range(tokens - 1):
        token = mx.argmax(model(token, cache)[:, -1:], axis=-1)
        written.append(int(token))
    return (time.perf_counter() - start) / (tokens - 1), written


def _leads(model: Model, cache: Any, ids: mx.array, answer: list[int]) -> list[float]:
    """How far each token's logit is ahead of the next one's, in parts of the largest logit."""
    logits = model(mx.concatenate([ids, mx.array([answer[:-1]])], axis=1), cache)[0, ids.shape[1] - 1 :]
    two = mx.sort(logits.astype(mx.float32), axis=-1)[:, -2:]
    leads: list[float] = ((two[:, 1] - two[:, 0]) / mx.abs(logits).max(axis=-1)).tolist()  # type: ignore[assignment]
    return leads

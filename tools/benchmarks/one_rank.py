"""One rank of `ranks`, in a process of its own, which loads checkpoints with both runtimes and lets them answer."""

import gc
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx.utils import tree_flatten

from mlx_qwen.checkpoint import shards
from mlx_qwen.config import ModelConfig
from mlx_qwen.errors import ShardingError
from mlx_qwen.loading import load_model
from mlx_qwen.model import Model as OurModel
from tools.benchmarks.rings import join_sleeping

_TIMED_TOKENS = 16
Model = Callable[[mx.array, Any], mx.array]
Group = mx.distributed.Group | None
Bytes = npt.NDArray[np.generic]


def main(asked: Path, results: list[Path]) -> None:
    """Answer the cases in the JSON file `asked`, and write what was seen of each as JSON, and its logits beside it.

    A case is {"model": folder, "prompt": file of NumPy, "judged": answers whose logits are written, or null for those
    that the first model with this prompt gives, "tokens", "turns", "theirs": whether mlx-lm answers too}. Where the
    ranks do not divide a model, null is written.
    """
    group = join_sleeping()
    judged: dict[str, Any] = {}
    for case, result in zip(json.loads(asked.read_text(encoding="utf-8")), results, strict=True):
        case["judged"] = case["judged"] or judged.get(case["prompt"])
        found = _answered(case, result.with_suffix(".npz"), group)
        judged[case["prompt"]] = found and found["judged"]
        result.write_text(json.dumps(found), encoding="utf-8")


def _answered(case: dict[str, Any], logits_file: Path, group: Group) -> dict[str, Any] | None:
    gc.collect()
    mx.clear_cache()
    folder, prompt = Path(case["model"]), dict(np.load(case["prompt"]))
    config, before = ModelConfig.from_directory(folder), mx.get_active_memory()
    mx.reset_peak_memory()
    with _reading() as read:
        try:
            ours = load_model(folder, config, group=group)
        except ShardingError:
            return None
    peak = mx.get_peak_memory() - before
    theirs, held = None, dict(tree_flatten(ours.parameters()))
    if case["theirs"] and _they_can(config, ours.dtype, group):
        theirs = load_theirs(folder, group)
    caches: dict[str, Callable[[], Any]] = {"ours": ours.make_cache}
    models: dict[str, Model] = {"ours": _seeing(ours, prompt, config)}
    if theirs is not None:
        caches["theirs"] = theirs.make_cache
        models["theirs"] = lambda ids, cache: theirs(ids, cache=cache)
    ids, tokens = mx.array(prompt["ids"]), case["tokens"]
    found: dict[str, Any] = {
        "held": sum(array.nbytes for name, array in held.items() if not name.startswith("vision.")),
        "read": sum(read),
        "peak": peak,
        "largest": max(info.nbytes for info in shards.checkpoint_tensors(folder).values()),
        "sent": {name: _sent(model, caches[name](), ids) for name, model in models.items()},
        "answers": {name: written(model, caches[name](), ids, tokens)[1] for name, model in models.items()},
        "seconds": _timed(models, caches, ids, case["turns"]),
    }
    found["judged"] = case["judged"] or found["answers"]["ours"]
    judged = mx.concatenate([ids, mx.array(found["judged"])[:, :-1]], axis=1)
    logits = {name: _logits(model, caches[name](), [judged]) for name, model in models.items()}
    if group is None:
        first = ids.shape[1] - 1 if "pixel_values" in prompt else ids.shape[1] // 2
        found["again"] = {}
        for name, model in models.items():
            logits[f"{name} again"] = _logits(model, caches[name](), _pieces(judged, first))
            pieces, cache = _pieces(ids, first), caches[name]()
            mx.eval([model(piece, cache) for piece in pieces[:-1]])
            found["again"][name] = written(model, cache, pieces[-1], tokens)[1]
    if group is None or group.rank() == 0:
        np.savez(logits_file, **logits)  # type: ignore[arg-type]
    return found


def _seeing(model: OurModel, prompt: dict[str, Bytes], config: ModelConfig) -> Model:
    """The model, which sees the prompt's picture where tokens stand for it."""
    pixels = {name: mx.array(array) for name, array in prompt.items() if name != "ids"}

    def called(ids: mx.array, cache: Any) -> mx.array:
        shown = pixels if pixels and bool(mx.any(ids == config.image_token_id)) else {}
        return model(ids, cache, **shown)

    return called


def _they_can(config: ModelConfig, dtype: mx.Dtype, group: Group) -> bool:
    """Whether mlx-lm computes such a model on a CPU, and divides it among these ranks."""
    if dtype == mx.bfloat16 and config.text.moe is not None and mx.default_device().type == mx.DeviceType.cpu:
        return False
    return group is None or (not config.is_next and config.text.linear_num_key_heads % group.size() == 0)


@contextmanager
def _reading() -> Iterator[list[int]]:
    """Bytes of every part that is read meanwhile; the vision tower is read later, and not among them."""
    read: list[int] = []
    as_mlx = shards._as_mlx

    def counting(values: Bytes, kind: mx.Dtype | None) -> mx.array:
        read.append(values.nbytes)
        return as_mlx(values, kind)

    shards._as_mlx = counting  # type: ignore[assignment]
    try:
        yield read
    finally:
        shards._as_mlx = as_mlx


def _sent(model: Model, cache: Any, ids: mx.array) -> list[tuple[str, int]]:
    """What a rank gives to each exchange of one decoded token: its kind, and bytes a row."""
    token = mx.argmax(model(ids, cache)[:, -1:], axis=-1)
    mx.eval(token)
    given: list[tuple[str, int]] = []
    all_sum, all_gather = mx.distributed.all_sum, mx.distributed.all_gather

    def summing(x: mx.array, *, group: mx.distributed.Group) -> mx.array:
        given.append(("sum", x.nbytes // len(ids)))
        return all_sum(x, group=group)

    def gathering(x: mx.array, *, group: mx.distributed.Group) -> mx.array:
        given.append(("gather", x.nbytes // len(ids)))
        return all_gather(x, group=group)

    mx.distributed.all_sum, mx.distributed.all_gather = summing, gathering  # type: ignore[assignment]
    try:
        mx.eval(model(token, cache))
    finally:
        mx.distributed.all_sum, mx.distributed.all_gather = all_sum, all_gather
    return given


def _timed(models: dict[str, Model], caches: dict[str, Callable[[], Any]], ids: mx.array, turns: int) -> dict[str, Any]:
    """Median seconds a token of each model, in alternation, for one prompt alone; nothing without turns."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(turns + 1 if turns else 0):
        for name, model in models.items():
            took = written(model, caches[name](), ids[:1], _TIMED_TOKENS)[0]
            seconds[name] += [took] if turn else []
    return {name: median(took) for name, took in seconds.items() if took}


def load_theirs(folder: Path, group: Group) -> Any:
    """mlx-lm's model, sharded as its `sharded_load` does."""
    from mlx_lm.utils import load_model as load

    model, _ = load(folder, lazy=True)
    if group is not None:
        model.shard(group)
    mx.eval(model.parameters())
    return model


def written(model: Model, cache: Any, ids: mx.array, tokens: int) -> tuple[float, list[list[int]]]:
    """Seconds a step of greedy answers to `ids` [B, T], without the prompts, and the tokens of each."""
    token = mx.argmax(model(ids, cache)[:, -1:], axis=-1)
    steps = [np.array(token)]
    start = time.perf_counter()
    for _ in range(tokens - 1):
        token = mx.argmax(model(token, cache)[:, -1:], axis=-1)
        steps.append(np.array(token))
    return (time.perf_counter() - start) / (tokens - 1), np.concatenate(steps, axis=1).tolist()


def _pieces(ids: mx.array, first: int) -> list[mx.array]:
    """The first tokens of `ids` [B, T] together, and each later one alone."""
    return [ids[:, :first], *(ids[:, place : place + 1] for place in range(first, ids.shape[1]))]


def _logits(model: Model, cache: Any, pieces: list[mx.array]) -> npt.NDArray[np.float32]:
    """The logits of every place of `pieces` [B, T], which are read one after the other."""
    return np.concatenate([np.array(model(piece, cache).astype(mx.float32)) for piece in pieces], axis=1)

"""`load`: a model of one process, or of several, of which rank 0 goes on as if it were alone."""

import atexit
import sys
from pathlib import Path

import mlx.core as mx

from mlx_qwen import loading
from mlx_qwen.declared import check_value
from mlx_qwen.distributed.start import Wanted, follow, lead
from mlx_qwen.errors import ShardingError
from mlx_qwen.model import Model
from mlx_qwen.prompt import Processor

_led: list[Wanted] = []


def load(
    path_or_repo: str | Path | None = None,
    *,
    revision: str | None = None,
    dtype: mx.Dtype | None = None,
    lazy: bool = False,
    tune: bool = True,
    group: mx.distributed.Group | None = None,
    pipeline: bool = False,
) -> tuple[Model, Processor]:
    """Load a model and its processor.

    Args:
        path_or_repo: a folder (Hugging Face or MLX layout) or a Hub repository such as "Qwen/Qwen3.5-0.8B"; the bundled
            demo when nothing is given.
        revision: branch, tag or commit of the Hub repository.
        dtype: what unpacked weights and activations become; the checkpoint's own by default. Norms, A_log and dt_bias
            stay in fp32.
        lazy: leave the weights on disk until they are first used, as those of the vision tower always are.
        tune: on a Mac, let the kernels prove themselves at this model's sizes first: a few seconds, once, remembered.
        group: the ranks that share the model, from `mx.distributed.init`. All of them call this, once; each reads its
            own part of what rank 0 names, at once. It returns on rank 0 alone: the others take every step of what that
            asks for, and end when it ends. None, and a group of one, load the whole.
        pipeline: give each rank whole layers, as many as its memory has room for, instead of a part of each: for any
            number of unequal Macs, which then compute one after the other.

    Raises:
        ConfigError: config.json is missing or describes no model of this family.
        ShardingError: the ranks do not divide the model, or share one already.
        CheckpointError: files are missing or damaged, or tensors do not match the config, or the ranks' files differ.
        PromptError: an argument is of another type.
        MLXQwenError: the ranks cannot reach each other, or run different versions.
    """
    check_value("group", group, mx.distributed.Group | None)
    if group is None or group.size() == 1:
        return loading.load(path_or_repo, revision=revision, dtype=dtype, lazy=lazy, tune=tune)
    loading.check_arguments(path_or_repo, revision=revision, dtype=dtype, lazy=lazy, tune=tune, pipeline=pipeline)
    if _led:
        raise ShardingError("These ranks share a model already, and follow this one. Start them again for another.")
    if group.rank():
        follow(group)
    wanted = Wanted(None if path_or_repo is None else str(path_or_repo), revision, dtype, tune, pipeline)
    _led.append(wanted)
    model, processor, leader = lead(wanted, group)
    atexit.register(lambda: leader.close(_uncaught()))
    return model, processor


def _uncaught() -> str:
    """What ends this process; "" where it ends well."""
    error = getattr(sys, "last_value", None)
    return "" if error is None else str(error) or type(error).__name__

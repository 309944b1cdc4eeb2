"""From a folder or a Hub repository to a model that generates."""

import warnings
from pathlib import Path
from typing import get_args

import mlx.core as mx

from mlx_qwen.checkpoint import mtp_reads
from mlx_qwen.checkpoint.adapters import warn_of_adapter
from mlx_qwen.checkpoint.foreign import CONVERTED, foreign_quantization, unreadable
from mlx_qwen.checkpoint.hub import resolve
from mlx_qwen.checkpoint.identity import model_identity
from mlx_qwen.checkpoint.layout import FORMAT_KEY, FORMAT_VERSION, Layout, Plan, plan_checkpoint
from mlx_qwen.checkpoint.matrices import read_matrices
from mlx_qwen.checkpoint.names import Role
from mlx_qwen.checkpoint.shards import TensorInfo, checkpoint_tensors, companion_tensors
from mlx_qwen.checkpoint.slices import SlicedTensors
from mlx_qwen.config import ModelConfig
from mlx_qwen.declared import Declaration, check_value
from mlx_qwen.demo import demo_folder
from mlx_qwen.errors import CheckpointError
from mlx_qwen.forked import note_computing
from mlx_qwen.model import Model
from mlx_qwen.model.collectives import gathered_numbers
from mlx_qwen.model.memory import usable_bytes
from mlx_qwen.model.pipeline import stages_of, stored_bytes
from mlx_qwen.model.proving import settle_kernels
from mlx_qwen.model.sharding import check_groups, check_ranks
from mlx_qwen.model.weights import assemble, check_norms, fill_vision
from mlx_qwen.prompt import Processor

_FLOAT = Declaration(
    "what weights become.",
    expected="mx.bfloat16, mx.float16 or mx.float32",
    check=lambda dtype: dtype in (mx.bfloat16, mx.float16, mx.float32),
)


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
    """As `mlx_qwen.load`; with a `group`, this rank's part, which computes when all others do the same."""
    check_arguments(path_or_repo, revision=revision, dtype=dtype, lazy=lazy, tune=tune, pipeline=pipeline)
    folder = resolve(demo_folder() if path_or_repo is None else path_or_repo, revision=revision)
    config = ModelConfig.from_directory(folder)
    processor = Processor.from_directory(folder, config)
    model = load_model(folder, config, dtype=dtype, lazy=lazy, group=group, pipeline=pipeline)
    if tune:
        settle_kernels(model)
    return model, processor


def check_arguments(
    path_or_repo: str | Path | None,
    *,
    revision: str | None,
    dtype: mx.Dtype | None,
    lazy: bool,
    tune: bool,
    pipeline: bool,
) -> None:
    """Raises PromptError unless these are what `load` takes."""
    check_value("path_or_repo", path_or_repo, str | Path | None)
    check_value("revision", revision, str | None)
    check_value("dtype", dtype, mx.Dtype | None, _FLOAT)
    check_value("lazy", lazy, bool)
    check_value("tune", tune, bool)
    check_value("pipeline", pipeline, bool)


def load_model(
    folder: Path,
    config: ModelConfig,
    *,
    dtype: mx.Dtype | None = None,
    lazy: bool = False,
    group: mx.distributed.Group | None = None,
    pipeline: bool = False,
) -> Model:
    """The model of a folder whose config is already read; see `load`."""
    note_computing()
    plan = plan_model(folder, config)
    warn_of_adapter(folder)
    config = plan.config
    layers = None
    if group is not None and pipeline:
        usable = gathered_numbers(usable_bytes() >> 20, group)
        stored = stored_bytes(plan.targets, config.text.num_hidden_layers)
        layers = stages_of(stored, [mebibytes << 20 for mebibytes in usable])[group.rank()]
    elif group is not None:
        check_ranks(config.text, group.size())
        check_groups(config.text, plan.targets, group.size())
    model = Model(config, with_mtp=plan.has_mtp, with_vision=plan.has_vision, group=group, layers=layers)
    _settle_mtp(model, folder, plan)
    if model.share.count > 1:
        _read_share(model, plan, dtype)
    else:
        _read_whole(model, plan, dtype)
    model.mark.take(model)
    model.identity = model_identity(folder, model.dtype) + model.share.label
    check_norms(model)
    if not lazy or model.share.count > 1:
        # Until the first image comes, the vision tower costs no memory.
        mx.eval({name: part for name, part in model.parameters().items() if name != "vision"})
    return model


def _read_whole(model: Model, plan: Plan, dtype: mx.Dtype | None) -> None:
    def read(model: Model) -> None:
        assemble(model, read_matrices(plan.targets, plan.config, dtype), interleaved=plan.config.is_next)

    read(model)
    model.reread = read


def _read_share(model: Model, plan: Plan, dtype: mx.Dtype | None) -> None:
    """Give the model its rank's part of each tensor; only the vision tower waits on the disk."""
    assemble(model, SlicedTensors(plan.targets, plan.config, dtype, model.share.cut), interleaved=plan.config.is_next)
    vision = [target for target in plan.targets if target.spec.role is Role.VISION]
    model.reread = lambda model: fill_vision(model, read_matrices(vision, plan.config, dtype))


def _settle_mtp(model: Model, folder: Path, plan: Plan) -> None:
    """Give the MTP layer its convention, as the checkpoint says or was found out, and remove it if that is unknown."""
    if model.mtp is None:
        return
    said = mtp_reads.stated(model.config, plan)
    if said is None:
        checkpoint = mtp_reads.identity(folder, model.config)
        reads = mtp_reads.recalled(checkpoint)
        model.mtp_unsettled = checkpoint if reads is None else None
    else:
        reads = mtp_reads.known(said)
        if reads is None:
            model.mtp = None
            warnings.warn(
                f"{FORMAT_KEY}.{mtp_reads.KEY} in config.json of {folder} is {said!r}, expected "
                f"{mtp_reads.WORDS}: the MTP layer is left unused, which changes no answer. Upgrade mlx-qwen.",
                stacklevel=5,
            )
    if said is None and model.group is not None and model.share.count > 1:
        words = (None, *get_args(mtp_reads.MTPReads))
        reads = words[max(gathered_numbers(words.index(reads), model.group))]
        model.mtp_unsettled = model.mtp_unsettled if reads is None else None
    model.mtp_reads = reads or "normed"


def plan_model(folder: Path, config: ModelConfig, tensors: dict[str, TensorInfo] | None = None) -> Plan:
    """How to read the folder's weights; raises CheckpointError where `load` refuses them.

    `tensors` stand for those of the main shards where they are not as plain as MLX needs them.
    """
    _check_format(folder, config)
    if tensors is None:
        _refuse_foreign_quantization(folder, config)
        tensors = checkpoint_tensors(folder)
    plan = plan_checkpoint(config, tensors, companion_tensors(folder))
    _check_layout(folder, config, plan)
    return plan


def _check_format(folder: Path, config: ModelConfig) -> None:
    marker = config.raw.get(FORMAT_KEY)
    if marker is None:
        return
    if not isinstance(marker, dict):
        raise CheckpointError(
            f"{FORMAT_KEY} in config.json of {folder} is {marker!r}, expected an object. Convert again."
        )
    if marker.get("format") != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} was written in format {marker.get('format')}, expected {FORMAT_VERSION}. Upgrade mlx-qwen."
        )
    companion = marker.get("companion", [])
    if not isinstance(companion, list) or not all(isinstance(name, str) for name in companion):
        raise CheckpointError(
            f"{FORMAT_KEY}.companion in config.json of {folder} is {companion!r:.200}, expected names of files. "
            "Convert again."
        )
    lost = [name for name in companion if not (folder / name).is_file()]
    if lost:
        raise CheckpointError(
            f"{folder} lacks {', '.join(lost)}, which hold the exact norms and the MTP layer. "
            "Copy the whole folder again."
        )


def _check_layout(folder: Path, config: ModelConfig, plan: Plan) -> None:
    marker = config.raw.get(FORMAT_KEY)
    if marker is not None and "norms" in marker and plan.layout is not Layout.MLX:
        raise CheckpointError(
            f"config.json in {folder} says that its norms are {marker.get('norms')!r}, as in MLX, but the other "
            f"tensors are arranged as {plan.layout.value} does. Weights and config are of different folders: copy or "
            "convert the model again."
        )


def _refuse_foreign_quantization(folder: Path, config: ModelConfig) -> None:
    settings = foreign_quantization(config)
    if settings is not None and settings["quant_method"] not in CONVERTED:
        raise CheckpointError(f"{folder} is {unreadable(settings['quant_method'])}")
    if settings is not None:
        raise CheckpointError(
            f"{folder} is quantized with {settings['quant_method']!r}, which runs once it is converted: "
            f"mlx-qwen convert --model {folder} --mlx-path <new folder>"
        )

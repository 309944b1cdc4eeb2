"""`load`: from a folder or a Hub repository to a model that generates."""

from pathlib import Path

import mlx.core as mx

from mlx_qwen.assembly import Matrix, Tensors, assemble
from mlx_qwen.checkpoint import FORMAT_KEY, FORMAT_VERSION, Layout, Plan, Target, foreign_quantization, plan_checkpoint
from mlx_qwen.config import ModelConfig
from mlx_qwen.errors import CheckpointError
from mlx_qwen.files import TensorInfo, checkpoint_tensors, companion_tensors
from mlx_qwen.hub import resolve
from mlx_qwen.model import Model
from mlx_qwen.norms import check_norms
from mlx_qwen.prompt import Processor
from mlx_qwen.tensors import EXACT_ROLES, MTP_PREFIX, text_prefix


def load(
    path_or_repo: str | Path,
    *,
    revision: str | None = None,
    dtype: mx.Dtype | None = None,
    lazy: bool = False,
) -> tuple[Model, Processor]:
    """Load a model and its processor.

    Args:
        path_or_repo: a folder (Hugging Face or MLX layout) or a Hub repository such as "Qwen/Qwen3.5-0.8B".
        revision: branch, tag or commit of the Hub repository.
        dtype: what unpacked weights and activations become; the checkpoint's own by default. Norms, A_log and dt_bias
            stay in fp32.
        lazy: leave the weights on disk until they are first used, as those of the vision tower always are.

    Raises:
        ConfigError: config.json is missing or describes no model of this family.
        CheckpointError: files are missing or damaged, or tensors do not match the config.
    """
    folder = resolve(path_or_repo, revision=revision)
    config = ModelConfig.from_directory(folder)
    processor = Processor.from_directory(folder, config)
    return load_model(folder, config, dtype=dtype, lazy=lazy), processor


def load_model(folder: Path, config: ModelConfig, *, dtype: mx.Dtype | None = None, lazy: bool = False) -> Model:
    """The model of a folder whose config is already read; see `load`."""
    _check_format(folder, config)
    _refuse_foreign_quantization(folder, config)
    plan = plan_checkpoint(config, checkpoint_tensors(folder), companion_tensors(folder))
    _check_layout(folder, config, plan)
    tensors = _read(plan, config, dtype)
    model = Model(config, with_mtp=plan.has_mtp, with_vision=plan.has_vision)
    assemble(model, tensors, interleaved=config.is_next)
    check_norms(model)
    if not lazy:
        # Until the first image comes, the vision tower costs no memory.
        mx.eval({name: part for name, part in model.parameters().items() if name != "vision"})
    return model


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
    lost = [name for name in marker.get("companion", ()) if not (folder / name).is_file()]
    if lost:
        raise CheckpointError(
            f"{folder} lacks {', '.join(lost)}, which hold the exact norms and the MTP layer. "
            "Copy the whole folder again."
        )


def _check_layout(folder: Path, config: ModelConfig, plan: Plan) -> None:
    marker = config.raw.get(FORMAT_KEY)
    if marker is not None and plan.layout is not Layout.MLX:
        raise CheckpointError(
            f"config.json in {folder} says that its norms are {marker.get('norms')!r}, as in MLX, but the other "
            f"tensors are arranged as {plan.layout.value} does. Weights and config are of different folders: copy or "
            "convert the model again."
        )


def _refuse_foreign_quantization(folder: Path, config: ModelConfig) -> None:
    settings = foreign_quantization(config)
    if settings is not None:
        raise CheckpointError(
            f"{folder} is quantized with {settings['quant_method']!r}, which runs once it is converted: "
            f"mlx-qwen convert --model {folder} --mlx-path <new folder>"
        )


def _read(plan: Plan, config: ModelConfig, dtype: mx.Dtype | None) -> Tensors:
    """Every tensor as a lazy matrix, by module name without the language-model prefix."""
    files = _LazyFiles()
    tensors: Tensors = {}
    prefix = text_prefix(config)
    for target in plan.targets:
        name = target.spec.name if target.spec.name.startswith(MTP_PREFIX) else target.spec.name.removeprefix(prefix)
        matrix = _matrix(target, files, dtype)
        if name.endswith(".bias"):
            base = name.removesuffix(".bias")
            tensors[base] = tensors[base].with_bias(matrix.weight)
        else:
            tensors[name.removesuffix(".weight")] = matrix
    return tensors


def _matrix(target: Target, files: "_LazyFiles", dtype: mx.Dtype | None) -> Matrix:
    if target.quantization is not None:
        scales, biases = (None if info is None else files[info] for info in (target.scales, target.biases))
        if dtype is not None and target.quantization.mode == "affine" and scales is not None and biases is not None:
            scales, biases = scales.astype(dtype), biases.astype(dtype)
        return Matrix(files[target.sources[0].tensor], scales, biases, target.quantization)
    weight = target.arrange(_dense(target, files))
    if target.spec.role in EXACT_ROLES:
        return Matrix(weight.astype(mx.float32))
    return Matrix(weight if dtype is None else weight.astype(dtype))


def _dense(target: Target, files: "_LazyFiles") -> mx.array:
    sources = target.sources
    first = sources[0]
    if not target.stacked:
        return files[first.tensor]
    if first.index is None:
        return mx.stack([files[source.tensor] for source in sources])
    assert first.rows is not None, "experts of a fused tensor name their rows"
    return files[first.tensor][:, slice(*first.rows)]


class _LazyFiles:
    """Tensors by where they lie; each file is opened once and nothing is read before it is used."""

    def __init__(self) -> None:
        self._open: dict[Path, dict[str, mx.array]] = {}

    def __getitem__(self, info: TensorInfo) -> mx.array:
        if info.file not in self._open:
            loaded = mx.load(str(info.file))
            assert isinstance(loaded, dict), "a safetensors file loads as a dict"
            self._open[info.file] = loaded
        return self._open[info.file][info.name]

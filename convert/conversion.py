"""`convert`: from a checkpoint in any layout to an MLX checkpoint, a few megabytes at a time."""

import json
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlx_qwen.checkpoint import Mode, Plan, parameter_count, plan_checkpoint
from mlx_qwen.config import ModelConfig
from mlx_qwen.files import checkpoint_tensors, companion_tensors
from mlx_qwen.hub import resolve

from .config_json import converted_config
from .formats import decodable, is_encoded, keeps_codes
from .outputs import Output, Outputs, plan_outputs
from .report import ConversionReport, peak_resident_bytes
from .settings import DType, Settings, check_settings
from .staging import check_apart, check_space, check_target, staged, write_text
from .travel import copied_files, copy_files, write_model_card
from .weights import Written, source_bytes, write_weights


def convert(
    hf_path: str | Path,
    mlx_path: str | Path,
    *,
    bits: int | None = None,
    group_size: int | None = None,
    mode: Mode = "affine",
    dtype: DType | None = None,
    quantize: bool = True,
    dequantize: bool = False,
    overwrite: bool = False,
    revision: str | None = None,
    dry_run: bool = False,
    progress: bool | None = None,
) -> ConversionReport:
    """Convert a checkpoint to MLX, by default quantized to 4 bits.

    Sources may also be FP8, or quantized for another runtime: see `mlx_qwen.convert.formats`.

    Reads, packs and writes pieces of a few megabytes, so that memory stays the same for every size of checkpoint. The
    output appears under its name only when it is complete. The same input always gives the same weights.

    Args:
        hf_path: a folder in Hugging Face or MLX layout, or a Hub repository.
        mlx_path: the folder to write.
        bits: bits per weight of most matrices: 2, 3, 4, 5, 6 or 8. By default the mode's own, 4 for affine.
        group_size: how many weights share a scale: 32, 64 or 128. By default the mode's own, 64 for affine.
        mode: "affine", or "mxfp4", "nvfp4" or "mxfp8", whose bits and group size are fixed.
        dtype: what unpacked weights, scales and biases become; the source's own by default. A_log stays in float32.
        quantize: False writes every matrix unpacked (an MLX-quantized source is unpacked).
        dequantize: the same, and insists that the source is quantized, for MLX or for another runtime.
        overwrite: replace an existing model folder, once the new one is complete.
        revision: branch, tag or commit of the Hub repository.
        dry_run: only check and report, without writing.
        progress: show a line on stderr; by default when it is a terminal.

    Returns:
        What was done: sizes, time, memory and every tensor worth a remark.

    Raises:
        ConfigError: the source's config.json is missing or describes no model of this family.
        CheckpointError: the source's files are missing, damaged or do not match its config.
        ConversionError: the settings contradict each other, or the target cannot be written.
    """
    settings = check_settings(
        bits=bits, group_size=group_size, mode=mode, dtype=dtype, quantize=quantize, dequantize=dequantize
    )
    target = Path(mlx_path).expanduser()
    check_target(target, overwrite=overwrite)
    job = _prepare(hf_path, revision, settings)
    check_apart(target, job.source)
    check_space(target, job.output_bytes)
    started, resident = time.perf_counter(), peak_resident_bytes()
    mx.reset_peak_memory()
    written = Written()
    if not dry_run:
        with staged(target) as folder:
            written = job.write(folder, progress)
    return ConversionReport(
        path=target,
        source=job.source,
        quantization=settings.quantization,
        dtype=job.outputs.dtype,
        source_bytes=source_bytes(job.plan),
        output_bytes=job.outputs.nbytes,
        parameters=parameter_count(target.spec for target in job.plan.targets),
        seconds=0.0 if dry_run else time.perf_counter() - started,
        peak_memory=0 if dry_run else peak_resident_bytes() - resident,
        mlx_peak_memory=0 if dry_run else mx.get_peak_memory(),
        indivisible=job.outputs.indivisible,
        non_finite=written.non_finite,
        kept_codes=tuple(output.name for output in job.outputs.all if keeps_codes(output.target)),
        rounded_scales=written.rounded,
        dry_run=dry_run,
    )


@dataclass(frozen=True, slots=True)
class _Job:
    """A source that was read as far as its headers, and what is to be made of it."""

    source: Path
    repository: str | None
    config: ModelConfig
    plan: Plan
    outputs: Outputs
    settings: Settings

    @property
    def output_bytes(self) -> int:
        return self.outputs.nbytes + sum(file.stat().st_size for file in copied_files(self.source))

    def write(self, folder: Path, progress: bool | None) -> Written:
        """Fill `folder`; returns what the weights showed."""
        quantization, has_vision = self.settings.quantization, self.plan.has_vision
        written = write_weights(folder, self.outputs, progress)
        copy_files(self.source, folder)
        write_model_card(
            self.source,
            folder,
            repository=self.repository,
            quantization=quantization,
            dtype=self.outputs.dtype,
            has_vision=has_vision,
        )
        config = converted_config(self.config, self.outputs, quantization, written.companion, has_vision=has_vision)
        # Last, as no reader takes a folder without it for a model.
        write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
        return written


def _prepare(hf_path: str | Path, revision: str | None, settings: Settings) -> _Job:
    source = resolve(hf_path, revision=revision)
    config = ModelConfig.from_directory(source)
    tensors = decodable(config, checkpoint_tensors(source), settings.keeps)
    plan = plan_checkpoint(config, tensors, companion_tensors(source))
    outputs = plan_outputs(plan, settings)
    _warn_of_packing_again(outputs)
    repository = None if Path(hf_path).expanduser().is_dir() else str(hf_path)
    return _Job(source, repository, config, plan, outputs, settings)


def _is_packed_otherwise(output: Output) -> bool:
    stored = output.target.quantization
    return is_encoded(output.target) if stored is None else stored != output.quantization


def _warn_of_packing_again(outputs: Outputs) -> None:
    again = [output for output in outputs.all if output.quantization is not None and _is_packed_otherwise(output)]
    if again:
        warnings.warn(
            f"{len(again)} matrices of the source are quantized already and are packed again, which loses more than "
            "packing the original would. Convert the unquantized checkpoint if there is one.",
            stacklevel=4,
        )

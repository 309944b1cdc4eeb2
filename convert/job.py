"""One conversion: a source that was read as far as its headers, and what is to be made of it."""

import hashlib
import json
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mlx_qwen.checkpoint.adapters import warn_of_adapter
from mlx_qwen.checkpoint.layout import Plan, plan_checkpoint
from mlx_qwen.checkpoint.settled import is_said_to_be_tied
from mlx_qwen.checkpoint.shards import TensorInfo
from mlx_qwen.config import ModelConfig

from .choices.choose import choose
from .choices.fitting import fitted_recipe
from .description import Description, described
from .formats import decodable, is_encoded
from .model_folder.config_json import converted_config
from .model_folder.fingerprint import fingerprint
from .model_folder.travel import copy_files, model_card
from .needs import memory_needed
from .outputs import Output, Outputs, plan_outputs
from .quantize.texts import calibration_windows
from .settings import AUTO, Settings
from .source.folder import copied_files, source_lines
from .source.loadable import check_loadable
from .source.origin import Origin
from .source.reading import read_source
from .work.calibration import Calibration
from .work.damage import damaged_source
from .work.pieces import DamagedPieceError
from .work.supply import files_of
from .work.write import Written, write_weights
from .writing.staging import Workspace, write_text


@dataclass(frozen=True, slots=True)
class Survey:
    """What the headers of a source say, and `remarks` on what it lacks.

    `windows` are token ids [n, T] of a calibration text, None without one. `copied` names files that are copied as they
    are, `adapter` is the folder of what is merged.
    """

    origin: Origin
    config: ModelConfig
    plan: Plan
    windows: npt.NDArray[np.int64] | None
    remarks: tuple[str, ...]
    copied: tuple[str, ...]
    adapter: Path | None = None

    @property
    def source(self) -> Path:
        """The folder of everything but, perhaps, the weights."""
        return self.origin.folder

    @property
    def copied_bytes(self) -> int:
        """Bytes of the files that are copied as they are."""
        return sum((self.source / name).stat().st_size for name in self.copied)

    def most_bytes(self, settings: Settings) -> int:
        """The most that the output can take on the disk, where `settings` leave choices to weights yet to come."""
        dtype = "bfloat16" if settings.dtype == AUTO else settings.dtype
        recipe = settings.recipe if settings.target_size is None else None
        if settings.target_bits is not None:  # what is measured later may fill the same budget a little better
            recipe = fitted_recipe(self.plan, replace(settings, dtype=dtype), expected=True)
        outputs = plan_outputs(self.plan, replace(settings, dtype=dtype, recipe=recipe, target_size=None))
        needed = outputs.file_bytes + self.copied_bytes
        return needed if settings.target_size is None else min(needed, settings.target_size)

    def downloaded(self, settings: Settings) -> "Survey":
        """The same once the weights are where they were to come; raises CheckpointError as `resolve` does.

        Whether a head that is said to be tied differs from the embedding only they can say.
        """
        origin = self.origin.downloaded()
        if origin is not self.origin and self.plan.has_head and is_said_to_be_tied(self.config):
            return survey_source(origin, settings)
        return replace(self, origin=origin)


@dataclass(frozen=True, slots=True)
class Job:
    """What a conversion works from, all choices made."""

    survey: Survey
    outputs: Outputs
    settings: Settings
    description: Description

    @property
    def fingerprint(self) -> str:
        """Equal for jobs that write the same bytes."""
        windows = self.survey.windows
        calibration = [] if windows is None else [hashlib.sha256(windows.tobytes()).hexdigest()]
        adapter = [] if self.survey.adapter is None else source_lines(self.survey.adapter)
        return fingerprint([*self.survey.origin.lines(), *calibration, *adapter], self.outputs)

    @property
    def output_bytes(self) -> int:
        """What the output will take on the disk."""
        return self.description.disk

    def write(self, space: Workspace, progress: bool | None) -> Written:
        """Fill the folder of `space`; returns what the weights showed.

        Raises ConversionError for weights of the source that are NaN or infinite.
        """
        survey, quantization, folder = self.survey, self.settings.quantization, space.folder
        source, plan = survey.source, survey.plan
        calibration = None
        if survey.windows is not None:
            calibration = Calibration(survey.config, plan, survey.windows, self.outputs.dtype)
        card = model_card(
            source,
            repository=survey.origin.repository,
            description=self.description,
            has_vision=plan.has_vision,
            adapter=survey.adapter,
        )
        try:
            written = write_weights(space, self.outputs, survey.origin.remote, progress, calibration)
        except DamagedPieceError as error:
            advice = damaged_source(plan, error.piece, survey.origin)
            for file in files_of(error.piece):
                if file.parent == space.downloads:  # the same command then downloads it again
                    file.unlink()
            raise advice from error
        copy_files((source / name for name in survey.copied), folder)
        write_text(folder / "README.md", card)
        config = converted_config(
            survey.config, self.outputs, quantization, written.companion, has_vision=plan.has_vision
        )
        # Last, as no reader takes a folder without it for a model.
        write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
        return written


def survey_source(origin: Origin, settings: Settings) -> Survey:
    """Read headers, and the calibration text that `settings` name.

    Raises ConfigError, CheckpointError and ConversionError as `convert` does.
    """
    config = ModelConfig.from_directory(origin.folder)
    if settings.adapter_path is None:
        warn_of_adapter(origin.folder, origin.names)

    def planned(tensors: dict[str, TensorInfo]) -> Plan:
        return plan_checkpoint(config, decodable(config, tensors, settings.keeps), origin.companion())

    read = read_source(origin.folder, config, origin.tensors(), planned, settings.adapter_path)
    plan, text = read.plan, settings.calibration
    remarks = check_loadable(origin.folder, plan.config)
    windows = None if text is None else calibration_windows(text, origin.folder, config)
    copied = tuple(file.name for file in copied_files(origin.folder))
    return Survey(origin, plan.config, plan, windows, read.remarks + remarks, copied, read.adapter)


def plan_job(
    survey: Survey, settings: Settings, progress: bool | None, *, verify: bool = False, download: int = 0
) -> Job:
    """Decide what is written of every tensor. Reads small tensors, and the weights that `settings` leave choices to.

    `verify` says that the output will be compared with the source, which takes memory; `download` is how many bytes of
    the source are not on the disk yet. Both are for the description.

    Raises ConversionError as `convert` does.
    """
    config, plan, windows = survey.config, survey.plan, survey.windows
    try:
        chosen = choose(settings, config, plan, windows, progress, headers_only=survey.origin.remote is not None)
    except DamagedPieceError as error:
        raise damaged_source(plan, error.piece, survey.origin) from error
    outputs = plan_outputs(plan, chosen.settings)
    if not any(output.quantization for output in outputs.all):
        chosen = replace(chosen, settings=replace(chosen.settings, recipe=None))
    _warn_of_packing_again(outputs)
    description = described(
        survey.source,
        outputs,
        recipe=None if chosen.settings.recipe is None else chosen.settings.recipe.name,
        memory=memory_needed(config.text, outputs, 0 if windows is None else windows.size, verify=verify),
        extra_files=survey.copied_bytes,
        remarks=chosen.remarks + survey.remarks,
        download=download,
    )
    return Job(survey, outputs, chosen.settings, description)


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

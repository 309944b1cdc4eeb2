"""One conversion: a source that was read as far as its headers, and what is to be made of it."""

import hashlib
import json
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mlx_qwen.checkpoint.layout import Plan, plan_checkpoint
from mlx_qwen.config import ModelConfig

from .choices.choose import choose
from .description import Description, described
from .formats import decodable, is_encoded
from .model_folder.config_json import converted_config
from .model_folder.fingerprint import fingerprint
from .model_folder.travel import copy_files, write_model_card
from .needs import memory_needed
from .outputs import Output, Outputs, plan_outputs
from .quantize.texts import calibration_windows
from .settings import Settings
from .source.folder import copied_files
from .source.origin import Origin
from .work.calibration import Calibration
from .work.damage import damaged_source
from .work.pieces import DamagedPieceError
from .work.supply import files_of
from .work.write import Written, write_weights
from .writing.staging import Workspace, write_text


@dataclass(frozen=True, slots=True)
class Job:
    """What a conversion works from. `windows` are the token ids [n, T] of the calibration text, None without one."""

    origin: Origin
    config: ModelConfig
    plan: Plan
    outputs: Outputs
    settings: Settings
    description: Description
    windows: npt.NDArray[np.int64] | None

    @property
    def source(self) -> Path:
        """The folder of everything but, perhaps, the weights."""
        return self.origin.folder

    @property
    def fingerprint(self) -> str:
        """Equal for jobs that write the same bytes."""
        calibration = [] if self.windows is None else [hashlib.sha256(self.windows.tobytes()).hexdigest()]
        return fingerprint([*self.origin.lines(), *calibration], self.outputs)

    @property
    def output_bytes(self) -> int:
        """What the output will take on the disk."""
        return self.description.disk

    def write(self, space: Workspace, progress: bool | None) -> Written:
        """Fill the folder of `space`; returns what the weights showed.

        Raises ConversionError for weights of the source that are NaN or infinite.
        """
        quantization, has_vision, folder = self.settings.quantization, self.plan.has_vision, space.folder
        calibration = None
        if self.windows is not None:
            calibration = Calibration(self.config, self.plan, self.windows, self.outputs.dtype)
        try:
            written = write_weights(space, self.outputs, self.origin.remote, progress, calibration)
        except DamagedPieceError as error:
            advice = damaged_source(self.plan, error.piece, self.origin)
            for file in files_of(error.piece):
                if file.parent == space.downloads:  # the same command then downloads it again
                    file.unlink()
            raise advice from error
        copy_files(self.source, folder)
        write_model_card(
            self.source,
            folder,
            repository=self.origin.repository,
            description=self.description,
            has_vision=has_vision,
        )
        config = converted_config(self.config, self.outputs, quantization, written.companion, has_vision=has_vision)
        # Last, as no reader takes a folder without it for a model.
        write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
        return written


def plan_job(
    origin: Origin, settings: Settings, progress: bool | None, *, verify: bool = False, download: int = 0
) -> Job:
    """Decide what is written of every tensor. Reads headers, and the weights that `settings` leave choices to.

    `verify` says that the output will be compared with the source, which takes memory; `download` is how many bytes of
    the source are not on the disk yet. Both are for the description.

    Raises ConfigError, CheckpointError and ConversionError as `convert` does.
    """
    source = origin.folder
    config = ModelConfig.from_directory(source)
    tensors = decodable(config, origin.tensors(), settings.keeps)
    plan = plan_checkpoint(config, tensors, origin.companion())
    text = settings.calibration
    windows = None if text is None else calibration_windows(text, source, config)
    try:
        chosen = choose(settings, config, plan, windows, progress)
    except DamagedPieceError as error:
        raise damaged_source(plan, error.piece, origin) from error
    outputs = plan_outputs(plan, chosen.settings)
    if not any(output.quantization for output in outputs.all):
        chosen = replace(chosen, settings=replace(chosen.settings, recipe=None))
    _warn_of_packing_again(outputs)
    description = described(
        source,
        outputs,
        recipe=None if chosen.settings.recipe is None else chosen.settings.recipe.name,
        memory=memory_needed(config.text, outputs, 0 if windows is None else windows.size, verify=verify),
        extra_files=sum(file.stat().st_size for file in copied_files(source)),
        remarks=chosen.remarks,
        download=download,
    )
    return Job(origin, config, plan, outputs, chosen.settings, description, windows)


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

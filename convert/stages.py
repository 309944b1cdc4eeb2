"""What pieces may be produced at once: all of them, or behind a calibration one layer after the other."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

from mlx_qwen.tensors import Role, decoder_layer

from .kinds import joined_with
from .outputs import Output
from .pieces import Piece
from .quantize.calibration import Calibration
from .quantize.inputs import Corrections
from .writer import SafetensorsWriter

Job = tuple[Piece, SafetensorsWriter]


@dataclass(frozen=True, slots=True)
class Stage:
    """Jobs that need nothing of each other. `layer` is the one that they write, `head` the name of a head's weights."""

    jobs: list[Job]
    layer: int | None = None
    head: str | None = None

    def corrections(self, calibration: Calibration | None) -> Corrections | None:
        """How the calibration, once all stages before are written, wants this one's tensors rounded."""
        outputs = {piece.output.name: piece.output for piece, _ in self.jobs}
        wanted = {name for name, output in outputs.items() if _is_correctable(output)}
        if calibration is None or not wanted:
            return None
        if self.layer is not None:
            return calibration.observe(self.layer, wanted)
        return None if self.head is None else calibration.observe_head(self.head)


def calibrated_stages(jobs: Iterable[Job]) -> list[Stage]:
    """The jobs, in whose order a layer's stand together, such that each layer is written before the next begins.

    The head comes after all layers, as it is corrected by what they give it; so do embeddings that serve as the head.
    """
    jobs = list(jobs)
    is_tied = not any(_role(job) is Role.HEAD for job in jobs)
    last = Role.EMBEDDING if is_tied else Role.HEAD
    heads, others = ([job for job in jobs if (_role(job) is last) is wanted] for wanted in (True, False))
    found = [_stage(layer, list(group)) for layer, group in groupby(others, key=_layer)]
    return [*found, Stage(heads, head=heads[0][0].output.name)]


def _role(job: Job) -> Role:
    return job[0].output.target.spec.role


def _layer(job: Job) -> int | None:
    return decoder_layer(job[0].output.name)


def _stage(layer: int | None, jobs: list[Job]) -> Stage:
    # Matrices that read the same rows stand together, expert by expert, as they share a correction.
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        groups.setdefault(joined_with(job[0].output.name), []).append(job)
    return Stage([job for group in groups.values() for job in sorted(group, key=_row)], layer=layer)


def _row(job: Job) -> int:
    return job[0].first_row


def _is_correctable(output: Output) -> bool:
    packed = output.quantization
    is_kept = packed == output.target.quantization
    return output.quantizer == "gptq" and packed is not None and packed.mode == "affine" and not is_kept

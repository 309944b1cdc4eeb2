"""What pieces may be produced at once: all of them, or behind a calibration one layer after the other."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

from mlx_qwen.checkpoint.names import Role, decoder_layer

from ..outputs import Output
from ..quantize.inputs import Corrections
from ..recipes.kinds import joined_with
from ..writing.writer import SafetensorsWriter
from .calibration import Calibration
from .pieces import Piece

# A piece to produce, and where it goes.
Task = tuple[Piece, SafetensorsWriter]


@dataclass(frozen=True, slots=True)
class Stage:
    """Tasks that need nothing of each other. `layer` is the one that they write, `head` a head's name."""

    tasks: list[Task]
    layer: int | None = None
    head: str | None = None

    def corrections(self, calibration: Calibration | None) -> Corrections | None:
        """How the calibration, once all stages before are written, wants this one's tensors rounded."""
        outputs = {piece.output.name: piece.output for piece, _ in self.tasks}
        wanted = {name for name, output in outputs.items() if _is_correctable(output)}
        if calibration is None or not wanted:
            return None
        if self.layer is not None:
            return calibration.observe(self.layer, wanted)
        return None if self.head is None else calibration.observe_head(self.head)


def calibrated_stages(tasks: Iterable[Task]) -> list[Stage]:
    """The tasks, in whose order a layer's stand together, such that each layer is written before the next begins.

    The head comes after all layers, as it is corrected by what they give it; so do embeddings that serve as the head.
    """
    tasks = list(tasks)
    is_tied = not any(_role(task) is Role.HEAD for task in tasks)
    last = Role.EMBEDDING if is_tied else Role.HEAD
    heads, others = ([task for task in tasks if (_role(task) is last) is wanted] for wanted in (True, False))
    found = [_stage(layer, list(group)) for layer, group in groupby(others, key=_layer)]
    return [*found, Stage(heads, head=heads[0][0].output.name)]


def _role(task: Task) -> Role:
    return task[0].output.target.spec.role


def _layer(task: Task) -> int | None:
    return decoder_layer(task[0].output.name)


def _stage(layer: int | None, tasks: list[Task]) -> Stage:
    # Matrices that read the same rows stand together, expert by expert, as they share a correction.
    groups: dict[str, list[Task]] = {}
    for task in tasks:
        groups.setdefault(joined_with(task[0].output.name), []).append(task)
    return Stage([task for group in groups.values() for task in sorted(group, key=_row)], layer=layer)


def _row(task: Task) -> int:
    return task[0].first_row


def _is_correctable(output: Output) -> bool:
    packed = output.quantization
    is_kept = packed == output.target.quantization
    return output.quantizer == "gptq" and packed is not None and packed.mode == "affine" and not is_kept

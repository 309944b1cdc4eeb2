"""Writes the weights of a conversion: pieces in a thread a core, each at its place in the output files."""

import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path

from mlx_qwen.checkpoint.layout import Plan
from mlx_qwen.checkpoint.names import parameter_count
from mlx_qwen.checkpoint.remote import Repository
from mlx_qwen.checkpoint.shards import INDEX_NAME

from ..layerwise import little_cache
from ..outputs import Output, Outputs
from ..progress import Progress
from ..quantize.inputs import Corrections
from ..quantize.rows import Run
from ..workers import core_count, piece_count
from ..writing.journal import Journal, Record
from ..writing.staging import Workspace, write_text
from ..writing.writer import SafetensorsWriter
from .calibration import Calibration
from .pieces import Piece, cut, produce
from .stages import Stage, Task, calibrated_stages
from .supply import Supply, in_order_of_files

COMPANION_STEM = "mlx-qwen"
# How much of the source an interrupted conversion may have to read again.
RECORD_BYTES = 64 << 20

_Outcome = tuple[bool, bool]
_Map = Callable[[Callable[[Task], _Outcome], list[Task]], Iterator[_Outcome]]


@dataclass(frozen=True, slots=True)
class Written:
    """What writing showed: the companion files, and tensors by name.

    `non_finite` hold NaN or infinite values; of `rounded` ones, scales or biases do not fit the dtype exactly.
    """

    companion: list[str] = field(default_factory=list)
    non_finite: tuple[str, ...] = ()
    rounded: tuple[str, ...] = ()


def write_weights(
    space: Workspace,
    outputs: Outputs,
    remote: Repository | None,
    progress: bool | None,
    calibration: Calibration | None = None,
) -> Written:
    """Write `model*.safetensors`, their index and `mlx-qwen*.safetensors` into the folder of `space`.

    Goes on after the pieces that its journal knows, and keeps it up to date. With `remote`, downloads the source's
    files as they are needed. Warns of tensors with values that the dtype cannot hold, and raises
    DamagedPieceError where the source itself holds NaN or infinite ones.
    """
    main = _writer(space.folder, "model", outputs.main)
    companion = _writer(space.folder, COMPANION_STEM, outputs.companion) if outputs.companion else None
    writers = [main] if companion is None else [main, companion]
    if space.journal.last.pieces and not all(writer.is_begun for writer in writers):
        space.start_afresh("weight files that it began are gone, or are not as they were left.")
    with ExitStack() as stack:
        for writer in writers:
            stack.enter_context(writer)
        tasks = [(piece, main) for output in outputs.main for piece in cut(output)]
        if companion is not None:
            tasks += [(piece, companion) for output in outputs.companion for piece in cut(output)]
        supply = None
        if remote is not None:
            pieces = [piece for piece, _ in tasks]
            tasks = [tasks[i] for i in in_order_of_files(pieces)]
            left = [piece for piece, _ in tasks[space.journal.last.pieces :]]
            supply = Supply(remote, space.downloads, left)
        in_order = [Stage(tasks)]
        if calibration is not None:
            calibration.follow(main.tensors())
            in_order = calibrated_stages(tasks)
        done = _run(in_order, space.journal, supply, progress, calibration)
        for writer in writers:
            writer.finish()
    write_text(space.folder / INDEX_NAME, json.dumps(_index(outputs, main.weight_map), indent=4) + "\n")
    _warn(done.non_finite)
    return Written([] if companion is None else companion.names, done.non_finite, done.rounded)


def source_bytes(plan: Plan) -> int:
    """Bytes of the tensors that `plan` reads."""
    infos = {info for target in plan.targets for info in (target.scales, target.biases) if info is not None}
    infos |= {source.tensor for target in plan.targets for source in target.sources}
    return sum(info.nbytes for info in infos)


def _writer(folder: Path, stem: str, outputs: Iterable[Output]) -> SafetensorsWriter:
    return SafetensorsWriter(folder, stem, [entry for output in outputs for entry in output.entries])


def _run(
    in_order: list[Stage],
    journal: Journal,
    supply: Supply | None,
    progress: bool | None,
    calibration: Calibration | None,
) -> Record:
    """Produce and write every piece that `journal` does not know yet; returns its last record, tensors in order."""
    begun, tasks = journal.last, [task for stage in in_order for task in stage.tasks]
    writers = list(dict.fromkeys(writer for _, writer in tasks))
    non_finite, rounded = dict.fromkeys(begun.non_finite), dict.fromkeys(begun.rounded)
    for task in tasks[: begun.pieces]:
        _skip_piece(task)
    total, done = (sum(piece.nbytes for piece, _ in some) for some in (tasks, tasks[: begun.pieces]))
    count, unrecorded = begun.pieces, 0
    # Pieces differ in size, so that freed buffers would collect.
    with little_cache(), Progress(total, progress, done=done) as line, _workers() as workers, supply or nullcontext():
        for piece, (finite, exact) in _outcomes(in_order, begun.pieces, supply, calibration, workers):
            if not finite:
                non_finite[piece.output.name] = None
            if not exact:
                rounded[piece.output.name] = None
            line.advance(piece.nbytes)
            count += 1
            unrecorded += piece.nbytes
            frees_disk = supply is not None and supply.done(piece)
            if unrecorded >= RECORD_BYTES or frees_disk or count == len(tasks):
                for writer in writers:
                    writer.sync()
                journal.commit(Record(count, tuple(non_finite), tuple(rounded)))
                unrecorded = 0
            if supply is not None:
                supply.remove_finished()
    return journal.last


def _outcomes(
    in_order: list[Stage], done: int, supply: Supply | None, calibration: Calibration | None, workers: "_Workers"
) -> Iterator[tuple[Piece, _Outcome]]:
    """Produce and write all but the first `done` pieces, each stage once those before it are written."""
    for stage in in_order:
        left = stage.tasks[done:]
        done = max(0, done - len(stage.tasks))
        if left:
            write = partial(_write_piece, supply, stage.corrections(calibration), workers.blocks)
            yield from zip((piece for piece, _ in left), workers.pieces(write, left), strict=True)


def _skip_piece(task: Task) -> None:
    """Count a piece as written."""
    piece, writer = task
    rows = prod(piece.output.target.spec.shape[:-1])
    for entry in piece.output.entries:
        share = rows if piece.rows is None else piece.rows[1] - piece.rows[0]
        writer.skip(entry.name, share * (entry.nbytes // rows))


def _write_piece(supply: Supply | None, corrections: Corrections | None, run: Run, task: Task) -> _Outcome:
    """Produce one piece and write it to its place; returns whether its values are finite, and its scales exact."""
    piece, writer = task
    if supply is not None:
        supply.wait(piece)
    result = produce(piece, corrections, run)
    rows = prod(piece.output.target.spec.shape[:-1])
    for entry, data in zip(piece.output.entries, result.data, strict=True):
        writer.write(entry.name, data, piece.first_row * (entry.nbytes // rows))
    return result.finite, result.exact


@dataclass(frozen=True, slots=True)
class _Workers:
    """Two `map`s, of which one runs in several threads: over pieces, and over blocks of rows within a piece."""

    pieces: _Map
    blocks: Run


@contextmanager
def _workers() -> Iterator[_Workers]:
    """Threads for pieces on a CPU, and for blocks on a GPU, which one thread feeds.

    At an error, tasks not yet begun are dropped and the rest awaited.
    """
    pool = ThreadPoolExecutor(core_count())
    try:
        yield _Workers(pool.map, map) if piece_count() > 1 else _Workers(map, pool.map)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _index(outputs: Outputs, weight_map: dict[str, str]) -> dict[str, object]:
    metadata = {
        "total_size": sum(output.nbytes for output in outputs.main),
        "total_parameters": parameter_count(output.target.spec for output in outputs.main),
    }
    return {"metadata": metadata, "weight_map": weight_map}


def _warn(non_finite: tuple[str, ...]) -> None:
    if non_finite:
        shown = ", ".join(non_finite[:5]) + (" …" if len(non_finite) > 5 else "")
        warnings.warn(
            f"{len(non_finite)} tensors hold NaN or infinite values: {shown}. The dtype is too narrow for what "
            "the source holds there, and the output will misbehave: choose bfloat16 or float32.",
            stacklevel=5,
        )

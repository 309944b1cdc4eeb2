"""Writes the weights of a conversion: pieces in a few threads, each at its place in the output files."""

import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path

import mlx.core as mx

from mlx_qwen.checkpoint import Plan, parameter_count
from mlx_qwen.files import INDEX_NAME
from mlx_qwen.repository import Repository

from .journal import Journal, Record
from .outputs import Output, Outputs
from .pieces import Piece, cut, produce
from .progress import Progress
from .quantize.calibration import Calibration
from .quantize.inputs import Corrections
from .quantize.rows import Run
from .stages import Job, Stage, calibrated_stages
from .staging import Workspace, write_text
from .supply import Supply, in_order_of_files
from .writer import SafetensorsWriter

COMPANION_STEM = "mlx-qwen"
_MOST_WORKERS = 4
_CACHE_BYTES = 32 << 20
# How much of the source an interrupted conversion may have to read again.
RECORD_BYTES = 64 << 20

_Outcome = tuple[bool, bool]
_Map = Callable[[Callable[[Job], _Outcome], list[Job]], Iterator[_Outcome]]


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
    files as they are needed. Warns of tensors that hold NaN or infinite values.
    """
    with ExitStack() as stack:
        main = stack.enter_context(_writer(space.folder, "model", outputs.main))
        jobs = [(piece, main) for output in outputs.main for piece in cut(output)]
        writers, companion = [main], None
        if outputs.companion:
            companion = stack.enter_context(_writer(space.folder, COMPANION_STEM, outputs.companion))
            writers.append(companion)
            jobs += [(piece, companion) for output in outputs.companion for piece in cut(output)]
        supply = None
        if remote is not None:
            pieces = [piece for piece, _ in jobs]
            jobs = [jobs[i] for i in in_order_of_files(pieces)]
            left = [piece for piece, _ in jobs[space.journal.last.pieces :]]
            supply = Supply(remote, space.downloads, left)
        in_order = [Stage(jobs)]
        if calibration is not None:
            calibration.follow(main.tensors())
            in_order = calibrated_stages(jobs)
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
    begun, jobs = journal.last, [job for stage in in_order for job in stage.jobs]
    writers = list(dict.fromkeys(writer for _, writer in jobs))
    non_finite, rounded = dict.fromkeys(begun.non_finite), dict.fromkeys(begun.rounded)
    for job in jobs[: begun.pieces]:
        _skip_piece(job)
    total, done = (sum(piece.nbytes for piece, _ in some) for some in (jobs, jobs[: begun.pieces]))
    count, unrecorded = begun.pieces, 0
    with _little_cache(), Progress(total, progress, done=done) as line, _workers() as workers, supply or nullcontext():
        for piece, (finite, exact) in _outcomes(in_order, begun.pieces, supply, calibration, workers):
            if not finite:
                non_finite[piece.output.name] = None
            if not exact:
                rounded[piece.output.name] = None
            line.advance(piece.nbytes)
            count += 1
            unrecorded += piece.nbytes
            frees_disk = supply is not None and supply.done(piece)
            if unrecorded >= RECORD_BYTES or frees_disk or count == len(jobs):
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
        left = stage.jobs[done:]
        done = max(0, done - len(stage.jobs))
        if left:
            write = partial(_write_piece, supply, stage.corrections(calibration), workers.blocks)
            yield from zip((piece for piece, _ in left), workers.pieces(write, left), strict=True)


def _skip_piece(job: Job) -> None:
    """Count a piece as written."""
    piece, writer = job
    rows = prod(piece.output.target.spec.shape[:-1])
    for entry in piece.output.entries:
        share = rows if piece.rows is None else piece.rows[1] - piece.rows[0]
        writer.skip(entry.name, share * (entry.nbytes // rows))


def _write_piece(supply: Supply | None, corrections: Corrections | None, run: Run, job: Job) -> _Outcome:
    """Produce one piece and write it to its place; returns whether its values are finite, and its scales exact."""
    piece, writer = job
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

    At an error, jobs not yet begun are dropped and the rest awaited.
    """
    pool = ThreadPoolExecutor(min(_MOST_WORKERS, os.cpu_count() or 1))
    try:
        yield _Workers(map, pool.map) if mx.default_device() == mx.gpu else _Workers(pool.map, map)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _little_cache() -> Iterator[None]:
    """Let MLX keep few freed buffers, as pieces differ in size and would collect."""
    before = mx.set_cache_limit(_CACHE_BYTES)
    try:
        yield
    finally:
        mx.set_cache_limit(before)
        mx.clear_cache()


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
            f"{len(non_finite)} tensors hold NaN or infinite values: {shown}. The source is damaged, or the dtype is "
            "too narrow for it; the output will misbehave.",
            stacklevel=5,
        )

"""Writes the weights of a conversion: pieces in a few threads, each at its place in the output files."""

import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import mlx.core as mx

from mlx_qwen.checkpoint import Plan, parameter_count
from mlx_qwen.files import INDEX_NAME

from .outputs import Output, Outputs
from .pieces import Piece, cut, produce
from .progress import Progress
from .staging import write_text
from .writer import SafetensorsWriter

COMPANION_STEM = "mlx-qwen"
_MOST_WORKERS = 4
_CACHE_BYTES = 32 << 20

_Job = tuple[Piece, SafetensorsWriter]
_Outcome = tuple[bool, bool]


@dataclass(frozen=True, slots=True)
class Written:
    """What writing showed: the companion files, and tensors by name.

    `non_finite` hold NaN or infinite values; of `rounded` ones, scales or biases do not fit the dtype exactly.
    """

    companion: list[str] = field(default_factory=list)
    non_finite: tuple[str, ...] = ()
    rounded: tuple[str, ...] = ()


def write_weights(folder: Path, outputs: Outputs, progress: bool | None) -> Written:
    """Write `model*.safetensors`, their index and `mlx-qwen*.safetensors` into `folder`.

    Warns of tensors that hold NaN or infinite values.
    """
    with ExitStack() as stack:
        main = stack.enter_context(_writer(folder, "model", outputs.main))
        jobs = [(piece, main) for output in outputs.main for piece in cut(output)]
        companion = None
        if outputs.companion:
            companion = stack.enter_context(_writer(folder, COMPANION_STEM, outputs.companion))
            jobs += [(piece, companion) for output in outputs.companion for piece in cut(output)]
        non_finite, rounded = _run(jobs, progress)
        main.finish()
        if companion is not None:
            companion.finish()
    write_text(folder / INDEX_NAME, json.dumps(_index(outputs, main.weight_map), indent=4) + "\n")
    _warn(non_finite)
    return Written([] if companion is None else companion.names, tuple(non_finite), tuple(rounded))


def source_bytes(plan: Plan) -> int:
    """Bytes of the tensors that `plan` reads."""
    infos = {info for target in plan.targets for info in (target.scales, target.biases) if info is not None}
    infos |= {source.tensor for target in plan.targets for source in target.sources}
    return sum(info.nbytes for info in infos)


def _writer(folder: Path, stem: str, outputs: Iterable[Output]) -> SafetensorsWriter:
    return SafetensorsWriter(folder, stem, [entry for output in outputs for entry in output.entries])


def _run(jobs: list[_Job], progress: bool | None) -> tuple[list[str], list[str]]:
    """Produce and write every piece; returns the tensors that are not finite and those that were rounded, in order."""
    non_finite: dict[str, None] = {}
    rounded: dict[str, None] = {}
    total = sum(piece.nbytes for piece, _ in jobs)
    with _little_cache(), Progress(total, progress) as line, _workers() as run:
        for (piece, _), (finite, exact) in zip(jobs, run(_write_piece, jobs), strict=True):
            if not finite:
                non_finite[piece.output.name] = None
            if not exact:
                rounded[piece.output.name] = None
            line.advance(piece.nbytes)
    return list(non_finite), list(rounded)


def _write_piece(job: _Job) -> _Outcome:
    """Produce one piece and write it to its place; returns whether its values are finite, and its scales exact."""
    piece, writer = job
    result = produce(piece)
    rows = prod(piece.output.target.spec.shape[:-1])
    for entry, data in zip(piece.output.entries, result.data, strict=True):
        writer.write(entry.name, data, piece.first_row * (entry.nbytes // rows))
    return result.finite, result.exact


@contextmanager
def _workers() -> Iterator[Callable[[Callable[[_Job], _Outcome], list[_Job]], Iterator[_Outcome]]]:
    """`map`, over several threads on a CPU. At an error, jobs not yet begun are dropped and the rest awaited."""
    if mx.default_device() == mx.gpu:  # packing is quick there, and one thread feeds it
        yield map
        return
    pool = ThreadPoolExecutor(min(_MOST_WORKERS, os.cpu_count() or 1))
    try:
        yield pool.map
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


def _warn(non_finite: list[str]) -> None:
    if non_finite:
        shown = ", ".join(non_finite[:5]) + (" …" if len(non_finite) > 5 else "")
        warnings.warn(
            f"{len(non_finite)} tensors hold NaN or infinite values: {shown}. The source is damaged, or the dtype is "
            "too narrow for it; the output will misbehave.",
            stacklevel=5,
        )

"""Finds weights of the source that are NaN or infinite, which shows that its files are damaged."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import dropwhile
from pathlib import Path

from mlx_qwen.checkpoint.layout import Plan, Target
from mlx_qwen.errors import ConversionError

from ..outputs import Output
from ..source.origin import Origin
from ..workers import piece_count
from .pieces import Piece, cut, dense_values, is_finite, sound_values
from .supply import files_of

_MOST_NAMES = 5


def check_sound(targets: Iterable[Target]) -> None:
    """Read tensors as they are stored; raises DamagedPieceError for the first value that is NaN or infinite."""
    with ThreadPoolExecutor(piece_count()) as pool:
        for _ in pool.map(_check_piece, _pieces(targets)):  # the first that is not ends it, and what has not begun
            pass


def damaged_source(plan: Plan, found: Piece, origin: Origin) -> ConversionError:
    """What to say of `origin`, which `plan` reads, and of whose damaged tensors `found` is a part of the first.

    Tensors behind it are looked through until five are known, in the files that hold `found`.
    """
    files, first = files_of(found), found.output.target.spec.name
    names: list[str] = []
    for target in dropwhile(lambda target: target.spec.name != first, plan.targets):
        pieces = (piece for piece in _pieces([target]) if files_of(piece) <= files)
        if not all(is_finite(dense_values(piece)) for piece in pieces):
            names.append(target.spec.name)
        if len(names) > _MOST_NAMES:
            break
    shown = ", ".join(names[:_MOST_NAMES]) + (" and more" if len(names) > _MOST_NAMES else "")
    held = ", ".join(sorted(file.name for file in files))
    return ConversionError(
        f"{held} is damaged: NaN or infinite values are stored in {shown}. No option converts such weights, as nothing "
        f"that they enter could be computed. {_next_step(origin, files)}"
    )


def _next_step(origin: Origin, files: Iterable[Path]) -> str:
    if origin.remote is not None:
        return "Give the same command again, which downloads the file anew."
    if origin.repository is None:
        return "Download the file again, and then give the same command."
    # Of the Hub's cache, which does not ask for a file twice: what the links in it lead to.
    stored = " and ".join(str(file.resolve()) for file in sorted(files))
    return f"Remove {stored}, and then give the same command, which downloads the file again."


def _check_piece(piece: Piece) -> None:
    sound_values(piece)


def _pieces(targets: Iterable[Target]) -> Iterator[Piece]:
    return (piece for target in targets for piece in cut(Output(target, None, "float32")))

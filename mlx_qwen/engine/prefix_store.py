"""What was read before, in memory and in folders: where sequences find the states they go on from, and leave theirs."""

import shutil
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_qwen.engine.prefix import Counted, Found, Kind, PrefixIndex
from mlx_qwen.engine.prefix_files import PrefixFiles
from mlx_qwen.engine.radix import Key
from mlx_qwen.engine.sequence import Sequence
from mlx_qwen.errors import PromptError
from mlx_qwen.model import Model
from mlx_qwen.model.chain import Chain
from mlx_qwen.model.collectives import gathered_numbers
from mlx_qwen.model.state import State, StateKind

_MOST_FOLDER_BYTES = 16 << 30


class PrefixStore:
    """An index in memory, which comes first, and folders, each opened once; without an index nothing is kept.

    `on_written` is called from another thread when a folder has taken a piece. All but `folder` is called from the
    thread that owns the model.
    """

    def __init__(self, model: Model, index: PrefixIndex | None, on_written: Callable[[], None]) -> None:
        self.index = index
        self._model = model
        self._on_written = on_written
        self._folders: dict[Path, PrefixFiles] = {}
        self._mark = model.mark

    def folder(self, path: Path, most_bytes: int | None = None) -> PrefixFiles:
        """The checkpoints of a folder, which is made if need be.

        Raises PromptError where it cannot be, or where nothing tells the model from others.
        """
        if not self._model.identity:
            raise PromptError(
                "prefix_cache_dir needs a model whose weights are those of a folder: this one was not loaded from one, "
                "or changed since. Leave it out, or save the model and load it from there."
            )
        try:
            path = path.expanduser().resolve()
            files = self._folders.get(path)
            if files is None:
                identity = f"{self._model.identity} {self._model.mtp_reads}"
                limit = most_bytes or _default_bytes(path)
                files = PrefixFiles(path, identity, most_bytes=limit, on_written=self._on_written)
                self._folders[path] = files
        except (OSError, RuntimeError) as error:
            raise PromptError(
                f"prefix_cache_dir {path} cannot be used ({error}). Choose a folder that can be written."
            ) from error
        if most_bytes is not None:
            files.most_bytes = most_bytes
        return files

    def find(self, sequence: Sequence, kind: StateKind) -> Found | None:
        """The longest checkpoint that begins a sequence's prompt and serves for `kind`."""
        key, index, files = sequence.key, self.index, sequence.folder
        if self._mark is not self._model.mark:
            # What other weights left is nothing to go on from.
            self.clear()
        self._mark = sequence.mark = self._model.mark
        if index is None or key is None:
            return None
        found = index.take(key, kind)
        if files is None or (found is not None and found.length == len(key)):
            return found
        more_than, of_all = found.length if found else 0, partial(gathered_numbers, group=self._model.group)
        longer = files.take(key, packing=kind.packing, mtp=kind.mtp, longer_than=more_than, of_all=of_all)
        if longer is None:
            return found
        index.insert(key[: longer.length], longer.state, _kind(sequence, longer.length))
        return longer

    def keep_prompt(self, sequence: Sequence, length: int) -> None:
        """Keep the state that has read the prompt up to `length` for whoever goes on from it."""
        if sequence.key is not None and sequence.state is not None:
            self._keep(sequence, sequence.key[:length], sequence.state, _kind(sequence, length))

    def keep_answer(self, row: Sequence) -> None:
        """Keep the state behind an answer for whoever goes on from it."""
        if self.index is None or row.key is None or row.state is None:
            return
        mx.eval(row.state.arrays())
        written = np.array(row.written[: row.state.offset - len(row.ids)], np.int64)
        self._keep(row, np.concatenate([row.key, written]), row.state, "answer")

    def limit(self, nbytes: int | None) -> None:
        """Hold no more than `nbytes` in memory from now on; None changes nothing."""
        if self.index is not None and nbytes is not None:
            self.index.budget_bytes = nbytes

    def count(self, counted: Counted) -> None:
        """Count what is in memory as that of another model: as all ranks count it."""
        if self.index is not None:
            self.index.counted = counted

    def clear(self) -> None:
        """Forget what is in memory, also what was still to be written."""
        if self.index is not None:
            self.index.clear()
        for files in self._folders.values():
            files.drop()

    def close(self) -> None:
        """Write what is left to the folders, and let go of them; only when no sequence is there any more."""
        for files in self._folders.values():
            files.close()
        self._folders.clear()

    def shed(self, nbytes: int, used: Iterable[Chain]) -> None:
        """Hold no more than `nbytes` in memory for now, beside the chains in use: answers need the rest."""
        if self.index is not None:
            self.index.shed(max(0, nbytes), used)

    def advance(self) -> bool:
        """Hand on a piece of what is to be written to each folder; whether there is more that a folder would take."""
        folders = list(self._folders.values())
        more = [files.advance() for files in folders]
        return any(there_is and not files.is_full for there_is, files in zip(more, folders, strict=True))

    def _keep(self, sequence: Sequence, key: Key, state: State, kind: Kind) -> None:
        if self.index is not None and sequence.mark is self._model.mark:
            self.index.insert(key, state, kind)
            if sequence.folder is not None:
                sequence.folder.put(key, state, kind)


def _kind(sequence: Sequence, length: int) -> Kind:
    return "prompt" if length <= sequence.answer_from else "answer"


def _default_bytes(path: Path) -> int:
    """16 GiB, or half of what is free on the disk if that is less."""
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    return min(_MOST_FOLDER_BYTES, shutil.disk_usage(there).free // 2)

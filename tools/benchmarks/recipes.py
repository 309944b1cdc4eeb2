"""What each recipe costs a model: divergence from the unquantized one by size, beside mlx-lm's conversions."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_qwen.bench.table import Table
from mlx_qwen.bench.timing import OURS, PEER
from mlx_qwen.checkpoint.names import VISION_PREFIX
from mlx_qwen.checkpoint.shards import checkpoint_tensors
from mlx_qwen.config import ModelConfig
from mlx_qwen.convert import convert
from mlx_qwen.convert.settings import Quantizer
from mlx_qwen.errors import MLXQwenError
from mlx_qwen.loading import load_model
from mlx_qwen.prompt import Processor
from tools.benchmarks.quality import perplexity, readable_by_mlx_lm

WINDOW = 256
RECIPES = ("balanced", "4bit", "mixed-4-6", "mixed-4-8", "mixed-3-6")
MLX_LM_BITS = (4, 5, 6)
MLX_LM_MIXED = ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6")
# Conversions of mlx-lm whose size others are made to meet, as its recipes and ours differ in size.
FITTED = ("4 bits", "5 bits", "6 bits", "mixed_4_6", "mixed_3_6")
_QUANTIZERS: tuple[Quantizer, ...] = ("rtn", "search")

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A converted checkpoint: who made it, how, and where it lies."""

    name: str
    folder: Path

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that every converter writes: without vision, and what only mlx-qwen reads."""
        tensors = checkpoint_tensors(self.folder).values()
        return sum(tensor.nbytes for tensor in tensors if not tensor.name.startswith(VISION_PREFIX))


@dataclass(frozen=True, slots=True)
class Judge:
    """Tokens [n, 256] that conversions are judged on, and the fp32 model's logits for them [n, 256, V]."""

    batch: npt.NDArray[np.int64]
    truth: Logits

    @classmethod
    def of(cls, folder: Path, text: str, *, windows: int = 16) -> "Judge":
        """Of the model at `folder`, on `windows` windows from all over `text`. Raises MLXQwenError for a short text."""
        ids = Processor.from_directory(folder, ModelConfig.from_directory(folder)).encode(text)
        count = len(ids) // WINDOW
        if not count:
            raise MLXQwenError(f"The text to judge on has {len(ids)} tokens, expected at least {WINDOW}.")
        chosen = np.linspace(0, count - 1, min(windows, count)).astype(int)
        batch = np.array(ids[: count * WINDOW], dtype=np.int64).reshape(-1, WINDOW)[chosen]
        return cls(batch, _logits(folder, batch))

    def divergence(self, folder: Path) -> float:
        """The mean divergence of a conversion in nats."""
        return float(divergences(_logits(folder, self.batch), self.truth).mean())

    def cells(self, folder: Path) -> list[str]:
        """Divergence, mean and 99th percentile, agreement and perplexity of a conversion."""
        logits = _logits(folder, self.batch)
        lost = divergences(logits, self.truth)
        agreement = (logits.argmax(axis=-1) == self.truth.argmax(axis=-1)).mean()
        spread = (f"{lost.mean():.4f}", f"{np.percentile(lost, 99):.3f}")
        return [*spread, f"{agreement:.2%}", f"{perplexity(logits, self.batch):.3f}"]


def bench_recipes(folder: Path, text: Path, workdir: Path, *, windows: int = 16) -> Table:
    """Convert `folder` by every recipe and quantizer, and with mlx-lm, and compare all with the fp32 model on a text.

    The first half of `text` calibrates one row a recipe, the default calibration text another; all are judged on the
    second half, `windows` windows of 256 tokens from all over it, by one runtime in fp32. Rows are in order of size.
    Raises MLXQwenError when the text is too short.
    """
    halves = halved(text)
    (workdir / "calibration.txt").write_text(halves[0], encoding="utf-8")
    judge = Judge.of(folder, halves[1], windows=windows)
    rows = []
    for candidate in _candidates(folder, workdir):
        rows.append((candidate.nbytes, [candidate.name, *judge.cells(candidate.folder)]))
        shutil.rmtree(candidate.folder)
    note = (
        f"{judge.batch.size:,} tokens in windows of {WINDOW}; perplexity {perplexity(judge.truth, judge.batch):.3f} in "
        "fp32. KL divergence from it in nats. Sizes without vision and what only mlx-qwen reads."
    )
    header = ("conversion", "size", "KL mean", "KL p99", "top-1", "perplexity")
    in_order = sorted(rows, key=lambda row: row[0])
    return Table(
        "Recipes", note, header, [(name, f"{nbytes / 1e6:.2f} MB", *rest) for nbytes, (name, *rest) in in_order]
    )


def halved(text: Path) -> tuple[str, str]:
    """A text file in two halves, cut at the end of a line."""
    whole = text.read_text(encoding="utf-8")
    middle = whole.find("\n", len(whole) // 2) + 1 or len(whole) // 2
    return whole[:middle], whole[middle:]


def divergences(logits: Logits, truth: Logits) -> npt.NDArray[np.float64]:
    """KL(truth ‖ logits) in nats of each token, [n, T] of [n, T, V]."""
    p, q = (_log_probabilities(x) for x in (truth, logits))
    found: npt.NDArray[np.float64] = (np.exp(p) * (p - q)).sum(axis=-1)
    return np.maximum(found, 0)


def _log_probabilities(logits: Logits) -> npt.NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    normed: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return normed


def _logits(folder: Path, batch: npt.NDArray[np.int64]) -> Logits:
    model = load_model(folder, ModelConfig.from_directory(folder), dtype=mx.float32)
    return np.concatenate([np.array(model(mx.array(row[None]))) for row in batch])


def _candidates(folder: Path, workdir: Path) -> Iterator[Candidate]:
    """Every conversion, made when its turn comes; those that are fitted to a peer's size after the peer."""
    target, own = workdir / "converted", workdir / "calibration.txt"
    readable = readable_by_mlx_lm(folder, workdir)
    sizes = {}
    for name, options in _peers().items():
        _convert_with_mlx_lm(readable, target, options)
        theirs = Candidate(f"{PEER} {name}", target)
        sizes[name] = theirs.nbytes
        yield theirs
    for recipe in RECIPES:
        for quantizer in _QUANTIZERS:
            convert(folder, target, recipe=recipe, quantizer=quantizer, progress=False)
            yield Candidate(f"{OURS} {recipe}, {quantizer}", target)
        for name, calibration in (("own text", own), ("default text", "default")):
            convert(folder, target, recipe=recipe, calibration=calibration, progress=False)
            yield Candidate(f"{OURS} {recipe}, gptq, {name}", target)
    for name in FITTED:
        for how, seen in (("search", None), ("gptq, own text", own)):
            fitted = Candidate(f"{OURS} of that size ({name}), {how}", target)
            _fit(folder, fitted, sizes[name], seen)
            yield fitted


def _fit(folder: Path, made: Candidate, most: int, calibration: Path | None) -> None:
    """Convert to at most `most` bytes of what counts as size; vision, and what only mlx-qwen reads, come on top."""
    convert(folder, made.folder, recipe="4bit", quantizer="rtn", progress=False)
    allowed = most + sum(file.stat().st_size for file in made.folder.glob("*.safetensors")) - made.nbytes
    while True:
        convert(folder, made.folder, target_size=allowed, calibration=calibration, progress=False, overwrite=True)
        if made.nbytes <= most:
            return
        allowed -= max(made.nbytes - most, most // 100)


def _peers() -> dict[str, dict[str, Any]]:
    """mlx-lm's conversions by name, with its options for each."""
    uniform = {f"{bits} bits": {"q_bits": bits} for bits in MLX_LM_BITS}
    return uniform | {mixed: {"quant_predicate": mixed} for mixed in MLX_LM_MIXED}


def _convert_with_mlx_lm(source: Path, target: Path, options: dict[str, Any]) -> None:
    from mlx_lm.convert import convert as mlx_lm_convert

    mlx_lm_convert(str(source), str(target), quantize=True, q_group_size=64, dtype="bfloat16", **options)
